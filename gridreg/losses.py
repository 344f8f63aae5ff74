"""Losses of training (paper, section 3.3), soft and differentiable. Metrics of hard labels in mm are in ``metrics``.

Displacements are in voxels. The bending energy converts them to the paper's normalised units ([-1, 1] across the image),
so that the paper's weights keep their meaning.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gridreg.errors import extra
from gridreg.spatial import Shape, as_shape, check_volume, warp
from gridreg.upsampling import apply_along_axes, basis

RESIDUAL_NOISE = 0.02  # intensity, of images in [0, 1]; a smaller residual carries no information on the displacement
LARGEST_SIGMA = 0.1  # standard deviation of a displacement where the image has no gradient, in image widths
LAMBDA_0 = 1.0  # λ0 of equation 2, for which the paper gives no number. With 1 the best σ̂² is the squared displacement
FLAT_VARIANCE = 1e-4  # fraction of an image's variance; a window with less variance holds no structure to correlate
MI_BINS = 23  # bins of the joint histogram of mutual information, along each axis
LABELS_AT_ONCE = 16  # masks that ``label_dice_loss`` holds in memory at once


def mse_loss(fixed: Tensor, warped: Tensor) -> Tensor:
    """Mean squared error of two (B, 1, ...) intensity tensors: a scalar."""
    return (fixed - warped).square().mean()


def _standardised(image: Tensor) -> Tensor:
    """Each case scaled to mean 0 and standard deviation 1, which removes gain and bias. A constant image becomes 0."""
    centred = image - image.mean((1, 2, 3, 4), keepdim=True)
    return centred * (centred.square().mean((1, 2, 3, 4), keepdim=True) + 1e-12).rsqrt()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
def _window_means(n: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, n) weights of the mean over ``window`` voxels around each voxel, without those outside the image."""
    place = torch.arange(n, dtype=torch.float64)
    inside = ((place[:, None] - place).abs() <= window // 2).to(torch.float64)
    return (inside / inside.sum(1, keepdim=True)).to(device, dtype)


def squared_local_ncc(fixed: Tensor, warped: Tensor, window: int = 5) -> Tensor:
    """cov² / (var · var) in the cube of ``window`` (odd) voxels around every voxel, (B, W, H, D), each in [0, 1].

    fixed, warped (B, 1, W, H, D). At the border only the part of the cube inside the image counts. A cube is flat if its
    variance is below ``FLAT_VARIANCE`` times that of the whole image. Its score tends to 0, since it holds only noise.
    """
    fixed, warped = _standardised(fixed), _standardised(warped)
    means = [_window_means(n, window, fixed.device, fixed.dtype) for n in fixed.shape[2:]]
    products = [fixed, warped, fixed * fixed, warped * warped, fixed * warped]
    f, w, ff, ww, fw = apply_along_axes(torch.cat(products, dim=1), means).unbind(1)
    variances = [(square - mean * mean).clamp(min=0) + FLAT_VARIANCE for mean, square in ((f, ff), (w, ww))]
    return (fw - f * w).square() / (variances[0] * variances[1])


def ncc_loss(fixed: Tensor, warped: Tensor, window: int = 5) -> Tensor:
    """Minus the squared local normalised cross-correlation of two (B, 1, W, H, D) images: a scalar in [-1, 0].

    It is the mean of ``squared_local_ncc`` over all voxels. Unlike the MSE, it ignores gain, bias and slow changes of
    contrast. MONAI's loss is not used because it counts zeros around the image, so its border depends on the bias.
    """
    return -squared_local_ncc(fixed, warped, window).mean()


def global_ncc_loss(fixed: Tensor, warped: Tensor) -> Tensor:
    """Minus the squared correlation of all values of two (B, 1, W, H, D) tensors, mean over cases: a scalar in [-1, 0]."""
    return -(_standardised(fixed) * _standardised(warped)).mean((1, 2, 3, 4)).square().mean()


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _mutual_information(bins: int):
    with extra("mi", "mutual information"):
        from monai.losses import GlobalMutualInformationLoss

    return GlobalMutualInformationLoss(num_bins=bins)


def mi_loss(fixed: Tensor, warped: Tensor, bins: int = MI_BINS) -> Tensor:
    """Minus the mutual information of two (B, 1, ...) images in [0, 1]: a scalar, in nats.

    It is computed from a joint histogram with Gaussian Parzen windows (MONAI). It ignores any one-to-one change of
    contrast, and so suits images of different contrasts. It needs memory for ``bins`` numbers per voxel.
    """
    return _mutual_information(bins)(warped, fixed)


def coarse_mi_loss(fixed: Tensor, warped: Tensor) -> Tensor:
    """``mi_loss`` of the few values at control points, with at least 5 values per bin of the joint histogram: a scalar.

    With fewer values per bin, any two images would seem to share information.
    """
    return mi_loss(fixed, warped, min(max(math.isqrt(fixed[0].numel() // 5), 2), MI_BINS))


SIMILARITIES = {"mse": mse_loss, "ncc": ncc_loss, "mi": mi_loss}
GRID_SIMILARITIES = {
    "mse": mse_loss,
    "ncc": global_ncc_loss,
    "mi": coarse_mi_loss,
}  # control points are too sparse for windows


def at_control_points(volume: Tensor, grid_size: Shape) -> Tensor:
    """Values (B, C, gw, gh, gd) of ``volume`` (B, C, W, H, D) at the control points, for the grid-level similarity."""
    matrices = [basis(g, n, "trilinear", volume.device, volume.dtype) for g, n in zip(grid_size, volume.shape[2:])]
    return apply_along_axes(volume, matrices)


def similarity_loss(name: str, fixed: Tensor, warped: Tensor, grid_size: Shape | None = None) -> Tensor:
    """L_sim without uncertainty: at image level and, with a grid, at the control points (paper, section 3.3): a scalar.

    name           one of ``SIMILARITIES``, used at both levels: a squared difference is wrong at both if contrasts differ
    fixed, warped  (B, 1, W, H, D) in [0, 1]
    grid_size      of the control points; None for methods without a grid

    KeyError on another name.
    """
    total = SIMILARITIES[name](fixed, warped)
    if grid_size is None:
        return total
    return total + GRID_SIMILARITIES[name](*(at_control_points(volume, grid_size) for volume in (fixed, warped)))


def gradient_energy(fixed: Tensor, window: int = 5) -> Tensor:
    """Squared gradient of an image, mean over a cube of ``window`` voxels. Where it is small, no displacement is visible.

    fixed (B, 1, W, H, D); returns the same shape, squared intensity per squared voxel.
    """
    gradients = torch.stack(torch.gradient(fixed[:, 0], dim=(1, 2, 3)), dim=1)
    return F.avg_pool3d(gradients.square().sum(1, keepdim=True), window, 1, window // 2, count_include_pad=False)


def uncertainty_loss(fixed: Tensor, warped: Tensor, energy: Tensor, variance: Tensor, largest_sigma: Tensor) -> Tensor:
    """L_unc of one Monte-Carlo sample: mean of Sim / σ̂² + λ0 log σ̂² (paper, equation 2): a scalar.

    fixed, warped  (B, 1, W, H, D) intensities in [0, 1]
    energy         (B, 1, W, H, D) ``gradient_energy`` of the fixed image
    variance       (B, 3, W, H, D) σ̂², squared voxels
    largest_sigma  (3, 1, 1, 1) σ in voxels where the image has no gradient

    Sim is the squared residual divided by the squared gradient. That is the squared displacement, in voxels, to which the
    residual corresponds. Both terms of (2) then have the same unit, and the minimum over σ̂² is that squared displacement,
    which is large where the image is flat. If Sim were the squared residual of intensities, the minimum would be smallest
    in flat regions, where the image determines the displacement least.
    """
    squared = ((fixed - warped).square() + RESIDUAL_NOISE**2) / (energy + RESIDUAL_NOISE**2 / largest_sigma**2)
    return (squared / variance + LAMBDA_0 * variance.log()).mean()


def _overlap_and_size(fixed: Tensor, warped: Tensor) -> tuple[Tensor, Tensor]:
    """Σ s_fix s_mov∘T and Σ s_fix + Σ s_mov∘T of masks (B, K, W, H, D), each (B, K)."""
    return (fixed * warped).sum((2, 3, 4)), fixed.sum((2, 3, 4)) + warped.sum((2, 3, 4))


def _dice_of_sums(overlap: Tensor, size: Tensor) -> Tensor:
    """1 - 2 overlap / size, mean over the structures (B, K) that are present; 0 if none is."""
    present = size > 0
    return 1 - (2 * overlap[present] / size[present]).mean() if present.any() else size.sum() * 0


def dice_loss(fixed: Tensor, warped: Tensor) -> Tensor:
    """L_DSC = 1 - 2 Σ s_fix s_mov∘T / (Σ s_fix + Σ s_mov∘T), mean over structures (paper, section 3.3): a scalar.

    fixed, warped (B, K, W, H, D) soft masks in [0, 1], one channel per structure. A structure absent from both images is
    left out.
    """
    return _dice_of_sums(*_overlap_and_size(fixed, warped))


def label_dice_loss(fixed: Tensor, moving: Tensor, displacement: Tensor, values: list[int]) -> Tensor:
    """``dice_loss`` of the masks of ``values``, where the moving masks are warped linearly: a scalar.

    fixed, moving  (B, 1, W, H, D) label maps of any integer type
    displacement   (B, 3, W, H, D) in voxels
    values         the labels that count

    With more than ``LABELS_AT_ONCE`` labels, the masks are made in groups, and again for the gradient. So memory does not
    grow with the number of labels.
    """

    def sums(some: list[int], displacement: Tensor) -> tuple[Tensor, Tensor]:
        masks = [torch.cat([labels == v for v in some], dim=1).to(displacement.dtype) for labels in (fixed, moving)]
        return _overlap_and_size(masks[0], warp(masks[1], displacement))

    if len(values) <= LABELS_AT_ONCE:
        return _dice_of_sums(*sums(values, displacement))
    parts = [values[first : first + LABELS_AT_ONCE] for first in range(0, len(values), LABELS_AT_ONCE)]
    found = [checkpoint(sums, part, displacement, use_reentrant=False) for part in parts]
    return _dice_of_sums(*(torch.cat(each, dim=1) for each in zip(*found)))


def _difference(n: int, order: int) -> Tensor:
    """(n - order, n) finite differences of that order (0, 1 or 2), float64, on the compact stencil.

    A mixed second derivative is a first difference along each of two axes. Unlike a central difference, it detects a ±1
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

    displacement (B, 3, W, H, D) in voxels; t is the same in normalised units, and derivatives are per voxel. Each
    derivative is averaged over the positions where its stencil fits. Returns a scalar. ValueError on other shapes, or on
    fewer than 3 voxels along an axis.
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
def _gram(n: int, g: int, order: int, method: str, device: torch.device) -> Tensor:
    """(g, g) mean over voxels of the products of two basis functions' derivatives along one axis, float64."""
    derivative = _difference(n, order) @ basis(n, g, method, dtype=torch.float64)
    return (derivative.T @ derivative / len(derivative)).to(device)


def grid_bending_energy(control_points: Tensor, shape: int | Shape, method: str = "trilinear") -> Tensor:
    """``bending_energy(upsample(control_points, shape, method))``, exactly, without forming the dense field.

    The dense energy is a quadratic form of the control points. Its matrix is a sum of Kronecker products of one (g, g)
    Gram matrix per axis, so it costs O(G·g) instead of six passes over all voxels. It is computed in float64: a shift
    that all control points share cancels, and in float32 its rounding error would remain.

    control_points (B, 3, gw, gh, gd) in voxels of an image of ``shape``. Returns a scalar. ValueError as in
    ``bending_energy``.
    """
    check_volume(control_points, 3, "control_points")
    shape = as_shape(shape, "shape")
    t = _to_normalised(control_points.double(), shape)
    energy = t.new_zeros(())
    for multiplicity, orders in _second_derivatives():
        grams = [_gram(n, g, o, method, t.device) for n, g, o in zip(shape, t.shape[2:], orders)]
        energy = energy + multiplicity * (t * apply_along_axes(t, grams)).sum() / t.shape[0]
    return energy.to(control_points.dtype)
