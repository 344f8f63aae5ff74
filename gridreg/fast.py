"""Code paths that are written for speed. Each must equal a plain function elsewhere.

    warp        equals ``spatial.warp``; it samples planes, for which PyTorch has vector instructions, instead of a volume
    slices      equals ``spatial.sample`` of one volume; it samples a batch of slices, which PyTorch shares out among
                threads
    attention   equals ``attention.CrossAttention.by_equation`` over ``attention.neighbourhoods``; it projects the queries
                instead of the tokens, and neighbouring control points share a window

The network uses the fast paths; ``with without("warp"): …`` runs the plain ones. The tests show that both agree, and
``python -m study.benchmark.fast_paths`` measures what each path gains. This module imports nothing from the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

PATHS = ("warp", "slices", "attention")
_switched_off: set[str] = set()

SLAB_VOXELS = 2**17  # warped at once, so that intermediate results stay in the cache
BELOW_LAST_PLANE = 1e-9  # voxels by which a point on the last plane is moved, so that it lies between two planes
WINDOW_NUMBERS = 2**21  # gathered in windows at once, so that they stay in the cache
POINTS_A_WINDOW = 5  # with more points more tokens are masked out, with fewer more tokens are copied


def used(path: str) -> bool:
    """Whether the fast path of that name is switched on."""
    return path not in _switched_off


@contextmanager
def without(*paths: str) -> Iterator[None]:
    """Run the block on the plain paths. KeyError on a name that is not in ``PATHS``."""
    if set(paths) - set(PATHS):
        raise KeyError(f"no fast path is called {', '.join(sorted(set(paths) - set(PATHS)))}; there are {PATHS}")
    before = set(_switched_off)
    _switched_off.update(paths)
    try:
        yield
    finally:
        _switched_off.clear()
        _switched_off.update(before)


# ---- warp ------------------------------------------------------------------------------------------------------------


def can_warp(moving: Tensor, displacement: Tensor) -> bool:
    """Whether ``warp`` applies: on a CPU, without gradients, to images of at least two voxels along the first two axes."""
    learns = torch.is_grad_enabled() and (moving.requires_grad or displacement.requires_grad)
    return used("warp") and moving.device.type == "cpu" and not learns and min(moving.shape[2:4]) > 1


def warp(moving: Tensor, displacement: Tensor) -> Tensor:
    """``spatial.warp`` with mode "linear": moving (B, C, W', H', D'), displacement (B, 3, W, H, D) → (B, C, W, H, D)."""
    warped = moving.new_empty(*moving.shape[:2], *displacement.shape[2:])
    for case in zip(moving, displacement, warped):
        _warp_by_planes(*case)
    return warped


def _warp_by_planes(moving: Tensor, displacement: Tensor, warped: Tensor) -> None:
    """Warp one volume (C, W', H', D') by a displacement (3, W, H, D) into ``warped`` (C, W, H, D).

    PyTorch samples 2-D images with vector instructions, but not volumes. The planes of the volume are therefore stacked
    into one tall image. It is sampled twice: in the plane below each point and in the plane above it.
    """
    (width, height, depth), shape = moving.shape[1:], displacement.shape[1:]
    rows = (width - 1) * height  # of the tall image; the image of the planes above starts ``height`` rows later
    row = 2 / (rows - 1)
    volume = moving.double().contiguous()
    x, y, z = (torch.linspace(0, n - 1, m, dtype=torch.float64) for n, m in zip(moving.shape[1:], shape))
    x, y, z = x.view(-1, 1, 1), y.view(1, -1, 1) * row - 1, z * 2 / max(depth - 1, 1) - 1
    first = 0
    for slab in displacement.split(max(SLAB_VOXELS // (shape[1] * shape[2]), 1), dim=1):
        u, planes = slab.double(), slice(first, first + slab.shape[1])
        at_x = (u[0] + x[planes]).clamp_(0, width - 1 - BELOW_LAST_PLANE)
        plane = at_x.floor()
        at = torch.empty(*u.shape[1:], 2, dtype=torch.float64)
        torch.add(z, u[2], alpha=2 / max(depth - 1, 1), out=at[..., 0])
        torch.add((y + u[1] * row).clamp_(-1, (height - 1) * row - 1), plane, alpha=height * row, out=at[..., 1])
        for channel, values in zip(volume, warped):
            tall = channel.as_strided((2, rows, depth), (height * depth, depth, 1)).expand(len(at), -1, -1, -1)
            read = F.grid_sample(tall, at, padding_mode="border", align_corners=True)
            values[planes] = torch.lerp(read[:, 0], read[:, 1], at_x - plane)
        first += slab.shape[1]


def can_sample_by_slice(volume: Tensor) -> bool:
    """Whether ``as_slices`` applies: to one volume on a CPU that needs no gradient."""
    return used("slices") and volume.shape[0] == 1 and volume.device.type == "cpu" and not volume.requires_grad


def as_slices(volume: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """One volume and its coordinates as a batch of slices: PyTorch shares out a batch among threads, but not one volume."""
    return volume.expand(coordinates.shape[1], -1, -1, -1, -1), coordinates[0, :, None]


def from_slices(values: Tensor) -> Tensor:
    """Values (w, C, 1, h, d) of slices, put together to one volume (1, C, w, h, d)."""
    return values.permute(2, 1, 0, 3, 4).contiguous()


# ---- attention -------------------------------------------------------------------------------------------------------


def attend(queries: Tensor, tokens: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """``CrossAttention.by_equation`` without its last projection: Q Kᵀ as (Q W_K) Ŷᵀ, and A V as (A Ŷ) W_V.

    The result is the same, but no token is projected. This is cheaper, as there are far more tokens than queries.

    queries     (G, heads, d), already divided by √d
    tokens      (B, windows, N, C)
    key, value  (heads · d, C) weights of the projections
    mask        (G / windows · heads, N), added to the logits of every window
    returns     (B, G, heads · d)
    """
    heads = queries.shape[1:]
    probes = torch.einsum("ghd,hdc->ghc", queries, key.unflatten(0, heads))
    batch, windows, _, channels = tokens.shape
    probes = probes.reshape(windows, -1, channels).expand(batch, -1, -1, -1)  # (B, windows, G / windows · heads, C)
    logits = probes @ tokens.transpose(2, 3)
    pooled = (logits if mask is None else logits + mask).softmax(-1) @ tokens
    pooled = pooled.reshape(batch, -1, heads[0], channels)
    return torch.einsum("bghc,hdc->bghd", pooled, value.unflatten(0, heads)).flatten(2)


def points_a_window(g: int) -> int:
    """How many of g control points share a window along an axis: the divisor above 1 nearest to ``POINTS_A_WINDOW``."""
    return min((q for q in range(2, g + 1) if g % q == 0), key=lambda q: abs(q - POINTS_A_WINDOW))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
def window_mask(q: int, p: int, columns: int, heads: int, device: torch.device) -> Tensor:
    """(q · heads, columns · p · (q + 1)): 0 where one of q neighbouring control points sees a token, else -inf."""
    after = torch.arange(p * (q + 1)) - p * torch.arange(q)[:, None]
    seen = ((after >= 0) & (after < 2 * p)).repeat_interleave(heads, 0).repeat(1, columns)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(device)


def by_window(rows: Tensor, g: int) -> Tensor:
    """Rows (p · (g + 1), n) of the last axis's token basis, gathered window by window: (g / q · p · (q + 1), n)."""
    p, q = len(rows) // (g + 1), points_a_window(g)
    return rows.unfold(0, p * (q + 1), p * q).transpose(1, 2).reshape(-1, rows.shape[1])


class _Columns(torch.autograd.Function):
    """Tokens (B, px · (a + 1), py · (b + 1), c, n, C) → (B, a · b · c, 2px · 2py · n, C): those around a × b points.

    PyTorch's gradient of ``unfold`` takes ten times as long as the four sums in ``backward``.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, px: int, py: int) -> Tensor:
        ctx.shape, ctx.counts = tokens.shape, (px, py)
        seen = tokens.unfold(1, 2 * px, px).unfold(2, 2 * py, py)  # (B, a, b, c, n, C, 2px, 2py), a view
        seen = seen.permute(0, 1, 2, 3, 6, 7, 4, 5)
        return seen.reshape(len(tokens), -1, 4 * px * py * tokens.shape[4], tokens.shape[5])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (batch, w, h, *groups), (px, py) = ctx.shape, ctx.counts
        a, b = w // px - 1, h // py - 1
        total = gradient.new_zeros(ctx.shape)
        cells = total.view(batch, a + 1, px, b + 1, py, *groups)
        parts = gradient.reshape(batch, a, b, groups[0], 2, px, 2, py, *groups[1:])
        parts = parts.permute(0, 1, 4, 5, 2, 6, 7, 3, 8, 9)
        for i in range(2):
            for j in range(2):
                cells[:, i : i + a, :, j : j + b] += parts[:, :, i, :, :, j]
        return total, None, None


def windows(tokens: Tensor, grid_size: tuple[int, int, int], heads: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens near the control points, for a few planes of the grid at a time.

    tokens (B, px · (gw + 1), py · (gh + 1), gd / q · p · (q + 1), C), gathered ``by_window`` along the last axis. Yields
    a slice of the control points, their tokens (B, windows, N, C), and the mask (q · heads, N) of a window of q control
    points.
    """
    gw, gh, gd = grid_size
    q = points_a_window(gd)
    px, py, n = tokens.shape[1] // (gw + 1), tokens.shape[2] // (gh + 1), tokens.shape[3] // (gd // q)
    mask = window_mask(q, n // (q + 1), 4 * px * py, heads, tokens.device)
    plane = len(tokens) * gh * (gd // q) * 4 * px * py * n * tokens.shape[4]
    planes = max(WINDOW_NUMBERS // plane, 1) if tokens.device.type == "cpu" else gw
    tokens = tokens.unflatten(3, (-1, n))
    for first in range(0, gw, planes):
        last = min(first + planes, gw)
        seen = _Columns.apply(tokens[:, px * first : px * (last + 1)], px, py)
        yield slice(first * gh * gd, last * gh * gd), seen, mask
