"""Figure 1 of the paper, with numbers: what a wrong correspondence does to coarse grids, fine grids and a dense field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from gridreg.errors import InputError
from study.reporting.figures.style import PAGE, SMALL, letter, origin, save_figure
from study.style import FIXED_COLOUR, MAGNITUDE, OTHERS, styled

MARKERS = "o^s"
LINE_OFFSET = 0.22  # distance of the lines of two bending weights, in steps of the grid axis: keeps their bars apart


def figure1(
    path: Path | str,
    frame: pd.DataFrame,
    pictures: Mapping[tuple[str, float, int], tuple[Any, np.ndarray]],
    note: str = "",
    condition: str = "false match",
) -> Figure:
    """Figure 1: what is injected into a simulated pair, and the error at coarse and fine grids.

    ``frame`` and ``pictures`` as ``evaluation.false_correspondence.run`` returns them. Top: one pair under ``condition``
    and, at every grid, the distance of the displacement found from the truth at the second bending weight (the only one,
    if there is one), over the grid deformed by it. Below: mean ± SD over seeds for every condition, one line per bending
    weight. Writes ``<path>.png``, ``.pdf`` and ``.txt``.
    """
    conditions, grids = list(dict.fromkeys(frame["condition"])), sorted(set(frame["grid"]))
    weights = sorted(set(frame["bending_weight"]), reverse=True)
    shown = weights[min(1, len(weights) - 1)]
    if (condition, shown, grids[0]) not in pictures:
        raise InputError(f"{path}: no picture of {condition!r}, expected one of {', '.join(conditions)}")
    with styled():
        figure = plt.figure(figsize=(PAGE, 5.3), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 2.6])
        _example(above, pictures, condition, shown, grids)
        axes = below.subplots(2, len(conditions), sharex=True, sharey=True, squeeze=False)
        for number, (column, name) in enumerate(zip(axes.T, conditions), 1):
            column[0].set_title(f"{letter(number)} {name}", fontsize=SMALL)
            for ax, part in zip(column, ("error_disc", "error_around")):
                for line, (weight, tint, marker) in enumerate(zip(weights, OTHERS, MARKERS)):
                    rows = frame[(frame["condition"] == name) & (frame["bending_weight"] == weight)]
                    errors = rows.groupby("grid")[part].agg(["mean", "std"]).reindex(grids)
                    x = np.arange(len(grids)) + LINE_OFFSET * (line - (len(weights) - 1) / 2)
                    ax.errorbar(x, errors["mean"], errors["std"].fillna(0), color=tint, marker=marker, ms=3, lw=1.0,
                                elinewidth=0.7, capsize=1.2, label=_times(weight / weights[0]))  # fmt: skip
                ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
                ax.set_xticks(range(len(grids)), [*map(str, grids[:-1]), "all"])
        axes[0, 0].set_ylim(bottom=0)
        axes[0, 0].set_ylabel("error in the\ndisc (voxels)")
        axes[1, 0].set_ylabel("error around\nthe disc (voxels)")
        below.supxlabel("control points per axis (all: one at every voxel)", fontsize=8)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        below.legend(handles, labels, loc="outside upper right", ncols=len(weights), title="weight of the bending energy",
                     title_fontsize=SMALL, alignment="right")  # fmt: skip
        below.text(0.01, 0.97, "Injected:", va="top")
    seeds = frame["seed"].nunique()
    save_figure(
        figure, path, "False correspondences at coarse and fine grids.", origin(True, "slices"),
        f"{seeds} pair{'s' * (seeds > 1)} with a known smooth deformation; the control points are optimised directly.",
        finding(frame), note,
        f"(a) The first pair under {condition!r}; its bending weight is {_times(shown / weights[0])}. Stars: the false match. "
        "Orange: the homogeneous disc. White: the deformed grid. Colours: distance from the true displacement.",
        f"{letter(1)} to {letter(len(conditions))} Mean ± SD over the pairs for each injected error, in the disc (top) and around "
        "it (bottom). Points of one grid are drawn side by side.",
    )  # fmt: skip
    return figure


_COMPARED = ("nothing", "false match", "wrong masks")  # conditions on which the finding rests


def finding(frame: pd.DataFrame) -> str:
    """How the mean error in the disc changes from the coarsest grid to the finest, in words; first what that shows, if it does."""
    means = (
        frame.groupby(["bending_weight", "condition", "grid"])["error_disc"].mean().unstack("grid").sort_index(axis=1)
    )
    weights = sorted(set(frame["bending_weight"]))
    names = [name for name in _COMPARED if name in set(frame["condition"])]
    parts, rising = [], []
    for weight, which in {weights[0]: "Smallest", weights[-1]: "Largest"}.items():
        changes = []
        for name in names:
            coarse, fine = means.loc[(weight, name)].iloc[[0, -1]]
            rising += [(which, name)] * bool(fine > coarse)
            changes.append(f"{coarse:.2f} → {fine:.2f} ({name})")
        parts.append(f"{which} bending weight: {', '.join(changes)}.")
    as_expected = names == list(_COMPARED) and rising == [("Smallest", name) for name in names[1:]]
    verdict = (
        "A fine grid follows a false correspondence where the bending energy is weak, and does not where it is strong. "
    )
    return f"{verdict * as_expected}Mean error in the disc in voxels, coarsest → finest grid. {' '.join(parts)}"


def _times(factor: float) -> str:
    return "the paper's" if factor == 1 else f"1/{1 / factor:.0f} of the paper's"


def _example(figure, pictures, condition: str, weight: float, grids: Sequence[int]) -> None:
    """Fixed, moving, and the error at every grid; slices (n, n) are drawn with their first axis horizontal."""
    axes = figure.subplots(1, 2 + len(grids))
    pair = pictures[condition, weight, grids[0]][0]
    errors = {grid: np.linalg.norm(pictures[condition, weight, grid][1] - pair.displacement, axis=0) for grid in grids}
    top = max(error.max() for error in errors.values())
    for ax, name, image, star in zip(axes, ("Fixed", "Moving"), (pair.fixed, pair.moving), (0, 1)):
        ax.imshow(image.T, origin="lower", vmin=0, vmax=1)
        ax.set_title(f"(a) {name}" if name == "Fixed" else name, fontsize=SMALL)
        if pair.spots is not None:
            ax.plot(*pair.spots[star], marker="*", ms=7, mfc=FIXED_COLOUR, mec="black", mew=0.4)
    for ax, grid in zip(axes[2:], grids):
        shown = ax.imshow(errors[grid].T, origin="lower", cmap=MAGNITUDE, vmin=0, vmax=top)
        _deformed_lines(ax, pictures[condition, weight, grid][1])
        name = "Every voxel" if grid == len(pair.fixed) else f"{grid}×{grid}"
        ax.set_title(f"{name}\n{errors[grid][pair.disc > 0.5].mean():.2f} in disc", fontsize=SMALL)
    for ax in axes:
        if ax is not axes[1]:
            ax.contour(pair.disc.T, levels=[0.5], colors=[FIXED_COLOUR], linewidths=0.7)
        ax.set(xticks=[], yticks=[], xlim=(-0.5, len(pair.fixed) - 0.5), ylim=(-0.5, len(pair.fixed) - 0.5))
        ax.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.01).set_label("error (voxels)", fontsize=SMALL)


def _deformed_lines(ax: Axes, displacement: np.ndarray, lines: int = 12) -> None:
    """Lines of the fixed slice carried by x + u(x); displacement (2, n, n) in voxels."""
    points = np.moveaxis(np.indices(displacement.shape[1:]) + displacement, 0, -1)
    step = points.shape[0] // lines
    ax.add_collection(LineCollection([*points[::step], *points[:, ::step].swapaxes(0, 1)], colors="white", linewidths=0.35,
                                     alpha=0.8))  # fmt: skip
