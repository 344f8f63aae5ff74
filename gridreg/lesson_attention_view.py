"""Lesson 3, the pictures: the tokens that a control point attends to, what each level adds, and what a grid costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from gridreg.grid import warp
from gridreg.attention import HEADS
from gridreg.lesson_attention import Pair, attend, early_exits, tokens_in_use
from gridreg.network import GridReg
from gridreg.panels import show_slice
from gridreg.style import COLOURS, MAGNITUDE, styled

POINT = COLOURS["voxelmorph"]


def attention_figure(network: GridReg, pair: Pair, grid: int, across: float, up: float, height: float) -> Figure:
    """The attention of the control point nearest to a place (0 to 1 along x, y, z): heads in rows, levels in columns.

    Every disc is a token; weights of tokens above one another along z are summed.
    """
    levels = attend(network, pair, grid)
    shape = tuple(pair.fixed.shape[2:])
    place = torch.tensor([across, up, height])
    image = pair.fixed[0, 0].numpy()
    with styled():
        figure = Figure(figsize=(9.6, 6.3), label=f"Attention of a control point of a {grid}×{grid}×{grid} grid")
        margins = dict(left=0.05, right=0.9, bottom=0.06, top=0.9, wspace=0.06, hspace=0.14)
        axes = figure.subplots(HEADS, len(levels), gridspec_kw=margins, squeeze=False)
        for column, level in zip(axes.T, levels):
            number = level.control_point(place)
            at = np.array(np.unravel_index(number, level.grid_size)) / (np.array(level.grid_size) - 1) * (np.array(shape) - 1)
            tokens, which = np.unique(level.places[number, :, :2].round(decimals=3).numpy(), axis=0, return_inverse=True)
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
        figure.text(0.01, 0.012, "Orange: the control point. " + pair.caption, fontsize=7, color="#333333")
    return figure


def levels_figure(network: GridReg, pair: Pair, grid: int) -> Figure:
    """Warped image and length of the error, were the head to read the features after each level."""
    before = tuple(pair.truth * 0)
    exits = [(None, np.stack(before), float(np.linalg.norm(pair.truth, axis=0)[pair.known].mean() * pair.spacing_mm))]
    exits += early_exits(network, pair, grid)
    index = pair.fixed.shape[4] // 2
    with styled():
        figure = Figure(figsize=(9.8, 5), label="Error in mm after each decoder level")
        margins = dict(left=0.03, right=0.9, bottom=0.07, top=0.9, wspace=0.06, hspace=0.08)
        axes = figure.subplots(2, 1 + len(exits), gridspec_kw=margins)
        show_slice(axes[0, 0], pair.fixed[0, 0].numpy(), "axial", index)
        axes[0, 0].set_title("fixed")
        axes[1, 0].set_axis_off()
        for (above, below), (layer, displacement, error) in zip(axes[:, 1:].T, exits):
            warped = warp(pair.moving, torch.from_numpy(displacement)[None].float())[0, 0].numpy()
            show_slice(above, warped, "axial", index, letters=False)
            above.set_title("moving, before" if layer is None else f"after encoder layer {layer}")
            length = np.linalg.norm(displacement - pair.truth, axis=0) * pair.spacing_mm
            show_slice(below, np.where(pair.known, length, np.nan), "axial", index, limits=(0, 12), letters=False)
            below.images[0].set_cmap(MAGNITUDE)
            below.set_xlabel(f"mean true TRE {error:.2f} mm")
        bar = figure.colorbar(axes[1, -1].images[0], cax=figure.add_axes((0.92, 0.1, 0.015, 0.35)), extend="max")
        bar.set_label("error (mm)")
        figure.text(0.01, 0.012, pair.caption, fontsize=7, color="#333333")
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
                ax.set_xticks(rows["control points"], [f"{int(count):,}".replace(",", " ") for count in rows["control points"]])
                ax.grid(axis="y", color="#E5E5E5", lw=0.5)
        axes[0].legend(loc="upper left")
        figure.supxlabel(f"Measured here, images of {'×'.join(map(str, shape))} voxels of random numbers.", fontsize=7,
                         color="#333333", x=0.01, ha="left")  # fmt: skip
    return figure
