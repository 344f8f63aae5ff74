"""Cross-attention from control points to the image features around them (paper, section 3.1).

Tokens are features at regular positions, one or two to a control-point spacing. A control point attends to those within
one spacing of it, so the cost grows with the number of control points and not with that of points times voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridreg.spatial import Shape

CHANNELS = 32  # C_p = C_pe = C_d: tokens, positional encodings and decoder features
HEADS, HEAD_CHANNELS = 2, 32
CACHED = 2**21  # numbers at once in windows, so that they stay in a cache
SHARED = 5  # control points to a window: more of them look at tokens in vain, fewer need more memory
MAX_TOKENS_A_SPACING = 2  # along one axis; a local window is two control-point spacings wide


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


def readers(shape: Shape, grid_size: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Per axis, the matrix that reads feature voxels of ``shape`` at the tokens' positions; along the last, window by window."""
    counts = [tokens_a_spacing(n, g) for n, g in zip(shape, grid_size)]
    shared = points_a_window(grid_size[2])
    x, y = (token_basis(n, g, p, device, dtype) for n, g, p in zip(shape[:2], grid_size, counts))
    return [x, y, window_basis(shape[2], grid_size[2], counts[2], shared, device, dtype)]


class Neighbourhoods(torch.autograd.Function):
    """Tokens (B, px·(a + 1), py·(b + 1), c, n, C) → (B, a·b·c, 2px·2py·n, C), those around each of a × b points, c times.

    A function of its own, because the gradient of ``unfold`` takes ten times as long as these four sums.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, px: int, py: int) -> Tensor:
        ctx.shape, ctx.counts = tokens.shape, (px, py)
        seen = tokens.unfold(1, 2 * px, px).unfold(2, 2 * py, py)  # (B, a, b, c, n, C, 2px, 2py), no copy yet
        return seen.permute(0, 1, 2, 3, 6, 7, 4, 5).reshape(
            len(tokens), -1, 4 * px * py * tokens.shape[4], tokens.shape[5]
        )

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (batch, w, h, *groups), (px, py) = ctx.shape, ctx.counts
        a, b = w // px - 1, h // py - 1
        total = gradient.new_zeros(ctx.shape)
        cells = total.view(batch, a + 1, px, b + 1, py, *groups)
        parts = gradient.reshape(batch, a, b, groups[0], 2, px, 2, py, *groups[1:]).permute(
            0, 1, 4, 5, 2, 6, 7, 3, 8, 9
        )
        for i in range(2):
            for j in range(2):
                cells[:, i : i + a, :, j : j + b] += parts[:, :, i, :, :, j]
        return total, None, None


def windows(tokens: Tensor, grid_size: Shape) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens near the control points, and who sees which, some planes of the grid after the other.

    tokens (B, w, h, d, C) as ``readers`` read them. Yields which control points, their (B, windows, N, C) tokens, and
    the (q·HEADS, N) mask of a window. Along the last axis, q control points share a window, which spares most copying.
    """
    gw, gh, gd = grid_size
    q = points_a_window(gd)
    px, py, n = tokens.shape[1] // (gw + 1), tokens.shape[2] // (gh + 1), tokens.shape[3] // (gd // q)
    mask = window_mask(q, n // (q + 1), 4 * px * py, tokens.device)
    plane = len(tokens) * gh * (gd // q) * 4 * px * py * n * tokens.shape[4]
    planes = max(CACHED // plane, 1) if tokens.device.type == "cpu" else gw
    tokens = tokens.unflatten(3, (-1, n))
    for first in range(0, gw, planes):
        last = min(first + planes, gw)
        seen = Neighbourhoods.apply(tokens[:, px * first : px * (last + 1)], px, py)
        yield slice(first * gh * gd, last * gh * gd), seen, mask


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
