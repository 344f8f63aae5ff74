"""Figure 8 of the paper: bending weights, and grid sizes trained separately and in one adaptive model."""

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
from study.evaluation.statistics import interval, matched, two_sided
from study.reporting.figures.style import PAGE, SMALL, letter_panels, origin, save_figure
from study.reporting.paper_numbers import FIGURE8_TEXT, PAPER_DATASETS
from study.reporting.results import METRICS, REFERENCE, dataset_label, grid_label, in_order, without_accuracy
from study.style import NEUTRAL, OTHERS, colour, styled

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
    """Figure 8: accuracy against the bending weight (top row), and against the grid size, separately trained and adaptive.

    bending  bending weight → per-case results of the run trained with it, all of one dataset; None: no top row
    indexes  dataset → its ``index.json``
    marks    what a vertical line in the top row means → its bending weight

    Points are means over test pairs, bars the 95 % Student-t interval of the mean; p of a two-sided paired t-test stands
    under every grid size where both were evaluated. A dataset without labels, landmarks and truth shows the correlation
    of the images. Writes ``<path>.png``, ``.pdf`` and ``.txt``.
    """
    rows = grid_comparison(cases)
    datasets = in_order(rows["dataset"], PAPER_DATASETS)
    for dataset in datasets:
        if "simulated" not in indexes.get(dataset, {}):
            raise InputError(f"index.json of {dataset}: no key 'simulated', expected true or false")
    metrics = {name: _shown_metrics(rows[rows["dataset"] == name]) for name in datasets}
    depth = max(map(len, metrics.values()))
    above = 2.2 if bending else 0.0
    below = 1.75 * depth + 0.75
    with styled():
        figure = plt.figure(figsize=(min(PAGE, 3.2 * len(datasets) + 0.5), above + below), layout="constrained")
        main, top = figure, []
        if bending:
            first, main = figure.subfigures(2, 1, height_ratios=[above, below])
            top = _bending_panels(first, bending, indexes, marks or {})
        axes = main.subplots(depth, len(datasets), squeeze=False)
        for column, dataset in zip(axes.T, datasets):
            group = rows[rows["dataset"] == dataset]
            label = dataset_label(dataset, bool(indexes[dataset]["simulated"]))
            column[0].set_title(label.replace(" (", "\n("), loc="left")
            for ax, metric in zip(column, metrics[dataset]):
                _grid_panel(ax, group, metric)
            for ax in column[len(metrics[dataset]) :]:
                ax.set_axis_off()
            column[len(metrics[dataset]) - 1].set_xlabel("control points per axis")
        letter_panels([ax for ax in axes.flat if ax.lines], start=len(top))
        handles = [
            Line2D([], [], color=c, marker=m, mfc=fill, ls=ls, label=label)
            for c, m, fill, ls, label in _STYLES.values()
        ]
        handles.append(
            Line2D([], [], color="black", marker="o", mfc="none", ms=9, ls="", label="grid chosen on validation")
        )
        main.legend(handles=handles, loc="outside upper center", ncols=1 if len(datasets) == 1 else 3)
    simulated = any(bool(indexes[dataset]["simulated"]) for dataset in datasets)
    unmeasured = [name for name in without_accuracy(cases) if name in datasets]
    save_figure(
        figure, path,
        "Bending weight and grid size." if bending else "Grid size.", origin(simulated),
        "Points are means over test pairs; bars are 95 % intervals of the mean.",
        "The top row shows one separately trained model for every weight of the bending energy." if bending else "",
        bending_note if bending else "",
        "The other rows compare one model trained for each grid with one adaptive model for all grids.",
        "p, below each grid: two-sided paired t-test between the two, pair by pair, not corrected. A large p means no "
        f"significant difference; equivalence was not tested. {FIGURE8_TEXT}",
        f"Accuracy was not measured on {', '.join(unmeasured)}; the correlation of the images does not replace it." if unmeasured else "",
        note,
    )  # fmt: skip
    return figure


def papers_bending_weight(dataset: str, spacing_mm: float) -> float:
    """The paper's best weight for other voxels: on voxels s times as large the same deformation has s^4 times the energy."""
    return PAPERS_BENDING_WEIGHT * (PAPERS_VOXEL_MM.get(dataset, 1.0) / spacing_mm) ** 4


def _shown_metrics(rows: pd.DataFrame) -> list[str]:
    """Dice, the landmark distance (without landmarks, that of the mask centroids) and true TRE, as far as known."""
    distance = "landmark_mm" if rows["landmark_mm"].notna().any() else "mask_mm"
    return [name for name in ("dice", distance, "tre_mm") if rows[name].notna().any()] or ["ncc"]


def _bending_panels(
    figure, bending: Mapping[float, pd.DataFrame], indexes: Mapping[str, Mapping], marks: Mapping[str, float]
) -> list[Axes]:
    """One panel per metric, the bending weight on a logarithmic axis."""
    rows = pd.concat([part.assign(weight=weight) for weight, part in bending.items()])
    dataset = rows["dataset"].iloc[0]
    metrics = _shown_metrics(rows)
    figure.suptitle(dataset_label(dataset, bool(indexes[dataset]["simulated"])), fontsize=8, x=0.01, ha="left")
    axes = list(figure.subplots(1, len(metrics), squeeze=False)[0])
    for ax, metric in zip(axes, metrics):
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
        _which_is_better(ax, metric)
    letter_panels(axes)
    if marks:
        named = [f"{words}: {weight:,.0f}" for words, weight in marks.items()]
        figure.legend(lines, named, loc="outside lower center", ncols=len(marks))
    return axes


def _grid_panel(ax: Axes, group: pd.DataFrame, metric: str) -> None:
    """Means with intervals of one metric of one dataset; p-values in the second line of the tick labels."""
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
    p_values = [_p_value(group[group["grid"] == grid], metric) for grid in grids]
    labels = [grid.split("x")[0] if len(set(grid.split("x"))) == 1 else grid_label(grid) for grid in grids]
    if np.isfinite(p_values).any():
        labels = [f"{label}\n{_p_text(p)}" for label, p in zip(labels, p_values)]
        second_line = -20  # points below the axis
        ax.annotate("p", (0, 0), (-5, second_line), "axes fraction", "offset points", ha="right", va="center",
                    fontsize=SMALL, fontstyle="italic")  # fmt: skip
    ax.set(xticks=range(len(grids)), xlim=(-0.45, len(grids) - 0.55), ylabel=_axis_label(metric))
    ax.set_xticklabels(labels)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
    _which_is_better(ax, metric)


def _which_is_better(ax: Axes, metric: str) -> None:
    arrow = "↑" if METRICS[metric].better == "higher" else "↓"
    ax.text(
        1, 1.02, f"{arrow} better", transform=ax.transAxes, ha="right", va="bottom", fontsize=SMALL, color="#555555"
    )


def _axis_label(metric: str) -> str:
    label = METRICS[metric].label.replace("Mask centroid", "Mask centroid\n").replace("Landmark", "Landmark\n")
    unit = METRICS[metric].unit
    return f"{label} ({unit})" if unit else label


def _p_text(p: float) -> str:
    return "" if not np.isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _p_value(rows: pd.DataFrame, metric: str) -> float:
    """Two-sided paired p of adaptive against separate at one grid; NaN unless both were evaluated."""
    adaptive, separate = (rows[rows["kind"] == kind] for kind in (REFERENCE, SEPARATE))
    if adaptive.empty or separate.empty:
        return np.nan
    return two_sided(*matched(adaptive, separate, metric)).p
