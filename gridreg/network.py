"""The GridReg network: a displacement at control points only, by cross-attention from grid to image features.

Encoder → skip-projections → decoder → heads (paper, section 3.1). Every weight is independent of the grid size:
the grid enters through its coordinates alone, so one model serves every grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridreg.fold_free import bounded
from gridreg.grid import Shape, check_grid_size, check_volume
from gridreg.interpolation import METHODS, upsample

WIDTHS = (1, 2, 2, 4, 4, 8, 8, 16, 16)  # encoder widths in base channels; they give the paper's parameter count
STRIDED_LAYERS = 4  # later layers keep the resolution
CHANNELS = 32  # C_p = C_pe = C_d: tokens, positional encodings and decoder features
HEADS, HEAD_CHANNELS = 2, 32
LOCAL_LAYERS = (3, 2)  # encoder layers whose tokens are attended locally, coarse to fine
CACHED = 2**21  # numbers at once in windows, so that they stay in a cache
SHARED = 5  # control points to a window: more of them look at tokens in vain, fewer need more memory
MAX_TOKENS_A_SPACING = 2  # along one axis; a local window is two control-point spacings wide
LOG_VARIANCE = (-14.0, 0.0)  # σ lies between a thousandth of half the image and half the image


@dataclass
class Registration:
    """What a registration network returns.

    displacement    (B, 3, W, H, D), voxels of the fixed grid
    control_points  (B, 3, gw, gh, gd) mean displacement in voxels; None for methods without a grid
    sigma           (B, 3, gw, gh, gd) standard deviation in voxels; None without the Bayesian head
    """

    displacement: Tensor
    control_points: Tensor | None = None
    sigma: Tensor | None = None


class EncoderLayer(nn.Module):
    """Conv3d 3×3×3 → InstanceNorm (as groups of one channel: that is faster) → bias, which it would cancel before → ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.group_norm(self.conv(x), len(self.bias), torch.ones_like(self.bias), self.bias), inplace=True)


def encoding(coordinates: Tensor) -> Tensor:
    """Sinusoidal positional encoding ψ of normalised coordinates (..., 3) in [-1, 1]: (..., CHANNELS)."""
    octaves = CHANNELS // 6
    frequencies = torch.pi * 2.0 ** torch.arange(-1, octaves - 1).to(coordinates)
    phases = (coordinates[..., None] * frequencies).flatten(-2)
    waves = torch.cat([phases.sin(), phases.cos()], dim=-1)
    return F.pad(waves, (0, CHANNELS - waves.shape[-1]), value=1.0)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve a training too
