"""Lesson 3, the sums: which image features a control point attends to, level by level, in a real forward pass.

The network does not keep its attention weights. They are computed again, with the module's own weights, from what its
attention received; the tests check that they reproduce what it returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gridreg.attention import HEAD_CHANNELS, HEADS, CrossAttention, token_positions, tokens_a_spacing
from gridreg.cost import count, timed
from gridreg.errors import InputError
from gridreg.grid import Shape, check_grid_size
from gridreg.interpolation import upsample
from gridreg.methods import parameter_count
from gridreg.metrics import tre_mm
from gridreg.network import GridReg, resize
from gridreg.pair import demo_case

REPEATS = 3  # of a timing, of which the least counts


@dataclass(frozen=True, eq=False)
class Pair:
    """fixed, moving (1, 1, W, H, D) in [0, 1]; truth (3, W, H, D) voxels and where it is known (W, H, D); mm a voxel.

    caption   what a figure must say of it
    """

    fixed: Tensor
    moving: Tensor
    truth: np.ndarray
    known: np.ndarray
    spacing_mm: float
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Level:
    """Attention of one decoder level. The grid may be coarser than asked for where the level has few features.

    layer      of the encoder, 1 the finest
    grid_size  of the control points of this level
    features   (w, h, d) feature voxels of the level
    weights    (G, HEADS, n) attention of every control point to its n tokens; each row sums to 1
    places     (G, n, 3) voxels of the image at which those tokens are
    result     (G, CHANNELS) decoder features after this level
    """

    layer: int
    grid_size: Shape
    features: Shape
    weights: Tensor
    places: Tensor
    result: Tensor

    def control_point(self, place: Tensor) -> int:
        """Number of the control point of this level that is nearest to a place (3,) between 0 and 1 along each axis."""
        i, j, k = (round(float(p) * (g - 1)) for p, g in zip(place, self.grid_size))
        return (i * self.grid_size[1] + j) * self.grid_size[2] + k


def load_pair(values: dict[str, Any], dataset: str) -> Pair:
    """The first validation pair of a dataset of params.yaml, preprocessed as for training (in seconds).

    ``values``: params.yaml as ``params.load`` reads it. InputError where the true displacement is not known.
    """
    case = demo_case(values, dataset, split="val")
    if case.truth is None:
        raise InputError(f"dataset '{dataset}': found no true displacement of {case.title}, expected a simulated cohort.")
    images = (torch.from_numpy(image)[None, None] for image in (case.fixed, case.moving))
    origin = "Simulated pair, not a patient" if case.simulated else "Pair"
    caption = f"{origin}: {case.title} of the validation set. Axial slices; R, L, A, P: right, left, front, back."
    return Pair(*images, *case.truth, float(case.spacing[0]), caption)


@contextmanager
def watching(network: GridReg) -> Iterator[dict[str, list]]:
    """Keep, level by level, what the level receives and returns, and what its attention receives, in one call or several."""
    kept: dict[str, list] = {"level": [], "attention": [[] for _ in network.decoder], "result": []}
    hooks = []
    for level, calls in zip(network.decoder, kept["attention"]):
        hooks.append(level.register_forward_pre_hook(lambda _, given: kept["level"].append(given)))
        hooks.append(level.attention.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given)))
        hooks.append(level.register_forward_hook(lambda _, given, result: kept["result"].append(result)))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(attention: CrossAttention, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """(windows, G / windows, HEADS, N) softmax(Q Kᵀ / √d) of the first case (paper, equation 3.1), written out."""
    q = attention.query(queries).unflatten(-1, (HEADS, HEAD_CHANNELS))
    q = q.unflatten(0, (tokens.shape[1], -1))  # (windows, points, heads, d)
    k = attention.key(tokens[0]).unflatten(-1, (HEADS, HEAD_CHANNELS))  # (windows, N, heads, d)
    logits = torch.einsum("cphd,cnhd->cphn", q, k) / HEAD_CHANNELS**0.5
    if mask is not None:
        logits = logits + mask.unflatten(0, (-1, HEADS))
    return logits.softmax(-1)


def _places(features: Shape, grid: Shape, shape: Shape, coarsest: bool) -> Tensor:
    """(G, n, 3) voxels of the image at which the tokens of each control point are."""
    windows = []
    for n, g, voxels in zip(features, grid, shape):
        p = tokens_a_spacing(n, g)
        at = torch.linspace(0, 1, n).expand(g, n) if coarsest else token_positions(g, p).unfold(0, 2 * p, p) / (g - 1)
        windows.append(at * (voxels - 1))  # (g, tokens of one control point along this axis)
    sizes = [*grid, *(window.shape[1] for window in windows)]
    axes = []
    for axis, window in enumerate(windows):
        view = [1] * 6
        view[axis], view[3 + axis] = window.shape
        axes.append(window.reshape(view).expand(sizes))
    return torch.stack(axes, dim=-1).flatten(3, 5).flatten(0, 2).float()


def _of_each_point(weights: Tensor, p: int) -> Tensor:
    """(G, HEADS, n) weights of the tokens that each control point sees, of those of its window (windows, q, HEADS, N)."""
    q = weights.shape[1]
    seen = p * torch.arange(q)[:, None] + torch.arange(2 * p)  # (q, 2p) along the last axis
    weights = weights.unflatten(-1, (-1, p * (q + 1)))
    return weights.take_along_dim(seen[None, :, None, None], -1).flatten(-2).flatten(0, 1)


@lru_cache(maxsize=8)
@torch.inference_mode()
def attend(network: GridReg, pair: Pair, grid_size: int | Shape) -> list[Level]:
    """The attention of every level, coarse to fine, when the network registers the pair on a grid; the last are kept."""
    shape = tuple(pair.fixed.shape[2:])
    grid_size = check_grid_size(grid_size, shape)
    with watching(network) as kept:
        network(pair.fixed, pair.moving, grid_size)
    levels = []
    for layer, level, received, calls, result in zip(network.layers, network.decoder, *kept.values()):
        size, here = tuple(received[0].shape[2:]), received[3]
        weights = torch.cat([attention_weights(level.attention, *call) for call in calls])
        p = tokens_a_spacing(size[2], here[2])
        weights = weights.flatten(0, 1) if level.coarsest else _of_each_point(weights, p)
        levels.append(Level(layer, here, size, weights, _places(size, here, shape, level.coarsest), result[0]))
    return levels


def tokens_in_use(level: Level) -> Tensor:
    """(G, HEADS) exp(entropy): to how many tokens the attention amounts, from 1 to all of them."""
    logs = level.weights.clamp(min=1e-12).log()
    return (-(level.weights * logs).sum(-1)).exp()


def attention_table(network: GridReg, pair: Pair, grids: list[int]) -> pd.DataFrame:
    """For each grid and level: feature voxels, control points, tokens each sees and uses, and the window's width in mm."""
    rows = []
    for grid in grids:
        for level in attend(network, pair, grid):
            extent = (level.places.amax(1) - level.places.amin(1)).amax() * pair.spacing_mm
            rows.append({
                "grid": f"{grid}×{grid}×{grid}", "encoder layer": level.layer,
                "feature voxels": "×".join(map(str, level.features)), "decoded on": "×".join(map(str, level.grid_size)),
                "tokens seen": level.weights.shape[-1], "tokens used": round(float(tokens_in_use(level).mean()), 1),
                "window (mm)": round(float(extent), 1),
            })  # fmt: skip
    return pd.DataFrame(rows).set_index(["grid", "encoder layer"])


