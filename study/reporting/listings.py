"""Tables 2 to 4 as data: one row a configuration, each faced by the paper's values (paper, Sections 5.2 to 5.4).

    table2    encoder layers, KeyMorph's and GridReg's
    table3    grid, width, upsampling, projector and Bayesian head of GridReg
    table4    regularity of the deformations

Tables 2 and 3 compare the ablations of ``params.yaml`` with each other: they have a budget of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from study.benchmark.published import Costs, reductions
from study.config.ablation import find, seeds
from study.evaluation.statistics import matched, summarise, two_sided
from study.reporting.paper_numbers import PAPER_DATASETS, TABLE2, TABLE3, Printed, facing
from study.reporting.results import METRICS, chosen_rows, in_order, run_label
from study.reporting.tables import (
    DEPENDENT,
    PAPER_MARKS,
    SIMULATED,
    Setting,
    Table,
    best_of,
    cohorts_in_words,
    cost_note,
    dataset_label,
    setting_in_words,
    sizes_in_words,
    test_pairs_in_words,
)

COLUMNS = ["group", "label", "run", "metric", "unit", "mean", "sd", "n", "failures", "p", "paper", "paper_note", "best"]
MEASURED = ("dice", "landmark_mm", "tre_mm")
COSTS = ("memory_mb", "parameters")
REGULARITY = ("logdet_mean", "logdet_std", "folding_percent", "nondiffeomorphic_percent")
NOT_RANKED = ("logdet_mean",)  # neither high nor low is good
KEYMORPH, GRIDREG = "keymorph", "gridreg"
FULL_DEPTH = {KEYMORPH: 9, GRIDREG: 5}  # the default number of layers, with which the others are compared
TABLE4_RUNS = ("gridreg-bayesian", "gridreg-adaptive", "keymorph", "voxelmorph", "transmorph", "ants-syn")


def layer_runs(params: Mapping[str, Any], method: str) -> dict[int, str | None]:
    """Encoder layers → the ablation that has them and is the default otherwise (None: not run)."""
    name = {KEYMORPH: "layers", GRIDREG: "num_layers"}[method]
    return {layers: find(params, method, **{name: layers}) for layers in TABLE2[method]}


def configurations(params: Mapping[str, Any]) -> dict[int, str | None]:
    """Number of a configuration of Table 3 → the ablation that is it (None: not run)."""
    return {
        number: find(params, GRIDREG, grids=[[one.grid] * 3], base_channels=one.base_channels, upsampling=one.upsampling,
                     projector=one.projector, bayesian=one.bayesian)
        for number, one in TABLE3.items()
    }  # fmt: skip


def bending_runs(params: Mapping[str, Any]) -> dict[float, str]:
    """Factor of the bending weight → the ablation that has it and is the default otherwise, in rising order (Figure 8 (1))."""
    factors = {run.get("bending", 1.0) for run in params.get("ablation", {}).get("runs", {}).values()}
    names = {
        factor: find(params, GRIDREG, **({} if factor == 1 else {"bending": factor})) for factor in sorted(factors)
    }
    return {factor: name for factor, name in names.items() if name}


# --- the tables --------------------------------------------------------------------------------------------------


def table2(
    cases: pd.DataFrame, budgets: pd.DataFrame, costs: Costs, params: Mapping[str, Any], index: Mapping[str, Any], setting: Setting
) -> Table:  # fmt: skip
    """Encoder layers against accuracy and memory.

    cases, budgets  of the ablations, as from ``gridreg.results``; empty where none was run
    costs           ``published.costs`` of them
    index           ``index.json`` of their dataset
    setting         of Table 1, with whose budgets theirs are compared
    """
    rows = []
    for method in (KEYMORPH, GRIDREG):
        runs = layer_runs(params, method)
        reference = runs[FULL_DEPTH[method]]
        for layers, run in runs.items():
            paper = dict(zip(("dice", "landmark_mm", "memory_mb"), TABLE2[method][layers]))
            label = f"{layers} layers" + (" (default)" if layers == FULL_DEPTH[method] else "")
            rows += _row(
                run_label(method) if method == KEYMORPH else "GridReg", label, run, reference, cases, costs, paper
            )
    title = f"Encoder layers: test pairs of {_named(params, index)}, the paper's values below ours."
    defaults = "9 layers for KeyMorph, 5 for GridReg"
    notes = _notes(params, cases, budgets, costs, index, setting, defaults, [KEYMORPH])
    return Table("table2", title, _finish(rows), notes, listing=True)


def table3(
    cases: pd.DataFrame, budgets: pd.DataFrame, costs: Costs, params: Mapping[str, Any], index: Mapping[str, Any], setting: Setting
) -> Table:  # fmt: skip
    """GridReg's configurations; arguments as of ``table2``."""
    runs, rows = configurations(params), []
    for number, one in TABLE3.items():
        paper = dict(zip(("dice", "landmark_mm", "memory_mb"), (one.dice, one.landmark_mm, one.peak_mb)))
        words = [f"{one.grid}×{one.grid}×{one.grid}", f"C = {one.base_channels}", one.upsampling]
        words += ["no projector"] * (not one.projector) + ["Bayesian"] * one.bayesian + ["(default)"] * (number == 4)
        rows += _row(
            "", f"{number}: {', '.join(words)}".replace(", (", " ("), runs[number], runs[4], cases, costs, paper
        )
    title = f"Configurations of GridReg: test pairs of {_named(params, index)}, the paper's values below ours."
    notes = _notes(params, cases, budgets, costs, index, setting, "configuration 4")
    return Table("table3", title, _finish(rows), notes + seed_spread(cases, params, MEASURED), listing=True)


