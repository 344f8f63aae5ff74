"""KeyMorph, the keypoint baseline (Wang et al., Medical Image Analysis 90, 2023), built from the official package.

A convolutional network learns to find K keypoints in each image. The registration is the closed-form transformation from
the fixed image's keypoints to those of the moving image. The package ``keymorph`` provides the network's blocks, the
centre-of-mass layer and both aligners.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gridreg.errors import InputError
from gridreg.network import Registration
from gridreg.spatial import Shape

try:
    from keymorph import keypoint_aligners as official
    from keymorph.layers import CenterOfMass3d, ConvBlock
except ModuleNotFoundError as error:
    raise InputError(
        f"method keymorph: found no package {error.name!r}, expected keymorph 2.0.1; "
        "install it with: pip install --no-deps -r requirements-no-deps.txt"
    ) from error

WIDTHS = (1, 2, 2, 4, 4, 8, 8, 16)  # of the package's ConvNet, times ``width``; the last layer has one per keypoint
RIDGE = 1e-6  # keeps both fits solvable where keypoints coincide or lie in one plane
DISTANCES_AT_ONCE = 2**25  # between voxels and keypoints, held in memory: 128 MB


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """U(r) = r² log r between points (B, N, 3) and (B, K, 3): (B, N, K).

    As in the package, r² = |a - b|² + 1e-6, so that the gradient is finite where a voxel and a keypoint coincide. It does
    not form the package's (B, N, K, 3) differences, and takes a third of the time and memory.
    """
    squared = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None] - 2 * a @ b.transpose(1, 2)
    squared = squared.clamp(min=0) + 1e-6
    return squared * squared.log() / 2


class TPS(official.TPS):
    """The package's thin-plate spline with two methods replaced, which solve and evaluate the same equations.

    They solve for the shift y - x of the keypoints, in float64 and on the CPU, all three components together. Equal
    keypoints thus give exactly the identity. Coinciding keypoints neither raise nor give NaN. Memory is bounded.
    """

    def fit(self, c_src: Tensor, c_dst: Tensor, lmbda: Tensor, weights: None = None) -> Tensor:
        """Keypoints x → y, both (B, K, 3); lmbda (B,). Returns (B, K + 4, 3): weights, then the affine part."""
        x, y, lmbda = c_src.cpu().double(), c_dst.cpu().double(), lmbda.cpu().double()
        powers = torch.cat([torch.ones_like(x[..., :1]), x], dim=-1)
        bending = kernel(x, x) + torch.diag_embed((lmbda + RIDGE)[:, None].expand(-1, x.shape[1]))
        ridge = -RIDGE / (1 + lmbda)  # so that its weight does not grow with the stiffness
        corner = torch.diag_embed(ridge[:, None].expand(-1, 4))
        system = torch.cat([torch.cat([bending, powers], -1), torch.cat([powers.transpose(1, 2), corner], -1)], 1)
        shift = torch.linalg.solve(system, torch.cat([y - x, torch.zeros_like(x[:, :4])], dim=1))
        identity = torch.zeros_like(shift)
        identity[:, -3:] = torch.eye(3)
        return (shift + identity).to(c_src)

    def tps(self, theta: Tensor, ctrl: Tensor, grid: Tensor) -> Tensor:
        """The spline ``theta`` with keypoints ``ctrl`` at (1, x, y, z) of ``grid`` (B, W, H, D, 4): (B, W, H, D, 3)."""
        weights, affine = theta[:, :-4], theta[:, -4:]

        def evaluate(weights: Tensor, affine: Tensor, ctrl: Tensor, points: Tensor) -> Tensor:
            return points @ affine + kernel(points[..., 1:], ctrl) @ weights

        slabs = grid.flatten(1, 3).split(max(DISTANCES_AT_ONCE // (ctrl.shape[0] * ctrl.shape[1]), 1), dim=1)
        if len(slabs) == 1:
            values = [evaluate(weights, affine, ctrl, slabs[0])]
        else:  # computed again for the gradient, which saves memory
            values = [checkpoint(evaluate, weights, affine, ctrl, slab, use_reentrant=False) for slab in slabs]
        return torch.cat(values, dim=1).view(*grid.shape[:-1], 3)


class Affine(official.AffineKeypointAligner):
    """The package's affine aligner, which takes one pair at a time; ``fit`` is replaced and fits the shift y - x."""

    def fit(self, x: Tensor, y: Tensor, w: None = None) -> Tensor:
        """Keypoints x → y, both (1, K, 3), by least squares. Returns (1, 3, 4)."""
        like, x, y = x, x.cpu().double(), y.cpu().double()
        powers = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        identity = torch.eye(4, dtype=x.dtype)
        gram = powers.transpose(1, 2) @ powers + RIDGE * identity
        shift = torch.linalg.solve(gram, powers.transpose(1, 2) @ (y - x)).transpose(1, 2)
        return (shift + identity[:3]).to(like)


