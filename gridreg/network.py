"""The GridReg network: it predicts a displacement at control points only, by cross-attention to image features.

Encoder → skip-projections → decoder → heads (paper, section 3.1). No weight depends on the grid size: the grid enters
through its coordinates alone, so one model works on every grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gridreg import fast
from gridreg.attention import CHANNELS, HEADS, CrossAttention, grid_encoding, neighbourhoods, readers
from gridreg.encoder import EncoderLayer
from gridreg.matching import MatchingEncoder
from gridreg.spatial import Shape, check_grid_size, check_volume
from gridreg.upsampling import METHODS, apply_channels_last, basis, bounded, upsample

WIDTHS = (1, 2, 2, 4, 4, 8, 8, 16, 16)  # of the encoder, times base_channels; they give the paper's parameter count
STRIDED_LAYERS = 4  # later layers keep the resolution
LOCAL_LAYERS = (3, 2)  # encoder layers with attention to local windows, coarse to fine
ENCODERS = ("pair", "match")
LOG_VARIANCE_RANGE = (-14.0, 0.0)  # σ is 0.001 to 1 times half the image width


@dataclass
class Registration:
    """The result of every registration network.

    displacement    (B, 3, W, H, D) in voxels of the fixed grid
    control_points  (B, 3, gw, gh, gd) mean displacement in voxels; None for methods without a grid
    sigma           (B, 3, gw, gh, gd) standard deviation in voxels; None without the Bayesian head
    """

    displacement: Tensor
    control_points: Tensor | None = None
    sigma: Tensor | None = None


def level_grid(grid_size: Shape, shape: Shape, whole: bool = False) -> Shape:
    """The grid on which a level of ``shape`` feature voxels is decoded: at most one point on and one between voxels.

    More points would read the same features again. With ``whole`` it is ``grid_size`` itself: the coarsest level, and the
    last one, whose points are the result.
    """
    return grid_size if whole else tuple(min(g, max(2 * n - 1, 2)) for g, n in zip(grid_size, shape))


def resize(y: Tensor, grid_size: Shape, new: Shape) -> Tensor:
    """Features Y (B, G, C) of one grid, interpolated at the points of another."""
    if grid_size == new:
        return y
    bases = [basis(n, g, "trilinear", y.device, y.dtype) for n, g in zip(new, grid_size)]
    return apply_channels_last(y.unflatten(1, grid_size), bases).flatten(1, 3)


class DecoderLevel(nn.Module):
    """One decoder level: it projects the encoder's features, attends to them, and refines the feature Y of every point.

    A local level first reads P and Y at the positions of the tokens and then concatenates them. Reading is linear, so the
    order does not change the result, and there are fewer tokens than feature voxels.
    """

    def __init__(self, channels: int, coarsest: bool):
        super().__init__()
        self.coarsest = coarsest
        self.project = nn.Linear(channels, CHANNELS)  # a 1×1×1 convolution
        self.attention = CrossAttention(CHANNELS if coarsest else 2 * CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.GELU(), nn.Linear(CHANNELS, CHANNELS))

    def forward(self, features: Tensor, carried: Tensor | None, carried_grid: Shape | None, grid_size: Shape) -> Tensor:
        """features (B, C_l, w, h, d); carried (B, G', CHANNELS) on ``carried_grid``; returns (B, G, CHANNELS)."""
        shape, where = tuple(features.shape[2:]), (features.device, self.norm.weight.dtype)
        queries = grid_encoding(grid_size, *where)
        # P, with positional encodings
        tokens = self.project(features.flatten(2).transpose(1, 2)) + grid_encoding(shape, *where)
        if self.coarsest:
            y = self.attention(queries, tokens[:, None])
        else:
            read = readers(shape, grid_size, *where)
            if fast.used("attention"):
                read[2] = fast.by_window(read[2], grid_size[2])
            through = [matrix @ basis(n, g, "trilinear", *where) for matrix, n, g in zip(read, shape, carried_grid)]
            pair = (tokens.unflatten(1, shape), read), (carried.unflatten(1, carried_grid), through)
            tokens = torch.cat([apply_channels_last(*each) for each in pair], dim=-1)  # Ŷ = [P, Y]
            if fast.used("attention"):
                windows = fast.windows(tokens, grid_size, HEADS)
                y = torch.cat([self.attention(queries[points], *seen) for points, *seen in windows], dim=1)
            else:
                y = self.attention(queries, neighbourhoods(tokens, grid_size))
            y = y + resize(carried, carried_grid, grid_size)
        return y + self.mlp(self.norm(y))


class GridReg(nn.Module):
    """Registration by displacements of a sparse grid of control points (paper, section 3.1).

    base_channels  width C of the encoder (paper: 16; ablated 8, 32)
    num_layers     encoder layers L, 4 to 9 (paper: 5)
    bayesian       also predict a standard deviation per control point (paper, section 3.2)
    upsampling     "trilinear", "bspline" or "deconv" (paper, section 3.2)
    projector      False: the decoder gets the coarsest level alone (Table 3, config 5)
    fold_free      bound the control points so that the field cannot fold (``upsampling.bounded``); "bspline" only
    encoder        "pair" (the paper's) encodes both images together; "match" finds correspondences (``matching``)
    passes         number of passes of "match"; each later one warps the moving image by the displacement so far and
                   adds to it. It may change after training

    ValueError on an impossible combination.
    """

    def __init__(
        self,
        base_channels: int = 16,
        num_layers: int = 5,
        bayesian: bool = False,
        upsampling: str = "trilinear",
        projector: bool = True,
        fold_free: bool = False,
        encoder: str = "pair",
        passes: int = 1,
    ):
        super().__init__()
        if not 4 <= num_layers <= len(WIDTHS):
            raise ValueError(f"num_layers must lie between 4 and {len(WIDTHS)}, found {num_layers}")
        if upsampling not in METHODS:
            raise ValueError(f"upsampling must be one of {', '.join(METHODS)}; found {upsampling!r}")
        if fold_free and upsampling != "bspline":
            raise ValueError(f"fold_free needs upsampling 'bspline', found {upsampling!r}")
        if encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}; found {encoder!r}")
        if passes < 1 or (passes > 1 and encoder == "pair"):
            raise ValueError(f"passes must be at least 1, and more need encoder 'match'; found {passes}")
        self.upsampling, self.fold_free, self.passes = upsampling, fold_free, passes
        widths = [2] + [base_channels * w for w in WIDTHS[:num_layers]]
        self.layers = (num_layers, *LOCAL_LAYERS) if projector else (num_layers,)
        if encoder == "match":
            self.encoder = MatchingEncoder(widths[1:], self.layers)
            channels = self.encoder.channels
        else:
            self.encoder = nn.ModuleList(
                EncoderLayer(widths[i], widths[i + 1], 2 if i < STRIDED_LAYERS else 1) for i in range(num_layers)
            )
            channels = [widths[layer] for layer in self.layers]
        self.decoder = nn.ModuleList(DecoderLevel(c, coarsest=n == num_layers) for c, n in zip(channels, self.layers))
        self.mean = nn.Linear(CHANNELS, 3)
        self.log_variance = nn.Linear(CHANNELS, 3) if bayesian else None
        nn.init.normal_(self.mean.weight, std=1e-3)  # start near the identity, so that the first gradients are useful
        nn.init.zeros_(self.mean.bias)
        if bayesian:  # start with a small σ: 1.5 % of the image width
            nn.init.normal_(self.log_variance.weight, std=1e-3)
            nn.init.constant_(self.log_variance.bias, -7.0)

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: int | Shape = (10, 10, 10)) -> Registration:
        """fixed, moving (B, 1, W, H, D) in [0, 1] → Registration. ValueError on other shapes or an impossible grid."""
        check_volume(fixed, 1, "fixed")
        check_volume(moving, 1, "moving")
        if fixed.shape != moving.shape:
            raise ValueError(f"fixed is {tuple(fixed.shape)}, moving {tuple(moving.shape)}; they must agree")
        shape = tuple(fixed.shape[2:])
        grid_size = check_grid_size(grid_size, shape)
        if max(shape) <= 2**STRIDED_LAYERS:
            raise ValueError(f"images must have more than {2**STRIDED_LAYERS} voxels on some axis, found {shape}")
        half = torch.tensor(shape, device=fixed.device)[:, None] / 2  # heads predict in half image widths
        if isinstance(self.encoder, MatchingEncoder):
            control_points, y = self._match(fixed, moving, grid_size, half)
        else:
            y = self._decode(self._encode(fixed, moving), grid_size)
            control_points = self._displace(y, half, grid_size)
        with torch.autocast(y.device.type, enabled=False):  # a displacement needs full precision
            sigma = None
            if self.log_variance is not None:
                log_variance = self.log_variance(y.to(self.mean.weight.dtype)).transpose(1, 2)
                sigma = ((log_variance.clamp(*LOG_VARIANCE_RANGE) / 2).exp() * half).unflatten(2, grid_size)
            if self.fold_free:
                control_points = bounded(control_points, shape)
        return Registration(upsample(control_points, shape, self.upsampling), control_points, sigma)

    def _encode(self, fixed: Tensor, moving: Tensor) -> dict[int, Tensor]:
        """Features (B, C_l, w, h, d) of both images together, by encoder layer."""
        features, x = {}, torch.cat([fixed, moving], dim=1)
        for layer, encode in enumerate(self.encoder, start=1):
            x = encode(x)
            if layer in self.layers:  # the others need not be kept
                features[layer] = x
        return features

    def _decode(self, features: dict[int, Tensor], grid_size: Shape) -> Tensor:
        """Feature Y (B, G, CHANNELS) of every control point."""
        y = at = None
        for layer, level in zip(self.layers, self.decoder):
            whole = level.coarsest or level is self.decoder[-1]
            here = level_grid(grid_size, features[layer].shape[2:], whole)
            y, at = level(features[layer], y, at, here), here
        return y

    def _displace(self, y: Tensor, half: Tensor, grid_size: Shape) -> Tensor:
        """Control points (B, 3, gw, gh, gd) in voxels, from Y."""
        with torch.autocast(y.device.type, enabled=False):
            return (self.mean(y.to(self.mean.weight.dtype)).transpose(1, 2) * half).unflatten(2, grid_size)

    def _match(self, fixed: Tensor, moving: Tensor, grid_size: Shape, half: Tensor) -> tuple[Tensor, Tensor]:
        """Control points (B, 3, gw, gh, gd) in voxels, summed over all passes, and Y of the last pass."""
        shape = tuple(fixed.shape[2:])
        fixed, moving = self.encoder.reduced(fixed), self.encoder.reduced(moving)
        scale = [
            (n - 1) / (m - 1) for n, m in zip(shape, fixed.shape[2:])
        ]  # image voxels per voxel of the encoder's input
        scale = fixed.new_tensor(scale).view(3, 1, 1, 1)

        def field(control_points: Tensor, size: Shape) -> Tensor:
            if self.fold_free:
                control_points = bounded(control_points * scale, shape) / scale
            return upsample(control_points, size, self.upsampling)

        seen, control_points = self.encoder.look_at_fixed(fixed), fixed.new_zeros(len(fixed), 3, *grid_size)
        nothing = self._displace(self._decode(self.encoder.nothing_to_do(seen), grid_size), half, grid_size)
        for number in range(self.passes):
            features, control_points = self.encoder(seen, moving, control_points, field, first=number == 0)
            y = self._decode(features, grid_size)
            control_points = control_points + (self._displace(y, half, grid_size) - nothing) / scale
        return control_points * scale, y
