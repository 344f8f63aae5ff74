"""Figures of what only a known truth can show: Figure 1, approximation against estimation error, and calibration."""

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

from gridreg import calibration
from gridreg.errors import InputError
from gridreg.figures import SEPARATE, grid_comparison, grid_order
from gridreg.paper_numbers import PAPER_DATASETS
from gridreg.results import REFERENCE, in_order
from gridreg.stats import interval
from gridreg.style import FIXED_COLOUR, MAGNITUDE, NEUTRAL, add_caption, colour, save_figure, styled
from gridreg.tables import dataset_label

ORACLE_COLOUR = "#009E73"
_WEIGHT_COLOURS = ("#0065AB", "#4AA6DF", "#D55E00", "#CC79A7")


# --- Figure 1 ----------------------------------------------------------------------------------------------------


def figure1(
    path: Path | str,
    frame: pd.DataFrame,
    pictures: Mapping[tuple[str, float, int], tuple[Any, np.ndarray]],
    condition: str = "false match",
) -> Figure:
    """Figure 1 with numbers: what is injected into a simulated pair, at coarse and fine grids.

    ``frame`` and ``pictures`` as ``false_correspondence.run`` returns them. Above: one pair under ``condition`` and the
    distance of the displacement found from the truth at every grid, at the second bending weight (the only one, if there
    is one), over the grid deformed by it. Below: mean ± sd over seeds for every condition, one line a bending weight.
    Writes ``<path>.png`` and ``<path>.pdf``.
    """
    conditions, grids = list(dict.fromkeys(frame["condition"])), sorted(set(frame["grid"]))
    weights = sorted(set(frame["bending_weight"]), reverse=True)
    shown = weights[min(1, len(weights) - 1)]
    if (condition, shown, grids[0]) not in pictures:
        raise InputError(f"{path}: no picture of {condition!r}, expected one of {', '.join(conditions)}")
    with styled():
        figure = plt.figure(figsize=(7.6, 5.6), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 2.4])
        _example(above, pictures, condition, shown, grids)
        axes = below.subplots(2, len(conditions), sharex=True, sharey=True, squeeze=False)
        for column, name in zip(axes.T, conditions):
            column[0].set_title(name, fontsize=7.5)
            for ax, part in zip(column, ("error_disc", "error_around")):
                for weight, tint in zip(weights, _WEIGHT_COLOURS):
                    rows = frame[(frame["condition"] == name) & (frame["bending_weight"] == weight)]
                    errors = rows.groupby("grid")[part].agg(["mean", "std"]).reindex(grids)
                    ax.errorbar(range(len(grids)), errors["mean"], errors["std"].fillna(0), color=tint, marker="o", ms=3,
                                lw=1.1, elinewidth=0.7, capsize=1.5, label=_times(weight / weights[0]))  # fmt: skip
                ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
                ax.set_xticks(range(len(grids)), [*map(str, grids[:-1]), "all"], fontsize=6.5)
        axes[0, 0].set_ylim(bottom=0)
        axes[0, 0].set_ylabel("error in the\ndisc (voxels)")
        axes[1, 0].set_ylabel("error around\nit (voxels)")
        below.supxlabel("control points per axis (all: one at every voxel)", fontsize=8)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        below.legend(handles, labels, loc="outside upper right", ncols=len(weights), title="weight of the bending energy",
                     title_fontsize=7, alignment="right")  # fmt: skip
        below.text(0.01, 0.97, "Injected:", va="top", fontsize=8.5)
        seeds = frame["seed"].nunique()
        add_caption(figure, f"Simulated slices, not patients; {seeds} pair{'s' * (seeds > 1)} with a known smooth "
                            "deformation, control points optimised directly, from the coarsest grid to the finest. "
                            f"Below: mean ± sd over pairs. Above: the first pair, {condition}, bending weight {_times(shown / weights[0])}; "
                            "stars: the false match; orange: the homogeneous disc; white: the grid deformed by what was found.")  # fmt: skip
        save_figure(figure, path)
    return figure


def _times(factor: float) -> str:
    return "the paper's" if factor == 1 else f"1/{1 / factor:.0f} of the paper's"


