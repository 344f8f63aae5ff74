"""Bring a volume to the preprocessed grid: images and label maps.

Both functions take one 4×4 matrix, from a voxel of the wanted grid to a voxel of the stored volume, in which crop,
spacing and alignment are already multiplied together: whatever happens, a volume is interpolated once.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter

from gridreg.scans.geometry import apply_affine

ANTI_ALIAS_FROM = 1.5  # downsampling factor above which an image is smoothed first
COUNTERS = 2**18  # voxels times labels whose votes are counted at once: they fit a cache


def resample_image(data: np.ndarray, grid_to_source: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Linear interpolation of an image (W', H', D') at the grid's voxels, 0 outside it; (W, H, D) float32.

    When one step crosses more than 1.5 voxels the image is smoothed first, with the Gaussian that turns a voxel's
    point spread into that of the coarser voxel (full width at half maximum = voxel size; Cardoso et al., MICCAI 2015).
    """
    step = np.linalg.norm(grid_to_source[:3, :3], axis=1)  # in voxels of the volume, along each of its axes
    sigma = np.where(step > ANTI_ALIAS_FROM, np.sqrt(np.maximum(step**2 - 1, 0)) / np.sqrt(8 * np.log(2)), 0)
    if sigma.any():
        data = gaussian_filter(data, sigma, mode="nearest")
    # grid-constant: a position a rounding error outside the last voxel still gets that voxel's value
    matrix, offset = grid_to_source[:3, :3], grid_to_source[:3, 3]
    return affine_transform(data, matrix, offset, shape, np.float32, order=1, mode="grid-constant")


def resample_labels(labels: np.ndarray, grid_to_source: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Majority vote of the labels in each voxel of the grid, 0 outside the map; (W, H, D) int16.

    Each voxel asks the nearest label at its centre and, where the grid is coarser, at the cells of a regular
    subdivision that is as fine as the map; a tie goes to the label met first, the centre being asked first. No label
    is ever made up by interpolation, and a thin structure is not lost because a centre happened to miss it.
    """
    cells = np.ceil(np.linalg.norm(grid_to_source[:3, :3], axis=0) - 1e-3).astype(int)  # along each axis of the grid
    inner = (np.array(place) for place in product(*((np.arange(n) + 0.5) / n - 0.5 for n in cells)) if np.any(place))
    offsets = [apply_affine(grid_to_source, place) for place in (np.zeros(3), *inner)]
    present = np.bincount(labels.ravel(), minlength=1) > 0
    present[0] = True  # outside the map
    values, number = np.flatnonzero(present), np.cumsum(present, dtype=np.int16) - np.int16(1)
    numbers = number[labels]  # the labels in the map, counted through; background is 0
    ballots = np.stack([affine_transform(numbers, grid_to_source[:3, :3], offset, shape, order=0, mode="grid-constant").ravel()
                        for offset in offsets])  # fmt: skip
    winners = ballots[0].copy()
    divided = np.flatnonzero((ballots != winners).any(axis=0))
    for part in np.array_split(divided, 1 + len(values) * len(divided) // COUNTERS):
        winners[part] = _most_votes(ballots[:, part], len(values))
    return values[winners].reshape(shape).astype(np.int16)


def _most_votes(ballots: np.ndarray, candidates: int) -> np.ndarray:
    """For every column of (votes, N) numbers below ``candidates``: the one met most often, of several the one met first."""
    votes = np.zeros(ballots.shape[1] * candidates, np.int32)
    counter = np.arange(ballots.shape[1]) * candidates + ballots  # (votes, N)
    for column in counter:
        votes[column] += 1
    first = np.argmax(votes[counter], axis=0)  # argmax takes the first of several
    return np.take_along_axis(ballots, first[None], 0)[0]
