"""The bound on control points: proven for the continuous spline and at voxels, nearly attained by adversaries."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.optimize import minimize

from gridreg import metrics
from gridreg.upsampling import BORDER_WEIGHTS, SPLINE_SUM, SPLINE_SUM_BEYOND, basis, displacement_bound, upsample

CHOI_LEE = 2.479472335  # their constant K3 for uniform B-splines in three dimensions
SIGNS = [(1, a, b) for a, b in product((1, -1), repeat=2)]
CASES = [  # (grid, shape): isotropic, anisotropic, few and many voxels a spacing, never a multiple of one
    ((2, 2, 2), (9, 9, 9)),
    ((3, 3, 3), (10, 10, 10)),
    ((4, 4, 4), (11, 11, 11)),
    ((5, 5, 5), (16, 16, 16)),
    ((5, 5, 5), (32, 32, 26)),
    ((6, 9, 12), (14, 20, 29)),
    ((8, 8, 8), (8, 8, 8)),
    ((10, 10, 10), (32, 32, 26)),
    ((15, 2, 4), (17, 9, 30)),
    ((12, 11, 15), (17, 19, 20)),
]
cases = pytest.mark.parametrize(("grid", "shape"), CASES, ids=str)


def bound_of(grid, shape) -> np.ndarray:
    return displacement_bound(grid, shape, dtype=torch.float64).numpy()


def dense(control: np.ndarray, shape) -> np.ndarray:
    return upsample(torch.from_numpy(np.ascontiguousarray(control))[None], shape, "bspline")[0].numpy()


def folds(control: np.ndarray, shape) -> tuple[float, float]:
    """(folding_percent, nondiffeomorphic_percent) of the whole image."""
    field, everywhere = dense(control, shape), np.ones(shape, bool)
    determinant = metrics.jacobian_determinant(field)
    return metrics.folding_percent(determinant, everywhere), metrics.nondiffeomorphic_percent(field, everywhere)


# ---- The spline itself, written once more: knots, and the knot parameter at which it reaches a position --------------


@cache
def spline(g: int) -> tuple[BSpline, BSpline, int]:
    """All basis functions (knots one apart), the position in control spacings that they reach, number of intervals."""
    k = min(3, g - 1)
    knots = np.r_[np.zeros(k), np.arange(g - k + 1.0), np.full(k, g - k)]
    return BSpline(knots, np.eye(g), k), BSpline(knots, np.arange(float(g)), k), g - k


def state(g: int, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(len(t), g) basis functions at the knot parameters t, and their derivatives by position in control spacings."""
    functions, position, _ = spline(g)
    return functions(t), functions(t, nu=1) / position(t, nu=1)[:, None]


def directional(states, signs) -> np.ndarray:
    """s · ∇φ_c at the product of the states' points: (points x, y, z, gw, gh, gd)."""
    total = 0.0
    for axis, sign in enumerate(signs):
        factors = [derivative if a == axis else value for a, (value, derivative) in enumerate(states)]
        total = total + sign * np.einsum("xi,yj,zk->xyzijk", *factors)
    return total


def test_the_constant_of_choi_and_lee():
    """Uniform interior of a long clamped spline, all control points alike: the largest sum is theirs."""

    def minus_sum(u):
        states = [state(12, np.array([3 + v % 1])) for v in u]
        return -max(np.abs(directional(states, signs)).sum() for signs in SIGNS)

    rng = np.random.default_rng(0)
    largest = -min(minimize(minus_sum, rng.random(3), method="Nelder-Mead").fun for _ in range(6))
    assert largest == pytest.approx(CHOI_LEE, abs=1e-5)


# ---- Proof that SPLINE_SUM holds everywhere between the points of a lattice ----------------------------------------------


