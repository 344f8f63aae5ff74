"""The matching encoder: it finds correspondences, and hands displacements to the decoder (not in the paper).

The paper's encoder sees both images at once and has to express a displacement by features. Here each image goes alone
through one shared encoder, and two steps compare the results:

1. Matching. Every token of the fixed image attends to all tokens of the moving one, and the value that attention carries
   is the position: token x with descriptor q(x) gets the displacement

       d(x) = Σ_y A(x, y) (y - x),   A = softmax_y(t · q(x)·k(y) - |y - x|² / 2s²),

   and the variance of y under A. Temperature t and reach s are learnt. An image matched with itself has d ≠ 0 near the
   border, where all candidates lie on one side; that part is subtracted.
2. Local least squares, for what is smaller than a voxel. With r = F - M∘φ the residual of the standardised images and g
   their mean gradient, the displacement u of a window minimises Σ (r - g·u)² + λ |u|² (Lucas & Kanade 1981):

       (Σ g gᵀ + λ I) u = Σ g r.

   The inverse of the matrix is the covariance of u: an edge knows motion across it, not along it.

Images of more than ``MOST_VOXELS`` are read at half the resolution, or less: the grid of control points is far coarser.
Both steps end in normal equations of tokens, G u = b. ``fit`` solves them from wide windows to narrow ones with learnt
damping λ. The decoder reads displacements, spreads and residuals beside the features of both images, and adds what they
lack. From that, what it says of the fixed image with itself is subtracted: identical images stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridreg.encoder import EncoderLayer
from gridreg.spatial import Shape, warp
from gridreg.upsampling import apply_along_axes, basis

MOST_VOXELS = 2**20  # of the images that the encoder sees
MOST_TOKENS = 2000  # that are matched with one another; more need a coarser lattice
DESCRIPTOR = 32  # channels
LEAST_VARIANCE = 0.1  # of a matched position, in squared ``UNITS``
TINY = 1e-4  # squared ``UNITS``; under the root of a variance that may be 0
UNITS = 16  # to a width of the image: displacements of tokens come in these units
STRIDES = (16, 8, 4)  # voxels between the tokens of the lattices, from wide windows to narrow ones
SWEEPS = 2  # of ``fit`` over these lattices
WINDOW = 8  # voxels; half the width of the windows in which images are standardised
MATCHED, LOCAL = 7, 7  # channels of a token: displacement, spread and cost of either step


def lattice(shape: Shape, stride: int) -> Shape:
    """Tokens along each axis, about ``stride`` voxels apart, corners included; at least two."""
    return tuple(max(-(-n // stride), 2) for n in shape)


def finest(shape: Shape, most: int, stride: int) -> Shape:
    """The finest lattice from ``stride`` on that has at most ``most`` tokens."""
    while math.prod(lattice(shape, stride)) > most and max(shape) > stride:
        stride += 1
    return lattice(shape, stride)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is cached must serve a training too
def reader(n: int, count: int, m: int, stride: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(m, count) weights that read values at voxels 0, stride, 2 stride … at m tokens between 0 and n - 1.

    Linear interpolation, its hat widened to the distance between tokens where that is larger: no value goes unseen.
    """
    distance = torch.linspace(0, n - 1, m, dtype=torch.float64)[:, None] - stride * torch.arange(count)
    width = max(stride, (n - 1) / (m - 1))
    weights = (1 - distance.abs() / width).clamp(min=0)
    beyond = weights.sum(1) == 0  # tokens after the last value read the last value
    weights[beyond, -1] = 1
    return (weights / weights.sum(1, keepdim=True)).to(device, dtype)


def read(values: Tensor, shape: Shape, tokens: Shape, stride: int = 1) -> Tensor:
    """Values (B, C, a, b, c), a voxel or ``stride`` voxels of an image of ``shape`` apart, at the tokens of a lattice."""
    where = (values.device, values.dtype)
    matrices = [reader(n, a, m, stride, *where) for n, a, m in zip(shape, values.shape[2:], tokens)]
    return apply_along_axes(values, matrices)


def resample(values: Tensor, tokens: Shape) -> Tensor:
    """Values of one lattice at the tokens of another: means over windows, or linear interpolation."""
    if tuple(values.shape[2:]) == tokens:
        return values
    where = (values.device, values.dtype)
    matrices = [
        basis(m, a, "trilinear", *where) if m >= a else reader(a, a, m, 1, *where)
        for a, m in zip(values.shape[2:], tokens)
    ]
    return apply_along_axes(values, matrices)


