"""Losses of training (paper, section 3.3): soft and differentiable. Hard labels and millimetres are in ``metrics``.

Displacements come in voxels; the bending energy turns them into the paper's normalised units ([-1, 1] across the
image), so that its weights keep their meaning.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor

from gridreg.grid import Shape, as_shape, check_volume, voxel_coordinates
from gridreg.interpolation import apply_along_axes, basis

NOISE = 0.02  # of images in [0, 1]: a residual below it says nothing about the displacement
WIDEST = 0.1  # standard deviation, in image widths, of a displacement about which the image says nothing


def mse(fixed: Tensor, warped: Tensor) -> Tensor:
    """Mean squared error of two (B, 1, ...) intensity tensors: a scalar."""
    return (fixed - warped).square().mean()


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept must serve a training too
def _local_ncc(window: int):
    from monai.losses import LocalNormalizedCrossCorrelationLoss  # here, not above: MONAI takes seconds to import

    return LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=window)


def ncc(fixed: Tensor, warped: Tensor, window: int = 5) -> Tensor:
    """Minus the squared local normalised cross-correlation of two (B, 1, W, H, D) images: a scalar in [-1, 0].

    Over a cube of ``window`` voxels around every voxel. Blind to gain, bias and contrast that change slowly, which the
    MSE is not.
    """
    return _local_ncc(window)(warped, fixed)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _mutual_information(bins: int):
    from monai.losses import GlobalMutualInformationLoss

    return GlobalMutualInformationLoss(num_bins=bins)


def mutual_information(fixed: Tensor, warped: Tensor, bins: int = 23) -> Tensor:
    """Minus the mutual information of two (B, 1, ...) images in [0, 1]: a scalar, in nats.

    From a joint histogram with Gaussian Parzen windows. Blind to any one-to-one change of contrast, so fit for images
    of different kinds; it needs ``bins`` numbers a voxel.
    """
    return _mutual_information(bins)(warped, fixed)


SIMILARITIES = {"mse": mse, "ncc": ncc, "mi": mutual_information}


def information(fixed: Tensor, window: int = 5) -> Tensor:
    """What an image tells of a displacement: its squared gradient, mean over a cube of ``window`` voxels.

    fixed (B, 1, W, H, D); returns the same shape, squared intensity per squared voxel.
    """
    gradients = torch.stack(torch.gradient(fixed[:, 0], dim=(1, 2, 3)), dim=1)
    return F.avg_pool3d(gradients.square().sum(1, keepdim=True), window, 1, window // 2, count_include_pad=False)


def uncertainty(fixed: Tensor, warped: Tensor, told: Tensor, variance: Tensor, widest: Tensor) -> Tensor:
    """L_unc of one Monte-Carlo sample: mean of Sim / σ̂² + log σ̂² (paper, equation 2, λ0 = 1): a scalar.

    fixed, warped  (B, 1, W, H, D) intensities in [0, 1]
    told           (B, 1, W, H, D) ``information`` of the fixed image
    variance       (B, 3, W, H, D) σ̂², squared voxels
    widest         (3, 1, 1, 1) σ in voxels where the image tells nothing

    Sim is the squared residual over the squared gradient: the squared displacement, in voxels, that the residual
    amounts to. Both terms of (2) then have one unit, and its minimum over σ̂² is that squared displacement: large where
    the image is flat. With intensities in place of it, the minimum would be the residual, which is smallest in flat
    regions, where least is known.
    """
    squared = ((fixed - warped).square() + NOISE**2) / (told + NOISE**2 / widest**2)
    return (squared / variance + variance.log()).mean()


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


def label_dice(fixed: Tensor, moving: Tensor, displacement: Tensor, values: list[int]) -> Tensor:
    """``dice`` of the masks of ``values``, those of the moving map warped linearly: the same number, a scalar.

    fixed, moving (B, 1, W, H, D) label maps of any integer type, displacement (B, 3, W, H, D) in voxels.

    No mask is ever formed, so time and memory do not depend on how many labels there are: each voxel reads the labels
    of the eight moving voxels around the point it is sent to, whose interpolation weights are then summed by label.
    """
    batch, labels = fixed.shape[0], len(values) + 1  # number 0 is everything that is not in values
    size = torch.tensor(moving.shape[2:], device=fixed.device)
    table = torch.zeros(int(max(fixed.max(), moving.max(), *values)) + 1, dtype=torch.long, device=fixed.device)
    table[values] = torch.arange(1, labels, device=fixed.device)
    offset = torch.arange(batch, device=fixed.device)[:, None] * labels
    fixed = table[fixed.flatten(1).long()] + offset  # (B, N), a number for each label of each case
    moving = table[moving.flatten(1).long()] + offset
    last = (size - 1).view(3, 1)
    point = voxel_coordinates(tuple(displacement.shape[2:]), fixed.device) + displacement
    point = point.flatten(2).nan_to_num().clamp(min=torch.zeros_like(last), max=last)  # (B, 3, N)
    low = point.detach().floor().long().clamp(max=(last - 1).clamp(min=0))
    share = point - low  # of the upper neighbour, along each axis
    overlap = warped_total = displacement.new_zeros(batch * labels)
    for corner in torch.cartesian_prod(*[torch.arange(2, device=fixed.device)] * 3):
        x, y, z = torch.minimum(low + corner.view(3, 1), last).unbind(1)
        found = moving.gather(1, (x * size[1] + y) * size[2] + z)
        weight = torch.where(corner.view(3, 1).bool(), share, 1 - share).prod(1)
        warped_total = warped_total.index_add(0, found.flatten(), weight.flatten())
        overlap = overlap.index_add(0, found.flatten(), (weight * (found == fixed)).flatten())
    total = warped_total + torch.bincount(fixed.flatten(), minlength=batch * labels)
    total, overlap = (t.view(batch, labels)[:, 1:] for t in (total, overlap))
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