@torch.inference_mode()
def early_exits(network: GridReg, pair: Pair, grid: int) -> list[tuple[int, np.ndarray, float]]:
    """(layer, displacement (3, W, H, D) voxels, true TRE in mm) if the head already read the features after each level.

    The head was trained on the last level alone, so the earlier ones show what later skips change, not what a network
    without them would do.
    """
    shape = tuple(pair.fixed.shape[2:])
    half, exits = torch.tensor(shape)[:, None] / 2, []
    for level in attend(network, pair, grid):
        features = resize(level.result[None], level.grid_size, (grid,) * 3)
        control_points = (network.mean(features).transpose(1, 2) * half).unflatten(2, (grid,) * 3)
        displacement = upsample(control_points, shape, network.upsampling)[0].numpy()
        exits.append((level.layer, displacement, tre_mm(displacement, pair.truth, pair.known, pair.spacing_mm)))
    return exits


@torch.inference_mode()
def costs(shape: Shape, grids: list[int], settings: dict[str, Any] | None = None) -> pd.DataFrame:
    """Parameters, multiply-adds (millions) and seconds of a registration over the grid size, with and without skips.

    The cost does not depend on the weights, so networks as they are built are measured; ``settings`` of ``GridReg``.
    """
    images, where = [torch.rand(1, 1, *shape) for _ in range(2)], torch.device("cpu")
    rows = []
    for projector in (True, False):
        network = GridReg(**(settings or {}), projector=projector).eval()
        for grid in grids:
            work = count(lambda: network(*images, grid))  # the first call also fills the caches
            seconds = min(timed(lambda: network(*images, grid), where) for _ in range(REPEATS))
            rows.append({"projector": projector, "grid": grid, "control points": grid**3, "parameters": parameter_count(network),
                         "multiply-adds (millions)": work / 1e6, "seconds": seconds})  # fmt: skip
    return pd.DataFrame(rows)
