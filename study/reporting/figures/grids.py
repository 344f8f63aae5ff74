"""Figures made of numbers: bending weights and grid sizes (paper Figure 8), and training curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from gridreg.errors import InputError
from gridreg.explorer.style import NEUTRAL, OTHERS, colour, styled
from study.evaluation.statistics import interval, matched, two_sided
from study.reporting.figures.style import add_caption, save_figure
from study.reporting.paper_numbers import FIGURE8_TEXT, PAPER_DATASETS
from study.reporting.results import METRICS, REFERENCE, grid_label, in_order, run_label
from study.reporting.tables import dataset_label

SEPARATE = "separate"
PAPERS_BENDING_WEIGHT, PAPERS_VOXEL_MM = 2e5, {"prostate": 0.7}  # voxels of its other datasets: 1 mm
_STYLES = {  # kind → (colour, marker, its fill, line, legend)
    SEPARATE: (NEUTRAL, "s", "white", (0, (3, 1.5)), "trained for this grid alone"),
    REFERENCE: (colour(REFERENCE), "o", colour(REFERENCE), "-", "one adaptive model"),
}


def grid_comparison(cases: pd.DataFrame) -> pd.DataFrame:
    """Rows of the adaptive run at all its grids and of the separately trained runs at theirs, column ``kind`` added.

    ``cases`` as from ``read_cases``; separately trained runs are those of method gridreg other than the adaptive one that
    cover a grid size of it and are named ``gridreg-<number>``.
    """
    gridreg = cases[cases["method"] == "gridreg"]
    adaptive = gridreg[gridreg["run"] == REFERENCE].assign(kind=REFERENCE)
    if adaptive.empty:
        raise InputError(f"cases.csv: no run {REFERENCE}, expected the adaptive model at each of its grid sizes")
    alone = gridreg[gridreg["run"].str.fullmatch(r"gridreg-\d+") & gridreg["grid"].isin(adaptive["grid"])]
    return pd.concat([adaptive, alone.assign(kind=SEPARATE)], ignore_index=True)


def grid_order(grids: pd.Series) -> list[str]:
    """Distinct grids such as ``10x10x10`` from the fewest control points to the most."""
    return sorted(set(grids), key=lambda grid: int(np.prod([int(n) for n in grid.split("x")])))


def figure8(
    path: Path | str, cases: pd.DataFrame, indexes: Mapping[str, Mapping], note: str = "",
    bending: Mapping[float, pd.DataFrame] | None = None, bending_note: str = "", marks: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Figure 8: (1) Dice and distances against bending weight; (2, 3) against grid size, separately trained and adaptive.

    bending  bending weight → per-case results of the run trained with it, all of one dataset; None: (1) is left out
    indexes  dataset → its ``index.json``
    marks    what a vertical line in (1) stands for → its bending weight

    Points are means over test pairs, bars the 95 % Student-t interval of the mean; p of a two-sided paired t-test stands
    under every grid size where both were evaluated. Every dataset is a column of (2, 3), the first (the paper's Dataset 1)
    drawn wider. Writes ``<path>.png`` and ``<path>.pdf``.
    """
    rows = grid_comparison(cases)
    datasets = in_order(rows["dataset"], PAPER_DATASETS)
    for dataset in datasets:
        if "simulated" not in indexes.get(dataset, {}):
            raise InputError(f"index.json of {dataset}: no key 'simulated', expected true or false")
    metrics = ["dice", "distance"] + (["tre_mm"] if rows["tre_mm"].notna().any() else [])
    widths = [1.5, *[1.0] * (len(datasets) - 1)]
    with styled():
        size = (2.5 * sum(widths) + 0.4, 1.95 * len(metrics) + 1.1)
        above = 2.8 if bending else 0.0
        figure = plt.figure(figsize=(size[0], size[1] + above), layout="constrained")
        main = figure
        if bending:
            first, main = figure.subfigures(2, 1, height_ratios=[above, size[1]])
            _bending_panels(first, bending, indexes, marks or {})
        axes = main.subplots(len(metrics), len(datasets), squeeze=False, sharex="col", width_ratios=widths)
        any_simulated = False
        for column, dataset in zip(axes.T, datasets):
            group = rows[rows["dataset"] == dataset]
            simulated = bool(indexes[dataset]["simulated"])
            any_simulated |= simulated
            column[0].set_title(dataset_label(dataset, simulated).replace(" (", "\n("), loc="left")
            for ax, metric in zip(column, metrics):
                _grid_panel(ax, group, _distance(group) if metric == "distance" else metric)
            column[-1].set_xlabel("control points per axis")
        for ax, number in zip(axes[:, 0], ("(2)", "(3)", "(3′)")):
            ax.text(-0.02, 1.04, number, transform=ax.transAxes, ha="right", va="bottom", fontweight="bold")
        handles = [
            Line2D([], [], color=c, marker=m, mfc=fill, ls=ls, label=label)
            for c, m, fill, ls, label in _STYLES.values()
        ]
        handles.append(
            Line2D([], [], color="black", marker="o", mfc="none", ms=9, ls="", label="grid chosen on validation")
        )
        main.legend(handles=handles, loc="outside upper center", ncols=1 if len(datasets) == 1 else 3)
        origin = "Simulated cohorts, not patients. " if any_simulated else ""
        weights = (
            f"(1): one model for every weight of the bending energy, on a logarithmic axis. {bending_note} "
            if bending
            else ""
        )
        distances = "(2) Dice and (3) distance" + (", (3′) true TRE" if "tre_mm" in metrics else "")
        add_caption(figure, f"{origin}Mean and 95 % interval over test pairs. {weights}{distances} against the grid size: one model "
                            "trained for each grid, and one adaptive model for all; p: two-sided paired t-test between the two, "
                            f"pair by pair ({FIGURE8_TEXT}). {note}".strip())  # fmt: skip
        save_figure(figure, path)
    return figure


