"""Approximation error and excess error: what a grid can represent of a known truth, and what a registration reached.

    approximation error   mean distance in mm between the true displacement and the best field of the grid (the oracle)
    excess error      true TRE minus the approximation error, in mm: what the registration adds to it

By the triangle inequality the field found is at least the excess error away from the best field of the grid, on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from gridreg.errors import InputError
from study.evaluation.statistics import interval
from study.reporting.figures.grid_sizes import SEPARATE, grid_comparison, grid_order
from study.reporting.figures.style import PAGE, letter_panels, origin, save_figure
from study.reporting.paper_numbers import PAPER_DATASETS
from study.reporting.results import REFERENCE, dataset_label, grid_label, in_order
from study.style import OTHERS, colour, styled

ORACLE_COLOUR = OTHERS[1]
_KEYS = ["dataset", "fixed", "moving", "grid"]
_KINDS = {SEPARATE: ("#BDBDBD", "trained for this grid alone"), REFERENCE: (colour(REFERENCE), "one adaptive model")}


def error_parts(oracle: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """One row per case of ``cases`` at which the oracle of its grid is known, with columns oracle_mm and gap_mm.

    oracle as from ``oracle_table``, cases as from ``read_cases``. oracle_mm is the approximation error, gap_mm =
    tre_mm - oracle_mm the excess error.
    """
    joined = cases.merge(oracle[[*_KEYS, "oracle_mm"]], on=_KEYS, validate="many_to_one")
    return joined.assign(gap_mm=joined["tre_mm"] - joined["oracle_mm"])


def error_table(oracle: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """Means over the pairs of every dataset, grid and run: approximation error, true TRE and excess error.

    Returns columns dataset, grid, run, pairs, oracle_mm, reached_mm, gap_mm (in the order named above, all in mm). A grid
    that no run has keeps a row, with run "".
    """
    reached = error_parts(oracle, cases).rename(columns={"tre_mm": "reached_mm"})
    without = ~oracle["dataset"].add(oracle["grid"]).isin(reached["dataset"].add(reached["grid"]))
    rows = pd.concat([reached, oracle[without].assign(run="")])
    orders = (("dataset", in_order(rows["dataset"], PAPER_DATASETS)), ("grid", grid_order(rows["grid"])))
    rows = rows.assign(**{name: pd.Categorical(rows[name], order) for name, order in orders})
    groups = rows.groupby(["dataset", "grid", "run"], observed=True)
    means = groups[["oracle_mm", "reached_mm", "gap_mm"]].mean()
    means.insert(0, "pairs", groups.size())
    return means.reset_index()


def oracle_figure(
    path: Path | str, oracle: pd.DataFrame, cases: pd.DataFrame, indexes: Mapping[str, Mapping], note: str = ""
) -> Figure:
    """A column per dataset. Above: approximation error against grid size. Below: the true TRE, as the sum of both errors.

    oracle   from ``oracle_table``; it may hold grids that no run has
    cases    from ``read_cases``; shown are the adaptive run, and the runs trained for one grid
    indexes  dataset → its ``index.json``

    Means over test pairs, bars the 95 % Student-t interval of the mean. Writes ``<path>.png``, ``.pdf`` and ``.txt``.
    """
    datasets = in_order(oracle["dataset"], PAPER_DATASETS)
    if not datasets:
        raise InputError(f"{path}: no oracle error to show, expected a dataset whose true deformations are known")
    reached = error_parts(oracle, grid_comparison(cases))
    simulated = any(bool(indexes[dataset]["simulated"]) for dataset in datasets)
    with styled():
        figure, axes = plt.subplots(2, len(datasets), figsize=(min(PAGE, 2.4 * len(datasets) + 0.6), 4.7), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for (above, below), dataset in zip(axes.T, datasets):
            own, before = (
                oracle[oracle["dataset"] == dataset],
                cases["run"].eq("identity") & cases["dataset"].eq(dataset),
            )
            grids = grid_order(own["grid"])
            means, bars = zip(*(_mean(own.loc[own["grid"] == grid, "oracle_mm"]) for grid in grids))
            sizes = [
                np.prod([int(n) for n in grid.split("x")]) ** (1 / 3) for grid in grids
            ]  # geometric mean of the axes
            above.errorbar(
                sizes, means, np.transpose(bars), capsize=2, elinewidth=0.9, ms=4, color=ORACLE_COLOUR, marker="^"
            )
            above.set_title(
                dataset_label(dataset, bool(indexes[dataset]["simulated"])).replace(" (", "\n("), loc="left"
            )
            above.set(yscale="log", xlabel="control points per axis")
            above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            above.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            above.yaxis.set_minor_formatter(NullFormatter())
            above.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
            _parts(below, reached[reached["dataset"] == dataset], cases.loc[before, "tre_mm"].mean())
        axes[0, 0].set_ylabel("approximation error (mm),\nlogarithmic axis")
        axes[1, 0].set_ylabel("true TRE (mm)")
        letter_panels(axes.flat)
        handles = [Patch(fc=ORACLE_COLOUR, label="approximation error")]
        handles += [Patch(fc=tint, label=f"excess error, {words}") for tint, words in _KINDS.values()]
        handles.append(Line2D([], [], color=colour("identity"), ls=":", lw=0.9, label="before registration"))
        figure.legend(handles=handles, loc="outside upper center", ncols=2 if len(datasets) > 1 else 1)
    save_figure(
        figure, path, "Approximation error and excess error, beyond the paper.", origin(simulated),
        "The true deformations of these cohorts are smooth." if simulated else "",
        "Values are means over test pairs within the fixed mask; bars are 95 % intervals of the mean.",
        "Top: the approximation error is the distance between the true displacement and the oracle, which fits the control "
        "points to the truth by least squares. No registration can do this.",
        "Bottom: the true TRE that was reached. The excess error is the true TRE minus the approximation error.",
        "The approximation error need not fall with every added point, because grids are not nested: a grid of 3 has a "
        "control point in the middle of the image, where an organ lies, and a grid of 4 has none there.",
        answer(reached), note,
    )  # fmt: skip
    return figure


def answer(parts: pd.DataFrame) -> str:
    """Which part of the true TRE of the adaptive model is approximation error, in words; "" without such a run."""
    adaptive = parts[parts["run"] == REFERENCE]
    if adaptive.empty:
        return ""
    means = adaptive.groupby(["dataset", "grid"])[["oracle_mm", "tre_mm"]].mean()
    shares = 100 * means["oracle_mm"] / means["tre_mm"]
    found = []
    for dataset in in_order(adaptive["dataset"], PAPER_DATASETS):
        own = shares[dataset]
        ends = [(own[grid], grid_label(grid)) for grid in (grid_order(own.index.to_series())[n] for n in (0, -1))]
        found.append(f"{dataset} " + " to ".join(f"{share:.2g} % at {grid}" for share, grid in ends))
    most = "Most of the true TRE of the adaptive model is excess error. " if shares.max() < 50 else ""
    return f"{most}The approximation error is this share of its true TRE: {'; '.join(found)}."


def _mean(values: pd.Series) -> tuple[float, tuple[float, float]]:
    """Mean of what is known, and how far its 95 % interval reaches below and above (0 for a single case)."""
    known = values.dropna().to_numpy(float)
    mean = known.mean() if len(known) else np.nan
    return mean, tuple(np.nan_to_num(np.abs(np.array(interval(known)) - mean))) if len(known) else (0.0, 0.0)


def _parts(ax: Axes, rows: pd.DataFrame, before: float) -> None:
    """The true TRE at every grid, one bar per kind of training: approximation error below, excess error on top."""
    grids, width = grid_order(rows["grid"]), 0.36
    for shift, (kind, (tint, _)) in zip((-0.2, 0.2), _KINDS.items()):
        for position, grid in enumerate(grids):
            own = rows[(rows["kind"] == kind) & (rows["grid"] == grid)].dropna(subset=["tre_mm"])
            if own.empty:
                continue
            (mean, bars), best = _mean(own["tre_mm"]), own["oracle_mm"].mean()
            ax.bar(position + shift, best, width, color=ORACLE_COLOUR, zorder=3)
            ax.bar(position + shift, mean - best, width, bottom=best, color=tint, zorder=2)
            ax.errorbar(
                position + shift, mean, np.array(bars)[:, None], color="#444444", capsize=2, elinewidth=0.9, zorder=4
            )
    if np.isfinite(before):
        ax.axhline(before, color=colour("identity"), lw=0.9, ls=":")
    ax.set_xticks(range(len(grids)), [grid.split("x")[0] if len(set(grid.split("x"))) == 1 else grid for grid in grids])
    ax.set(xlabel="control points per axis", ylim=(0, None), xlim=(-0.5, len(grids) - 0.5))
    ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