def grid_encoding(grid_size: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(G, CHANNELS) encodings of the control points; cached per grid size (paper, section 3.1)."""
    axes = [torch.linspace(-1, 1, g, device=device, dtype=dtype) for g in grid_size]
    return encoding(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2))


def tokens_a_spacing(n: int, g: int) -> int:
    """Tokens in one control-point spacing along an axis of n feature voxels: about as many as it holds, 1 or 2."""
    return min(max(round((n - 1) / (g - 1)), 1), MAX_TOKENS_A_SPACING)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def token_positions(g: int, p: int) -> Tensor:
    """(p·(g + 1),) positions of tokens, in control-point spacings: p to a spacing, half a window beyond either end.

    Those of control point i are numbers p·i to p·i + 2p - 1, which lie around it. Positions outside are clamped.
    """
    return ((torch.arange(p * (g + 1), dtype=torch.float64) + 0.5) / p - 1).clamp(0, g - 1)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def token_basis(n: int, g: int, p: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(p·(g + 1), n) weights that read n equidistant, corners-included values at the tokens' positions.

    Linear interpolation, its hat widened to the distance between tokens where that is larger: no voxel goes unseen.
    """
    voxels = (n - 1) / (g - 1)  # to a control-point spacing
    distance = (token_positions(g, p)[:, None] * voxels - torch.arange(n, dtype=torch.float64)).abs()
    weights = (1 - distance / max(1.0, voxels / p)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(device, dtype)


def points_a_window(g: int) -> int:
    """How many of g control points share a window along an axis: about SHARED, and all windows alike."""
    return min((q for q in range(2, g + 1) if g % q == 0), key=lambda q: abs(q - SHARED))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def window_basis(n: int, g: int, p: int, q: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(g / q · p·(q + 1), n): the rows of ``token_basis`` window by window, each around q control points."""
    rows = token_basis(n, g, p, device, dtype).unfold(0, p * (q + 1), p * q)
    return rows.transpose(1, 2).reshape(-1, n).contiguous()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def window_mask(q: int, p: int, columns: int, device: torch.device) -> Tensor:
    """(q·HEADS, columns·p·(q + 1)): 0 where one of q control points in a row sees a token of theirs, else -inf."""
    after = torch.arange(p * (q + 1)) - p * torch.arange(q)[:, None]
    seen = ((after >= 0) & (after < 2 * p)).repeat_interleave(HEADS, 0).repeat(1, columns)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(device)


def windows(tokens: Tensor, grid_size: Shape) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens (B, C, w, h, d) near the control points, and who sees which, some planes of the grid after the other.

    Yields which control points, the (B, windows, N, C) tokens resampled to positions around them, and the (q·HEADS, N)
    mask of a window. Along the last axis, q control points share a window, which spares most of the copying.
    """
    counts = [tokens_a_spacing(n, g) for n, g in zip(tokens.shape[2:], grid_size)]
    shared = (1, 1, points_a_window(grid_size[2]))
    axes = zip(tokens.shape[2:], grid_size, counts, shared)
    x, y, z = (window_basis(*axis, tokens.device, tokens.dtype) for axis in axes)
    mw, mh, md = (p * (q + 1) for p, q in zip(counts, shared))
    mask = window_mask(shared[2], counts[2], mw * mh, tokens.device)
    tokens = z @ tokens.permute(0, 2, 3, 4, 1)  # channels last, so that every copy below moves whole tokens
    batch, _, h, length, channels = tokens.shape
    plane = batch * mw * len(y) * length * channels
    planes = max(CACHED // plane, 1) if tokens.device.type == "cpu" else grid_size[0]
    for number, rows in enumerate(x.split(planes * mw)):
        some = (rows @ tokens.flatten(2)).view(batch, -1, h, length * channels)
        some = (y @ some).view(batch, -1, mw, grid_size[1], mh, length // md, md * channels)
        some = some.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, mw * mh * md, channels)
        points = planes * grid_size[1] * grid_size[2]
        yield slice(number * points, (number + 1) * points), some, mask


class CrossAttention(nn.Module):
    """Control points attend to tokens (paper, equation 3.1), all of them or those of their own window.

    Q Kᵀ is computed as (Q W_K) Ŷᵀ and A V as (A Ŷ) W_V: the same numbers, but no token is ever projected, and tokens
    are what there is most of.
    """

    def __init__(self, channels_in: int):
        super().__init__()
        inner = HEADS * HEAD_CHANNELS
        self.query = nn.Linear(CHANNELS, inner, bias=False)
        self.key = nn.Linear(channels_in, inner, bias=False)
        self.value = nn.Linear(channels_in, inner, bias=False)
        self.out = nn.Linear(inner, CHANNELS)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries (G, CHANNELS), some of which share tokens (B, windows, N, C). Returns (B, G, CHANNELS).

        mask (G / windows · HEADS, N) is added to the logits of every window.
        """
        per_head = (HEADS, HEAD_CHANNELS)
        q = self.query(queries).unflatten(-1, per_head) / HEAD_CHANNELS**0.5
        probes = torch.einsum("ghd,hdc->ghc", q, self.key.weight.unflatten(0, per_head))
        batch, windows, _, channels = tokens.shape
        probes = probes.reshape(windows, -1, channels).expand(batch, -1, -1, -1)  # (B, windows, G·HEADS / windows, C)
        logits = probes @ tokens.transpose(2, 3)
        pooled = (logits if mask is None else logits + mask).softmax(-1) @ tokens
        pooled = pooled.reshape(batch, -1, HEADS, channels)
        values = torch.einsum("bghc,hdc->bghd", pooled, self.value.weight.unflatten(0, per_head))
        return self.out(values.flatten(2))


def level_grid(grid_size: Shape, shape: Shape, whole: bool = False) -> Shape:
    """The grid on which a level of ``shape`` feature voxels is decoded: at most a point on and between any two.

    More would read the same features again. The coarsest and the last level take the whole grid: each point has its answer.
    """
    return grid_size if whole else tuple(min(g, max(2 * n - 1, 2)) for g, n in zip(grid_size, shape))


def resize(y: Tensor, grid_size: Shape, new: Shape) -> Tensor:
    """Features Y (B, G, C) of one grid at the points of another."""
    if grid_size == new:
        return y
    return upsample(y.transpose(1, 2).unflatten(2, grid_size), new).flatten(2).transpose(1, 2)


class DecoderLevel(nn.Module):
    """One encoder level, skip-projected and attended to, refining the feature Y of every control point."""

    def __init__(self, channels: int, coarsest: bool):
        super().__init__()
        self.coarsest = coarsest
        self.project = nn.Conv3d(channels, CHANNELS, 1)
        self.attention = CrossAttention(CHANNELS if coarsest else 2 * CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.GELU(), nn.Linear(CHANNELS, CHANNELS))

    def tokens(self, features: Tensor, carried: Tensor | None, grid_size: Shape) -> Tensor:
        """Ŷ = [P, Y]: projected features with their positions, beside Y carried to those positions: (B, C, w, h, d)."""
        shape = tuple(features.shape[2:])
        encodings = grid_encoding(shape, features.device, self.norm.weight.dtype)
        tokens = self.project(features) + encodings.T.unflatten(1, shape)
        if carried is not None:
            carried = upsample(carried.transpose(1, 2).unflatten(2, grid_size), shape)
            tokens = torch.cat([tokens, carried], dim=1)
        return tokens

    def forward(self, features: Tensor, carried: Tensor | None, carried_grid: Shape | None, grid_size: Shape) -> Tensor:
        """carried (B, G', CHANNELS) on its own grid; returns (B, G, CHANNELS)."""
        tokens = self.tokens(features, carried, carried_grid)
        queries = grid_encoding(grid_size, features.device, self.norm.weight.dtype)
        if self.coarsest:
            y = self.attention(queries, tokens.flatten(2).transpose(1, 2)[:, None])
        else:
            y = torch.cat([self.attention(queries[some], *seen) for some, *seen in windows(tokens, grid_size)], dim=1)
        if carried is not None:
            y = y + resize(carried, carried_grid, grid_size)
        return y + self.mlp(self.norm(y))


class GridReg(nn.Module):
    """Registration by displacements of a sparse grid of control points (paper, section 3.1).

    base_channels  width C of the encoder (paper: 16; ablated 8, 32)
    num_layers     encoder layers L, 4 to 9 (paper: 5)
    bayesian       predict a standard deviation per control point too (paper, section 3.2)
    upsampling     "trilinear", "bspline" or "deconv" (paper, section 3.2)
    projector      False feeds the coarsest level alone to the decoder (Table 3, config 5)
    fold_free      bound the control points so that the field cannot fold (``fold_free``); "bspline" only
    """

    def __init__(
        self,
        base_channels: int = 16,
        num_layers: int = 5,
        bayesian: bool = False,
        upsampling: str = "trilinear",
        projector: bool = True,
        fold_free: bool = False,
    ):
        super().__init__()
        if not 4 <= num_layers <= len(WIDTHS):
            raise ValueError(f"num_layers must lie between 4 and {len(WIDTHS)}, found {num_layers}")
        if upsampling not in METHODS:
            raise ValueError(f"upsampling must be one of {', '.join(METHODS)}; found {upsampling!r}")
        if fold_free and upsampling != "bspline":
            raise ValueError(f"fold_free needs upsampling 'bspline', found {upsampling!r}")
        self.upsampling, self.fold_free = upsampling, fold_free
        widths = [2] + [base_channels * w for w in WIDTHS[:num_layers]]
        self.encoder = nn.ModuleList(
            EncoderLayer(widths[i], widths[i + 1], 2 if i < STRIDED_LAYERS else 1) for i in range(num_layers)
        )
        self.layers = (num_layers, *LOCAL_LAYERS) if projector else (num_layers,)
        self.decoder = nn.ModuleList(DecoderLevel(widths[layer], coarsest=layer == num_layers) for layer in self.layers)
        self.mean = nn.Linear(CHANNELS, 3)
        self.log_variance = nn.Linear(CHANNELS, 3) if bayesian else None
        nn.init.normal_(self.mean.weight, std=1e-3)  # start near the identity, so that the first gradients mean something
        nn.init.zeros_(self.mean.bias)
        if bayesian:  # and nearly certain: σ of 1.5 % of the image
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
        features, x, y, at = {}, torch.cat([fixed, moving], dim=1), None, None
        for layer, encode in enumerate(self.encoder, start=1):
            features[layer] = x = encode(x)
        for layer, level in zip(self.layers, self.decoder):
            whole = level.coarsest or level is self.decoder[-1]
            here = level_grid(grid_size, features[layer].shape[2:], whole)
            y, at = level(features[layer], y, at, here), here
        with torch.autocast(y.device.type, enabled=False):  # a displacement needs all its digits
            y = y.to(self.mean.weight.dtype)
            half = torch.tensor(shape, device=y.device)[:, None] / 2  # heads speak in half widths
            control_points = (self.mean(y).transpose(1, 2) * half).unflatten(2, grid_size)
            if self.fold_free:
                control_points = bounded(control_points, shape)
            sigma = None
            if self.log_variance is not None:
                log_variance = self.log_variance(y).transpose(1, 2).clamp(*LOG_VARIANCE)
                sigma = ((log_variance / 2).exp() * half).unflatten(2, grid_size)
        return Registration(upsample(control_points, shape, self.upsampling), control_points, sigma)