def papers_bending_weight(dataset: str, spacing_mm: float) -> float:
    """The paper's best weight for other voxels: on voxels s times as large the same deformation has s^4 times the energy."""
    return PAPERS_BENDING_WEIGHT * (PAPERS_VOXEL_MM.get(dataset, 1.0) / spacing_mm) ** 4


def _bending_panels(
    figure, bending: Mapping[float, pd.DataFrame], indexes: Mapping[str, Mapping], marks: Mapping[str, float]
) -> None:
    """(1): one panel a metric, the bending weight on a logarithmic axis."""
    rows = pd.concat([part.assign(weight=weight) for weight, part in bending.items()])
    dataset = rows["dataset"].iloc[0]
    metrics = ["dice", _distance(rows)] + (["tre_mm"] if rows["tre_mm"].notna().any() else [])
    figure.suptitle(dataset_label(dataset, bool(indexes[dataset]["simulated"])), fontsize=8, x=0.01, ha="left")
    for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        values = [rows.loc[rows["weight"] == weight, metric].to_numpy(float) for weight in bending]
        means = np.array([np.nanmean(value) for value in values])
        bars = np.nan_to_num(np.abs(np.array([interval(value) for value in values]) - means[:, None]).T)
        ax.errorbar(
            list(bending), means, bars, color=colour(REFERENCE), marker="o", capsize=2, elinewidth=0.9, zorder=3
        )
        lines = [ax.axvline(at, color=tint, ls=dash, lw=2.5, alpha=0.5, zorder=2)  # broad: an error bar may stand on it
                 for at, tint, dash in zip(marks.values(), OTHERS[1:], ("-", (0, (4, 2))))]  # fmt: skip
        ax.set(xscale="log", xlabel="weight of the bending energy", ylabel=_axis_label(metric))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
        arrow = "↑" if METRICS[metric].better == "higher" else "↓"
        ax.text(
            1, 1.02, f"{arrow} better", transform=ax.transAxes, ha="right", va="bottom", fontsize=5.8, color="#555555"
        )
        if metric == "dice":
            ax.text(-0.02, 1.04, "(1)", transform=ax.transAxes, ha="right", va="bottom", fontweight="bold")
    if marks:
        named = [f"{words}: {weight:,.0f}" for words, weight in marks.items()]
        figure.legend(lines, named, loc="outside lower center", ncols=len(marks))


