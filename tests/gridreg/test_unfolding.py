"""Folds are found as the metrics find them, and taken out without touching anything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gridreg import metrics
from gridreg.spatial import voxel_coordinates
from gridreg.unfolding import folds, unfold
from gridreg.upsampling import upsample

SHAPE, GRID = (22, 20, 18), (8, 7, 6)
EVERYWHERE = np.ones(SHAPE, bool)


def rough(size: float, seed: int = 0) -> torch.Tensor:
    return size * torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(seed))


def folding(control_points: torch.Tensor, upsampling: str) -> tuple[float, float]:
    """Both metrics, in percent."""
    u = upsample(control_points, SHAPE, upsampling)[0].numpy()
    determinant = metrics.jacobian_determinant(u)
    return metrics.folding_percent(determinant, EVERYWHERE), metrics.nondiffeomorphic_percent(u, EVERYWHERE)


@pytest.mark.parametrize("seed", range(3))
def test_every_fold_of_the_metrics_is_found(seed):
    u = upsample(rough(1.2, seed), SHAPE, "bspline")[0]
    found = folds(u).numpy()
    negative = metrics.jacobian_determinant(u.numpy()) <= 0
    assert negative.any() and not (negative & ~found).any()
    assert metrics.nondiffeomorphic_percent(u.numpy(), ~found) == 0
    assert found.mean() < 0.9


def test_a_turn_and_a_smooth_field_have_no_folds():
    """A turn by 80° is steep, and folds nowhere."""
    assert not folds(upsample(rough(0.2), SHAPE, "bspline")[0]).any()
    x = voxel_coordinates(SHAPE)
    angle = torch.tensor(80.0).deg2rad()
    turned = torch.stack([angle.cos() * x[0] - angle.sin() * x[1], angle.sin() * x[0] + angle.cos() * x[1], x[2]])
    assert not folds(turned - x).any()
    assert folds(-2 * x).all()  # everything turned over


@pytest.mark.parametrize("upsampling", ["trilinear", "bspline", "deconv"])
@pytest.mark.parametrize("seed", range(2))
def test_folds_are_taken_out(seed, upsampling):
    control_points = rough(1.5, seed)
    assert max(folding(control_points, upsampling)) > 0
    found = unfold(control_points, SHAPE, upsampling)
    assert folding(found, upsampling) == (0, 0)


def test_a_fold_that_touches_every_control_point_little():
    """One voxel, at which no control point has half of the weight."""
    for size in np.arange(2, 20, 0.1):
        control_points = torch.zeros(1, 3, *GRID)
        control_points[0, 0, 3, 3, 3], control_points[0, 0, 4, 3, 3] = size, -size
        marked = folds(upsample(control_points, SHAPE, "bspline")[0])
        if marked.any():
            break
    assert 0 < marked.sum() < 40
    assert folding(unfold(control_points, SHAPE, "bspline"), "bspline") == (0, 0)


def test_only_what_lies_around_a_fold_moves():
    control_points = rough(0.1)
    control_points[0, 0, 1, 1, 1] += 8
    found = unfold(control_points, SHAPE, "bspline")
    assert folding(found, "bspline") == (0, 0)
    assert torch.equal(found[:, :, 6:], control_points[:, :, 6:])
    assert unfold(found, SHAPE, "bspline") is found
