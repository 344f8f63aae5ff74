"""Predicted uncertainty compared with the known error: the numbers of Figure 7 and of its calibration table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn
from tqdm import tqdm

from gridreg import calibration
from gridreg.devices import device
from gridreg.spatial import Shape
from gridreg.upsampling import upsample, upsample_sigma
from study.cohorts.dataset import Preprocessed
from study.evaluation.evaluate import register

VOXELS = 20_000  # largest number per pair; all voxels of hundreds of pairs in the paper's size would take 100 GB
COLUMNS = ["dataset", "run", "simulated", "grid", "propagation", "scaling", "factor", "fitted_on", "pairs"]

# Two assumptions on how σ extends from control points to the voxels between them. The head predicts no correlations
# between neighbours; the truth lies between both assumptions.
INDEPENDENT, CORRELATED = "independent", "fully correlated"
PROPAGATIONS = {
    INDEPENDENT: upsample_sigma,  # variances add up with squared weights, so errors average out between control points
    CORRELATED: upsample,  # σ is interpolated like the displacement, so errors do not average out
}


class Uncertain(NamedTuple):
    """A pair registered by a network with a Bayesian head; arrays are on the fixed grid, in mm along each array axis."""

    fixed: str
    moving: str
    sigma_mm: dict[str, np.ndarray]  # by propagation: (3, W, H, D)
    error_mm: np.ndarray  # (3, W, H, D) displacement minus the true displacement; NaN where that is unknown
    region: np.ndarray  # (W, H, D) bool: voxels of the fixed mask (all without a mask) at which the truth is known

    def within(self, propagation: str) -> tuple[np.ndarray, np.ndarray]:
        """(error, sigma), (3, N) each in mm, at all voxels of the region, or at ``VOXELS`` evenly chosen ones."""
        voxels = np.flatnonzero(self.region)
        if voxels.size > VOXELS:
            voxels = voxels[np.linspace(0, voxels.size - 1, VOXELS).astype(int)]
        return tuple(values.reshape(3, -1)[:, voxels] for values in (self.error_mm, self.sigma_mm[propagation]))


def uncertain_pairs(data: Preprocessed, network: nn.Module, grid: Shape, split: str) -> Iterator[Uncertain]:
    """Register every pair of a split at ``grid``, one after the other. A result holds whole volumes, so keep few of them."""
    where = device()
    network = network.to(where).eval()
    for fixed, moving in tqdm(data.pairs(split), f"uncertainty {split}", unit="pair", mininterval=2, leave=False):
        pair = data.pair(fixed, moving)
        registration = register(network, pair, grid, where)[0]
        sigma = {
            name: propagate(registration.sigma, pair.shape, network.upsampling)[0].cpu().numpy() * pair.spacing_mm
            for name, propagate in PROPAGATIONS.items()
        }
        error = np.full((3, *pair.shape), np.nan)
        if pair.truth is not None:
            truth, known = pair.truth
            found_mm = (registration.displacement[0].cpu().numpy() - truth) * pair.spacing_mm
            error = np.where(known, found_mm, np.nan)
        yield Uncertain(fixed, moving, sigma, error, pair.region & np.isfinite(error).all(0))


def joined(pairs: Iterable[Uncertain]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Propagation → (error, sigma), (3, N) each, joined over all pairs with known truth (``within``); {} without such."""
    known = [{name: pair.within(name) for name in PROPAGATIONS} for pair in pairs if pair.region.any()]
    return {
        name: tuple(np.concatenate(side, axis=1) for side in zip(*(pair[name] for pair in known)))
        for name in (PROPAGATIONS if known else ())
    }


def calibration_rows(
    dataset: str, run: str, grid: str, simulated: bool, measured: dict, fitted: dict, pairs: tuple[int, int]
) -> pd.DataFrame:
    """``calibration.report`` of the test pairs, as predicted and rescaled by one factor fitted on the validation pairs.

    measured, fitted   ``joined`` test pairs, and ``joined`` validation pairs
    pairs              the numbers of test pairs and of validation pairs

    Two rows for each propagation; none if the truth of the test or the validation pairs is unknown.
    """
    rows = []
    for name in measured if fitted else ():
        (error, sigma), factor = measured[name], calibration.scale(*fitted[name])
        for words, times in (("as predicted", 1.0), ("rescaled", factor)):
            values = (dataset, run, simulated, grid, name, words, times, f"{pairs[1]} validation pairs", pairs[0])
            rows.append(dict(zip(COLUMNS, values)) | calibration.report(error, times * sigma))
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=COLUMNS)
