"""From control points to a dense displacement field (paper, section 3.2, "Transformation interpolation").

T↑(x) = Σ_ijk B_x(i) B_y(j) B_z(k) T_ijk is linear and separable. Each axis has one small (n, g) matrix, and a field takes
three small matrix products. The dense basis is never formed.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import torch
from scipy.interpolate import BSpline
from torch import Tensor

from gridreg.spatial import Shape, as_shape, check_grid_size, check_volume

METHODS = ("trilinear", "bspline", "deconv")

# Standard deviation of the Gaussian basis in control spacings. The cubic B-spline has the same variance, 1/3.
GAUSSIAN_WIDTH = 3**-0.5


def _linear_basis(n: int, g: int) -> np.ndarray:
    """B(x) = max(0, 1 - |x|), x in control spacings."""
    spacings = np.linspace(0, g - 1, n)[:, None] - np.arange(g)
    return np.maximum(0, 1 - np.abs(spacings))


def _bspline_basis(n: int, g: int) -> np.ndarray:
    """Clamped cubic B-spline (degree g - 1 below four control points), by Cox-de Boor recursion in SciPy.

    With clamped knots the i-th basis function is not centred on the i-th point of a uniform lattice. The knot parameter t
    is therefore chosen at each voxel such that Σ_i B_i(t) i = x. The control points then lie where the conventions of
    ``spatial`` put them, and a linear field is reproduced exactly.
    """
    degree = min(3, g - 1)
    knots = np.concatenate([np.zeros(degree), np.linspace(0, 1, g - degree + 1), np.ones(degree)])
    position = BSpline(knots, np.arange(g, dtype=float), degree)
    velocity = position.derivative()
    wanted = np.linspace(0, g - 1, n)
    low, high = np.zeros(n), np.ones(n)
    t = np.linspace(0, 1, n)
    for _ in range(100):  # Newton steps inside a shrinking bracket, as the position increases strictly with t
        error = position(t) - wanted
        low, high = np.where(error < 0, t, low), np.where(error > 0, t, high)
        step = t - error / np.maximum(velocity(t), 1e-12)
        t = np.where((step >= low) & (step <= high), step, (low + high) / 2)
        if np.abs(error).max() < 1e-13 * g:
            break
    return BSpline.design_matrix(np.clip(t, 0, 1), knots, degree).toarray()


def _gaussian_basis(n: int, g: int) -> np.ndarray:
    """Transposed convolution with a Gaussian kernel and a stride of one control spacing; rows are normalised to sum 1."""
    spacings = np.linspace(0, g - 1, n)[:, None] - np.arange(g)
    weights = np.exp(-(spacings**2) / (2 * GAUSSIAN_WIDTH**2))
    return weights / weights.sum(1, keepdims=True)


_BASES = {"trilinear": _linear_basis, "bspline": _bspline_basis, "deconv": _gaussian_basis}


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
def basis(n: int, g: int, method: str = "trilinear", device=None, dtype=torch.float32) -> Tensor:
    """(n, g) weights of g control points at n voxels along one axis. ValueError on an unknown method."""
    if method not in _BASES:
        raise ValueError(f"upsampling must be one of {', '.join(METHODS)}; found {method!r}")
    return torch.as_tensor(_BASES[method](n, g), device=device, dtype=dtype)


def apply_along_axes(volume: Tensor, matrices: list[Tensor]) -> Tensor:
    """Multiply the last three axes of ``volume`` (..., a, b, c) by matrices (A, a), (B, b), (C, c): (..., A, B, C).

    Autocast is switched off, since in bfloat16 a displacement of 10 voxels would be wrong by 0.1 voxels.
    """
    first, second, third = matrices
    with torch.autocast(volume.device.type, enabled=False):
        volume = second @ (volume.to(third.dtype) @ third.T)
        folded = first @ volume.flatten(-2)
    return folded.unflatten(-1, (second.shape[0], third.shape[0]))


def apply_channels_last(volume: Tensor, matrices: list[Tensor]) -> Tensor:
    """``apply_along_axes`` for volumes (B, a, b, c, C) with channels last: (B, A', B', C', C)."""
    first, second, third = matrices
    batch, _, b, c, channels = volume.shape
    with torch.autocast(volume.device.type, enabled=False):
        volume = first @ volume.to(first.dtype).reshape(batch, -1, b * c * channels)
        volume = second @ volume.view(batch, len(first), b, c * channels)
        return third @ volume.view(batch, len(first), len(second), c, channels)


def upsample(control_points: Tensor, shape: int | Shape, method: str = "trilinear") -> Tensor:
    """Dense field from control-point values; differentiable (paper, section 3.2).

    control_points  (B, C, gw, gh, gd); for displacements C = 3, in voxels
    shape           (W, H, D) of the image; it need not be a multiple of the grid
    method          "trilinear", "bspline" (clamped cubic) or "deconv" (transposed-convolution Gaussian)
    returns         (B, C, W, H, D), same units

    ValueError on another shape or method.
    """
    check_volume(control_points, None, "control_points")
    shape = as_shape(shape, "shape")
    matrices = [
        basis(n, g, method, control_points.device, control_points.dtype)
        for n, g in zip(shape, control_points.shape[2:])
    ]
    return apply_along_axes(control_points, matrices)


def upsample_sigma(sigma: Tensor, shape: int | Shape, method: str = "trilinear") -> Tensor:
    """Dense standard deviation of a displacement whose control points are independent.

    sigma (B, C, gw, gh, gd) → (B, C, W, H, D), same units. The variance of a weighted sum is the sum of the squared
    weights times the variances. This neglects correlations. The errors of neighbouring control points are usually
    correlated, so between control points the result is rather too small than too large.
    """
    check_volume(sigma, None, "sigma")
    shape = as_shape(shape, "shape")
    squared = [basis(n, g, method, sigma.device, sigma.dtype).square() for n, g in zip(shape, sigma.shape[2:])]
    return apply_along_axes(sigma.square(), squared).sqrt()


# ---- The bound that forbids folds (after Choi & Lee 2000) ------------------------------------------------------------
#
# Let every axis be measured in control spacings. If Σ_b |∂u_a/∂x_b| < 1 for each component a, then u is a contraction in the max
# norm and x → x + u(x) is one-to-one with det J > 0: φ(x) = φ(y) would mean |x - y| = |u(x) - u(y)| < |x - y|.
# With u_a = Σ_c d_ac φ_c and |d_ac| ≤ r_c that sum is at most
#
#     max over s in {-1, 1}³ of Σ_c r_c |s · ∇φ_c(x)|,
#
# and control points at the bound attain it. For uniform B-splines and equal r_c its largest value over x is r · 2.4795:
# the bound of 0.4033 spacings of Choi & Lee, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions",
# Graphical Models 62, 2000. Our spline is clamped, and its derivative is larger at the border. Equal r_c would have to be
# 1/6 of a spacing because of the corner voxel, where ∇φ is that of trilinear interpolation. We therefore take
# r_c = w_i w_j w_k / K with weights ``BORDER_WEIGHTS`` at the two outer control points of each axis. Only these points
# are restricted further. K is the larger of two numbers:
#
# - ``SPLINE_SUM``, which holds for the continuous spline at any number of voxels. Two intervals away from the border the
#   basis is the uniform one, so grids of 8 and more share a value. It was computed on a fine lattice, with a bound on the
#   values between lattice points from second derivatives. The tests repeat this computation.
# - the largest sum over the voxels of the image, with differences along the edges of a cell as derivatives. This covers
#   the discrete field in three readings: linear interpolation between voxels (``transform_points``), central differences,
#   which are means of differences along edges (``metrics.folding_percent``), and the tetrahedra of
#   ``metrics.nondiffeomorphic_percent``. Both metrics are 0. With coarse voxels this makes the bound smaller: by a fifth
#   at one voxel per spacing, by 3 % at 3.4 voxels, and not at all from 7 voxels on.
#
# The bound limits the range: a control point moves by less than half a spacing, so a fine grid allows only small
# displacements. The reserve of 1 % keeps det J above 0 in floating point. The guarantee holds for the mean displacement;
# a sample drawn with the sigma of a Bayesian model may leave the bound.

BORDER_WEIGHTS = (2 / 3, 0.9)  # of the first and second control point from the border; the others have 1
SPLINE_SUM = {2: 1.8, 3: 2.15, 4: 2.15, 5: 2.15, 6: 2.25}  # K of the continuous spline, by the largest grid size
SPLINE_SUM_BEYOND = 2.5  # for larger grids
RESERVE = 0.99  # fraction of the bound that is used
LARGEST_RATIO = 1e15  # of a control point to its bound; the square of a larger ratio would overflow in single precision


def _weights(g: int) -> Tensor:
    """(g,) weights of the control points along one axis, float64."""
    weights = torch.ones(g, dtype=torch.float64)
    for distance, weight in reversed(list(enumerate(BORDER_WEIGHTS[: (g + 1) // 2]))):
        weights[[distance, -1 - distance]] = weight
    return weights


def _cells(n: int, g: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Weighted basis at both ends of the first half of the n - 1 cells, and its difference per control spacing.

    Each is (cells, control points that reach the cell). The basis is symmetric, so half of the cells are enough.
    """
    half = n // 2
    values = basis(n, g, "bspline", dtype=torch.float64) * _weights(g)
    low, high = values[:half], values[1 : half + 1]
    reached = low + high > 0
    first, last = reached.int().argmax(1), g - 1 - reached.flip(1).int().argmax(1)
    width = int((last - first).max()) + 1
    window = first.clamp(max=g - width)[:, None] + torch.arange(width)
    low, high = (side.gather(1, window).to(device, torch.float32) for side in (low, high))
    return (low, high), (high - low) * ((n - 1) / (g - 1))


def _largest_sum(grid_size: Shape, shape: Shape, device: torch.device) -> float:
    """Largest Σ_c w_c |s · ∇φ_c| over cells and signs; ∂φ_c along an axis is a difference along a cell's edge.

    Two sets of edges count. The three edges at one corner bound the trilinear field: inside a cell the sum is convex in
    each coordinate, so it is largest at a corner. Three consecutive edges from a corner to the opposite one bound the
    tetrahedra. In the loop, the edges along the two other axes lie at the same end of an axis: of every axis, or of all
    but one.
    """
    (x, dx), (y, dy), (z, dz) = (_cells(n, g, device) for n, g in zip(shape, grid_size))
    signs = torch.tensor([[1, a, b] for a, b in product((1, -1), repeat=2)], device=device, dtype=torch.float32)
    largest = 0.0
    for i2, i3, j1, j3, k1, k2 in product((0, 1), repeat=6):
        if (i2 != i3) + (j1 != j3) + (k1 != k2) > 1:
            continue
        along_z = torch.stack([z[k1], z[k2], dz]).transpose(1, 2).flatten(1)  # (3, reached · cells)
        for i in range(len(dx)):
            slab = [torch.einsum("i,yj->yij", *pair) for pair in ((dx[i], y[j1]), (x[i2][i], dy), (x[i3][i], y[j3]))]
            for sign in signs:
                sums = ((torch.stack(slab, dim=-1) * sign).flatten(0, -2) @ along_z).abs_()
                largest = max(largest, sums.view(len(dy), -1, len(dz)).sum(1).max().item())
    return largest


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
def _bound(grid_size: Shape, shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.autocast(device.type, enabled=False):
        largest = max(SPLINE_SUM.get(max(grid_size), SPLINE_SUM_BEYOND), _largest_sum(grid_size, shape, device))
    weights = torch.einsum("i,j,k->ijk", *map(_weights, grid_size))
    spacing = torch.tensor([(n - 1) / (g - 1) for n, g in zip(shape, grid_size)], dtype=torch.float64)
    return (RESERVE / largest * spacing.view(3, 1, 1, 1) * weights).to(device, dtype)


def displacement_bound(
    grid_size: int | Shape, shape: int | Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """(3, gw, gh, gd) largest |displacement| of each control point in voxels, within which a B-spline field cannot fold.

    The result is cached. The first call for a grid and a shape takes seconds from about 128³ voxels on. ValueError on a
    grid that does not fit the image.
    """
    shape = as_shape(shape, "shape")
    return _bound(check_grid_size(grid_size, shape), shape, torch.device(device), dtype)


def bounded(control_points: Tensor, shape: int | Shape) -> Tensor:
    """Control points c (B, 3, gw, gh, gd) in voxels, mapped into the bound r: c / √(1 + (c / r)²).

    The map is smooth, and near zero it is the identity to second order. Its slope decreases slowly, as c⁻³, so a network
    that starts outside the bound can still learn. The slope of tanh would vanish in rounding at ten times the bound.
    Infinite control points end at the bound.
    """
    check_volume(control_points, 3, "control_points")
    bound = displacement_bound(tuple(control_points.shape[2:]), shape, control_points.device, control_points.dtype)
    control_points = control_points.clamp(-LARGEST_RATIO * bound, LARGEST_RATIO * bound)
    return control_points * torch.rsqrt(1 + (control_points / bound).square())
