"""From control points to a dense field: each basis against an independent reference, and what all must reproduce."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from scipy.optimize import brentq

from gridreg.spatial import control_point_coordinates, voxel_coordinates
from gridreg.upsampling import GAUSSIAN_WIDTH, METHODS, apply_along_axes, basis, upsample, upsample_sigma

GRID, SHAPE = (4, 5, 7), (11, 16, 23)  # no axis is a multiple of its control spacing

sizes = st.tuples(st.integers(2, 9), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair)))  # g ≤ n
axes = st.tuples(sizes, sizes, sizes).map(lambda pairs: tuple(zip(*pairs)))  # (grid, shape)
some = settings(max_examples=15, deadline=None, derandomize=True)


def random_grid(grid=GRID, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, channels, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_trilinear_is_pytorchs():
    control = random_grid()
    expected = F.interpolate(control, SHAPE, mode="trilinear", align_corners=True)
    torch.testing.assert_close(upsample(control, SHAPE, "trilinear"), expected)


def scipy_spline(values: np.ndarray, n: int) -> np.ndarray:
    """Clamped spline along the first axis with coefficients ``values``, at n positions x = Σ_i B_i(t) i."""
    g = len(values)
    k = min(3, g - 1)
    knots = np.r_[np.zeros(k), np.linspace(0, 1, g - k + 1), np.ones(k)]
    position = BSpline(knots, np.arange(float(g)), k)
    inner = [brentq(lambda t: position(t) - x, 0, 1, xtol=1e-14) for x in np.linspace(0, g - 1, n)[1:-1]]
    return BSpline(knots, values, k)(np.r_[0, inner, 1])


@pytest.mark.parametrize(("grid", "shape"), [(GRID, SHAPE), ((2, 3, 4), (9, 3, 10)), ((8, 9, 10), (8, 30, 10))])
def test_bspline_is_scipys(grid, shape):
    control = random_grid(grid, channels=1)[0, 0].numpy()
    expected = control
    for n in shape:  # each pass takes the first axis and puts it last: after three they are in order again
        expected = np.moveaxis(scipy_spline(expected, n), 0, -1)
    found = upsample(torch.from_numpy(control)[None, None], shape, "bspline")[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def transposed_convolution(control: torch.Tensor, stride: int) -> torch.Tensor:
    """Gaussian transposed convolution along the last axis of (1, 1, g): no normalisation."""
    reach = (control.shape[-1] - 1) * stride
    at = torch.arange(-reach, reach + 1, dtype=control.dtype) / stride
    kernel = torch.exp(-(at**2) / (2 * GAUSSIAN_WIDTH**2))[None, None]
    return F.conv_transpose1d(control, kernel, stride=stride)[..., reach : 2 * reach + 1]


@pytest.mark.parametrize(("g", "stride"), [(2, 5), (5, 1), (7, 3)])
def test_deconv_is_a_normalised_transposed_convolution(g, stride):
    control = random_grid((g, 1, 1))[:1, :1, :, 0, 0]
    expected = transposed_convolution(control, stride) / transposed_convolution(torch.ones_like(control), stride)
    found = control @ basis((g - 1) * stride + 1, g, "deconv", dtype=torch.float64).T
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_each_component_is_upsampled_alone(method):
    """The released transposed convolution summed the three components."""
    control = random_grid()
    dense = upsample(control, SHAPE, method)
    for channel in range(3):
        alone = torch.zeros_like(control)
        alone[:, channel] = control[:, channel]
        expected = torch.zeros_like(dense)
        expected[:, channel] = dense[:, channel]
        torch.testing.assert_close(upsample(alone, SHAPE, method), expected)


def test_the_three_methods_differ():
    """The released "bspl" and "tconv" runs ended in trilinear interpolation."""
    fields = [upsample(random_grid(), SHAPE, method) for method in METHODS]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (fields[first] - fields[second]).abs().mean() > 0.05
    kinks = [field.diff(n=2, dim=-1).abs().max() for field in fields]
    assert kinks[1] < kinks[0] / 2 and kinks[2] < kinks[0] / 2  # a smooth basis has none at its control points


@pytest.mark.parametrize("method", METHODS)
@some
@given(axes)
def test_constants_are_reproduced_and_nothing_overshoots(method, sizes):
    grid, shape = sizes
    constant = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1, 1)
    dense = upsample(constant.expand(1, 3, *grid), shape, method)
    torch.testing.assert_close(dense, constant.expand(1, 3, *shape), rtol=0, atol=1e-12)
    control = random_grid(grid)
    dense = upsample(control, shape, method)
    assert dense.min() >= control.min() - 1e-12 and dense.max() <= control.max() + 1e-12


@pytest.mark.parametrize("method", ["trilinear", "bspline"])
@some
@given(axes)
def test_linear_fields_are_reproduced(method, sizes):
    """Control points sit on the corners-included lattice, so the field 'x' at them is the field 'x' everywhere."""
    grid, shape = sizes
    matrix = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.3], [2.0, 0.0, -1.0]], dtype=torch.float64)
    control, voxels = (
        torch.einsum("ab,b...->a...", matrix, x)[None]
        for x in (
            control_point_coordinates(grid, shape, dtype=torch.float64),
            voxel_coordinates(shape, dtype=torch.float64),
        )
    )
    torch.testing.assert_close(upsample(control, shape, method), voxels, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@some
@given(sizes)
def test_a_basis_is_mirror_symmetric_and_local(method, size):
    g, n = size
    weights = basis(n, g, method, dtype=torch.float64)
    assert weights.shape == (n, g) and (weights >= 0).all()
    torch.testing.assert_close(weights, weights.flip(0, 1), rtol=0, atol=1e-10)
    reach = {"trilinear": 1, "bspline": 3, "deconv": 4}[method]  # in control spacings; Gaussian: 7 widths
    x = torch.linspace(0, g - 1, n, dtype=torch.float64)[:, None] - torch.arange(g)
    assert (weights * (x.abs() >= reach)).max() < 1e-4


@pytest.mark.parametrize("method", ["trilinear", "bspline"])
def test_corners_keep_their_control_point(method):
    control = random_grid()
    dense = upsample(control, SHAPE, method)
    for i, j, k in itertools.product((0, -1), repeat=3):
        torch.testing.assert_close(dense[..., i, j, k], control[..., i, j, k])


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    control = random_grid((2, 3, 4), channels=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: upsample(c, (3, 5, 7), method), (control,))


def test_a_field_made_in_inference_mode_does_not_forbid_training_later():
    """Bases are cached: one made while evaluating must serve a training at the same sizes."""
    with torch.inference_mode():
        upsample(torch.zeros(1, 3, 3, 3, 3), (19, 21, 25))
    control = torch.ones(1, 3, 3, 3, 3, requires_grad=True)
    upsample(control, (19, 21, 25)).sum().backward()
    assert control.grad.sum() == pytest.approx(3 * 19 * 21 * 25, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_does_not_blunt_a_field(method):
    """bfloat16 has steps of 0.06 voxels at 10 voxels: enough to break a smooth field into stairs."""
    control = 10 + random_grid().float()
    with torch.autocast("cpu", torch.bfloat16):
        dense = upsample(control, SHAPE, method)
    torch.testing.assert_close(dense.double(), upsample(control.double(), SHAPE, method), rtol=0, atol=1e-4)


def test_each_matrix_works_on_its_own_axis():
    volume = random_grid((2, 3, 4))
    matrices = [torch.randn(m, n, dtype=torch.float64) for m, n in ((5, 2), (6, 3), (7, 4))]
    expected = torch.einsum("bcijk,xi,yj,zk->bcxyz", volume, *matrices)
    torch.testing.assert_close(apply_along_axes(volume, matrices), expected)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="one of trilinear, bspline, deconv; found 'cubic'"):
        upsample(torch.zeros(1, 3, 2, 2, 2), SHAPE, "cubic")
    with pytest.raises(ValueError, match="control_points must have shape"):
        upsample(torch.zeros(3, 2, 2, 2), SHAPE)
    with pytest.raises(ValueError, match="shape must be one integer or three"):
        upsample(torch.zeros(1, 3, 2, 2, 2), (5, 5))


@pytest.mark.parametrize("method", METHODS)
def test_upsampled_sigma_is_the_spread_of_upsampled_samples(method):
    """Monte Carlo: 4000 draws give a standard deviation to about 1 %."""
    torch.manual_seed(0)
    sigma = 0.5 + torch.rand(1, 2, 4, 5, 3, dtype=torch.float64)
    drawn = upsample(sigma * torch.randn(4000, 2, 4, 5, 3, dtype=torch.float64), (9, 7, 8), method)
    spread = upsample_sigma(sigma, (9, 7, 8), method)
    assert (drawn.std(0) / spread[0] - 1).abs().max() < 0.06
