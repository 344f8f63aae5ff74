"""The true correspondence of a simulated pair.

Every simulated subject knows its map to the template, phi(p) = p + e(p). The point y of the moving image that matches
x of the fixed one satisfies phi_moving(y) = phi_fixed(x); it has no closed form, so it is solved for every voxel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates

from gridreg.errors import InputError
from gridreg.scans.geometry import apply_affine
from gridreg.scans.volumes import read_displacement, read_field_mm

ITERATIONS = 12
CONVERGED = 1e-3  # voxels of the residual at which a voxel is no longer iterated
ACCEPTED = 1e-2  # voxels


def carried_truth(file: Path, affine: np.ndarray, to_source: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The true displacement of a subject to its template on a grid: (3, W, H, D), world RAS mm; see ``resample_field``."""
    return resample_field(*read_field_mm(file), affine, to_source, shape)


def pair_truth(index_dir: Path | str, fixed_id: str, moving_id: str) -> tuple[np.ndarray, np.ndarray]:
    """The true displacement of a pair on the fixed grid, from the ``truth`` folder of a preprocessed dataset.

    Returns (u (3, W, H, D) float32 in voxels with phi_moving(x + u) = phi_fixed(x), valid (W, H, D) bool). Both
    subjects must have been made from one template, as those of any listed pair are.
    """
    fixed, moving = (read_displacement(Path(index_dir) / "truth" / f"{i}.nii.gz") for i in (fixed_id, moving_id))
    if fixed[0].shape != moving[0].shape or not np.allclose(fixed[1], moving[1], atol=1e-4):
        raise InputError(
            f"{index_dir}: found the true fields of {fixed_id} and {moving_id} on different grids, expected one grid."
        )
    return correspondence(fixed[0], moving[0])


def resample_field(
    field_mm: np.ndarray, lattice: np.ndarray, grid: np.ndarray, to_source: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Carry a subject's true deformation to the grid: e(q) = p + d(p) - q with p = to_source(q); (3, W, H, D) mm.

    field_mm: d on its own lattice, world RAS mm; lattice, grid: their voxel → world affines; to_source: (4, 4), world
    of the grid → world of the subject. Linear between lattice points, as the field is defined; constant beyond them.
    """
    q = apply_affine(grid, np.moveaxis(np.indices(shape), 0, -1))  # (W, H, D, 3)
    p = apply_affine(to_source, q)
    at = np.moveaxis(apply_affine(np.linalg.inv(lattice), p), -1, 0)
    d = np.stack([map_coordinates(component, at, order=1, mode="nearest") for component in field_mm])
    return (np.moveaxis(p - q, -1, 0) + d).astype(np.float32)


def correspondence(fixed: np.ndarray, moving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve y + moving(y) = x + fixed(x) for u = y - x at every voxel x.

    fixed, moving: (3, W, H, D), displacements to the template in voxels, linear between voxels. Newton's method from
    y = x + fixed(x) - moving(x), with the Jacobian of the voxel nearest to y. ``valid`` is False where y leaves the
    volume or the residual stays above 0.01 voxel.
    """
    shape = fixed.shape[1:]
    last = np.array(shape, float)[:, None] - 1
    x = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij")).reshape(3, -1)  # (3, N)
    goal = x + fixed.reshape(3, -1)
    inverse = _inverse_jacobians(moving)  # (N, 3, 3)
    y = goal - moving.reshape(3, -1)
    error = np.full(x.shape[1], np.inf)
    active = np.arange(x.shape[1])
    for _ in range(ITERATIONS):
        at = y[:, active]
        residual = at + np.stack([map_coordinates(c, at, order=1, mode="nearest") for c in moving]) - goal[:, active]
        error[active] = np.abs(residual).max(axis=0)
        going = error[active] > CONVERGED
        active, at, residual = active[going], at[:, going], residual[:, going]
        if not active.size:
            break
        nearest = np.rint(np.clip(at, 0, last)).astype(int)
        step = np.einsum("nab,bn->an", inverse[np.ravel_multi_index(nearest, shape)], residual)
        y[:, active] = np.clip(at - step, -1, last + 1)  # beyond the volume nothing is known: stay near
    valid = (error < ACCEPTED) & ((y >= 0) & (y <= last)).all(axis=0)
    return (y - x).reshape(fixed.shape).astype(np.float32), valid.reshape(shape)


def _inverse_jacobians(displacement: np.ndarray) -> np.ndarray:
    """Inverse of the Jacobian of y + displacement(y) at every voxel, (N, 3, 3); identity where it is singular."""
    gradients = np.stack([np.stack(np.gradient(component)) for component in displacement])  # (3 of, 3 along, W, H, D)
    jacobian = np.moveaxis(gradients.reshape(3, 3, -1), -1, 0) + np.eye(3)
    jacobian[np.abs(np.linalg.det(jacobian)) < 1e-2] = np.eye(3)
    return np.linalg.inv(jacobian)