def interval(g: int, number: int, steps: int):
    """One knot interval: nodal values and derivatives (steps + 1, 4), weighted, and three bounds a step.

    The bounds are Σ |E|, Σ |B''| and Σ |E''| over the basis functions B with E = dB/dx, derivatives by the knot
    parameter; from points eight times as close, with 1 % in reserve.
    """
    functions, position, _ = spline(g)
    weights = np.ones(g)
    for distance in (1, 0):
        if g > 2 or distance == 0:
            weights[[distance, -1 - distance]] = BORDER_WEIGHTS[distance]
    t = np.clip(np.linspace(number, number + 1, 8 * steps + 1), number, number + 1 - 1e-12)
    none = np.zeros((len(t), 1))
    b, b1, b2, b3 = [functions(t, nu=m) * weights if m <= functions.k else none for m in range(4)]
    p1, p2, p3 = [position(t, nu=m)[:, None] if m <= position.k else none for m in (1, 2, 3)]
    e = b1 / p1
    e1 = (b2 - e * p2) / p1
    e2 = (b3 - 2 * e1 * p2 - e * p3) / p1
    sums = [np.abs(v).sum(1) for v in (e, b2 + 0 * b, e2)]
    bounds = [1.01 * np.max([v[i : len(v) - 8 + i : 8] for i in range(9)], axis=0) for v in sums]
    here = slice(number, number + functions.k + 1)
    padding = ((0, 0), (0, 3 - functions.k))
    return *(np.pad(v[::8, here], padding) for v in (b, e)), *bounds


def upper_bound(x, y, z, steps: int) -> float:
    """Of Σ_c w_c |s · ∇φ_c| over a product of knot intervals.

    Inside a cell of the lattice a function differs from its linear interpolation along an axis by at most an eighth of
    its second derivative times the squared step; a linear function's absolute value is largest at a corner.
    """
    (bx, ex), (by, ey), (bz, ez) = ([torch.from_numpy(v).float() for v in axis[:2]] for axis in (x, y, z))
    along_z = torch.stack([bz, ez]).transpose(1, 2).flatten(1)
    largest = torch.zeros(steps + 1, steps + 1, steps + 1)
    for i, (_, a, b) in product(range(steps + 1), SIGNS):
        slope = torch.einsum("i,yj->yij", ex[i], by) + a * torch.einsum("i,yj->yij", bx[i], ey)
        value = b * torch.einsum("i,yj->yij", bx[i], by)
        sums = (torch.stack([slope, value], dim=-1).flatten(0, -2) @ along_z).abs_()
        largest[i] = torch.maximum(largest[i], sums.view(steps + 1, -1, steps + 1).sum(1))
    corners = torch.nn.functional.max_pool3d(largest[None], 2, 1)[0].numpy()
    remainder = 0.0
    for axis in range(3):
        e, b2, e2 = ([v[m].reshape([-1 if b == a else 1 for b in range(3)]) for a, v in enumerate((x, y, z))]
                     for m in (2, 3, 4))  # fmt: skip
        remainder = remainder + e2[axis] + b2[axis] * (e[axis - 1] + e[axis - 2])
    return float((corners + remainder / (8 * steps**2)).max())


