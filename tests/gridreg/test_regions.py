"""Interior and boundary of an organ, on a ball whose parts are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gridreg.metrics import region_masks

SHAPE, RADIUS = (33, 35, 37), 14.0


def ball(radius: float) -> np.ndarray:
    centre = (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    return np.square(np.indices(SHAPE) - centre).sum(0) <= radius**2


@pytest.mark.parametrize("spacing, thickness", [(1.0, 4.0), (2.5, 10.0), (0.5, 1.5)])
def test_the_interior_of_a_ball_is_a_ball(spacing, thickness):
    organ = ball(RADIUS)
    parts = region_masks(organ.astype(np.int16), spacing, thickness)
    assert (parts["interior"] ^ parts["boundary"]).sum() == organ.sum() and not (parts["interior"] & ~organ).any()
    inner = RADIUS - thickness / spacing
    volume = 4 / 3 * math.pi * inner**3
    assert parts["interior"].sum() == pytest.approx(volume, rel=0.12)
    assert not (parts["interior"] & ~ball(inner + 0.75)).any()
    assert not (parts["boundary"] & ball(inner - 0.75)).any()


def test_the_outermost_layer_alone_and_a_shell_that_takes_all():
    organ = ball(RADIUS).astype(np.int16)
    thin = region_masks(organ, 2.0, 1.0)["boundary"]  # centres one half voxel, 1 mm, below the surface
    neighbours = sum(np.roll(organ, step, axis) for axis in range(3) for step in (-1, 1))
    np.testing.assert_array_equal(thin, (organ > 0) & (neighbours < 6))
    assert not region_masks(organ, 1.0, 100.0)["interior"].any()


def test_labels_are_one_organ_unless_chosen():
    labels = ball(RADIUS).astype(np.int16)
    whole = region_masks(labels, 1.0, 3.0)["interior"]
    labels[:17] *= 2
    np.testing.assert_array_equal(region_masks(labels, 1.0, 3.0)["interior"], whole)  # no surface between the halves
    half = region_masks(labels, 1.0, 3.0, values=[2])
    assert 0 < half["interior"].sum() < whole.sum() / 2 and not half["boundary"][labels != 2].any()


def test_the_field_of_view_is_no_surface():
    assert region_masks(np.ones(SHAPE, np.int16), 1.0, 3.0)["interior"].all()
    assert not any(mask.any() for mask in region_masks(np.zeros(SHAPE, np.int16), 1.0, 3.0).values())


def test_a_thickness_of_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        region_masks(np.ones(SHAPE, np.int16), 1.0, 0.0)
