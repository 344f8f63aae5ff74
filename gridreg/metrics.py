"""Metrics of evaluation (paper, section 4.4): hard labels, distances in mm, one case at a time, in NumPy.

Soft and differentiable losses are in ``losses``. A displacement here is (3, W, H, D) in voxels of the fixed grid.
``spacing_mm`` is the isotropic voxel size of preprocessed images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from scipy import ndimage

from gridreg.scans.pair import Pair
from gridreg.spatial import warp

THICKNESS_MM = 5.0  # thickness of the boundary shell: one to two voxels of the demo cohorts


def label_values(*label_maps: np.ndarray) -> list[int]:
    """The labels that occur in any of the maps, without the background (0)."""
    return sorted({int(v) for labels in label_maps for v in np.flatnonzero(np.bincount(labels.ravel()))} - {0})


def dice(fixed: np.ndarray, warped: np.ndarray) -> float:
    """Mean of 2 |A∩B| / (|A| + |B|) over all labels in either map; NaN if there are none.

    fixed, warped (W, H, D) integers. A label that vanished in the warp counts as 0; it is not dropped.
    """
    size = 1 + int(max(fixed.max(), warped.max()))
    overlap = np.bincount(fixed[fixed == warped], minlength=size)
    total = np.bincount(fixed.ravel(), minlength=size) + np.bincount(warped.ravel(), minlength=size)
    found = np.flatnonzero(total[1:]) + 1
    return float((2 * overlap[found] / total[found]).mean()) if found.size else float("nan")


def centroid_distance_mm(fixed: np.ndarray, warped: np.ndarray, spacing_mm: float) -> float:
    """D_CD^msk: mean distance in mm between the centroids of each label present in both maps; NaN if there are none."""
    values = sorted(set(label_values(fixed)) & set(label_values(warped)))
    if not values:
        return float("nan")
    centres = [np.array(ndimage.center_of_mass(np.ones_like(m, np.uint8), m, values)) for m in (fixed, warped)]
    return float(np.linalg.norm(centres[0] - centres[1], axis=1).mean() * spacing_mm)


def landmark_distance_mm(fixed: np.ndarray, moving: np.ndarray, displacement: np.ndarray, spacing_mm: float) -> float:
    """D_CD^ldmk: mean distance in mm between the fixed landmarks at x + u(x) and the corresponding moving landmarks.

    fixed, moving (N, 3) in voxels; equal rows are the same landmark. Points are transformed instead of warping blobs, so
    that no landmark can vanish. NaN without landmarks.
    """
    if len(fixed) == 0:
        return float("nan")
    moved = fixed + np.stack([ndimage.map_coordinates(u, fixed.T, order=1, mode="nearest") for u in displacement], 1)
    return float(np.linalg.norm(moved - moving, axis=1).mean() * spacing_mm)


def image_similarity(fixed: np.ndarray, warped: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """{"mse", "ncc"}: mean squared difference and correlation of intensities over the voxels ``where`` (W, H, D).

    Both compare images, not anatomy, so neither measures accuracy. ncc is NaN where an image is constant.
    """
    a, b = (image[where].astype(np.float64) for image in (fixed, warped))
    if not a.size:
        return {"mse": float("nan"), "ncc": float("nan")}
    spread = a.std() * b.std()
    ncc = float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else float("nan")
    return {"mse": float(np.square(a - b).mean()), "ncc": ncc}


def tre_mm(displacement: np.ndarray, truth: np.ndarray, where: np.ndarray, spacing_mm: float) -> float:
    """TRE against the true displacement: mean |u(x) - u_true(x)| in mm over the voxels ``where`` (W, H, D); NaN if none."""
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
    """Mean and standard deviation of log det J over the voxels ``where``; det J is clipped at 1e-6 where the field folds."""
    values = np.log(np.maximum(determinant[where], 1e-6))
    return (float(values.mean()), float(values.std())) if values.size else (float("nan"), float("nan"))


def folding_percent(determinant: np.ndarray, where: np.ndarray) -> float:
    """Percentage of the voxels ``where`` with det J ≤ 0; NaN if there are none."""
    return float(100 * (determinant[where] <= 0).mean()) if where.any() else float("nan")


def nondiffeomorphic_percent(displacement: np.ndarray, where: np.ndarray) -> float:
    """Non-diffeomorphic volume, in percent of the volume of the cells ``where``; NaN if there are none.

    The field is interpolated linearly between voxels, and a central difference can miss a fold there. Each cell of eight
    voxels is cut into six tetrahedra, in two mirror-image ways. On a tetrahedron the map is affine, so its signed volume
    is exact. The result is the volume of the tetrahedra with negative orientation, averaged over both ways (after Liu et
    al., "On finite difference Jacobian computation in deformable image registration", IJCV 2024). A folded tetrahedron
    counts by its warped volume: a field that mirrors every cell and doubles its volume gives 200.
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