def _distance(group: pd.DataFrame) -> str:
    """Landmark distance as in the paper; the mask centroid distance stands in where a dataset has no landmarks."""
    return "landmark_mm" if group["landmark_mm"].notna().any() else "mask_mm"


def _grid_panel(ax: Axes, group: pd.DataFrame, metric: str) -> None:
    """Means with intervals of one metric of one dataset, p-values along the bottom."""
    rule = METRICS[metric]
    grids = grid_order(group["grid"])
    place = {grid: position for position, grid in enumerate(grids)}
    for shift, (kind, (tint, marker, fill, dash, _)) in zip((-0.09, 0.09), _STYLES.items()):
        part = group[group["kind"] == kind]
        found = [grid for grid in grids if np.isfinite(part.loc[part["grid"] == grid, metric]).any()]
        values = [part.loc[part["grid"] == grid, metric].to_numpy(float) for grid in found]
        means = np.array([np.nanmean(value) for value in values])
        bounds = np.array([interval(value) for value in values]).reshape(-1, 2)
        bars = np.nan_to_num(np.abs(bounds - means[:, None]).T)  # one case has no interval
        x = np.array([place[grid] + shift for grid in found])
        ax.errorbar(x, means, bars, color=tint, marker=marker, ls=dash, mfc=fill, capsize=2, elinewidth=0.9, zorder=3)
        for grid, x_value, mean in zip(found, x, means):
            if kind == REFERENCE and part.loc[part["grid"] == grid, "chosen"].any():
                ax.plot(x_value, mean, marker="o", ms=9, mfc="none", mec="black", mew=0.8, zorder=4)
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.16 * (high - low), high)  # room for the p-values
    for grid, position in place.items():
        p = _p_value(group[group["grid"] == grid], metric)
        if np.isfinite(p):
            text = "p<0.001" if p < 0.001 else f"p={p:.3f}" if p < 0.1 else f"p={p:.2f}"
            ax.text(position, 0.02, text, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=5.8,
                    color="#555555")  # fmt: skip
    labels = [grid.split("x")[0] if len(set(grid.split("x"))) == 1 else grid_label(grid) for grid in grids]
    ax.set(xticks=range(len(grids)), xlim=(-0.45, len(grids) - 0.55), ylabel=_axis_label(metric))
    ax.set_xticklabels(labels)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(labelbottom=True)
    ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
    arrow = "↑" if rule.better == "higher" else "↓"
    ax.text(1, 1.02, f"{arrow} better", transform=ax.transAxes, ha="right", va="bottom", fontsize=5.8, color="#555555")


def _axis_label(metric: str) -> str:
    return "Mask centroid distance (mm)\n(no landmarks)" if metric == "mask_mm" else METRICS[metric].title


def _p_value(rows: pd.DataFrame, metric: str) -> float:
    """Two-sided paired p of adaptive against separate at one grid; NaN unless both were evaluated."""
    adaptive, separate = (rows[rows["kind"] == kind] for kind in (REFERENCE, SEPARATE))
    if adaptive.empty or separate.empty:
        return np.nan
    return two_sided(*matched(adaptive, separate, metric)).p


# --- training ----------------------------------------------------------------------------------------------------


