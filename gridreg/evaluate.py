"""One evaluation for every method: per-case results of the held-out test pairs (paper, section 4.4)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from gridreg import metrics
from gridreg.checkpoint import load_model
from gridreg.dataset import Preprocessed
from gridreg.devices import describe_device, device, to_tensor
from gridreg.grid import Shape, warp
from gridreg.interpolation import upsample_sigma
from gridreg.methods import build, grid_name, grid_sizes
from gridreg.network import Registration
from gridreg.refine import refine
from gridreg.regions import region_masks
from gridreg.schema import UNTRAINED, training_arguments
from gridreg.volumes import write_displacement, write_volume


def load_run(run: dict[str, Any], folder: Path | str) -> tuple[nn.Module, list, Shape | None, dict[str, Any]]:
    """A run of ``params.yaml`` ready to evaluate: network, its grid sizes, the chosen one, and how it was trained.

    A method that is not trained (identity) has nothing in ``folder`` and no grid.
    """
    if run["method"] in UNTRAINED:
        return build(run), [None], None, {}
    network, config = load_model(folder)
    chosen = tuple(config["grid"]) if config["grid"] else None
    return network, grid_sizes(config["run"]), chosen, config["training"]


def refinement_arguments(params: dict[str, Any], dataset: str, run: str) -> dict[str, Any]:
    """Arguments of ``refine.refine`` by which a run is refined with the losses it was trained with, but for the Dice.

    The bending weight is that of its training, times ``refine_bending``.
    """
    section, trained = params["evaluate"], training_arguments(params, dataset, run)
    bending_weight = trained["bending_weight"] * trained["settings"]["bending"] * section["refine_bending"]
    return {"steps": section["refine_steps"], "similarity": trained["similarity"], "bending_weight": bending_weight}


@torch.inference_mode()
def register(
    network: nn.Module,
    fixed: np.ndarray,
    moving: np.ndarray,
    grid: Shape | None,
    where: torch.device,
    refinement: dict[str, Any] | None = None,
    labels: list[np.ndarray | None] = (None, None),
) -> tuple[Registration, np.ndarray, float, float]:
    """Register one pair of (W, H, D) images in [0, 1]; ``refinement`` holds arguments of ``refine.refine``, or None.

    labels   of fixed and moving image, for a method that looks only around them (SyN with ``mask_margin``)

    Returns the registration, the warped moving image (W, H, D), the seconds for network, refinement and warp with the
    images on the device, and the peak of GPU memory in MB, weights and images included (NaN without a GPU).
    """
    images = [to_tensor([image], where) for image in (fixed, moving)]
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
    masked = getattr(network, "mask_margin", None) is not None and all(side is not None for side in labels)
    began = time.perf_counter()
    registration = network(*images, grid, labels=labels) if masked else network(*images, grid)
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


def case_metrics(data: Preprocessed, fixed: str, moving: str, displacement: np.ndarray, truth) -> dict[str, float]:
    """Every metric of one case. displacement (3, W, H, D) in voxels; truth as ``Preprocessed.truth`` gives it.

    The region of interest is the fixed mask: all labels together, or the whole image without labels. Where one organ is
    labelled, its interior and its boundary are measured too (``regions``).
    """
    fixed_labels, moving_labels = data.labels(fixed), data.labels(moving)
    region = fixed_labels > 0 if fixed_labels is not None else np.ones(data.shape, bool)
    row = dict.fromkeys(("dice", "landmark_mm", "mask_mm", "tre_mm", "tre_interior_mm", "tre_boundary_mm"), float("nan"))
    row |= {"labels_lost": 0, "landmarks_missing": 0}  # failures are counted, not dropped from a mean in silence
    if fixed_labels is not None and moving_labels is not None:
        warped = warp_labels(moving_labels, displacement)
        row["dice"] = metrics.dice(fixed_labels, warped)
        row["mask_mm"] = metrics.centroid_distance_mm(fixed_labels, warped, data.spacing)
        row["labels_lost"] = len(set(metrics.label_values(fixed_labels)) - set(metrics.label_values(warped)))
    points, partners = data.landmarks(fixed) or {}, data.landmarks(moving) or {}
    common = [name for name in points if name in partners]
    row["landmarks_missing"] = len(points) - len(common)
    if common:
        positions = [np.array([side[name] for name in common]) for side in (points, partners)]
        row["landmark_mm"] = metrics.landmark_distance_mm(*positions, displacement, data.spacing)
    if truth is not None:
        row["tre_mm"] = metrics.tre_mm(displacement, truth[0], region & truth[1], data.spacing)
        if fixed_labels is not None and len(data.index["labels"]) == 1:
            for part, where in region_masks(fixed_labels, data.spacing).items():
                row[f"tre_{part}_mm"] = metrics.tre_mm(displacement, truth[0], where & truth[1], data.spacing)
    determinant = metrics.jacobian_determinant(displacement)
    row["logdet_mean"], row["logdet_std"] = metrics.log_jacobian(determinant, region)
    row["folding_percent"] = metrics.folding_percent(determinant, np.ones_like(region))
    row["nondiffeomorphic_percent"] = metrics.nondiffeomorphic_percent(displacement, np.ones_like(region))
    return row


def warp_labels(labels: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Label map (W, H, D) of the moving image on the fixed grid, nearest neighbour."""
    field = torch.from_numpy(np.ascontiguousarray(displacement))[None]
    return warp(torch.from_numpy(labels)[None, None].float(), field, "nearest")[0, 0].numpy().astype(np.int16)


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
    """Per-case results of ``network`` on the test pairs, at each of ``grids``; one row a pair and grid.

    chosen      the grid size chosen on validation; the rows of the others are for Figure 8 alone
    refinement  arguments of ``refine.refine``, for methods with control points; None: what the network answers
    pictures    a folder for the warped image, the warped labels and the ITK displacement field of the first cases, and
                for σ in mm where the method has a Bayesian head
    """
    where = device()
    network = network.to(where).eval()
    pairs, rows = data.pairs("test"), []
    first = [data.image(subject) for subject in pairs[0]]
    for grid in [] if method in UNTRAINED else grids:
        register(network, *first, grid, where)  # warm-up: the first call allocates and fills caches
    for number, (fixed, moving) in enumerate(tqdm(pairs, desc=f"{dataset} {run}", unit="pair", mininterval=2)):
        truth = data.truth(fixed, moving)
        for grid in grids:
            registration, warped, seconds, peak_mb = register(
                network, data.image(fixed), data.image(moving), grid, where, refinement, [data.labels(fixed), data.labels(moving)]
            )
            displacement = registration.displacement[0].cpu().numpy()
            row: dict[str, Any] = {"dataset": dataset, "run": run, "method": method, "grid": grid_name(grid)}
            row |= {"chosen": grid == chosen, "fixed": fixed, "moving": moving}
            row |= case_metrics(data, fixed, moving, displacement, truth)
            rows.append(row | {"seconds": seconds, "peak_mb": peak_mb})
            if pictures is not None and grid == chosen and number < pictured_cases:
                save_pictures(data, Path(pictures), fixed, moving, warped, displacement)
                if registration.sigma is not None:
                    spread = sigma_mm(registration, network.upsampling, data.spacing)[0].cpu().numpy()
                    write_volume(Path(pictures) / f"{fixed}__{moving}_sigma.nii.gz", spread, data.affine)
    return pd.DataFrame(rows)