def warp_labels(labels: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Warp a moving label map (W, H, D) to the fixed grid, by nearest neighbour: (W, H, D) int16."""
    field = torch.from_numpy(np.ascontiguousarray(displacement))[None]
    return warp(torch.from_numpy(labels)[None, None].float(), field, "nearest")[0, 0].numpy().astype(np.int16)


def region_masks(
    labels: np.ndarray, spacing_mm: float, thickness_mm: float = THICKNESS_MM, values: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """{"interior": mask, "boundary": mask} of an organ, each (W, H, D) bool; together they are the organ.

    labels        (W, H, D) integers
    spacing_mm    isotropic voxel size
    thickness_mm  thickness of the shell: voxels whose centre lies at most this deep below the surface are boundary, deeper
                  ones are interior. The surface lies half a voxel outside the outermost voxel centres.
    values        labels that make up the organ; None: all labels but the background

    The edge of the field of view is not a surface. Either mask may be empty: in a small organ all voxels are boundary.
    ValueError unless the thickness is above 0.
    """
    if not thickness_mm > 0:
        raise ValueError(f"thickness_mm must be above 0, found {thickness_mm}")
    organ = labels > 0 if values is None else np.isin(labels, values)
    # distance to the nearest voxel outside the organ; infinite if there is none
    to_outside = ndimage.distance_transform_edt(organ) * spacing_mm if not organ.all() else np.full(organ.shape, np.inf)
    deep = to_outside - spacing_mm / 2 > thickness_mm
    return {"interior": organ & deep, "boundary": organ & ~deep}


def warp_image(image: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Warp a moving image (W, H, D) to the fixed grid, by linear interpolation: (W, H, D) float32."""
    field = torch.from_numpy(np.ascontiguousarray(displacement))[None].float()
    return warp(torch.from_numpy(np.ascontiguousarray(image))[None, None].float(), field)[0, 0].numpy()


def measure_pair(pair: Pair, displacement: np.ndarray) -> dict[str, float]:
    """Every metric of one registered pair, by name; NaN where the pair lacks the data that a metric needs.

    displacement  (3, W, H, D) in voxels

    TRE, image similarity and log det J are means over ``pair.region``. If the pair has a single label, the TRE is also
    measured in the organ's interior and at its boundary (``region_masks``).
    """
    spacing, region = pair.spacing_mm, pair.region
    row = dict.fromkeys(
        ("dice", "landmark_mm", "mask_mm", "tre_mm", "tre_interior_mm", "tre_boundary_mm"), float("nan")
    )
    row |= {"labels_lost": 0, "landmarks_missing": 0}  # failures are counted, so that no mean drops them silently
    fixed_labels, moving_labels = pair.labels
    if fixed_labels is not None and moving_labels is not None:
        warped = warp_labels(moving_labels, displacement)
        row["dice"] = dice(fixed_labels, warped)
        row["mask_mm"] = centroid_distance_mm(fixed_labels, warped, spacing)
        row["labels_lost"] = len(set(label_values(fixed_labels)) - set(label_values(warped)))
    points, partners = pair.common_landmarks()
    row["landmarks_missing"] = len(pair.landmarks[0] or {}) - len(points)
    if len(points):
        row["landmark_mm"] = landmark_distance_mm(points, partners, displacement, spacing)
    if pair.truth is not None:
        truth, known = pair.truth
        row["tre_mm"] = tre_mm(displacement, truth, region & known, spacing)
        if fixed_labels is not None and len(pair.label_names) == 1:
            for part, where in region_masks(fixed_labels, spacing).items():
                row[f"tre_{part}_mm"] = tre_mm(displacement, truth, where & known, spacing)
    row |= image_similarity(pair.fixed, warp_image(pair.moving, displacement), region)
    determinant = jacobian_determinant(displacement)
    row["logdet_mean"], row["logdet_std"] = log_jacobian(determinant, region)
    row["folding_percent"] = folding_percent(determinant, np.ones_like(region))
    row["nondiffeomorphic_percent"] = nondiffeomorphic_percent(displacement, np.ones_like(region))
    return row