def _example(figure, pictures, condition: str, weight: float, grids: Sequence[int]) -> None:
    """Fixed, moving, and the error at every grid; slices (n, n) are drawn with their first axis across."""
    axes = figure.subplots(1, 2 + len(grids))
    pair = pictures[condition, weight, grids[0]][0]
    errors = {grid: np.linalg.norm(pictures[condition, weight, grid][1] - pair.displacement, axis=0) for grid in grids}
    top = max(error.max() for error in errors.values())
    for ax, name, image, star in zip(axes, ("Fixed", "Moving"), (pair.fixed, pair.moving), (0, 1)):
        ax.imshow(image.T, origin="lower", vmin=0, vmax=1)
        ax.set_title(name, fontsize=7.5)
        if pair.spots is not None:
            ax.plot(*pair.spots[star], marker="*", ms=7, mfc=FIXED_COLOUR, mec="black", mew=0.4)
    for ax, grid in zip(axes[2:], grids):
        shown = ax.imshow(errors[grid].T, origin="lower", cmap=MAGNITUDE, vmin=0, vmax=top)
        _deformed_lines(ax, pictures[condition, weight, grid][1])
        name = "Every voxel" if grid == len(pair.fixed) else f"{grid}×{grid}"
        ax.set_title(f"{name}\n{errors[grid][pair.disc > 0.5].mean():.2f} in the disc", fontsize=6.5)
    for ax in axes:
        if ax is not axes[1]:
            ax.contour(pair.disc.T, levels=[0.5], colors=[FIXED_COLOUR], linewidths=0.7)
        ax.set(xticks=[], yticks=[], xlim=(-0.5, len(pair.fixed) - 0.5), ylim=(-0.5, len(pair.fixed) - 0.5))
        ax.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.01).set_label("error (voxels)", fontsize=7)


def _deformed_lines(ax: Axes, displacement: np.ndarray, lines: int = 12) -> None:
    """Lines of the fixed slice carried by x + u(x); displacement (2, n, n) in voxels."""
    points = np.moveaxis(np.indices(displacement.shape[1:]) + displacement, 0, -1)
    step = points.shape[0] // lines
    ax.add_collection(LineCollection([*points[::step], *points[:, ::step].swapaxes(0, 1)], colors="white", linewidths=0.35,
                                     alpha=0.8))  # fmt: skip


# --- approximation and estimation --------------------------------------------------------------------------------