def sigma_mm(registration: Registration, upsampling: str, spacing_mm: float) -> torch.Tensor:
    """How uncertain a Bayesian registration is, (B, W, H, D) in mm: the root of the summed variances of the three axes."""
    shape = tuple(registration.displacement.shape[2:])
    return spacing_mm * upsample_sigma(registration.sigma, shape, upsampling).norm(dim=1)


def save_pictures(
    data: Preprocessed, folder: Path, fixed: str, moving: str, warped: np.ndarray, displacement: np.ndarray
) -> None:
    """Write ``<fixed>__<moving>.nii.gz``, its labels and its displacement field (ITK: vector intent, LPS, mm)."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, affine = f"{fixed}__{moving}", data.affine
    write_volume(folder / f"{stem}.nii.gz", warped.astype(np.float32), affine)
    write_displacement(folder / f"{stem}_displacement.nii.gz", displacement, affine)
    if data.labels(moving) is not None:
        write_volume(folder / f"{stem}_labels.nii.gz", warp_labels(data.labels(moving), displacement), affine)


def summary(cases: pd.DataFrame, training: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Means over the cases at the chosen grid, for ``dvc metrics``; NaN is left out."""
    chosen = cases[cases["chosen"]]
    means = chosen.select_dtypes("number").mean().dropna()
    result = {name: round(float(value), 6) for name, value in means.items()}
    return result | {
        "grid": str(chosen["grid"].iloc[0]),
        "cases": len(chosen),
        "parameters": parameters,
        "device": describe_device(device()),
        "precision": "32-true",  # whatever the training had
        "steps": training.get("steps"),
        "batch": training.get("batch"),
    }