def missing_figure(path: Path | str, sentence: str) -> Figure:
    """A page that says why a figure is not there, so that nothing is left out in silence. Writes PNG and PDF."""
    with styled():
        figure = plt.figure(figsize=(6, 1.2))
        figure.text(0.5, 0.5, sentence, ha="center", va="center")
    save_figure(figure, path)
    return figure


def read_history(path: Path | str) -> pd.DataFrame:
    """``history.csv`` of a training run: at least columns step and loss, usually val_dice (empty between validations)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found, expected the history that the training writes")
    history = pd.read_csv(path)
    missing = [column for column in ("step", "loss") if column not in history.columns]
    if missing or history.empty:
        found = f"no column {', '.join(missing)}" if missing else "no step"
        raise InputError(f"{path}: {found}, expected step, loss, similarity, dice_loss, bending, val_dice")
    return history


def training_curves(
    path: Path | str, histories: Mapping[str, pd.DataFrame], dataset: str, simulated: bool, note: str = ""
) -> Figure:
    """Loss and validation Dice against step, one column per run of a dataset, the other runs behind it in grey.

    ``histories`` maps a run to its ``read_history``. Thin: loss of every recorded step; thick: its running median. The
    loss axis ends at the 98th percentile, so that the first steps do not flatten the rest. Losses of different methods
    weigh different terms; compare them by Dice. Writes ``<path>.png`` and ``<path>.pdf``.
    """
    runs = in_order(histories)
    if not runs:
        raise InputError(f"{path}: no training history to show, expected at least one run")
    with styled():
        figure, axes = plt.subplots(
            2, len(runs), figsize=(1.55 * len(runs) + 0.9, 3.9), squeeze=False, sharex=True, sharey="row",
            layout="constrained",
        )  # fmt: skip
        for column, run in zip(axes.T, runs):
            column[0].set_title(run_label(run).replace(" (", "\n("), fontweight="bold")
            for other in [name for name in runs if name != run] + [run]:
                _curves(column, histories[other], colour(run) if other == run else "#DDDDDD", thin=other == run)
            column[1].set_xlabel("step")
            column[1].xaxis.set_major_locator(MaxNLocator(3, integer=True))
        losses = np.concatenate([history["loss"].to_numpy(float) for history in histories.values()])
        losses = losses[np.isfinite(losses)]
        if len(losses):
            low, high = losses.min(), np.percentile(losses, 98)
            axes[0, 0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
        axes[0, 0].set_ylabel("training loss")
        scores = pd.concat([history.get("val_dice", pd.Series(dtype=float)) for history in histories.values()])
        axes[1, 0].set_ylabel("validation Dice" if not scores.min() < 0 else "validation, minus the MSE")
        figure.suptitle(f"Training, {dataset_label(dataset, simulated)}", fontsize=9, x=0.01, ha="left")
        origin = "Simulated cohort, not patients. " if simulated else ""
        add_caption(figure, f"{origin}Coloured: the run named above; grey: the others. Thin: every tenth step; "
                            "thick: running median. Losses of different methods weigh different terms; compare by Dice. "
                            f"{note}".strip())  # fmt: skip
        save_figure(figure, path)
    return figure


def _curves(axes: np.ndarray, history: pd.DataFrame, tint: str, thin: bool) -> None:
    """Loss on ``axes[0]``, validation Dice on ``axes[1]``."""
    loss = history[["step", "loss"]].dropna()
    window = max(1, len(loss) // 20)
    if thin:
        axes[0].plot(loss["step"], loss["loss"], color=tint, lw=0.4, alpha=0.45)
    median = loss["loss"].rolling(window, center=True, min_periods=1).median()
    axes[0].plot(loss["step"], median, color=tint, lw=1.4 if thin else 0.8)
    if "val_dice" in history.columns:
        validation = history[["step", "val_dice"]].dropna()
        axes[1].plot(validation["step"], validation["val_dice"], color=tint, lw=1.4 if thin else 0.8,
                     marker="o" if thin else None, ms=2.5)  # fmt: skip
