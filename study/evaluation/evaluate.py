"""One evaluation for all methods: per-case results on the held-out test pairs (paper, section 4.4)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from gridreg.checkpoint import load_model
from gridreg.devices import describe_device, device, to_tensor
from gridreg.metrics import measure_pair, tre_mm, warp_labels
from gridreg.network import Registration
from gridreg.refinement import refine
from gridreg.scans.pair import Pair
from gridreg.scans.volumes import write_displacement, write_volume
from gridreg.spatial import Shape, warp
from gridreg.upsampling import upsample_sigma
from study.cohorts.dataset import Preprocessed
from study.config.schema import UNTRAINED
from study.methods.table import build, grid_name, grid_sizes


def load_run(run: dict[str, Any], folder: Path | str) -> tuple[nn.Module, list, Shape | None, dict[str, Any]]:
    """A run of ``params.yaml`` to evaluate: network, its grid sizes, the chosen grid size, and facts of its training.

    A method that is not trained (identity, SyN) has no ``folder`` and no grid. InputError as in ``load_model``.
    """
    if run["method"] in UNTRAINED:
        return build(run), [None], None, {}
    network, config = load_model(folder, build)
    chosen = tuple(config["grid"]) if config["grid"] else None
    return network, grid_sizes(config["run"]), chosen, config["training"]


@torch.inference_mode()
def register(
    network: nn.Module,
    pair: Pair,
    grid: Shape | None,
    where: torch.device,
    refinement: dict[str, Any] | None = None,
) -> tuple[Registration, np.ndarray, float, float]:
    """Register one pair; ``refinement`` holds arguments of ``gridreg.refine``, or is None.

    A method whose metric is evaluated around the labels (SyN with ``mask_margin``) also gets the labels.

    Returns the registration, the warped moving image (W, H, D), the seconds of network, refinement and warp for images on
    the device, and the peak GPU memory in MB with weights and images (NaN without a GPU).
    """
    images = [to_tensor([image], where) for image in (pair.fixed, pair.moving)]
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
    masked = getattr(network, "mask_margin", None) is not None and all(side is not None for side in pair.labels)
    began = time.perf_counter()
    registration = network(*images, grid, labels=pair.labels) if masked else network(*images, grid)
    if refinement and registration.control_points is not None:
        registration = refine(
            registration, *images, upsampling=network.upsampling, fold_free=network.fold_free, **refinement
        )
    warped = warp(images[1], registration.displacement)
    if on_gpu:
        torch.cuda.synchronize(where)
    seconds = time.perf_counter() - began
    peak_mb = torch.cuda.max_memory_allocated(where) / 2**20 if on_gpu else float("nan")
    return registration, warped[0, 0].cpu().numpy(), seconds, peak_mb


def evaluate(
    data: Preprocessed,
    network: nn.Module,
    *,
    dataset: str,
    run: str,
    method: str,
    grids: list[Shape | None],
    chosen: Shape | None,
    refinement: dict[str, Any] | None = None,
    pictures: Path | str | None = None,
    pictured_cases: int = 4,
) -> pd.DataFrame:
    """Per-case results of ``network`` on the test pairs, with one row per pair and grid.

    chosen      the grid size chosen on validation; rows of other grids are for Figure 8 alone
    refinement  arguments of ``gridreg.refine``, for methods with control points; None: no refinement
    pictures    folder for the warped image, the warped labels and the ITK displacement field of the first
                ``pictured_cases`` cases, and for σ in mm if the method has a Bayesian head
    """
    where = device()
    network = network.to(where).eval()
    names, rows = data.pairs("test"), []
    for grid in [] if method in UNTRAINED else grids:
        register(network, data.pair(*names[0]), grid, where)  # warm-up: the first call allocates and fills caches
    for number, (fixed, moving) in enumerate(tqdm(names, desc=f"{dataset} {run}", unit="pair", mininterval=2)):
        pair = data.pair(fixed, moving)
        for grid in grids:
            registration, warped, seconds, peak_mb = register(network, pair, grid, where, refinement)
            displacement = registration.displacement[0].cpu().numpy()
            row: dict[str, Any] = {"dataset": dataset, "run": run, "method": method, "grid": grid_name(grid)}
            row |= {"chosen": grid == chosen, "fixed": fixed, "moving": moving}
            row |= measure_pair(pair, displacement)
            row["identical_mm"] = (
                motion_of_identical_mm(network, pair, grid, where, refinement) if grid == chosen else np.nan
            )
            rows.append(row | {"seconds": seconds, "peak_mb": peak_mb})
            if pictures is not None and grid == chosen and number < pictured_cases:
                stem = Path(pictures) / f"{fixed}__{moving}"
                save_pictures(stem, pair, warped, displacement)
                if registration.sigma is not None:
                    spread = sigma_mm(registration, network.upsampling, pair.spacing_mm)[0].cpu().numpy()
                    write_volume(f"{stem}_sigma.nii.gz", spread, pair.affine)
    return pd.DataFrame(rows)


def motion_of_identical_mm(
    network: nn.Module, pair: Pair, grid: Shape | None, where: torch.device, refinement: dict[str, Any] | None = None
) -> float:
    """Mean motion in mm within the pair's region when the fixed image is registered to itself; the correct value is 0."""
    same = replace(pair, moving=pair.fixed, labels=(pair.labels[0], pair.labels[0]))
    displacement = register(network, same, grid, where, refinement)[0].displacement[0].cpu().numpy()
    return tre_mm(displacement, np.zeros_like(displacement), pair.region, pair.spacing_mm)


def sigma_mm(registration: Registration, upsampling: str, spacing_mm: float) -> torch.Tensor:
    """Uncertainty of a Bayesian registration, (B, W, H, D) in mm: the root of the summed variances of the three axes."""
    shape = tuple(registration.displacement.shape[2:])
    return spacing_mm * upsample_sigma(registration.sigma, shape, upsampling).norm(dim=1)


def save_pictures(stem: Path, pair: Pair, warped: np.ndarray, displacement: np.ndarray) -> None:
    """Write the warped image ``<stem>.nii.gz``, its labels and its displacement field (ITK: vector intent, LPS, mm)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_volume(f"{stem}.nii.gz", warped.astype(np.float32), pair.affine)
    write_displacement(f"{stem}_displacement.nii.gz", displacement, pair.affine)
    if pair.labels[1] is not None:
        write_volume(f"{stem}_labels.nii.gz", warp_labels(pair.labels[1], displacement), pair.affine)


def summary(cases: pd.DataFrame, training: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Means over the cases at the chosen grid, for ``dvc metrics``; NaN values are left out."""
    chosen = cases[cases["chosen"]]
    means = chosen.select_dtypes("number").mean().dropna()
    result = {name: round(float(value), 6) for name, value in means.items()}
    return result | {
        "grid": str(chosen["grid"].iloc[0]),
        "cases": len(chosen),
        "parameters": parameters,
        "device": describe_device(device()),
        "precision": "32-true",  # of evaluation, whatever the precision of the training
        "steps": training.get("steps"),
        "batch": training.get("batch"),
    }