def test_the_constants_of_the_continuous_spline_are_proven():
    """On every kind of knot interval of every axis, half an axis being enough. Grids beyond 8 have those of 8."""
    steps, kinds = 24, {}
    for g in range(2, 9):
        for number in range((spline(g)[2] + 1) // 2):
            made = interval(g, number, steps)
            kinds.setdefault(tuple(np.ravel(made[:2]).round(9)), (g, made))  # the border of a grid of 6 is that of 8
    assert len(kinds) == 8
    for triple in combinations_with_replacement(kinds.values(), 3):
        largest_grid = max(g for g, _ in triple)
        assert upper_bound(*(made for _, made in triple), steps) <= SPLINE_SUM.get(largest_grid, SPLINE_SUM_BEYOND)


# ---- Fields within the bound do not fold -----------------------------------------------------------------------------


@cases
def test_random_control_points_at_the_bound_do_not_fold(grid, shape):
    rng, bound = np.random.default_rng(0), bound_of(grid, shape)
    for _ in range(3):
        assert folds(rng.choice([-1.0, 1.0], bound.shape) * bound, shape) == (0, 0)
    checkerboard = (-1.0) ** np.indices(grid).sum(0)
    for signs in SIGNS:
        assert folds(checkerboard * np.reshape(signs, (3, 1, 1, 1)) * bound, shape) == (0, 0)


def adversary(grid, shape, steps, place, signs) -> np.ndarray:
    """Control points at the bound that make det J least, were the rows of the Jacobian differences ``steps`` at
    ``place``: the sign of each is that of -s · ∇φ_c, so that J s = (1 - Σ_c r_c |s · ∇φ_c|) s.
    """
    gradient = sum(
        sign * np.einsum("i,j,k->ijk", *(steps[a][place[a]] if a == b else basis_at(a, shape, grid)[place[a]]
                                         for a in range(3)))
        for b, sign in enumerate(signs)
    )  # fmt: skip
    return -np.sign(gradient) * np.reshape(signs, (3, 1, 1, 1)) * bound_of(grid, shape)


def basis_at(axis: int, shape, grid) -> np.ndarray:
    return basis(shape[axis], grid[axis], "bspline", dtype=torch.float64).numpy()


def worst_at_voxels(grid, shape, rng, tries: int = 24) -> list[np.ndarray]:
    """Adversaries of random voxels and sign patterns, and of the corners: forward and central differences."""
    forward = [np.diff(basis_at(a, shape, grid), axis=0, append=np.nan) for a in range(3)]
    central = [np.gradient(basis_at(a, shape, grid), axis=0) for a in range(3)]
    spacing = [(n - 1) / (g - 1) for n, g in zip(shape, grid)]
    fields = []
    for number in range(tries):
        place = [rng.integers(n - 1) if number else 0 for n in shape]
        steps = [s * h for s, h in zip((forward, central)[number % 2], spacing)]
        fields.append(adversary(grid, shape, steps, place, SIGNS[rng.integers(4)]))
    return fields


@cases
def test_adversaries_at_voxels_do_not_fold_within_the_bound_and_do_beyond(grid, shape):
    beyond = []
    for control in worst_at_voxels(grid, shape, np.random.default_rng(1)):
        assert folds(control, shape) == (0, 0)
        beyond.append(folds(3 * control, shape))
    assert min(max(column) for column in zip(*beyond)) > 0  # so that this test could fail


@cases
def test_the_bound_is_nearly_attained(grid, shape):
    """The continuous spline: det J > 0 for the worst signs at any point, and < 0 for some at 1.5 times the bound."""
    rng, least, bound = np.random.default_rng(2), np.inf, bound_of(grid, shape)
    spacing = np.array([(n - 1) / (g - 1) for n, g in zip(shape, grid)])
    for number in range(150):
        states = [state(g, np.array([rng.random() * spline(g)[2] if number else 0.0])) for g in grid]
        signs = SIGNS[rng.integers(4)]
        control = -np.sign(directional(states, signs)[0, 0, 0]) * np.reshape(signs, (3, 1, 1, 1)) * bound
        gradients = np.stack([directional(states, unit)[0, 0, 0] for unit in np.eye(3)])  # by control spacings
        gradient = np.einsum("aijk,bijk->ab", control / spacing[:, None, None, None], gradients)
        assert np.linalg.det(np.eye(3) + gradient) > 0 and np.abs(gradient).sum(1).max() < 1
        least = min(least, np.linalg.det(np.eye(3) + 1.5 * gradient))
    assert least < 0  # half as much again, and some of these fold


@pytest.mark.parametrize(("grid", "shape"), [((5, 5, 5), (16, 16, 16)), ((8, 7, 6), (20, 15, 22))])
def test_gradient_ascent_finds_no_fold(grid, shape):
    """Down the least determinants, control points pressed to the bound; at three times it the same search folds."""
    for factor, folded in ((1.0, False), (3.0, True)):
        bound = factor * displacement_bound(grid, shape)
        free = torch.randn(3, *grid, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimiser = torch.optim.Adam([free], lr=0.2)
        for _ in range(40):
            field = upsample((bound * free.tanh())[None], shape, "bspline")[0]
            columns = [field.diff(dim=1 + a).narrow(1 + (a + 1) % 3, 0, shape[(a + 1) % 3] - 1)
                       .narrow(1 + (a + 2) % 3, 0, shape[(a + 2) % 3] - 1) for a in range(3)]  # fmt: skip
            jacobian = torch.stack(columns, dim=-1).movedim(0, -2) + torch.eye(3)
            determinant = torch.linalg.det(jacobian)
            loss = determinant.flatten().topk(20, largest=False).values.mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        control = (bound * free.detach().sign()).double().numpy()
        assert (determinant.min().item() < 0) == folded
        assert (sum(folds(control, shape)) > 0) == folded


@pytest.mark.parametrize(("grid", "shape"), CASES[3:8], ids=str)
def test_read_linearly_between_voxels_nothing_folds(grid, shape):
    """The trilinear field's own Jacobian at random places inside cells, for adversaries of the voxels."""
    rng = np.random.default_rng(3)
    for control in worst_at_voxels(grid, shape, rng, tries=12):
        phi = dense(control, shape) + np.indices(shape)
        for _ in range(4):
            at = rng.random(3).round(rng.integers(3))  # now and then on an edge or at a corner
            columns = []
            for axis in range(3):
                edges = np.diff(phi, axis=1 + axis)
                for other in ((axis + 1) % 3, (axis + 2) % 3):
                    low, high = (np.take(edges, range(o, shape[other] - 1 + o), axis=1 + other) for o in (0, 1))
                    edges = (1 - at[other]) * low + at[other] * high
                columns.append(edges)
            assert (np.linalg.det(np.moveaxis(np.stack(columns, -1), 0, -2)) > 0).all()


# ---- How large it is -------------------------------------------------------------------------------------------------


def test_how_large_the_bound_is():
    """Beside Choi and Lee's 0.4033 control spacings, for which no border exists."""
    spacing = 63 / 9
    bound = displacement_bound((10, 10, 10), (64, 64, 64))[0] / spacing
    assert 0.97 / CHOI_LEE < bound[2:-2, 2:-2, 2:-2].min() and bound.max() < 1 / CHOI_LEE
    torch.testing.assert_close(bound[2:-2, 2:-2, 2:-2], bound.max().expand(6, 6, 6))  # inside it is one number
    assert bound[0, 5, 5] / bound[5, 5, 5] == pytest.approx(BORDER_WEIGHTS[0])
    assert bound[0, 1, 0] / bound[5, 5, 5] == pytest.approx(BORDER_WEIGHTS[0] ** 2 * BORDER_WEIGHTS[1])
    equal = displacement_bound((2, 2, 2), (10, 10, 10)) / 9  # nothing but corners: 1/6 of a spacing
    assert 0.97 / 6 < equal.min() and equal.max() < 1 / 6
    assert displacement_bound(5, 32).max() > 1 / CHOI_LEE * 31 / 4  # a short spline bends less than a uniform one


def test_the_bound_follows_the_spacing_of_each_axis():
    bound = displacement_bound((5, 6, 4), (17, 11, 19))
    assert bound.shape == (3, 5, 6, 4)
    for axis, spacing in enumerate((4.0, 2.0, 6.0)):
        torch.testing.assert_close(bound[axis] / spacing, bound[0] / 4.0)
    torch.testing.assert_close(bound, bound.flip(1, 2, 3))
    turned = displacement_bound((4, 5, 6), (19, 17, 11))
    torch.testing.assert_close(bound[0], turned[1].permute(1, 2, 0), rtol=1e-5, atol=0)
