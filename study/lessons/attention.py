"""Lesson 3: the image features to which a control point attends, level by level, in a real forward pass.

The network does not keep its attention weights. ``CrossAttention.weights`` computes them again from the inputs of each
attention layer. The tests check that these weights reproduce the layer's output.
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
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from gridreg.attention import HEADS, token_positions, tokens_a_spacing
from gridreg.errors import InputError
from gridreg.explorer.slices import show_slice
from gridreg.metrics import tre_mm
from gridreg.network import GridReg, resize
from gridreg.scans.pair import Pair
from gridreg.spatial import Shape, check_grid_size, warp
from gridreg.upsampling import upsample
from study.benchmark.cost import count, timed
from study.cohorts.pairs import demo_pair
from study.methods.table import parameter_count
from study.style import COLOURS, MAGNITUDE, styled

REPEATS = 3  # of a timing; the smallest counts


@dataclass(frozen=True, eq=False)
class Level:
    """Attention of one decoder level. Its grid may be coarser than the requested one if the level has few features.

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
    pair = demo_pair(values, dataset, split="val")
    if pair.truth is None:
        raise InputError(
            f"dataset '{dataset}': found no true displacement of {pair.title}, expected a simulated cohort."
        )
    return pair


def caption_of(pair: Pair) -> str:
    """The caption of a pair."""
    origin = "Simulated pair, not a patient" if pair.simulated else "Pair"
    return f"{origin}: {pair.title} of the validation set. Axial slices; R, L, A, P: right, left, front, back."


def images_of(pair: Pair) -> tuple[Tensor, Tensor]:
    """The fixed and the moving image as a network takes them, each (1, 1, W, H, D)."""
    return tuple(torch.from_numpy(np.ascontiguousarray(image))[None, None] for image in (pair.fixed, pair.moving))


@contextmanager
def watching(network: GridReg) -> Iterator[dict[str, list]]:
    """Record for each level its inputs and result, and the inputs of its attention, which may take several calls."""
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
    """(G, HEADS, n) weights of each control point's tokens, selected from its window's weights (windows, q, HEADS, N)."""
    q = weights.shape[1]
    seen = p * torch.arange(q)[:, None] + torch.arange(2 * p)  # (q, 2p) along the last axis
    weights = weights.unflatten(-1, (-1, p * (q + 1)))
    return weights.take_along_dim(seen[None, :, None, None], -1).flatten(-2).flatten(0, 1)


@lru_cache(maxsize=8)
@torch.inference_mode()
def attend(network: GridReg, pair: Pair, grid_size: int | Shape) -> list[Level]:
    """The attention of every level, coarse to fine, when the network registers the pair on a grid. Recent results are cached."""
    shape = pair.shape
    grid_size = check_grid_size(grid_size, shape)
    with watching(network) as kept:
        network(*images_of(pair), grid_size)
    levels = []
    for layer, level, received, calls, result in zip(network.layers, network.decoder, *kept.values()):
        size, here = tuple(received[0].shape[2:]), received[3]
        weights = torch.cat([level.attention.weights(*call)[0] for call in calls])
        p = tokens_a_spacing(size[2], here[2])
        weights = weights.flatten(0, 1) if level.coarsest else _of_each_point(weights, p)
        levels.append(Level(layer, here, size, weights, _places(size, here, shape, level.coarsest), result[0]))
    return levels


def tokens_in_use(level: Level) -> Tensor:
    """(G, HEADS) exp(entropy), the effective number of tokens, between 1 and all of them."""
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

    The head was trained on the last level alone. The earlier levels therefore show what later skips change, not the result
    of a network without these skips.
    """
    shape = pair.shape
    half, exits = torch.tensor(shape)[:, None] / 2, []
    for level in attend(network, pair, grid):
        features = resize(level.result[None], level.grid_size, (grid,) * 3)
        control_points = (network.mean(features).transpose(1, 2) * half).unflatten(2, (grid,) * 3)
        displacement = upsample(control_points, shape, network.upsampling)[0].numpy()
        exits.append((level.layer, displacement, tre_mm(displacement, *pair.truth, pair.spacing_mm)))
    return exits


@torch.inference_mode()
def costs(shape: Shape, grids: list[int], settings: dict[str, Any] | None = None) -> pd.DataFrame:
    """Parameters, multiply-adds (millions) and seconds of a registration for each grid size, with and without skips.

    The cost does not depend on the weights, so untrained networks are measured. ``settings`` are arguments of ``GridReg``.
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


# ---- The pictures: tokens that a control point attends to, what each level adds, what a grid costs ----


POINT = COLOURS["voxelmorph"]


