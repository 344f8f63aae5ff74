"""Lesson 2: the bases, the patterns and the folds that the notebook shows."""

from __future__ import annotations

import numpy as np
import pytest

from gridreg.upsampling import METHODS, displacement_bound
from study.lessons.basis import (
    PATTERNS,
    SHAPE,
    bound_figure,
    bound_in_spacings,
    cube_figure,
    field,
    folds,
    least_determinants,
    line_figure,
    pattern,
    plane_figure,
    profile,
    properties,
)
from study.lessons.sliders import picture


def test_the_table_of_properties():
    table = properties(7, 61)
    assert (table["constant: error"] < 1e-6).all()
    assert (table["line: error"] < 1e-6).tolist() == [True, True, False]
    assert table["value at its own control point"].tolist() == pytest.approx([1, 2 / 3, 0.689], abs=1e-3)
    assert table["largest jump of the slope"].idxmax() == "linear"


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_have_unit_size_and_stay_in_their_dimensions(name, dimensions):
    moved = pattern(name, 5, dimensions)
    assert 0.8 < np.abs(moved).max() <= 1
    if dimensions == 2:
        assert not moved[2].any()
        assert (moved[..., 0] == moved[..., 1]).all()


def test_a_linear_field_reaches_a_control_point_and_a_line_is_its_own_profile():
    u = field("one point", 5, 0.5, "trilinear", 2)
    assert u[0].max() == pytest.approx(0.5 * (SHAPE[0] - 1) / 4) and not u[1:].any()
    np.testing.assert_allclose(profile(np.arange(4.0), 7, "bspline"), np.arange(7) / 2, atol=1e-12)


def test_nothing_folds_at_rest_and_a_checkerboard_folds_at_once():
    for method in METHODS:
        assert folds(field("random", 5, 0.0, method))["least det J"] == pytest.approx(1)
        assert folds(field("checkerboard", 7, 1.5, method))["volume turned over (%)"] > 0


@pytest.mark.parametrize("name", PATTERNS)
def test_the_bound_forbids_folds_and_the_diagonal_squeeze_attains_it(name):
    assert min(least_determinants(name, 7, (0.3, 1.0, 5.0), True, "bspline")) > 0
    bound = bound_in_spacings(7)
    assert bound == pytest.approx(0.4, abs=0.01)
    just_below, just_above = least_determinants(name, 7, (0.95 * bound, 1.05 * bound), False, "bspline")
    assert (just_below > 0 >= just_above) == (name == "diagonal squeeze")
    if name == "one point":
        assert least_determinants(name, 7, (2.0,), False, "bspline")[0] > 0
    if name == "checkerboard":  # folds in the corners, where the bound is stricter
        assert just_below < 0 < least_determinants(name, 7, (0.16,), False, "bspline")[0]
        corner = float(displacement_bound((7, 7, 7), SHAPE)[0, 0, 0, 0]) * 6 / (SHAPE[0] - 1)
        assert corner == pytest.approx(0.12, abs=0.005)


def test_an_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match="pattern must be one of random"):
        pattern("spiral", 5, 2)


def test_figures_are_drawn():
    for figure in (
        line_figure(4, 9, 1.0),
        plane_figure("random", 5, 0.8),
        cube_figure("squeeze", 4, 0.5),
        bound_figure("one point", 5, 1.0),
    ):
        assert picture(figure).data.startswith(b"\x89PNG")
