"""Cross-attention from control points to the image features around them (paper, section 3.1).

Tokens are features at regular positions, one or two per control-point spacing. A control point attends to the tokens
within one spacing of it. The cost therefore grows with the number of control points alone, not with points times voxels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridreg import fast
from gridreg.spatial import Shape

CHANNELS = 32  # C_p = C_pe = C_d: tokens, positional encodings and decoder features
HEADS, HEAD_CHANNELS = 2, 32
MAX_TOKENS_A_SPACING = 2  # along one axis; a local window is two control-point spacings wide


def encoding(coordinates: Tensor) -> Tensor:
    """Sinusoidal positional encoding ψ of normalised coordinates (..., 3) in [-1, 1]: (..., CHANNELS)."""
    octaves = CHANNELS // 6
    frequencies = torch.pi * 2.0 ** torch.arange(-1, octaves - 1).to(coordinates)
    phases = (coordinates[..., None] * frequencies).flatten(-2)
    waves = torch.cat([phases.sin(), phases.cos()], dim=-1)
    return F.pad(waves, (0, CHANNELS - waves.shape[-1]), value=1.0)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
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
    """(p·(g + 1),) positions of tokens in control-point spacings: p per spacing, and half a window beyond either end.

    Control point i attends to tokens p·i to p·i + 2p - 1, which lie around it. Positions outside the image are clamped.
    """
    return ((torch.arange(p * (g + 1), dtype=torch.float64) + 0.5) / p - 1).clamp(0, g - 1)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def token_basis(n: int, g: int, p: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(p·(g + 1), n) weights that read n equidistant values (corners included) at the positions of the tokens.

    The weights are those of linear interpolation. Where tokens lie farther apart than voxels, the hat function is widened
    to the distance between tokens, so that every voxel counts.
    """
    voxels = (n - 1) / (g - 1)  # per control-point spacing
    distance = (token_positions(g, p)[:, None] * voxels - torch.arange(n, dtype=torch.float64)).abs()
    weights = (1 - distance / max(1.0, voxels / p)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(device, dtype)


def readers(shape: Shape, grid_size: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """For each axis, the ``token_basis`` that reads feature voxels of ``shape`` at the tokens of a grid."""
    counts = [tokens_a_spacing(n, g) for n, g in zip(shape, grid_size)]
    return [token_basis(n, g, p, device, dtype) for n, g, p in zip(shape, grid_size, counts)]


def neighbourhoods(tokens: Tensor, grid_size: Shape) -> Tensor:
    """The tokens that each control point attends to: those within one spacing of it.

    tokens   (B, px · (gw + 1), py · (gh + 1), pz · (gd + 1), C), p per spacing along each axis, read with ``readers``
    returns  (B, G, 2px · 2py · 2pz, C)
    """
    for axis, g in enumerate(grid_size, start=1):
        p = tokens.shape[axis] // (g + 1)
        tokens = tokens.unfold(axis, 2 * p, p)  # control point i attends to tokens p·i to p·i + 2p - 1
    return tokens.permute(0, 1, 2, 3, 5, 6, 7, 4).flatten(4, 6).flatten(1, 3)


class CrossAttention(nn.Module):
    """Control points attend to tokens Ŷ, either to all or to those of their window (paper, equation 3.1):

        Q = ψ(R) W_Q,  K = Ŷ W_K,  V = Ŷ W_V
        A = softmax(Q Kᵀ / √d) for each head,  Y = Concat(A V) W_O

    channels_in  number of channels C of the tokens
    """

    def __init__(self, channels_in: int):
        super().__init__()
        inner = HEADS * HEAD_CHANNELS
        self.query = nn.Linear(CHANNELS, inner, bias=False)
        self.key = nn.Linear(channels_in, inner, bias=False)
        self.value = nn.Linear(channels_in, inner, bias=False)
        self.out = nn.Linear(inner, CHANNELS)

    def weights(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """A = softmax(Q Kᵀ / √d) (B, windows, G / windows, HEADS, N); each row sums to 1. Arguments as in ``by_equation``."""
        q = self.query(queries).unflatten(-1, (HEADS, HEAD_CHANNELS)).unflatten(0, (tokens.shape[1], -1))
        k = self.key(tokens).unflatten(-1, (HEADS, HEAD_CHANNELS))
        logits = torch.einsum("wphd,bwnhd->bwphn", q, k) / HEAD_CHANNELS**0.5
        return (logits if mask is None else logits + mask.unflatten(0, (-1, HEADS))).softmax(-1)

    def by_equation(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Y = Concat(A V) W_O, in the order of the equation.

        queries  (G, CHANNELS) ψ(R)
        tokens   (B, windows, N, C) Ŷ; the G control points are shared out evenly among the windows
        mask     (G / windows · HEADS, N), added to the logits of every window
        returns  (B, G, CHANNELS)
        """
        v = self.value(tokens).unflatten(-1, (HEADS, HEAD_CHANNELS))
        y = torch.einsum("bwphn,bwnhd->bwphd", self.weights(queries, tokens, mask), v)
        return self.out(y.flatten(3).flatten(1, 2))

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Same result and arguments as ``by_equation``, in the cheapest order of products (``fast.attend``)."""
        if not fast.used("attention"):
            return self.by_equation(queries, tokens, mask)
        q = self.query(queries).unflatten(-1, (HEADS, HEAD_CHANNELS)) / HEAD_CHANNELS**0.5
        return self.out(fast.attend(q, tokens, self.key.weight, self.value.weight, mask))
