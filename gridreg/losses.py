"""Losses of training (paper, section 3.3): soft and differentiable. Hard labels and millimetres are in ``metrics``.

Displacements come in voxels; the bending energy turns them into the paper's normalised units ([-1, 1] across the
image), so that its weights keep their meaning.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from gridreg.grid import Shape, as_shape, check_volume
from gridreg.interpolation import apply_along_axes, basis


def mse(fixed: Tensor, warped: Tensor) -> Tensor:
    """Mean squared error of two (B, 1, ...) intensity tensors: a scalar."""
    return (fixed - warped).square().mean()


@lru_cache(maxsize=4)
def _local_ncc(window: int):
    from monai.losses import LocalNormalizedCrossCorrelationLoss  # here, not above: MONAI takes seconds to import

    return LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=window)


def ncc(fixed: Tensor, warped: Tensor, window: int = 5) -> Tensor:
    """Minus the squared local normalised cross-correlation of two (B, 1, W, H, D) images: a scalar in [-1, 0].

    Over a cube of ``window`` voxels around every voxel. Blind to gain, bias and contrast that change slowly, which the
    MSE is not.
    """
    return _local_ncc(window)(warped, fixed)


SIMILARITIES = {"mse": mse, "ncc": ncc}


def at_control_points(volume: Tensor, grid_size: Shape) -> Tensor:
    """Values (B, C, gw, gh, gd) of ``volume`` (B, C, W, H, D) at the control points, for the grid-level similarity."""
    matrices = [basis(g, n, "trilinear", volume.device, volume.dtype) for g, n in zip(grid_size, volume.shape[2:])]
    return apply_along_axes(volume, matrices)


def dice(fixed: Tensor, warped: Tensor) -> Tensor:
    """L_DSC = 1 - 2 Σ s_fix s_mov∘T / (Σ s_fix + Σ s_mov∘T): a scalar, mean over the structures that are there.

    fixed, warped (B, K, W, H, D) soft masks in [0, 1], one channel a structure. A structure absent from both says
    nothing and is left out.
    """
    overlap = (fixed * warped).sum((2, 3, 4))
    total = fixed.sum((2, 3, 4)) + warped.sum((2, 3, 4))
    present = total > 0
    return 1 - (2 * overlap[present] / total[present]).mean() if present.any() else total.sum() * 0


def _difference(n: int, order: int) -> Tensor:
    """(n - order, n) finite differences of that order (0, 1 or 2), float64, on the compact stencil.

    The mixed second derivative is a first difference along two axes: unlike a central difference it sees a ±1
    checkerboard.
    """
    matrix = torch.eye(n, dtype=torch.float64)
    for _ in range(order):
        matrix = matrix[1:] - matrix[:-1]
    return matrix


def _second_derivatives():
    """(multiplicity, order of the derivative along x, y, z) for the six second derivatives; mixed ones count twice."""
    for a, b in combinations_with_replacement(range(3), 2):
        orders = [0, 0, 0]
        orders[a] += 1
        orders[b] += 1
        yield (1 if a == b else 2), tuple(orders)


def _to_normalised(displacement: Tensor, shape: Shape) -> Tensor:
    if min(shape) < 3:
        raise ValueError(f"a second derivative needs 3 voxels on every axis, found {shape}")
    scale = torch.tensor([2 / (n - 1) for n in shape], device=displacement.device, dtype=displacement.dtype)
    return displacement * scale.view(3, 1, 1, 1)


def bending_energy(displacement: Tensor) -> Tensor:
    """L_bend: mean over voxels of Σ_i Σ_ρϱ (∂²t_i/∂ρ∂ϱ)², mixed terms twice (paper, section 3.3).

    displacement (B, 3, W, H, D) in voxels; t is the same in normalised units, derivatives are per voxel. Each
    derivative is averaged over the places where its stencil fits. Returns a scalar. ValueError on other shapes, or
    fewer than 3 voxels on an axis.
    """
    check_volume(displacement, 3, "displacement")
    shape = tuple(displacement.shape[2:])
    t = _to_normalised(displacement, shape)
    energy = t.new_zeros(())
    for multiplicity, orders in _second_derivatives():
        derivative = t
        for axis, order in enumerate(orders):
            derivative = derivative.diff(n=order, dim=2 + axis) if order else derivative
        energy = energy + multiplicity * derivative.square().sum(1).mean()
    return energy


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _gram(n: int, g: int, order: int, method: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(g, g) mean over voxels of the products of two basis functions' derivatives along one axis."""
    derivative = _difference(n, order) @ basis(n, g, method, dtype=torch.float64)
    return (derivative.T @ derivative / len(derivative)).to(device, dtype)


def grid_bending_energy(control_points: Tensor, shape: int | Shape, method: str = "trilinear") -> Tensor:
    """``bending_energy(upsample(control_points, shape, method))``, exactly, without forming the dense field.

    The dense energy is a quadratic form of the control points whose matrix is a Kronecker product of one (g, g) Gram
    matrix an axis, so it costs O(G·g) instead of six passes over all voxels.

    control_points (B, 3, gw, gh, gd) in voxels of an image of ``shape``. Returns a scalar.
    """
    check_volume(control_points, 3, "control_points")
    shape = as_shape(shape, "shape")
    t = _to_normalised(control_points, shape)
    energy = t.new_zeros(())
    for multiplicity, orders in _second_derivatives():
        grams = [_gram(n, g, o, method, t.device, t.dtype) for n, g, o in zip(shape, t.shape[2:], orders)]
        energy = energy + multiplicity * (t * apply_along_axes(t, grams)).sum() / t.shape[0]
    return energy
