"""Bring a volume to the preprocessed grid: intensities to [0, 1], images, label maps and displacement fields.

Every function takes one 4×4 matrix, from a voxel of the wanted grid to a voxel of the stored volume, in which crop,
spacing and alignment are already multiplied together: whatever happens, a volume is interpolated once.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter, map_coordinates

from gridreg.scans.volumes import apply_affine

BACKGROUND_SHARE = 0.1  # a volume with this share of voxels at its lowest value has a background, e.g. skull-stripped
PERCENTILES = (0.1, 99.9)
ANTI_ALIAS_FROM = 1.5  # downsampling factor above which an image is smoothed first


def normalise(data: np.ndarray) -> np.ndarray:
    """Intensities to [0, 1] as float32, per volume, robust to a few extreme voxels.

    With a background (skull-stripped, or air stored as one value) the background becomes 0 and the 99.9th percentile
    of the rest 1; without one, the 0.1st and 99.9th percentile become 0 and 1. What lies outside is clipped.
    """
    low, high = data.min(), data.max()
    foreground = data[data > low]
    if foreground.size < (1 - BACKGROUND_SHARE) * data.size:
        high = np.percentile(foreground, PERCENTILES[1])
    else:
        low, high = np.percentile(data, PERCENTILES)
        if not high > low:  # fewer than 0.2 % of the voxels differ from the rest
            low, high = data.min(), data.max()
    return np.clip((data - low) / (high - low), 0, 1).astype(np.float32)


def steps(grid_to_source: np.ndarray) -> np.ndarray:
    """How many voxels of the stored volume one step on the grid crosses, along each axis of the volume, (3,)."""
    return np.linalg.norm(grid_to_source[:3, :3], axis=1)


def resample_image(data: np.ndarray, grid_to_source: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Linear interpolation of an image (W', H', D') at the grid's voxels, 0 outside it; (W, H, D) float32.

    When one step crosses more than 1.5 voxels the image is smoothed first, with the Gaussian that turns a voxel's
    point spread into that of the coarser voxel (full width at half maximum = voxel size; Cardoso et al., MICCAI 2015).
    """
    factor = steps(grid_to_source)
    sigma = np.where(factor > ANTI_ALIAS_FROM, np.sqrt(np.maximum(factor**2 - 1, 0)) / np.sqrt(8 * np.log(2)), 0)
    if sigma.any():
        data = gaussian_filter(data, sigma, mode="nearest")
    # grid-constant: a position a rounding error outside the last voxel still gets that voxel's value
    return affine_transform(
        data, grid_to_source[:3, :3], grid_to_source[:3, 3], shape, np.float32, order=1, mode="grid-constant"
    )


def resample_labels(labels: np.ndarray, grid_to_source: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Majority vote of the labels in each voxel of the grid, 0 outside the map; (W, H, D) int16.

    Each voxel asks the nearest label at its centre and, where the grid is coarser, at the cells of a regular
    subdivision that is as fine as the map; a tie goes to the label met first, the centre being asked first. No label
    is ever made up by interpolation, and a thin structure is not lost because a centre happened to miss it.
    """
    cells = np.ceil(np.linalg.norm(grid_to_source[:3, :3], axis=0) - 1e-3).astype(int)  # along each axis of the grid
    offsets = [(np.arange(n) + 0.5) / n - 0.5 for n in cells]
    places = [np.zeros(3), *(np.array(p) for p in product(*offsets) if np.any(p))]
    ballots = [
        affine_transform(
            labels, grid_to_source[:3, :3], apply_affine(grid_to_source, place), shape, order=0, mode="grid-constant"
        )
        for place in places
    ]
    best, most = ballots[0].copy(), np.zeros(shape, np.int16)
    for ballot in ballots:
        votes = sum((ballot == other).astype(np.int16) for other in ballots)
        np.copyto(best, ballot, where=votes > most)
        np.maximum(most, votes, out=most)
    return best.astype(np.int16)


def resample_field(
    field_mm: np.ndarray, lattice: np.ndarray, grid: np.ndarray, to_source: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Carry a subject's true deformation to the grid: e(q) = p + d(p) - q with p = to_source(q); (3, W, H, D) mm.

    field_mm: d on its own lattice, world RAS mm; lattice, grid: their voxel → world affines; to_source: (4, 4), world
    of the grid → world of the subject. Linear between lattice points, as the field is defined; constant beyond them.
    """
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)  # (W, H, D, 3)
    q = apply_affine(grid, voxels)
    p = apply_affine(to_source, q)
    at = np.moveaxis(apply_affine(np.linalg.inv(lattice), p), -1, 0)
    d = np.stack([map_coordinates(component, at, order=1, mode="nearest") for component in field_mm])
    return (np.moveaxis(p - q, -1, 0) + d).astype(np.float32)
