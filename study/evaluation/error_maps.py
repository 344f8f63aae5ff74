"""The error map of a method beside the known error, on validation and test pairs: the numbers of its table.

The map learns from training scans alone. The validation pairs give its one factor. The test pairs are measured with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from gridreg import calibration
from gridreg.devices import to_tensor
from gridreg.error_map import ErrorMap, Register, coverage_factor, train_error_map
from gridreg.refinement import refine
from gridreg.spatial import Shape, warp
from study.cohorts.dataset import Preprocessed

LEVEL = 0.9  # of the central interval that the factor is fitted for
FEWEST = 20  # voxels of a pair within which a rank correlation says anything


def registering(network: nn.Module, refinement: dict[str, Any] | None = None) -> Register:
    """A network as (fixed, moving, grid) → displacement on the CPU; ``refinement`` holds arguments of ``gridreg.refine``."""
    where = next((p.device for p in network.parameters()), torch.device("cpu"))

    def register(fixed: Tensor, moving: Tensor, grid: Shape | None) -> Tensor:
        fixed, moving = fixed.to(where), moving.to(where)
        with torch.no_grad():
            found = network(fixed, moving, grid)
        if refinement and found.control_points is not None:
            settings = {"upsampling": network.upsampling, "fold_free": network.fold_free} | refinement
            found = refine(found, fixed, moving, **settings)
        return found.displacement.detach().cpu()

    return register


def train_on(data: Preprocessed, register: Register, grids: Sequence[Shape | None], **settings) -> ErrorMap:
    """``train_error_map`` on the training scans of a cohort; the scans of a training pair are registered in earnest."""
    pairs = data.pairs("train")
    names = sorted({name for pair in pairs for name in pair})
    number = {name: index for index, name in enumerate(names)}
    return train_error_map(
        register, [data.image(name) for name in names], data.spacing,
        pairs=[(number[fixed], number[moving]) for fixed, moving in pairs], grids=grids, **settings,
    )  # fmt: skip


class Mapped(NamedTuple):
    """One pair: names, and (3, N) each, mm along each axis, at the voxels of its region whose truth is known."""

    fixed: str
    moving: str
    error: np.ndarray
    sigma: np.ndarray


def mapped_pairs(
    data: Preprocessed, register: Register, error_map: ErrorMap, grid: Shape | None, split: str
) -> list[Mapped]:
    """Every pair of a split whose truth is known."""
    found = []
    for fixed, moving in tqdm(data.pairs(split), f"error map {split}", unit="pair", mininterval=2, leave=False):
        pair = data.pair(fixed, moving)
        if pair.truth is None:
            continue
        images = [to_tensor([image], torch.device("cpu")) for image in (pair.fixed, pair.moving)]
        displacement = register(*images, grid)
        with torch.no_grad():
            sigma = error_map(images[0], warp(images[1], displacement), displacement)[0].numpy()
        truth, known = pair.truth
        region = pair.region & known
        if region.any():
            error = (displacement[0].numpy() - truth) * pair.spacing_mm
            found.append(Mapped(fixed, moving, error[:, region].astype(float), sigma[:, region].astype(float)))
    return found


def joined(pairs: Iterable[Mapped]) -> tuple[np.ndarray, np.ndarray]:
    """(error, sigma), (3, N) each, of all pairs."""
    return tuple(np.concatenate(side, axis=1) for side in zip(*((pair.error, pair.sigma) for pair in pairs)))


def fit_factor(error_map: ErrorMap, validation: Sequence[Mapped]) -> float:
    """Set the factor of the map so that ``LEVEL`` of the errors of validation pairs lie within; returns it.

    ``validation`` was mapped with the factor that the map has now.
    """
    error_map.factor.mul_(coverage_factor(*joined(validation), LEVEL))
    return float(error_map.factor)


def _lengths(pair: Mapped) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.sqrt(np.square(side).sum(0)) for side in (pair.error, pair.sigma))


def case_rows(pairs: Sequence[Mapped], **columns) -> pd.DataFrame:
    """One row a pair: mean error and mean σ (lengths, mm), rank correlation within it, AUSE, coverage at 90 %."""
    rows = []
    for pair in pairs:
        error, sigma = _lengths(pair)
        rows.append(
            columns
            | {"fixed": pair.fixed, "moving": pair.moving, "voxels": error.size}
            | {"error_mm": error.mean(), "sigma_mm": sigma.mean()}
            | {"spearman": spearmanr(error, sigma)[0] if error.size >= FEWEST else np.nan}
            | {"ause": calibration.ause(pair.error, pair.sigma)}
            | {"coverage_90": calibration.coverage(pair.error, pair.sigma, (LEVEL,))[0]}
        )
    return pd.DataFrame(rows)


def summary(pairs: Sequence[Mapped]) -> dict[str, float]:
    """The row of a method: AUSE of all voxels together beside that of no knowledge, Spearman within and across pairs.

    spearman_across ranks the pairs: their mean error against their mean σ. NaN with fewer than three pairs.
    """
    error, sigma = joined(pairs)
    cases = case_rows(pairs)
    across = spearmanr(cases["error_mm"], cases["sigma_mm"])[0] if len(cases) > 2 else np.nan
    return {
        "pairs": len(cases),
        "error_mm": float(cases["error_mm"].mean()),
        "ause": calibration.ause(error, sigma),
        "ause_uninformed": calibration.ause(error, np.ones_like(sigma)),
        "spearman_within": float(cases["spearman"].mean()),
        "spearman_across": float(across),
        "coverage_90": float(calibration.coverage(error, sigma, (LEVEL,))[0]),
    }
