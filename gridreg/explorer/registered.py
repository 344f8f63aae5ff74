"""What the explorer computes: a registered pair, voxel by voxel in millimetres, samples, and the error.

No widgets and no drawing here: ``picture`` draws, ``widgets`` puts sliders to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gridreg import metrics
from gridreg.checkpoint import load_model
from gridreg.devices import device, to_tensor
from gridreg.errors import InputError, refused
from gridreg.scans.pair import Pair
from gridreg.spatial import as_shape, warp
from gridreg.upsampling import upsample, upsample_sigma

AXES = ("right–left", "front–back", "head–foot")  # along the array axes; positive to the right, the front, the head
ALL_AXES = "σ, all axes"


@dataclass(frozen=True)
class Registered:
    """A registered pair. Arrays are (…, W, H, D); ``_mm`` ones in millimetres, the others in voxels of the grid.

    displacement, displacement_mm   (3, W, H, D) along the array axes
    sigma_mm                        (3, W, H, D) standard deviation of each, None without the Bayesian head
    control_points, sigma           (1, 3, g, g, g) tensors in voxels, mean and standard deviation at the grid
    """

    pair: Pair
    warped: np.ndarray
    displacement: np.ndarray
    displacement_mm: np.ndarray
    sigma_mm: np.ndarray | None
    control_points: Tensor | None
    sigma: Tensor | None
    upsampling: str

    def maps(self) -> list[str]:
        """Names of what can be laid over the images."""
        sigmas = [] if self.sigma_mm is None else [ALL_AXES, *(f"σ {axis}" for axis in AXES)]
        return [*sigmas, "displacement", *(["error"] if self.pair.truth is not None else [])]

    def map_mm(self, name: str) -> np.ndarray:
        """One of ``maps``: (W, H, D) in mm, ≥ 0; NaN where it is not known."""
        if name == "displacement":
            return length(self.displacement_mm)
        if name == "error":
            return np.where(self.pair.truth[1], length(self.error_mm()), np.nan)
        return length(self.sigma_mm) if name == ALL_AXES else self.sigma_mm[self.maps().index(name) - 1]

    def error_mm(self) -> np.ndarray | None:
        """(3, W, H, D) predicted minus true displacement; None where there is no truth."""
        if self.pair.truth is None:
            return None
        return (self.displacement - self.pair.truth[0]) * self.pair.spacing[:, None, None, None]


def length(vectors: np.ndarray) -> np.ndarray:
    """Euclidean length over the first axis; of three standard deviations, the root of the summed variances."""
    return np.sqrt(np.square(vectors).sum(0))


def load_network(folder: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """A trained GridReg and its configuration; InputError where there is none, or the model has no control points."""
    if not Path(folder, "model.json").is_file():
        expected = "model.json and model.safetensors, which `make repro` writes to results/train/<dataset>/<run>"
        raise refused(folder, "no trained model", expected)
    network, config = load_model(folder)
    if config["run"]["method"] != "gridreg":
        raise refused(folder, f"a model of method '{config['run']['method']}'", "gridreg")
    return network, config


@torch.inference_mode()
def register_pair(network: nn.Module, pair: Pair, grid_size: int | tuple[int, int, int] | list[int]) -> Registered:
    """Register a pair on a grid of control points. ValueError on an impossible grid size."""
    where = device()
    grid = as_shape(grid_size if isinstance(grid_size, int) else tuple(grid_size), "grid_size")
    images = [to_tensor([image], where) for image in (pair.fixed, pair.moving)]
    registration = network.to(where).eval()(*images, grid)
    warped = warp(images[1], registration.displacement)[0, 0].cpu().numpy()
    displacement = registration.displacement[0].cpu().numpy()
    to_mm = pair.spacing.astype(np.float32)[:, None, None, None]
    sigma_mm = None
    if registration.sigma is not None:
        sigma_mm = upsample_sigma(registration.sigma, pair.shape, network.upsampling)[0].cpu().numpy() * to_mm
    return Registered(pair, warped, displacement, displacement * to_mm, sigma_mm, registration.control_points,
                      registration.sigma, network.upsampling)  # fmt: skip


@torch.inference_mode()
def draw_sample(registered: Registered, number: int) -> tuple[np.ndarray, np.ndarray]:
    """One displacement the model holds for possible: T = μ + σ ε on the grid, upsampled (paper, section 3.2).

    ``number`` is the seed: the same number gives the same sample. Returns (displacement (3, W, H, D) in voxels, the
    moving image warped with it (W, H, D)). InputError without σ.
    """
    if registered.sigma is None:
        raise InputError("found a model without the Bayesian head, expected one with σ to draw samples from.")
    mean, sigma = registered.control_points, registered.sigma
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(number)).to(mean.device)
    sample = upsample(mean + sigma * noise, registered.pair.shape, registered.upsampling)
    warped = warp(to_tensor([registered.pair.moving], mean.device), sample)
    return sample[0].cpu().numpy(), warped[0, 0].cpu().numpy()


def read_out(registered: Registered, voxel: tuple[int, int, int]) -> dict[str, Any]:
    """What is known at a voxel: scan_mm (3,), label, displacement_mm (3,), sigma_mm and error_mm (3,) or None."""
    pair, at = registered.pair, (slice(None), *voxel)
    label = None
    if pair.labels[0] is not None:
        value = int(pair.labels[0][tuple(voxel)])
        label = pair.label_names.get(value, f"label {value}") if value else "background"
    error = None
    if pair.truth is not None and pair.truth[1][tuple(voxel)]:
        error = (registered.displacement[at] - pair.truth[0][at]) * pair.spacing
    return {
        "scan_mm": pair.scan_mm(voxel),
        "label": label,
        "displacement_mm": registered.displacement_mm[at],
        "sigma_mm": None if registered.sigma_mm is None else registered.sigma_mm[at],
        "error_mm": error,
    }


def measure(registered: Registered) -> pd.DataFrame:
    """Before and after registration, a column each; what is not known is left out.

    Mean squared difference of the images, Dice, true TRE in mm within the pair's region, folded voxels in percent.
    """
    pair, rows, everywhere = registered.pair, {}, np.ones(registered.pair.shape, bool)
    for when, u, image in (("before", np.zeros_like(registered.displacement), pair.moving),
                           ("after", registered.displacement, registered.warped)):  # fmt: skip
        row = {"mean squared difference": float(np.square(pair.fixed - image).mean())}
        if all(labels is not None for labels in pair.labels):
            row["Dice"] = metrics.dice(pair.labels[0], metrics.warp_labels(pair.labels[1], u))
        if pair.truth is not None:
            row["true TRE (mm)"] = metrics.tre_mm(u, pair.truth[0], pair.region & pair.truth[1], pair.spacing[0])
        row["folded voxels (%)"] = metrics.folding_percent(metrics.jacobian_determinant(u), everywhere)
        rows[when] = row
    return pd.DataFrame(rows)
