"""ANTs SyN, the classical baseline without learning: symmetric diffeomorphic registration of one pair (antspyx).

ITK's order of summation depends on its number of threads, and ITK reads that number once per process. Call ``syn`` in a
process in which ITK has not run before (``study.methods.pairwise`` starts one). It then uses one thread and one seed, so
the same pair always gives the same field.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np

from gridreg.errors import InputError
from gridreg.scans.volumes import RAS_TO_LPS, read_field_mm

METRICS = {
    "mattes": 32,
    "CC": 4,
    "meansquares": 0,
}  # with ANTs' default parameter: number of bins, radius in voxels, none
SEED = 1
PLAUSIBLE = (0.5, 2.0)  # change of volume by an affine registration; outside this range it has failed


def to_ants(image: np.ndarray, affine: np.ndarray):
    """An array (W, H, D) with its affine (voxel → RAS mm, possibly oblique) as an ANTs image (LPS)."""
    import ants  # imported here: it takes seconds, and ITK must not run before its number of threads is set

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
    """Register two images (W, H, D) on one grid. Returns the displacement (3, W, H, D) float32, in voxels, a pull-back.

    affine        (4, 4) voxel → RAS mm affine of the grid; None: isotropic voxels
    iterations    of the deformable stage, from the coarsest level, at 1/2^(levels - 1) of the resolution, to the full one
    metric        of that stage: "mattes" (mutual information), "CC" (local cross-correlation) or "meansquares"
    gradient_step, flow_sigma, total_sigma
                  of SyN: length of a step, and smoothing of each update and of the whole field, in squared voxels
    affine_stage  whether centre-of-mass alignment and an affine registration come before the deformable stage. They are
                  left out if the affine matrix mirrors the image or changes volumes by more than a factor of two
    fixed_mask, moving_mask
                  (W, H, D) where the metric of the deformable stage is evaluated; None: everywhere

    The defaults are those of ANTs. InputError where ANTs fails.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    import ants

    affine = np.eye(4) if affine is None else affine
    images = [to_ants(image, affine) for image in (fixed, moving)]
    masks = [None if mask is None else to_ants(mask, affine) for mask in (fixed_mask, moving_mask)]
    ants.config.set_ants_deterministic(on=False, seed_value=SEED)  # `on` would not allow this kind of registration
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("SyN", "SyNOnly") if affine_stage else ("SyNOnly",):
                result = ants.registration(
                    *images, kind, outprefix=f"{folder}/{kind}_", mask=masks[0], moving_mask=masks[1],
                    reg_iterations=tuple(iterations), syn_metric=metric, syn_sampling=METRICS[metric],
                    grad_step=gradient_step, flow_sigma=flow_sigma, total_sigma=total_sigma,
                )  # fmt: skip
                stages = result["fwdtransforms"]
                if kind == "SyN" and PLAUSIBLE[0] < _volume_change(ants.read_transform(stages[-1])) < PLAUSIBLE[1]:
                    break
            field_mm, _ = read_field_mm(ants.apply_transforms(*images, stages, compose=f"{folder}/all_"))
    except RuntimeError as error:
        why = f"ANTs SyN: found no registration ({error}), expected images of the same body part."
        raise InputError(why) from error
    finally:
        ants.config.set_ants_deterministic(on=False, seed_value=None)
    return np.einsum("ab,bijk->aijk", np.linalg.inv(affine[:3, :3]), field_mm).astype(np.float32)


def _volume_change(transform) -> float:
    """Determinant of the matrix of an affine ANTs transform; it is negative if the transform mirrors."""
    return float(np.linalg.det(np.reshape(transform.parameters[:9], (3, 3))))