def flow_field(fixed: Tensor, moving: Tensor, shape: Shape, align: str, tps_lambda: float) -> Tensor:
    """The package's sampling grid (B, W, H, D, 3) from keypoints (B, K, 3) in [-1, 1]; last array axis first."""
    if align == "tps":
        strength = torch.full((len(fixed),), tps_lambda, device=fixed.device)
        return TPS(moving, fixed, strength).get_flow_field((len(fixed), 1, *shape))
    pairs = zip(moving.split(1), fixed.split(1))
    return torch.cat([Affine(m, f).get_flow_field((1, 1, *shape)) for m, f in pairs])


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
def identity_grid(shape: Shape, device: torch.device) -> Tensor:
    """(W, H, D, 3) normalised coordinates of the voxels in the order of the axes, computed as in the package."""
    axes = [torch.linspace(-1, 1, n) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(device)


def to_displacement(grid: Tensor) -> Tensor:
    """A sampling grid (B, W, H, D, 3), last array axis first, as a displacement (B, 3, W, H, D) in voxels.

    The package's grid has voxel 0 at -1 and voxel n - 1 at +1, which is ``align_corners=True``. The package's
    ``align_img`` samples with False, which shifts images even at the identity. We do not do this.
    """
    shape = tuple(grid.shape[1:4])
    half = torch.tensor([(n - 1) / 2 for n in shape], device=grid.device)
    return ((grid.flip(-1) - identity_grid(shape, grid.device)) * half).movedim(-1, 1)


class KeyMorph(nn.Module):
    """Registration by keypoints.

    keypoints   number of keypoints K
    layers      number of convolutions, 4 to 9
    width       channels of the first layer
    poolings    largest number of max-poolings by 2; one follows every second layer except the last
    align       "tps" or "affine"
    tps_lambda  stiffness of the thin-plate spline: 0 interpolates the keypoints, 10 is almost affine

    The package's ConvNet has 9 layers, width 32 and 4 poolings. It has 7.0 M parameters plus 13 825 per keypoint. The
    GridReg paper compares with 1 410 329 parameters, which no K gives. The defaults here give 1 403 216.

    ValueError on another number of layers or another ``align``.
    """

    def __init__(
        self,
        keypoints: int = 80,
        layers: int = 9,
        width: int = 12,
        poolings: int = 4,
        align: str = "tps",
        tps_lambda: float = 1.0,
    ):
        super().__init__()
        if not 4 <= layers <= 9:
            raise ValueError(f"layers must be 4 to 9, found {layers}")
        if align not in ("tps", "affine"):
            raise ValueError(f"align must be tps or affine, found {align!r}")
        widths = [1, *(width * w for w in WIDTHS[: layers - 1]), keypoints]
        self.poolings = min(poolings, (layers - 1) // 2)
        self.align, self.tps_lambda = align, tps_lambda
        self.backbone = nn.Sequential()
        for number, (channels_in, channels_out) in enumerate(zip(widths, widths[1:]), start=1):
            pooled = number % 2 == 0 and number // 2 <= self.poolings
            self.backbone.append(ConvBlock(channels_in, channels_out, 1, "instance", pooled, dim=3))
        self.centre_of_mass = CenterOfMass3d(indexing="ij")

    def locate(self, heatmaps: Tensor, shape: Shape) -> Tensor:
        """Centres of mass of (B, K, w, h, d): (B, K, 3) in [-1, 1] of an image of ``shape``, in the order of the axes.

        The layer's coordinates run from the first cell to the last. A cell covers the voxels that were pooled into it, so
        the centres of these two cells are not the corners of the image. If they were taken as corners, a translation
        would come out too large.
        """
        cell = 2**self.poolings
        counts, sizes = (torch.tensor(s, device=heatmaps.device) for s in (heatmaps.shape[2:], shape))
        voxels = (self.centre_of_mass(heatmaps) + 1) / 2 * (counts - 1) * cell + (cell - 1) / 2
        return 2 * voxels / (sizes - 1) - 1

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        """fixed, moving (B, 1, W, H, D) in [0, 1]; ``grid_size`` is ignored. ValueError if the images are too small."""
        shape, least = tuple(fixed.shape[2:]), 2 ** (self.poolings + 1)
        if min(shape) < least:
            raise ValueError(f"{self.poolings} poolings need at least {least} voxels on every axis, found {shape}")
        heatmaps = self.backbone(torch.cat([fixed, moving]))
        with torch.autocast(heatmaps.device.type, enabled=False):  # a displacement needs full precision
            points = self.locate(heatmaps.float(), shape)
            grid = flow_field(*points.split(len(fixed)), shape, self.align, self.tps_lambda)
            return Registration(to_displacement(grid).contiguous())
