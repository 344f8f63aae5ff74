"""Label maps on a coarser grid: the vote is that of its definition, for any ratio and turn."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from gridreg.scans import resample
from gridreg.scans.geometry import apply_affine
from gridreg.scans.resample import resample_labels


def by_definition(labels: np.ndarray, grid_to_source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every voter is compared with every other; of the labels with most votes the one that is met first wins."""
    cells = np.ceil(np.linalg.norm(grid_to_source[:3, :3], axis=0) - 1e-3).astype(int)
    inner = [p for p in product(*[(np.arange(n) + 0.5) / n - 0.5 for n in cells]) if np.any(p)]
    voters = [affine_transform(labels, grid_to_source[:3, :3], apply_affine(grid_to_source, np.array(place)), shape, order=0,
                               mode="grid-constant") for place in [(0.0, 0.0, 0.0), *inner]]  # fmt: skip
    votes = [sum((voter == other).astype(int) for other in voters) for voter in voters]
    return np.take_along_axis(np.stack(voters), np.argmax(votes, axis=0)[None], 0)[0]


@pytest.mark.parametrize("seed", range(12))
def test_votes_are_counted_as_defined(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    if seed % 2:
        monkeypatch.setattr(resample, "COUNTERS", 50)  # many parts
    labels = rng.choice([0, 1, 2, 7, 300, 32767][: 2 + seed % 5], tuple(rng.integers(8, 22, 3))).astype(np.int16)
    grid_to_source = np.eye(4)
    grid_to_source[:3, :3] = np.diag(rng.choice([0.7, 1, 1.5, 2, 2.5, 3, 4], 3))
    grid_to_source[:3, 3] = rng.choice([-3, -0.5, 0, 0.25, 0.5, 1], 3)
    if seed % 3 == 0:
        turn = Rotation.from_euler("xyz", rng.uniform(-30, 30, 3), degrees=True).as_matrix()
        grid_to_source[:3, :3] = turn @ grid_to_source[:3, :3]
    shape = tuple(rng.integers(3, 9, 3))
    found = resample_labels(labels, grid_to_source, shape)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, by_definition(labels, grid_to_source, shape))


def test_a_map_without_background_and_a_grid_beside_it():
    labels = np.full((8, 8, 8), 5, np.int16)
    assert (resample_labels(labels, np.diag((2.0, 2, 2, 1)), (4, 4, 4)) == 5).all()
    beside = np.eye(4)
    beside[:3, 3] = 50
    assert not resample_labels(labels, beside, (4, 4, 4)).any()
