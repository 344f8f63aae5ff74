"""Metrics of evaluation (paper, section 4.4): hard labels, millimetres, one case at a time, in NumPy.

Losses, which are soft and differentiable, are in ``losses``. A displacement here is (3, W, H, D), in voxels of the
fixed grid; spacing_mm is the isotropic voxel size of preprocessed images.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from scipy import ndimage


def label_values(*label_maps: np.ndarray) -> list[int]:
    """The labels, background (0) left out, that occur in any of the maps."""
    return sorted({int(v) for labels in label_maps for v in np.flatnonzero(np.bincount(labels.ravel()))} - {0})


def dice(fixed: np.ndarray, warped: np.ndarray) -> float:
    """Mean over labels of 2 |A∩B| / (|A| + |B|), over all labels in either map; NaN if there are none.

    A label that the warp lost counts as 0; it is not dropped.
    """
    size = 1 + int(max(fixed.max(), warped.max()))
    overlap = np.bincount(fixed[fixed == warped], minlength=size)
    total = np.bincount(fixed.ravel(), minlength=size) + np.bincount(warped.ravel(), minlength=size)
    found = np.flatnonzero(total[1:]) + 1
    return float((2 * overlap[found] / total[found]).mean()) if found.size else float("nan")


def centroid_distance_mm(fixed: np.ndarray, warped: np.ndarray, spacing_mm: float) -> float:
    """D_CD^msk: mean distance in mm of the centroids of the labels in both maps; NaN if there are none."""
    values = sorted(set(label_values(fixed)) & set(label_values(warped)))
    if not values:
        return float("nan")
    centres = [np.array(ndimage.center_of_mass(np.ones_like(m, np.uint8), m, values)) for m in (fixed, warped)]
    return float(np.linalg.norm(centres[0] - centres[1], axis=1).mean() * spacing_mm)


def landmark_distance_mm(fixed: np.ndarray, moving: np.ndarray, displacement: np.ndarray, spacing_mm: float) -> float:
    """D_CD^ldmk: mean distance in mm between fixed landmarks carried by the warp and their moving partners.

    fixed, moving (N, 3) in voxels, row by row the same landmark. Points are carried, blobs are not warped, so that no
    landmark can vanish. NaN without landmarks.
    """
    if len(fixed) == 0:
        return float("nan")
    moved = fixed + np.stack([ndimage.map_coordinates(u, fixed.T, order=1, mode="nearest") for u in displacement], 1)
    return float(np.linalg.norm(moved - moving, axis=1).mean() * spacing_mm)


def tre_mm(displacement: np.ndarray, truth: np.ndarray, where: np.ndarray, spacing_mm: float) -> float:
    """Mean true TRE in mm: |u(x) - u_true(x)| over the voxels ``where`` (W, H, D); NaN if there are none."""
    error = np.sqrt(np.square(displacement - truth).sum(0))[where]
    return float(error.mean() * spacing_mm) if error.size else float("nan")


def jacobian_determinant(displacement: np.ndarray) -> np.ndarray:
    """(W, H, D) det J of φ(x) = x + u(x), by central differences (one-sided at the border)."""
    rows = [list(np.gradient(component.astype(np.float64))) for component in displacement]  # rows[a][b] = ∂u_a/∂x_b
    for axis, row in enumerate(rows):
        row[axis] += 1
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def log_jacobian(determinant: np.ndarray, where: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of log det J over the voxels ``where``, det clipped at 1e-6 where it folds."""
    values = np.log(np.maximum(determinant[where], 1e-6))
    return (float(values.mean()), float(values.std())) if values.size else (float("nan"), float("nan"))


def folding_percent(determinant: np.ndarray, where: np.ndarray) -> float:
    """Percentage of the voxels ``where`` at which det J ≤ 0."""
    return float(100 * (determinant[where] <= 0).mean()) if where.any() else float("nan")


def nondiffeomorphic_percent(displacement: np.ndarray, where: np.ndarray) -> float:
    """Non-diffeomorphic volume, in percent of the volume of the cells ``where``.

    Between voxels the field is read linearly, and a central difference can miss a fold there. Each cell of eight
    voxels is cut into six tetrahedra, in two mirror-image ways; on a tetrahedron the map is affine and its signed
    volume exact. The share is the volume that tetrahedra with negative orientation cover, averaged over both ways
    (after Liu et al., "On finite difference Jacobian computation in deformable image registration", IJCV 2024). A
    turned tetrahedron counts by its warped volume, so a field that turns everything over and doubles it gives 200.
    """
    corners = displacement + np.indices(displacement.shape[1:])
    w, h, d = corners.shape[1:]

    def corner(offset):
        i, j, k = offset
        return corners[:, i : w - 1 + i, j : h - 1 + j, k : d - 1 + k]

    negative = np.zeros((w - 1, h - 1, d - 1))
    for mirror in (0, 1):
        for path in permutations(range(3)):  # the six monotone paths from one corner to the opposite one
            offset, vertices = np.array([mirror, 0, 0]), []
            vertices.append(corner(offset))
            for axis in path:
                offset = offset.copy()
                offset[axis] = 1 - offset[axis]
                vertices.append(corner(offset))
            a, b, c = (v - vertices[0] for v in vertices[1:])
            volume = (np.cross(a, b, axis=0) * c).sum(0) / 6
            orientation = np.linalg.det(np.eye(3)[list(path)]) * (-1 if mirror else 1)
            negative += np.maximum(-volume * orientation, 0) / 2
    inside = where[:-1, :-1, :-1]
    return float(100 * negative[inside].sum() / max(inside.sum(), 1)) if inside.any() else float("nan")
