"""ANTs SyN, the classical baseline: symmetric diffeomorphic registration of one pair, nothing learned (antspyx).

ITK sums in an order that depends on its number of threads, and reads that number once a process. In a process in
which ITK has not run before (``study.methods.pairwise`` starts one) there is one thread and one seed: the same pair then
always gives the same field, and its seconds are those of one thread.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np

from gridreg.errors import InputError
from gridreg.scans.volumes import RAS_TO_LPS, read_field_mm

METRICS = {"mattes": 32, "CC": 4, "meansquares": 0}  # and ANTs' usual parameter: bins, radius in voxels, none
SEED = 1
CREDIBLE = (0.5, 2.0)  # change of volume by an affine registration; beyond, it has collapsed, mirrored or blown up


def to_ants(image: np.ndarray, affine: np.ndarray):
    """An array (W, H, D) and its voxel → world RAS mm affine, oblique if need be, as an ANTs image (LPS)."""
    import ants  # here, not above: it takes seconds, and ITK must not run before its number of threads is set

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = RAS_TO_LPS[:, None] * affine[:3, :3] / spacing
    origin = tuple(RAS_TO_LPS * affine[:3, 3])
    return ants.from_numpy(np.asarray(image, np.float32), origin=origin, spacing=tuple(spacing), direction=direction)


def syn(
    fixed: np.ndarray,
    moving: np.ndarray,
    affine: np.ndarray | None = None,
    *,
    iterations: Sequence[int] = (40, 20, 0),
    metric: str = "mattes",
    gradient_step: float = 0.2,
    flow_sigma: float = 3.0,
    total_sigma: float = 0.0,
    affine_stage: bool = True,
    fixed_mask: np.ndarray | None = None,
    moving_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Register two images (W, H, D) of one grid: displacement (3, W, H, D) float32, in voxels, pull-back.

    affine        (4, 4) voxel → world RAS mm of the grid; None: isotropic voxels
    iterations    of the deformable stage, from the coarsest level, at 1/2^(levels - 1) of the resolution, to the full
    metric        of that stage: "mattes" (mutual information), "CC" (local cross-correlation) or "meansquares"
    gradient_step, flow_sigma, total_sigma
                  of SyN: length of a step, and the smoothing of each update and of the whole field, in voxels squared
    affine_stage  centres of mass and an affine registration come before the deformable stage; where its matrix more
                  than halves or doubles volumes, or mirrors, which no body does, it is left out after all
    fixed_mask, moving_mask
                  where the metric of the deformable stage is evaluated; None: everywhere

    The defaults are ANTs'. InputError where ANTs fails.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    import ants

    affine = np.eye(4) if affine is None else affine
    images = [to_ants(image, affine) for image in (fixed, moving)]
    masks = [None if mask is None else to_ants(mask, affine) for mask in (fixed_mask, moving_mask)]
    ants.config.set_ants_deterministic(on=False, seed_value=SEED)  # `on` would allow only other kinds of registration
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("SyN", "SyNOnly") if affine_stage else ("SyNOnly",):
                result = ants.registration(
                    *images, kind, outprefix=f"{folder}/{kind}_", mask=masks[0], moving_mask=masks[1],
                    reg_iterations=tuple(iterations), syn_metric=metric, syn_sampling=METRICS[metric],
                    grad_step=gradient_step, flow_sigma=flow_sigma, total_sigma=total_sigma,
                )  # fmt: skip
                stages = result["fwdtransforms"]
                if kind == "SyN" and CREDIBLE[0] < _volume_change(ants.read_transform(stages[-1])) < CREDIBLE[1]:
                    break
            field_mm, _ = read_field_mm(ants.apply_transforms(*images, stages, compose=f"{folder}/all_"))
    except RuntimeError as error:
        why = f"ANTs SyN: found no registration ({error}), expected images of the same body part."
        raise InputError(why) from error
    finally:
        ants.config.set_ants_deterministic(on=False, seed_value=None)
    return np.einsum("ab,bijk->aijk", np.linalg.inv(affine[:3, :3]), field_mm).astype(np.float32)


def _volume_change(transform) -> float:
    """Determinant of the matrix of an affine ANTs transform; negative: it mirrors."""
    return float(np.linalg.det(np.reshape(transform.parameters[:9], (3, 3))))