def table4(cases: pd.DataFrame, indexes: Mapping[str, Mapping[str, Any]], setting: Setting) -> Table:
    """Regularity of the deformations of every method; ``cases`` of the runs of Table 1."""
    rows, datasets = [], in_order(cases["dataset"], PAPER_DATASETS)
    for dataset in datasets:
        own = cases[cases["dataset"] == dataset]
        group = dataset_label(dataset, bool(indexes[dataset]["simulated"]))
        for run in (run for run in TABLE4_RUNS if run in set(own["run"])):
            paper = {"folding_percent": facing(dataset, "folding_percent", run)}
            rows += _row(group, run_label(run), run, None, own, None, paper, REGULARITY)
    notes = [SIMULATED] if any(index["simulated"] for index in indexes.values()) else []
    notes += [
        setting_in_words(setting),
        f"Mean ± SD over test pairs ({test_pairs_in_words(cases, indexes)}); bold: best of a column within a dataset, equal as "
        "printed being equal, nothing where all are. Mean and SD of log det J are taken within the fixed mask, folding (voxels "
        "with det J ≤ 0; the paper counts < 0) and non-diffeomorphic volume in the whole image.",
        "The paper's mean and SD of log det J cannot be read; its Dataset 2 and ANTs SyN are not in its Table 4.",
    ]
    title = f"Regularity of the deformations: test pairs of {cohorts_in_words(datasets, indexes)}, the paper's folding below ours."
    return Table("table4", title, _finish(rows, ["metric", "group"]), notes, listing=True)


# --- their parts -------------------------------------------------------------------------------------------------


def _row(
    group: str, label: str, run: str | None, reference: str | None, cases: pd.DataFrame, costs: Costs | None,
    paper: Mapping[str, Printed | None], metrics: tuple[str, ...] = MEASURED,
) -> list[dict[str, Any]]:  # fmt: skip
    """One tidy row for every metric of a configuration; p against ``reference``, if it is another run that was made."""
    there = set(cases["run"]) if len(cases) else set()
    summary = summarise(cases[cases["run"] == run], metrics).set_index("metric") if run in there else pd.DataFrame()
    rows = []
    for metric in (*metrics, *(COSTS if costs else ())):
        row = {"group": group, "label": label, "run": run or "", "metric": metric, "unit": METRICS[metric].unit}
        if metric in COSTS:
            row["mean"] = costs.of(run, metric) if run else np.nan
        elif metric in summary.index:
            row |= summary.loc[metric, ["mean", "sd", "n", "failures"]].to_dict()
            if reference in there - {run}:
                chosen = chosen_rows(cases)
                row["p"] = two_sided(*matched(*(chosen[chosen["run"] == name] for name in (run, reference)), metric)).p
        value = paper.get(metric)
        rows.append(row | {"paper": value.text(metric) if value else "", "paper_note": value.note if value else ""})
    return rows