def error_parts(oracle: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """One row per case of ``cases`` at which the oracle of its grid is known, with columns oracle_mm and gap_mm.

    oracle as from ``oracle_table``, cases as from ``read_cases``. gap_mm = tre_mm - oracle_mm, what the registration has
    on top of the error no placing of its control points avoids. By the triangle inequality the mean distance between
    what was found and the best field of the grid is at least the gap.
    """
    keys = ["dataset", "fixed", "moving", "grid"]
    joined = cases.merge(oracle[[*keys, "oracle_mm"]], on=keys, validate="many_to_one")
    return joined.assign(gap_mm=joined["tre_mm"] - joined["oracle_mm"])


def oracle_figure(
    path: Path | str, oracle: pd.DataFrame, cases: pd.DataFrame, indexes: Mapping[str, Mapping], note: str = ""
) -> Figure:
    """Oracle error and reached true TRE against grid size, one panel a dataset; below the oracle, nothing is possible.

    oracle   from ``oracle_table``; it may hold grids that no run has
    cases    from ``read_cases``; shown are the adaptive run, and the runs trained for one grid
    indexes  dataset → its ``index.json``

    Points are means over test pairs, bars the 95 % Student-t interval of the mean. Writes ``<path>.png`` and ``.pdf``.
    """
    datasets = in_order(oracle["dataset"], PAPER_DATASETS)
    if not datasets:
        raise InputError(f"{path}: no oracle error to show, expected a dataset whose true deformations are known")
    reached = grid_comparison(cases)
    simulated = any(bool(indexes[dataset]["simulated"]) for dataset in datasets)
    with styled():
        figure, axes = plt.subplots(1, len(datasets), figsize=(2.4 * len(datasets) + 0.6, 2.9), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for ax, dataset in zip(axes[0], datasets):
            own = reached[reached["dataset"] == dataset]
            series = [
                ("best field of the grid (oracle)", oracle[oracle["dataset"] == dataset], "oracle_mm", ORACLE_COLOUR, "^", "-"),
                ("reached, trained for this grid alone", own[own["kind"] == SEPARATE], "tre_mm", NEUTRAL, "s", (0, (3, 1.5))),
                ("reached, one adaptive model", own[own["kind"] == REFERENCE], "tre_mm", colour(REFERENCE), "o", "-"),
            ]
            for label, rows, metric, tint, marker, dash in series:
                _against_grid(ax, rows, metric, color=tint, marker=marker, ls=dash, label=label, zorder=3)
            nothing = cases[(cases["dataset"] == dataset) & (cases["run"] == "identity")]["tre_mm"].mean()
            if np.isfinite(nothing):
                ax.axhline(nothing, color=colour("identity"), lw=0.8, ls=":", label="before registration")
            ax.set_title(dataset_label(dataset, bool(indexes[dataset]["simulated"])).replace(" (", "\n("), loc="left")
            ax.set(yscale="log", xlabel="control points per axis", ylabel="mean error (mm)")
            ax.yaxis.set_major_formatter(plt.FormatStrFormatter("%g"))
            ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        origin = "Simulated cohorts, not patients; their true deformations are smooth. " if simulated else ""
        add_caption(figure, f"{origin}Mean and 95 % interval over test pairs, within the fixed mask; logarithmic. Oracle: "
                            "control points fitted to the truth by least squares, which no registration can do. "
                            f"{note}".strip())  # fmt: skip
        save_figure(figure, path)
    return figure


def _against_grid(ax: Axes, rows: pd.DataFrame, metric: str, **style) -> None:
    """Means with 95 % intervals of cubic grids, at their number of control points along an axis (geometric mean else)."""
    grids = grid_order(rows["grid"])
    values = [rows.loc[rows["grid"] == grid, metric].dropna().to_numpy(float) for grid in grids]
    kept = [(np.prod([int(n) for n in grid.split("x")]) ** (1 / 3), v) for grid, v in zip(grids, values) if len(v)]
    if kept:
        x, means = [size for size, _ in kept], np.array([v.mean() for _, v in kept])
        bars = np.nan_to_num(np.abs(np.array([interval(v) for _, v in kept]) - means[:, None]).T)
        ax.errorbar(x, means, bars, capsize=2, elinewidth=0.9, ms=4, **style)


# --- calibration -------------------------------------------------------------------------------------------------


def calibration_figure(
    path: Path | str,
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
    factors: Mapping[str, float],
    simulated: bool,
    note: str = "",
) -> Figure:
    """Reliability (coverage, spread by bin) and sparsification of the predicted uncertainty, one row a dataset.

    measured   dataset → (error, sigma) of its test cases, (3, ...) mm, as in ``calibration``
    factors    dataset → ``calibration.scale`` of its *validation* cases; drawn beside the uncertainty as predicted

    Writes ``<path>.png`` and ``<path>.pdf``.
    """
    if not measured:
        raise InputError(f"{path}: no uncertainty to show, expected at least one dataset with a Bayesian run")
    datasets = in_order(measured, PAPER_DATASETS)
    levels = np.linspace(0.01, 0.99, 99)
    with styled():
        figure, axes = plt.subplots(len(datasets), 3, figsize=(7.2, 2.35 * len(datasets) + 0.9), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for row, dataset in zip(axes, datasets):
            error, sigma = measured[dataset]
            kinds = [("as predicted", sigma, "#D55E00", "o"), ("rescaled", factors[dataset] * sigma, "#0065AB", "s")]
            for label, spread, tint, marker in kinds:
                row[0].plot(levels, calibration.coverage(error, spread, levels), color=tint,
                            label=f"{label}, ECE {calibration.coverage_error(error, spread):.3f}")  # fmt: skip
                row[1].plot(*calibration.spread_bins(error, spread), color=tint, marker=marker, ms=3,
                            label=f"{label}, ENCE {calibration.spread_error(error, spread):.2f}")  # fmt: skip
            row[0].plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
            limit = max(row[1].dataLim.max)
            row[1].plot([0, limit], [0, limit], color="#999999", lw=0.8, ls=":")
            row[1].set(xlim=(0, None), ylim=(0, None))
            fractions, left, best = calibration.sparsification(error, sigma)
            row[2].axhline(1, color="#999999", lw=0.8, ls=":")
            row[2].plot(fractions, left, color=NEUTRAL, label=f"by uncertainty, AUSE {calibration.ause(error, sigma):.2f}")
            row[2].plot(fractions, best, color=ORACLE_COLOUR, ls="--", label="by the error itself (oracle)")
            row[2].fill_between(fractions, best, left, color="#DDDDDD", lw=0)
            row[2].set(ylim=(0, None))
            row[0].set(xlabel="level of the interval", ylabel="fraction of errors within", xlim=(0, 1), ylim=(0, 1))
            row[1].set(xlabel="predicted sd (RMS of a bin, mm)", ylabel="error found (RMS, mm)")
            row[2].set(xlabel="fraction of voxels left out", ylabel="mean error left (of all: 1)", xlim=(0, 1))
            row[0].set_title(f"{dataset_label(dataset, simulated)}: scale × {factors[dataset]:.2f}", loc="left")
            for ax in row:
                ax.legend(loc="best", fontsize=6)
        origin = "Simulated cohorts, not patients. " if simulated else ""
        add_caption(figure, f"{origin}Test cases, against the true displacement, each axis by itself on the left and in the "
                            "middle, lengths on the right. Dotted: ideal on the left and in the middle, no knowledge on "
                            "the right. ECE: mean |coverage - level|; ENCE: mean |RMS sd - RMS error| / RMS sd over "
                                f"{calibration.BINS} bins; AUSE: the grey area. The factor was fitted on validation "
                                "cases; it changes no ranking. "
                            f"{note}".strip())  # fmt: skip
        save_figure(figure, path)
    return figure