# ---- Symmetric 3×3 matrices, (B, 6, ...): xx, xy, xz, yy, yz, zz --------------------------------------------------


def diagonal(values: Tensor) -> Tensor:
    """(B, 3, ...) diagonals as matrices."""
    x, y, z = values.unbind(1)
    zero = torch.zeros_like(x)
    return torch.stack([x, zero, zero, y, zero, z], dim=1)


def product(matrix: Tensor, u: Tensor) -> Tensor:
    """Matrix (B, 6, ...) times vector (B, 3, ...)."""
    xx, xy, xz, yy, yz, zz = matrix.unbind(1)
    x, y, z = u.unbind(1)
    return torch.stack([xx * x + xy * y + xz * z, xy * x + yy * y + yz * z, xz * x + yz * y + zz * z], dim=1)


def inverse(matrix: Tensor) -> Tensor:
    """Inverse (B, 6, ...) of positive definite matrices, by cofactors."""
    xx, xy, xz, yy, yz, zz = matrix.unbind(1)
    cofactors = [yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy,
                 xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy]  # fmt: skip
    determinant = xx * cofactors[0] + xy * cofactors[1] + xz * cofactors[2]
    return torch.stack(cofactors, dim=1) / determinant[:, None]


def fit(matrix: Tensor, right: Tensor, shape: Shape, damping: Tensor) -> Tensor:
    """A smooth displacement u with G u ≈ b: damped least squares over wide windows, then over narrower ones.

    matrix   (B, 6, a, b, c) G of the tokens; right (B, 3, a, b, c) b
    shape    of the image, from which the lattices of ``STRIDES`` follow
    damping  (SWEEPS, len(STRIDES)) λ > 0
    returns  (B, 3, a, b, c)
    """
    tokens, u = tuple(right.shape[2:]), torch.zeros_like(right)
    identity = diagonal(torch.ones_like(right[:1, :, :1, :1, :1]))
    for each in damping:
        for stride, weight in zip(STRIDES, each):
            windows = lattice(shape, stride)
            windows = tuple(min(w, t) for w, t in zip(windows, tokens))
            of_windows = resample(torch.cat([matrix, right - product(matrix, u)], dim=1), windows)
            damped = inverse(of_windows[:, :6] + weight * identity)
            u = u + resample(product(damped, of_windows[:, 6:]), tokens)
    return u


def standardised(image: Tensor, floor: Tensor) -> Tensor:
    """The image minus its mean, over its standard deviation, in a window around each voxel.

    Slow changes of gain and bias are gone. ``floor`` is added to the deviation (in squares), so that the noise of flat
    regions stays small. Means are formed at a lattice of ``WINDOW`` voxels and interpolated between.
    """
    shape = tuple(image.shape[2:])
    means = [read(power, shape, lattice(shape, WINDOW)) for power in (image, image * image)]
    deviation = ((means[1] - means[0] ** 2).clamp(min=0) + floor * floor).sqrt()
    mean, deviation = (resample(values, shape) for values in (means[0], deviation))
    return (image - mean) / deviation


def gradient(image: Tensor) -> Tensor:
    """(B, 1, W, H, D) → (B, 3, W, H, D), central differences a voxel."""
    return torch.stack(torch.gradient(image[:, 0], dim=(1, 2, 3)), dim=1)