def _finish(rows: list[dict[str, Any]], rivals: Sequence[str] = ("metric",)) -> pd.DataFrame:
    """The order of the columns, counts as integers, and the best among rows that agree in the columns ``rivals``."""
    tidy = pd.DataFrame(rows).reindex(columns=COLUMNS)
    tidy["n"] = tidy["n"].astype("Int64")
    tidy["failures"] = tidy["failures"].fillna(0).astype("Int64")
    tidy["best"] = False
    for _, part in tidy.groupby(list(rivals)):
        metric = part["metric"].iloc[0]
        if metric not in NOT_RANKED:
            tidy.loc[best_of(part.rename(columns={"run": "method"}), metric), "best"] = True
    return tidy


def _named(params: Mapping[str, Any], index: Mapping[str, Any]) -> str:
    return (
        dataset_label(params["ablation"]["dataset"], bool(index["simulated"])) if index else "a dataset (not run here)"
    )


def _notes(
    params: Mapping[str, Any], cases: pd.DataFrame, budgets: pd.DataFrame, costs: Costs, index: Mapping[str, Any], setting: Setting,
    default: str, peers: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Of Tables 2 and 3; ``peers`` are the bases, beside GridReg, that the table has."""
    notes = [SIMULATED] if index and index["simulated"] else []
    bases = params["ablation"].get("base", {})
    size = sizes_in_words("; ".join(reductions({name: bases[name] for name in peers if name in bases})))
    pairs = f" ({test_pairs_in_words(cases, {params['ablation']['dataset']: index})})" if len(cases) else ""
    budget = _budget(budgets, setting.budgets.get(params["ablation"].get("dataset"), {}))
    notes += [
        f"Profile {params['profile']}. {budget} {size}".strip(),
        f"Mean ± SD over test pairs{pairs}; bold: best of the column, equal as printed being equal. p: two-sided paired t-test "
        f"against the default ({default}), no correction for their number. –: not run in this profile.",
        DEPENDENT,
        cost_note(costs),
        PAPER_MARKS,
        "The paper's memory is that of Dataset 1.",
    ]
    return notes


def _budget(budgets: pd.DataFrame, main: Mapping[str, tuple[int, int]]) -> str:
    """The budget of the ablations, and how it compares with ``main``, those of the runs of Table 1."""
    own = sorted({(int(row.steps), int(row.batch)) for row in budgets.itertuples()})
    words = "; ".join(f"{steps:,} steps × batch {batch}" for steps, batch in own) or "none"
    samples, others = ({steps * batch for steps, batch in some} for some in (own, main.values()))
    beside = ""
    if samples and samples == others:
        beside = ", as in Table 1"
    elif samples and others and (max(samples) < min(others) or min(samples) > max(others)):
        beside = f", {'shorter' if max(samples) < min(others) else 'longer'} than in Table 1"
    return f"Training budget of every run: {words}{beside}; rows compare with each other alone."


def seed_spread(cases: pd.DataFrame, params: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """How much trainings of the default differ by their seed alone: what a difference in the table is to be held against."""
    runs = [run for run in seeds(params) if len(cases) and run in set(cases["run"])]
    if len(runs) < 2:
        return []
    means = chosen_rows(cases).groupby("run")[list(metrics)].mean().loc[runs]
    parts = [
        f"{METRICS[metric].label} {', '.join(METRICS[metric].format.format(value) for value in means[metric])}"
        + (f" {METRICS[metric].unit}" if METRICS[metric].unit else "")
        for metric in metrics if means[metric].notna().all()
    ]  # fmt: skip
    return [
        f"The default, trained with {len(runs)} seeds: {'; '.join(parts)}. No test or interval knows of this spread."
    ]