def attention_figure(network: GridReg, pair: Pair, grid: int, across: float, up: float, height: float) -> Figure:
    """The attention of the control point nearest to a place (0 to 1 along x, y, z): heads in rows, levels in columns.

    Every disc is a token; weights of tokens above one another along z are summed.
    """
    levels = attend(network, pair, grid)
    shape = pair.shape
    place = torch.tensor([across, up, height])
    image = pair.fixed
    with styled():
        figure = Figure(figsize=(9.6, 6.3), label=f"Attention of a control point of a {grid}×{grid}×{grid} grid")
        margins = dict(left=0.05, right=0.9, bottom=0.06, top=0.9, wspace=0.06, hspace=0.14)
        axes = figure.subplots(HEADS, len(levels), gridspec_kw=margins, squeeze=False)
        for column, level in zip(axes.T, levels):
            number = level.control_point(place)
            at = (
                np.array(np.unravel_index(number, level.grid_size))
                / (np.array(level.grid_size) - 1)
                * (np.array(shape) - 1)
            )
            tokens, which = np.unique(
                level.places[number, :, :2].round(decimals=3).numpy(), axis=0, return_inverse=True
            )
            for head, ax in enumerate(column):
                share = np.bincount(which.ravel(), weights=level.weights[number, head].numpy())
                show_slice(ax, image, "axial", round(float(at[2])), letters=head == 0)
                shown = ax.scatter(*tokens.T, c=100 * share, s=12 + 500 * share, cmap=MAGNITUDE, vmin=0, vmax=50,
                                   edgecolors="white", linewidths=0.5, clip_on=False)  # fmt: skip
                ax.plot(at[0], at[1], "P", color=POINT, ms=8, mec="white", mew=0.8)
                used = float(tokens_in_use(level)[number, head])
                ax.set_xlabel(f"uses {used:.1f} of {level.weights.shape[-1]} tokens", labelpad=2)
            column[0].set_title(f"encoder layer {level.layer}: {'×'.join(map(str, level.features))} feature voxels\n"
                                f"decoded on {'×'.join(map(str, level.grid_size))} control points")  # fmt: skip
        for head, ax in enumerate(axes[:, 0]):
            ax.set_ylabel(f"head {head + 1}")
        bar = figure.colorbar(shown, cax=figure.add_axes((0.92, 0.2, 0.015, 0.55)), extend="max")
        bar.set_label("attention (%)")
        figure.text(0.01, 0.012, "Orange: the control point. " + caption_of(pair), fontsize=7, color="#333333")
    return figure


def levels_figure(network: GridReg, pair: Pair, grid: int) -> Figure:
    """Warped image and length of the error if the head read the features after each level."""
    truth, known = pair.truth
    unmoved = np.zeros_like(truth)
    exits = [(None, unmoved, tre_mm(unmoved, truth, known, pair.spacing_mm))]
    exits += early_exits(network, pair, grid)
    index = pair.shape[2] // 2
    with styled():
        figure = Figure(figsize=(9.8, 5), label="Error in mm after each decoder level")
        margins = dict(left=0.03, right=0.9, bottom=0.07, top=0.9, wspace=0.06, hspace=0.08)
        axes = figure.subplots(2, 1 + len(exits), gridspec_kw=margins)
        show_slice(axes[0, 0], pair.fixed, "axial", index)
        axes[0, 0].set_title("fixed")
        axes[1, 0].set_axis_off()
        for (above, below), (layer, displacement, error) in zip(axes[:, 1:].T, exits):
            warped = warp(images_of(pair)[1], torch.from_numpy(displacement)[None].float())[0, 0].numpy()
            show_slice(above, warped, "axial", index, letters=False)
            above.set_title("moving, before" if layer is None else f"after encoder layer {layer}")
            length = np.linalg.norm(displacement - truth, axis=0) * pair.spacing_mm
            show_slice(below, np.where(known, length, np.nan), "axial", index, limits=(0, 12), letters=False)
            below.images[0].set_cmap(MAGNITUDE)
            below.set_xlabel(f"mean true TRE {error:.2f} mm")
        bar = figure.colorbar(axes[1, -1].images[0], cax=figure.add_axes((0.92, 0.1, 0.015, 0.35)), extend="max")
        bar.set_label("error (mm)")
        figure.text(0.01, 0.012, caption_of(pair), fontsize=7, color="#333333")
    return figure


def cost_figure(costs: pd.DataFrame, shape: tuple[int, int, int]) -> Figure:
    """Multiply-adds and seconds over the number of control points, with and without skip-projections."""
    kinds = {True: ("with skip-projections", COLOURS["gridreg-adaptive"], "o-"),
             False: ("coarsest level alone", COLOURS["voxelmorph"], "s--")}  # fmt: skip
    with styled():
        figure = Figure(figsize=(8.4, 3.4), layout="constrained", label="Cost over the number of control points")
        axes = figure.subplots(1, 2)
        for projector, (text, colour, line) in kinds.items():
            rows = costs[costs["projector"] == projector]
            for ax, column in zip(axes, ("multiply-adds (millions)", "seconds")):
                parameters = f"{text}: {rows['parameters'].iloc[0]:,} parameters".replace(",", " ")
                ax.plot(rows["control points"], rows[column], line, color=colour, label=parameters)
                ax.set(xscale="log", yscale="log", xlabel="control points", ylabel=column)
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.minorticks_off()
                ax.set_xticks(
                    rows["control points"], [f"{int(count):,}".replace(",", " ") for count in rows["control points"]]
                )
                ax.grid(axis="y", color="#E5E5E5", lw=0.5)
        axes[0].legend(loc="upper left")
        figure.supxlabel(f"Measured here, images of {'×'.join(map(str, shape))} voxels of random numbers.", fontsize=7,
                         color="#333333", x=0.01, ha="left")  # fmt: skip
    return figure