def normal_equations(fixed: Tensor, warped: Tensor, tokens: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Means of g gᵀ (B, 6, ...), g r (B, 3, ...) and r² (B, 1, ...) around the tokens; images are standardised."""
    residual, slope = fixed - warped, gradient((fixed + warped) / 2)
    x, y, z = slope.split(1, 1)
    products = torch.cat([x * slope, y * slope[:, 1:], z * z, residual * slope, residual.square()], dim=1)
    return read(products, tuple(fixed.shape[2:]), tokens).split([6, 3, 1], dim=1)


@dataclass
class Seen:
    """What the encoder keeps of an image.

    image        (B, 1, w, h, d), standardised for the least squares
    features     of the layers that the decoder reads, at their lattices
    descriptors  (B, N, DESCRIPTOR) unit vectors of the tokens that are matched
    own          what ``attend`` finds of the image in itself; of the fixed image alone
    """

    image: Tensor
    features: dict[int, Tensor]
    descriptors: Tensor
    own: tuple[Tensor, Tensor, Tensor] | None = None


class MatchingEncoder(nn.Module):
    """Shared encoder of each image, matching, and local least squares. See the module.

    widths   channels of the encoder's layers, as the paper's; the first four have stride 2
    layers   numbers of the layers that the decoder reads, coarse to fine: the last, 3, 2
    """

    def __init__(self, widths: list[int], layers: tuple[int, ...]):
        super().__init__()
        sizes = [2, *widths]  # of the image, and of the standardised image
        self.layers = layers
        self.encoder = nn.ModuleList(
            EncoderLayer(sizes[i], sizes[i + 1], 2 if i < 4 else 1) for i in range(len(widths))
        )
        self.described = (2, 3, len(widths))
        self.describe = nn.Linear(sum(widths[layer - 1] for layer in self.described), DESCRIPTOR)
        # All of these are learnt. From here even random descriptors find most of a displacement.
        self.log_temperature = nn.Parameter(torch.tensor(2.5))
        self.log_reach = nn.Parameter(torch.tensor(1.5))
        self.log_floor = nn.Parameter(torch.tensor(-1.6))
        self.log_damping_matched = nn.Parameter(torch.tensor([[-3.0, -2.0, -1.0]]).repeat(SWEEPS, 1))
        self.log_damping = nn.Parameter(torch.tensor([[-6.0, -4.6, -3.2]]).repeat(SWEEPS, 1))
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0]))
        self.channels = [2 * widths[layer - 1] + MATCHED for layer in layers]
        self.channels[-1] += LOCAL

    @staticmethod
    def reduced(image: Tensor) -> Tensor:
        """The image (B, 1, W, H, D) as the encoder sees it: at most ``MOST_VOXELS``, mean 0, standard deviation 1."""
        shape = tuple(image.shape[2:])
        if math.prod(shape) > MOST_VOXELS:
            image = read(image, shape, finest(shape, MOST_VOXELS, 2))
        centred = image - image.mean((1, 2, 3, 4), keepdim=True)
        return centred * (centred.square().mean((1, 2, 3, 4), keepdim=True) + 1e-12).rsqrt()

    def look_at_fixed(self, fixed: Tensor) -> Seen:
        """Encode the fixed image (B, 1, w, h, d), as ``reduced`` gives it: once, for all passes."""
        seen = self.look(fixed)
        seen.own = self.attend(
            seen.descriptors, seen.descriptors, finest(tuple(fixed.shape[2:]), MOST_TOKENS, STRIDES[-1])
        )
        return seen

    def look(self, image: Tensor) -> Seen:
        """Encode one image (B, 1, w, h, d)."""
        standard = standardised(image, self.log_floor.exp())
        shape, features, x = tuple(image.shape[2:]), {}, torch.cat([image, standard], dim=1)
        for layer, encode in enumerate(self.encoder, start=1):
            x = encode(x)
            if layer in self.layers or layer in self.described:
                features[layer] = x.to(image.dtype)
        stride = {layer: 2 ** min(layer, 4) for layer in features}
        tokens = finest(shape, MOST_TOKENS, STRIDES[-1])
        described = [read(features[layer], shape, tokens, stride[layer]) for layer in self.described]
        with torch.autocast(image.device.type, enabled=False):
            descriptors = self.describe(torch.cat(described, dim=1).flatten(2).transpose(1, 2))
        features = {n: read(features[n], shape, lattice(shape, stride[n]), stride[n]) for n in self.layers}
        return Seen(standard, features, F.normalize(descriptors, dim=-1))

    def attend(self, fixed: Tensor, moving: Tensor, tokens: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """Expected position and its variance (B, 3, *tokens) in ``UNITS``, and expected similarity (B, 1, *tokens)."""
        axes = [torch.linspace(-UNITS / 2, UNITS / 2, n, device=fixed.device, dtype=fixed.dtype) for n in tokens]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2).expand(len(fixed), -1, -1)
        near = (-2 * self.log_reach).exp()  # 1 / s². Of |y - x|² the part that softmax sees is a product, as q·k is
        query = torch.cat([fixed * self.log_temperature.exp(), place * near, torch.ones_like(place[..., :1])], dim=-1)
        key = torch.cat([moving, place, -place.square().sum(-1, keepdim=True) * near / 2], dim=-1)
        value = torch.cat([place, place.square(), moving], dim=-1)
        width = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8  # the fast kernels want one width, a multiple of 8
        query, key, value = (F.pad(x, (0, width - x.shape[-1]))[:, None] for x in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0]
        mean, square = found[..., :3], found[..., 3:6]
        similarity = (fixed * found[..., 6 : 6 + DESCRIPTOR]).sum(-1, keepdim=True)
        variance = (square - mean.square()).clamp(min=0)
        return tuple(x.transpose(1, 2).unflatten(2, tokens) for x in (mean, variance, similarity))

    def forward(
        self, fixed: Seen, moving: Tensor, control_points: Tensor, field: Callable[[Tensor, Shape], Tensor], first: bool
    ) -> tuple[dict[int, Tensor], Tensor]:
        """One pass: what the decoder reads, by layer, and the control points so far.

        fixed           what ``look_at_fixed`` saw
        moving          (B, 1, w, h, d), as ``reduced`` gives it
        control_points  (B, 3, gw, gh, gd) of the passes before, in voxels of (w, h, d); zeros in the ``first`` one
        field           control points and (w, h, d) → displacement (B, 3, w, h, d)
        """
        seen = self.look(moving if first else warp(moving, field(control_points, tuple(moving.shape[2:]))))
        with torch.autocast(moving.device.type, enabled=False):  # a displacement needs all its digits
            control_points, matched, local = self.find(fixed, seen, moving, control_points, field)
        return self.for_decoder(fixed, seen, matched, local), control_points

    def nothing_to_do(self, fixed: Seen) -> dict[int, Tensor]:
        """What the decoder would read of the fixed image with itself; what it says of that is no displacement."""
        with torch.autocast(fixed.image.device.type, enabled=False):
            variance = fixed.own[1]
            matched = torch.cat([torch.zeros_like(variance), (variance + TINY).sqrt(), fixed.own[2] * 0], dim=1)
            matrix, zero, cost = normal_equations(fixed.image, fixed.image, lattice(fixed.image.shape[2:], STRIDES[-1]))
            local = torch.cat([zero, self.unknown(matrix), cost], dim=1)
        return self.for_decoder(fixed, fixed, matched, local)

    def for_decoder(self, fixed: Seen, seen: Seen, matched: Tensor, local: Tensor) -> dict[int, Tensor]:
        """Features of both images, and what was found, at the lattice of each layer that the decoder reads."""
        tokens = {}
        for layer in self.layers:
            steps = [matched, local] if layer == self.layers[-1] else [matched]
            size = tuple(fixed.features[layer].shape[2:])
            parts = [fixed.features[layer], seen.features[layer], *(resample(step, size) for step in steps)]
            tokens[layer] = torch.cat(parts, dim=1)
        return tokens

    def unknown(self, matrix: Tensor) -> Tensor:
        """Spread of the least squares along each axis (B, 3, ...), as a share of what it is without an image."""
        damping = self.log_damping[-1, -1].exp()
        return (inverse(matrix + damping * diagonal(torch.ones_like(matrix[:, :3])))[:, [0, 3, 5]] * damping).sqrt()

    def find(
        self, fixed: Seen, seen: Seen, moving: Tensor, control_points: Tensor, field: Callable[[Tensor, Shape], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both steps: the control points with what they add, and displacement, spread and cost of their tokens.

        The spread of a matched token is the standard deviation of its position; that of the least squares is a share of
        what it would be without an image, 1 where nothing is known. The displacements come in ``UNITS``. Other arguments
        as for ``forward``; seen is the moving image, warped by the passes before.
        """
        shape, grid_size = tuple(moving.shape[2:]), tuple(control_points.shape[2:])
        unit = moving.new_tensor([(n - 1) / UNITS for n in shape]).view(3, 1, 1, 1)  # voxels

        position, variance, similarity = self.attend(
            fixed.descriptors, seen.descriptors, finest(shape, MOST_TOKENS, STRIDES[-1])
        )
        own_position, _, own_similarity = fixed.own
        displacement, weight = position - own_position, 1 / (variance + LEAST_VARIANCE)
        matched = torch.cat([displacement, (variance + TINY).sqrt(), own_similarity - similarity], dim=1)
        smooth = fit(diagonal(weight), weight * displacement, shape, self.log_damping_matched.exp())
        control_points = control_points + self.gain[0] * resample(smooth, grid_size) * unit

        warped = standardised(warp(moving, field(control_points, shape)), self.log_floor.exp())
        matrix, right, cost = normal_equations(fixed.image, warped, lattice(shape, STRIDES[-1]))
        displacement = fit(matrix, right, shape, self.log_damping.exp())
        local = torch.cat([displacement / unit, self.unknown(matrix), cost], dim=1)
        return control_points + self.gain[1] * resample(displacement, grid_size), matched, local
