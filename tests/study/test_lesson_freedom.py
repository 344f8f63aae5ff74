"""Lesson 1: the errors add up, the solver solves, and the numbers do what the notebook says they do."""

from __future__ import annotations

from dataclasses import replace

import ipywidgets
import numpy as np
import pytest
from matplotlib.figure import Figure

from study.lessons import sliders as lesson_sliders
from study.lessons.freedom import (
    GRIDS,
    HOMOGENEOUS,
    MARGIN,
    SIZE,
    TEXTURED,
    _basis,
    _coordinates,
    _grams,
    best_fit,
    best_grid,
    conjugate_gradients,
    freedom_figure,
    images,
    outcome,
    register,
    tissue,
    true_displacement,
    valley_figure,
)
from study.lessons.sliders import explore, picture, slider


@pytest.mark.parametrize("method", ["trilinear", "bspline", "deconv"])
@pytest.mark.parametrize("grid", [3, 10])
def test_approximation_and_estimation_error_add_up_exactly(method, grid):
    found = outcome(replace(HOMOGENEOUS, method=method), grid)
    assert found.total == pytest.approx(found.approximation + found.estimation, rel=1e-9)


def test_the_fit_is_a_projection_and_a_dense_grid_fits_everything():
    truth = true_displacement(0.5)
    fit = best_fit(truth, 6, "trilinear")
    np.testing.assert_allclose(best_fit(fit, 6, "trilinear"), fit, atol=1e-9)
    np.testing.assert_allclose(best_fit(truth, SIZE, "trilinear"), truth, atol=1e-9)


def test_fixed_is_moving_at_the_true_displacement():
    """Without noise, on the same formula the images are made of."""
    fixed, moving = images(replace(HOMOGENEOUS, noise=0.0))
    x = _coordinates()
    np.testing.assert_allclose(moving[0, MARGIN:-MARGIN, MARGIN:-MARGIN], tissue(x, HOMOGENEOUS.texture))
    np.testing.assert_allclose(fixed[1], tissue(x + true_displacement(0.0)[1], HOMOGENEOUS.texture))


def test_a_shift_is_recovered():
    shift = np.array([1.25, -0.75]).reshape(2, 1, 1)
    fixed, moving = tissue(_coordinates() + shift, 0.15), tissue(_coordinates(MARGIN), 0.15)
    found = register(fixed[None], moving[None], 5, 1e-4, "trilinear")[0]
    assert np.abs(found - shift).max() < 0.15


def test_conjugate_gradients_solve_a_batch():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((18, 18))
    matrix = factor @ factor.T / 18 + np.eye(18)
    right = rng.standard_normal((2, 2, 3, 3))
    solved = conjugate_gradients(lambda x: (x.reshape(2, 18) @ matrix).reshape(x.shape), right, np.copy)
    np.testing.assert_allclose(solved.reshape(2, 18), np.linalg.solve(matrix, right.reshape(2, 18).T).T, atol=0.02)


def test_bending_energy_is_that_of_the_dense_field():
    c = np.random.default_rng(1).standard_normal((5, 5))
    u = _basis(5, "bspline") @ c @ _basis(5, "bspline").T
    dense = sum(np.square(d).mean() * times for d, times in (
        (np.diff(u, 2, axis=0), 1), (np.diff(np.diff(u, axis=0), axis=1), 2), (np.diff(u, 2, axis=1), 1)))  # fmt: skip
    g = _grams(5, "bspline")
    assert (c * (g[2] @ c @ g[0] + 2 * g[1] @ c @ g[1] + g[0] @ c @ g[2])).sum() == pytest.approx(dense)


def test_what_the_notebook_claims():
    totals = {grid: outcome(HOMOGENEOUS, grid).total for grid in GRIDS}
    assert 3 < best_grid(HOMOGENEOUS) < SIZE  # a minimum in the middle …
    assert totals[SIZE] > 1.3 * totals[best_grid(HOMOGENEOUS)]  # … and the dense field loses,
    assert best_grid(TEXTURED) == SIZE  # but not everywhere: with texture and fine motion it is the best of all
    dense, coarse = (outcome(TEXTURED, grid).total for grid in (SIZE, best_grid(HOMOGENEOUS)))
    assert dense < coarse / 2
    blind = [outcome(replace(HOMOGENEOUS, texture=0.0, fine=0.5), grid) for grid in GRIDS]
    assert (
        min(o.total for o in blind) > 1.5 and blind[-1].approximation < 1e-9
    )  # no grid sees what the image does not show
    weights = (0.0001, 0.001, 0.003, 0.01, 0.1, 1.0)
    by_grid = {g: [outcome(replace(HOMOGENEOUS, smoothness=s), g).total for s in weights] for g in (5, 6, SIZE)}
    assert min(by_grid[SIZE]) < min(by_grid[5]) and max(by_grid[5]) / min(by_grid[5]) < 3 < 6 < max(
        by_grid[SIZE]
    ) / min(by_grid[SIZE])
    assert (
        outcome(replace(HOMOGENEOUS, noise=0.12), 20).estimation
        > outcome(replace(HOMOGENEOUS, noise=0.01), 20).estimation
    )
    smooth = replace(HOMOGENEOUS, smoothness=0.1)
    assert outcome(smooth, SIZE).total < totals[SIZE]  # regularisation removes degrees of freedom too


def test_figures_are_drawn():
    assert isinstance(freedom_figure(5, noise=0.02), Figure)
    assert picture(valley_figure({"one": HOMOGENEOUS}, [0.003, 0.1])).data.startswith(b"\x89PNG")


def test_a_slider_draws_the_picture_anew_in_place(monkeypatch):
    shown, drawn = [], []

    class Handle:
        def update(self, image):
            shown.append(image)

    def display(what, display_id=False):
        shown.append(what)
        return Handle()

    def draw(height):
        drawn.append(height)
        return Figure(figsize=(1, height), label=f"height {height}")

    monkeypatch.setattr(lesson_sliders, "display", display)
    controls = explore(draw, height=slider("height", [1, 2], 1))
    controls["height"].value = 2
    assert drawn == [1, 2]
    box, before, after = shown
    assert isinstance(box, ipywidgets.Box) and before.data != after.data and after.alt == "height 2"
