"""The oracle error, against dense least squares and fields that a grid can, or cannot, express."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gridreg.metrics import tre_mm
from gridreg.scans.pair import Pair
from gridreg.upsampling import METHODS, basis, upsample
from study.evaluation import oracle

SHAPE, GRID = (13, 11, 9), (5, 4, 3)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def dense_basis(method: str, grid=GRID) -> np.ndarray:
    """(N, G): what the oracle never forms."""
    x, y, z = (basis(n, g, method, dtype=torch.float64).numpy() for n, g in zip(SHAPE, grid))
    return np.kron(np.kron(x, y), z)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["all", "block", "scattered"])
def test_it_is_the_least_squares_solution(rng, method, part):
    region = {"all": np.ones(SHAPE, bool), "block": np.zeros(SHAPE, bool), "scattered": rng.random(SHAPE) < 0.2}[part]
    region[2:7, 3:9, 1:5] = True
    truth = rng.normal(size=(3, *SHAPE))
    a, b = dense_basis(method)[region.ravel()], truth[:, region].T
    residual = b - a @ np.linalg.lstsq(a, b, rcond=None)[0]
    found = b - a @ oracle.best_control_points(truth, region, GRID, method).reshape(3, -1).T
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(residual), rel=5e-4)
    in_mm = 2.5 * np.linalg.norm(found, axis=1).mean()
    assert oracle.oracle_error_mm(truth, region, 2.5, GRID, method) == pytest.approx(in_mm, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_grid_can_express_costs_nothing(rng, method):
    control_points = rng.normal(size=(3, *GRID))
    truth = upsample(torch.from_numpy(control_points)[None], SHAPE, method)[0].numpy()
    everywhere = np.ones(SHAPE, bool)
    assert oracle.oracle_error_mm(truth, everywhere, 1.0, GRID, method) < 1e-4
    np.testing.assert_allclose(oracle.best_control_points(truth, everywhere, GRID, method), control_points, atol=1e-3)


def test_a_grid_as_fine_as_the_image_costs_nothing(rng):
    truth, region = rng.normal(size=(3, *SHAPE)), rng.random(SHAPE) < 0.5
    assert oracle.oracle_error_mm(truth, region, 1.0, SHAPE) == pytest.approx(0, abs=1e-5)


def test_nested_grids_err_less_and_less():
    x = np.indices(SHAPE) / 4
    truth = np.stack([np.sin(x[0] + x[1]), np.cos(x[1]), np.sin(x[2] - x[0])])
    region = np.square(np.indices(SHAPE) - np.array([6, 5, 4]).reshape(3, 1, 1, 1)).sum(0) < 25
    grids = [(2, 2, 2), (3, 3, 3), (5, 5, 5)]  # each holds the fields of the one before
    errors = [oracle.oracle_error_mm(truth, region, 1.0, grid) for grid in grids]
    assert errors[0] > errors[1] > errors[2] > 0


def test_squared_errors_add_up(rng):
    """mean |u - truth|² = mean |u - best|² + mean |best - truth|², for any u of the grid: Pythagoras."""
    truth, region = rng.normal(size=(3, *SHAPE)), rng.random(SHAPE) < 0.6
    best, other = oracle.best_control_points(truth, region, GRID, "trilinear"), rng.normal(size=(3, *GRID))
    best, other = (upsample(torch.from_numpy(c)[None], SHAPE)[0].numpy() for c in (best, other))
    squared = [np.square(a - b).sum(0)[region].mean() for a, b in ((other, truth), (other, best), (best, truth))]
    assert squared[0] == pytest.approx(squared[1] + squared[2], rel=1e-5)
    assert oracle.oracle_error_mm(truth, region, 3.0, GRID) == pytest.approx(tre_mm(best, truth, region, 3.0), rel=1e-6)


def test_a_control_point_that_reaches_nothing_stays_zero(rng):
    region = np.zeros(SHAPE, bool)
    region[:4] = True  # the spacing along x is 3: only the control points at voxels 0 and 3 reach it
    found = oracle.best_control_points(rng.normal(size=(3, *SHAPE)), region, GRID, "trilinear")
    assert not found[:, 2:].any() and found[:, :2].all()


class OnePair:
    """As much of a preprocessed dataset as the table reads: a pair with truth, and one without."""

    def __init__(self, truth, known, labels):
        self.known, self.map = (truth, known), labels

    def pairs(self, split):
        return {"test": [("a", "b"), ("a", "c")], "val": []}[split]

    def pair(self, fixed, moving):
        image, known = np.zeros(SHAPE, np.float32), self.known if moving == "b" else None
        return Pair("", image, image, np.eye(4), 2.0, (), (), labels=(self.map, None), truth=known)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_table_has_a_row_for_every_pair_with_truth_and_grid(rng, labelled):
    truth, known = rng.normal(size=(3, *SHAPE)), rng.random(SHAPE) < 0.9
    labels = (rng.random(SHAPE) < 0.5).astype(np.int16) * 3
    table = oracle.oracle_table(OnePair(truth, known, labels if labelled else None), "pelvis", [3, GRID])
    assert list(table.columns) == ["dataset", "fixed", "moving", "grid", "oracle_mm"]
    assert table["grid"].tolist() == ["3x3x3", "5x4x3"] and set(table["moving"]) == {"b"}
    region = known & (labels > 0) if labelled else known
    assert table["oracle_mm"][1] == oracle.oracle_error_mm(truth, region, 2.0, GRID)


def test_what_is_refused(rng):
    truth, region = rng.normal(size=(3, *SHAPE)), np.zeros(SHAPE, bool)
    assert np.isnan(oracle.oracle_error_mm(truth, region, 1.0, GRID))
    with pytest.raises(ValueError, match="empty"):
        oracle.best_control_points(truth, region, GRID, "trilinear")
    with pytest.raises(ValueError, match="grid_size"):
        oracle.oracle_error_mm(truth, ~region, 1.0, 12)
    with pytest.raises(ValueError, match="expected \\(3, W, H, D\\)"):
        oracle.oracle_error_mm(truth[:, 1:], ~region, 1.0, GRID)
