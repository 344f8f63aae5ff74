"""Lesson 1, the pictures: approximation and estimation error over the grid size, and where in the image they arise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gridreg.lesson_freedom import GRIDS, HOMOGENEOUS, MARGIN, SIZE, World, best_grid, images, outcome
from gridreg.panels import lines_through
from gridreg.style import COLOURS, IMAGE, MAGNITUDE, NEUTRAL, styled

LONGEST = 2.5  # voxels of error at the end of the colour map
HIGHEST = 1.6  # voxels² on the axis of the curves, the same for every world whose errors are not larger
APPROXIMATION, ESTIMATION = COLOURS["gridreg-adaptive"], COLOURS["gridreg-5"]
SIMULATED = "Simulated images in two dimensions; errors are means over three deformations and draws of noise."


def _grid_name(grid: int) -> str:
    return f"{grid}×{grid}" + (" (every voxel)" if grid == SIZE else "")


def draw_curves(ax: Axes, world: World, chosen: int | None = None) -> None:
    """Approximation and estimation error of a world over the grid size, stacked: the line on top is their sum."""
    outcomes = [outcome(world, grid) for grid in GRIDS]
    parts = [[getattr(o, name) for o in outcomes] for name in ("approximation", "estimation")]
    ax.stackplot(GRIDS, parts, colors=(APPROXIMATION, ESTIMATION), labels=("approximation error", "estimation error"))
    ax.plot(GRIDS, [o.total for o in outcomes], color=NEUTRAL, marker="o", ms=3, label="total error, their sum")
    best = best_grid(world)
    ax.plot(best, outcome(world, best).total, "o", ms=10, mfc="none", mec=NEUTRAL, ls="", label="least total error")
    if chosen:
        ax.axvline(chosen, color=COLOURS["voxelmorph"], lw=1)
    highest = max(HIGHEST, 1.05 * max(o.total for o in outcomes))
    ax.set(xscale="log", xlim=(GRIDS[0], GRIDS[-1]), ylim=(0, highest), xlabel="control points per axis")
    ax.set_ylabel("mean squared error (voxels²)")
    ax.set_xticks(GRIDS, [str(g) for g in GRIDS])
    ax.minorticks_off()


def _bare(ax: Axes, title: str) -> None:
    ax.set(xticks=[], yticks=[], xlim=(-0.5, SIZE - 0.5), ylim=(-0.5, SIZE - 0.5), aspect="equal")
    ax.set_title(title)
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_warped_lines(ax: Axes, displacement: np.ndarray, colour: str, step: int = 3) -> None:
    """Lines of the fixed grid carried along by a displacement (2, n, n) in voxels."""
    tracks = lines_through(np.indices(displacement.shape[1:]) + displacement, step)
    ax.add_collection(LineCollection(tracks, colors=colour, linewidths=0.6))


def freedom_figure(grid: int, world: World = HOMOGENEOUS, **changes: float | str) -> Figure:
    """The errors over the grid size beside the images and the errors, voxel by voxel, on one grid (the first draw).

    ``changes`` replace fields of the world: noise, texture, fine, smoothness, method.
    """
    world = replace(world, **changes)
    here = outcome(world, grid)
    fixed, moving = (stack[0] for stack in images(world))
    errors = {"approximation error": here.fit - here.truth, "estimation error": here.estimate - here.fit,
              "total error": here.estimate - here.truth}  # fmt: skip
    best = best_grid(world)
    label = (f"With {_grid_name(grid)} control points: approximation {here.approximation:.2f}, estimation "
             f"{here.estimation:.2f}, total {here.total:.2f} voxels²; least total with {_grid_name(best)}.")  # fmt: skip
    with styled():
        figure = Figure(figsize=(10.4, 4.9), label=label)
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
        ax = left.add_axes((0.15, 0.2, 0.82, 0.66))
        draw_curves(ax, world, grid)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.19), ncols=2, columnspacing=1, handlelength=2.2)
        axes = right.subplots(2, 3, gridspec_kw=dict(left=0.02, right=0.88, bottom=0.09, top=0.9, wspace=0.06, hspace=0.2))
        inner = slice(MARGIN, -MARGIN)
        for panel, image, title in ((axes[0, 0], fixed, "fixed"), (axes[0, 1], moving[inner, inner], "moving")):
            panel.imshow(image.T, origin="lower", vmin=0, vmax=1, cmap=IMAGE)
            _bare(panel, title)
        axes[0, 2].imshow(np.zeros((SIZE, SIZE)), cmap="Greys", vmin=0, vmax=1, origin="lower")
        draw_warped_lines(axes[0, 2], here.truth[0], "#AAAAAA")
        draw_warped_lines(axes[0, 2], here.estimate[0], COLOURS["gridreg-adaptive"])
        _bare(axes[0, 2], "deformation\n(true: grey, found: blue)")
        for panel, (title, error) in zip(axes[1], errors.items()):
            length = np.linalg.norm(error[0], axis=0)
            shown = panel.imshow(length.T, origin="lower", vmin=0, vmax=LONGEST, cmap=MAGNITUDE)
            if grid < SIZE / 2:
                at = np.linspace(0, SIZE - 1, grid)
                panel.plot(*(axis.ravel() for axis in np.meshgrid(at, at)), ".", ms=2, color="white", clip_on=False)
            _bare(panel, f"{title}\n(root mean square {np.sqrt(np.square(length).mean()):.2f})")
        bar = right.colorbar(shown, cax=right.add_axes((0.9, 0.09, 0.017, 0.33)), extend="max")
        bar.set_label("voxels")
        figure.text(0.01, 0.02, f"{_grid_name(grid)} control points, {2 * grid**2} numbers to estimate (orange line). " + SIMULATED,
                    fontsize=7, color="#333333")  # fmt: skip
    return figure


def worlds_figure(worlds: Mapping[str, World]) -> Figure:
    """The errors over the grid size for several worlds side by side, their fixed image above."""
    with styled():
        figure = Figure(figsize=(4.2 * len(worlds), 5.4), layout="constrained", label="Errors over the grid size")
        axes = figure.subplots(2, len(worlds), height_ratios=(1, 1.7), squeeze=False)
        for (above, below), (title, world) in zip(axes.T, worlds.items()):
            above.imshow(images(world)[0][0].T, origin="lower", vmin=0, vmax=1, cmap=IMAGE)
            _bare(above, title)
            draw_curves(below, world)
            below.set_title(f"least total error with {_grid_name(best_grid(world))}")
        axes[1, 0].legend(loc="upper right")
        figure.supxlabel(SIMULATED, fontsize=7, color="#333333", x=0.01, ha="left")
    return figure


def valley_figure(worlds: Mapping[str, World], smoothness: Sequence[float]) -> Figure:
    """Total error over grid size and regularisation; the least of every column is marked, that of all has a ring."""
    tables = [np.array([[outcome(replace(w, smoothness=s), g).total for g in GRIDS] for s in smoothness])
              for w in worlds.values()]  # fmt: skip
    scale = LogNorm(min(table.min() for table in tables), max(table.max() for table in tables))
    with styled():
        figure = Figure(figsize=(4.6 * len(worlds), 3.6), layout="constrained", label="Total error by grid and smoothness")
        axes = figure.subplots(1, len(worlds), squeeze=False)[0]
        for ax, title, table in zip(axes, worlds, tables):
            shown = ax.imshow(table, origin="lower", norm=scale, cmap=MAGNITUDE, aspect="auto")
            for (row, column), value in np.ndenumerate(table):
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6,
                        color="white" if scale(value) < 0.6 else "black")  # fmt: skip
            ax.plot(range(len(GRIDS)), table.argmin(0), "s", ms=19, mfc="none", mec="white", mew=0.9)
            row, column = np.unravel_index(table.argmin(), table.shape)
            ax.plot(column, row, "s", ms=24, mfc="none", mec=COLOURS["voxelmorph"], mew=1.6)
            ax.set_xticks(range(len(GRIDS)), [str(g) for g in GRIDS])
            ax.set_yticks(range(len(smoothness)), [f"{s:g}" for s in smoothness])
            ax.set(title=title, xlabel="control points per axis")
        axes[0].set_ylabel("weight of the bending energy")
        bar = figure.colorbar(shown, ax=axes, label="mean squared error (voxels²)", ticks=(0.1, 0.2, 0.5, 1, 2, 5), format="%g")
        bar.ax.minorticks_off()
        figure.supxlabel("White: the best weight for each grid; orange: the best of all. " + SIMULATED,
                         fontsize=7, color="#333333", x=0.01, ha="left")  # fmt: skip
    return figure
