"""Tables 1 to 4 as data: our value of every cell, its p- or q-value, and the paper's value beside it (paper, Section 5).

    table1    every method on every dataset: accuracy, regularity and cost
    table2    encoder layers of KeyMorph and GridReg
    table3    grid, width, upsampling, projector and Bayesian head of GridReg
    table4    regularity of the deformations

Each is a tidy frame with one row per value; ``table_text`` prints it. Tables 2 and 3 compare the ablations of
``params.yaml`` with each other: they have a training budget of their own. A cell in which GridReg loses is shown like any
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from gridreg.errors import InputError
from gridreg.metrics import THICKNESS_MM
from study.benchmark.published import Costs, reductions
from study.config.ablation import find, seeds
from study.evaluation.statistics import Test, compare, matched, summarise, two_sided
from study.reporting.paper_numbers import (
    PAPER_COLUMN,
    PAPER_COLUMN_LABELS,
    PAPER_DATASETS,
    TABLE2,
    TABLE3,
    Printed,
    facing,
    facing_text,
)
from study.reporting.provenance import (
    Setting,
    cohorts_in_words,
    cost_note,
    setting_in_words,
    sizes_in_words,
    test_pairs_in_words,
)
from study.reporting.results import (
    CASE_METRICS,
    METRICS,
    REFERENCE,
    SIMILARITY,
    chosen_rows,
    dataset_label,
    in_order,
    refined_name,
    run_label,
    without_accuracy,
)

TABLE1_COLUMNS = ["dataset", "dataset_label", "simulated", "metric", "unit", "method", "method_label", "grid", "mean", "sd", "n",
                  "failures", "p", "q", "test", "sides", "paper", "paper_note", "best", "note"]  # fmt: skip
LISTING_COLUMNS = ["group", "label", "run", "metric", "unit", "mean", "sd", "n", "failures", "p", "paper", "paper_note",
                   "best"]  # fmt: skip
ALL = "all"  # the rows that are not of one dataset
SKIPPED = "skipped"  # metric of the one row of a dataset without results
FDR = 0.05
ABLATED = ("dice", "landmark_mm", "tre_mm")  # metrics of Tables 2 and 3
COSTS = ("memory_mb", "parameters")
REGULARITY = ("logdet_mean", "logdet_std", "folding_percent", "nondiffeomorphic_percent", "identical_mm")
KEYMORPH, GRIDREG = "keymorph", "gridreg"
FULL_DEPTH = {KEYMORPH: 9, GRIDREG: 5}  # the default number of layers, with which the others are compared
TABLE4_RUNS = (
    "gridreg-bayesian",
    "gridreg-adaptive",
    "gridreg-adaptive-refined",
    "keymorph",
    "voxelmorph",
    "transmorph",
    "ants-syn",
)

SIMULATED = (
    "Datasets marked (simulated) are simulated cohorts, not patients. The paper's values come from other, real cohorts: they "
    "are for orientation and are not a target."
)
PAPER_MARKS = (
    "Marks on the paper's values: * was bold in the paper, is lost from the table we have, and is taken from the paper's text; "
    "? is uncertain (the CSV file says why). A blank cannot be read or is not in the paper."
)
DEPENDENT = (
    "The tests treat pairs as independent, as the paper does. Pairs that share a patient are not independent, so these p- and "
    "q-values are too small."
)
BOLD = (
    "Bold: the best mean among the registration methods; means that print equal are equally good. Nothing is bold where all "
    "are equal, or where the unregistered images are as good."
)
NO_BOLD = "Folding, non-diffeomorphic volume and log det J have no bold: not moving anything is perfect there."
NO_ACCURACY = (
    "{names}: accuracy was not measured, for no test pair has labels, landmarks or a known deformation. Image correlation and "
    "mean squared difference compare the fixed image with the moving one before (Original) and after registration. They say "
    "how alike the images look, not whether the same anatomy lies in the same place."
)


@dataclass(frozen=True)
class Table:
    """A table of the paper: ``rows`` is tidy; ``title`` and ``notes`` are plain sentences.

    In Table 1 a column is a method and a row a metric (TABLE1_COLUMNS). In a listing a column is a metric and a row a
    configuration (LISTING_COLUMNS).
    """

    name: str
    title: str
    rows: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    listing: bool = False


def best_of(group: pd.DataFrame, metric: str) -> pd.Index:
    """Rows with the best mean among the registration methods of ``group`` (columns method, mean, failures).

    Means that print equal are equal; fewer failed cases come first. None is best where all are equal, where there is no
    other, or where a trivial answer is as good: the identity, or, of what describes the transform alone, no motion.
    A method without parameters is not best in parameters: nothing was learned.
    """
    rule = METRICS[metric]
    ranked = group[(group["method"] != "identity") & np.isfinite(group["mean"])]
    if metric == "parameters":
        ranked = ranked[ranked["mean"] > 0]
    if rule.trivial_for_identity or ranked.empty:
        return ranked.index[:0]

    def printed(rows: pd.DataFrame) -> pd.Series:
        return rows["mean"].map(lambda value: float(rule.format.format(value).replace(",", "")))

    sign = 1 if rule.better == "higher" else -1
    able = ranked[ranked["failures"] == ranked["failures"].min()]
    scores = sign * printed(able)
    best = able.index[scores == scores.max()]
    before = group[(group["method"] == "identity") & np.isfinite(group["mean"])]
    trivial = (sign * printed(before) >= scores.max()).any()
    return best[:0] if trivial or len(best) == len(ranked) else best


# --- Table 1 -----------------------------------------------------------------------------------------------------


def table1(
    cases: pd.DataFrame,
    costs: Costs,
    skipped: dict[str, str],
    indexes: dict[str, dict[str, Any]],
    setting: Setting,
    test: Test = "t",
) -> Table:
    """Table 1 of the paper on our own cases.

    cases    as from ``results.read_cases``
    costs    as from ``benchmark.published.costs``
    skipped  a dataset without results → the reason
    indexes  every dataset of ``cases`` → its preprocessed ``index.json`` ("simulated", and patients)

    A dataset without labels, landmarks and truth has image similarity in the place of accuracy.
    """
    datasets = in_order(cases["dataset"], PAPER_DATASETS)
    for dataset in datasets:
        if "simulated" not in indexes.get(dataset, {}):
            raise InputError(f"index.json of {dataset}: no key 'simulated', expected true or false")
    unmeasured = without_accuracy(cases)
    summary = summarise(cases)
    if unmeasured:
        summary = pd.concat(
            [summary, summarise(cases[cases["dataset"].isin(unmeasured)], SIMILARITY)], ignore_index=True
        )
    keys = ["dataset", "metric", "run"]
    tests = compare(cases, test=test)[[*keys, "p", "q", "test", "sides"]]
    rows = [summary.merge(tests, on=keys, how="left"), _costs(cases, costs)]
    tidy = pd.concat([part for part in rows if len(part)], ignore_index=True)
    tidy = _complete(tidy, datasets, indexes, unmeasured)
    missing = [
        {"dataset": name, "dataset_label": dataset_label(name, False), "metric": SKIPPED, "note": reason}
        for name, reason in sorted(skipped.items())
    ]
    if missing:
        tidy = pd.concat([tidy, pd.DataFrame(missing)], ignore_index=True)
    tidy = tidy.reindex(columns=TABLE1_COLUMNS)
    title = (
        f"Registration of the test pairs of {cohorts_in_words(datasets, indexes)}, with the paper's values below ours."
    )
    return Table("table1", title, tidy, _table1_notes(tidy, cases, costs, indexes, skipped, setting, test))


def _costs(cases: pd.DataFrame, costs: Costs) -> pd.DataFrame:
    """Memory, parameters and seconds of every run in its published size; not for the identity."""
    runs = in_order(set(cases["run"]) - {"identity"})
    rows = [{"metric": name, "run": run, "mean": costs.of(run, name)} for name in costs.rows.columns for run in runs]
    return pd.DataFrame(rows).assign(dataset=ALL, n=np.nan)


def _complete(
    tidy: pd.DataFrame, datasets: list[str], indexes: dict[str, dict[str, Any]], unmeasured: list[str]
) -> pd.DataFrame:
    """Labels, the paper's values, the best of each row, and the order of the printed table."""
    simulated = {name: bool(indexes[name]["simulated"]) for name in datasets}
    labels = {name: dataset_label(name, simulated[name]) for name in datasets} | {ALL: "All datasets"}
    tidy = tidy.rename(columns={"run": "method"})
    tidy["dataset_label"] = tidy["dataset"].map(labels)
    tidy["simulated"] = tidy["dataset"].map(simulated | {ALL: any(simulated.values())})
    tidy["unit"] = tidy["metric"].map(lambda name: METRICS[name].unit)
    tidy["method_label"] = tidy["method"].map(run_label)
    tidy["n"] = tidy["n"].astype("Int64")  # nullable integers: a skipped dataset has none
    tidy["failures"] = tidy["failures"].fillna(0).astype("Int64")
    tidy["note"] = tidy["dataset"].map(dict.fromkeys(unmeasured, "accuracy not measured"))
    printed = [
        facing_text("" if row.dataset == ALL else row.dataset, row.metric, row.method) for row in tidy.itertuples()
    ]
    tidy["paper"], tidy["paper_note"] = zip(*printed)
    tidy["best"] = False
    for (_, metric), group in tidy.groupby(["dataset", "metric"]):
        tidy.loc[best_of(group, metric), "best"] = True
    orders = {
        "dataset": {name: place for place, name in enumerate([*datasets, ALL])},
        "metric": {name: place for place, name in enumerate(METRICS)},
        "method": {name: place for place, name in enumerate(in_order(tidy["method"]))},
    }
    return tidy.sort_values(list(orders), key=lambda column: column.map(orders[column.name]), ignore_index=True)


def _table1_notes(
    tidy: pd.DataFrame,
    cases: pd.DataFrame,
    costs: Costs,
    indexes: dict[str, dict[str, Any]],
    skipped: dict[str, str],
    setting: Setting,
    test: Test,
) -> list[str]:
    notes, reference = [], run_label(REFERENCE)
    if any(index["simulated"] for name, index in indexes.items() if name in set(cases["dataset"])):
        notes.append(SIMULATED)
    unmeasured = without_accuracy(cases)
    if unmeasured:
        names = [dataset_label(name, bool(indexes[name]["simulated"])) for name in unmeasured]
        notes.append(NO_ACCURACY.format(names="; ".join(names)))
    notes.append(setting_in_words(setting))
    if refined_name(REFERENCE) in set(cases["run"]):
        notes.append(
            f"{run_label(refined_name(REFERENCE))} optimises the control points of {reference} for every test pair: "
            f"{setting.refinement}. Its time per case is that much longer."
        )
    notes += [f"Values: mean ± SD over test pairs ({test_pairs_in_words(cases, indexes)}).", BOLD, NO_BOLD]
    kind = {"t": "paired t-test", "wilcoxon": "Wilcoxon signed-rank test"}[test]
    notes.append(
        f"q: one-sided {kind} on the same pairs, with the alternative that {reference} is better than the baseline of the "
        f"column. Benjamini–Hochberg corrects over the baselines of one dataset and metric; q ≤ {FDR:g} is significant at a "
        f"false discovery rate of {FDR:.0%}. A q near 1 means that GridReg is no better and may be worse. p, for variants of "
        f"GridReg: two-sided {kind} against {reference}, not corrected. A large p means no significant difference; "
        "equivalence was not tested."
    )
    notes.append(DEPENDENT)
    tested = tidy.loc[tidy["metric"].isin(CASE_METRICS), "test"].dropna()
    if (tested != test).any():
        notes.append(
            "Where only one of two methods failed on a case, the signed-rank test was used, with the failure ranked worst."
        )
    if (tidy["failures"] > 0).any():
        notes.append("n failed: the landmark or mask vanished in n cases, which are not in the mean.")
    chosen = chosen_rows(cases)
    missing = chosen.loc[chosen["run"] == REFERENCE, "landmarks_missing"].sum()
    if missing:
        notes.append(f"{missing:.0f} landmarks of fixed images have no partner in the moving image and are in no mean.")
    if chosen["tre_interior_mm"].notna().any():
        notes.append(
            f"Interior and boundary of the true TRE: more than {THICKNESS_MM:g} mm, and at most {THICKNESS_MM:g} mm, below the "
            "surface of the labelled organ."
        )
    lost = chosen[chosen["labels_lost"] > 0].groupby("run", sort=False)["labels_lost"].sum()
    if len(lost):
        counts = ", ".join(f"{run_label(run)} {lost[run]:.0f}" for run in in_order(lost.index))
        notes.append(f"Labels that vanished under the warp: {counts}. Their Dice is 0; the mask distance omits them.")
    if setting.syn and "ants-syn" in set(cases["run"]):
        note = costs.notes.get("ants-syn", "")
        notes.append(setting.syn + (f" In the benchmark: {note}." if note else ""))
    notes.append(cost_note(costs))
    absent = [PAPER_COLUMN_LABELS[column] for run, column in PAPER_COLUMN.items() if run not in set(cases["run"])]
    if absent:
        notes.append(f"In the paper but not run here: {', '.join(absent)}.")
    notes.append(PAPER_MARKS)
    notes.append(
        "In the text we have of the paper, the columns of its first Dice row are uncertain. Its memory is given for Datasets "
        "1 / 2 / 3 (–: cannot be read), its folding comes from its Table 4. Its Table 1 has no true TRE, non-diffeomorphic "
        "volume or log det J."
    )
    notes += [f"Dataset {name} was skipped: {reason}" for name, reason in sorted(skipped.items())]
    return notes


# --- Tables 2 to 4: one row a configuration ----------------------------------------------------------------------


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
    """Factor of the bending weight → the ablation that has it and is the default otherwise, in rising order (Figure 8)."""
    factors = {run.get("bending", 1.0) for run in params.get("ablation", {}).get("runs", {}).values()}
    names = {
        factor: find(params, GRIDREG, **({} if factor == 1 else {"bending": factor})) for factor in sorted(factors)
    }
    return {factor: name for factor, name in names.items() if name}


def table2(
    cases: pd.DataFrame, budgets: pd.DataFrame, costs: Costs, params: Mapping[str, Any], index: Mapping[str, Any], setting: Setting
) -> Table:  # fmt: skip
    """Encoder layers against accuracy and memory.

    cases, budgets  of the ablations, as from ``results.read_ablations``; empty where none was run
    costs           ``benchmark.published.costs`` of them
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
            group = run_label(method) if method == KEYMORPH else "GridReg"
            rows += _rows(group, label, run, reference, cases, costs, paper)
    title = f"Encoder layers: test pairs of {_named(params, index)}, with the paper's values below ours."
    defaults = "9 layers for KeyMorph, 5 for GridReg"
    notes = _ablation_notes(params, cases, budgets, costs, index, setting, defaults, [KEYMORPH])
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
        label = f"{number}: {', '.join(words)}".replace(", (", " (")
        rows += _rows("", label, runs[number], runs[4], cases, costs, paper)
    title = f"Configurations of GridReg: test pairs of {_named(params, index)}, with the paper's values below ours."
    notes = _ablation_notes(params, cases, budgets, costs, index, setting, "configuration 4")
    return Table("table3", title, _finish(rows), notes + seed_spread(cases, params, ABLATED), listing=True)


def table4(cases: pd.DataFrame, indexes: Mapping[str, Mapping[str, Any]], setting: Setting) -> Table:
    """Regularity of the deformations of every method; ``cases`` of the runs of Table 1."""
    rows, datasets = [], in_order(cases["dataset"], PAPER_DATASETS)
    for dataset in datasets:
        own = cases[cases["dataset"] == dataset]
        group = dataset_label(dataset, bool(indexes[dataset]["simulated"]))
        for run in (run for run in TABLE4_RUNS if run in set(own["run"])):
            paper = {"folding_percent": facing(dataset, "folding_percent", run)}
            rows += _rows(group, run_label(run), run, None, own, None, paper, REGULARITY)
    notes = [SIMULATED] if any(index["simulated"] for index in indexes.values()) else []
    notes += [
        setting_in_words(setting),
        f"Values: mean ± SD over test pairs ({test_pairs_in_words(cases, indexes)}).",
        NO_BOLD,
        "Mean and SD of log det J are taken within the fixed mask. Folding (voxels with det J ≤ 0; the paper counts < 0) and "
        "non-diffeomorphic volume are taken over the whole image.",
        "Motion of identical images: the fixed image of every test pair is registered to itself. The mean length of the "
        "displacement within the fixed mask should be 0.",
        "The paper's mean and SD of log det J cannot be read. Its Table 4 has neither Dataset 2 nor ANTs SyN.",
    ]
    title = f"Regularity of the deformations: test pairs of {cohorts_in_words(datasets, indexes)}, with the paper's folding below ours."
    return Table("table4", title, _finish(rows, ["metric", "group"]), notes, listing=True)


def _rows(
    group: str, label: str, run: str | None, reference: str | None, cases: pd.DataFrame, costs: Costs | None,
    paper: Mapping[str, Printed | None], metrics: tuple[str, ...] = ABLATED,
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


def _finish(rows: list[dict[str, Any]], within: Sequence[str] = ("metric",)) -> pd.DataFrame:
    """The order of the columns, counts as integers, and the best among rows that agree in the columns ``within``."""
    tidy = pd.DataFrame(rows).reindex(columns=LISTING_COLUMNS)
    tidy["n"] = tidy["n"].astype("Int64")
    tidy["failures"] = tidy["failures"].fillna(0).astype("Int64")
    tidy["best"] = False
    for _, part in tidy.groupby(list(within)):
        tidy.loc[best_of(part.rename(columns={"run": "method"}), part["metric"].iloc[0]), "best"] = True
    return tidy


def _named(params: Mapping[str, Any], index: Mapping[str, Any]) -> str:
    return (
        dataset_label(params["ablation"]["dataset"], bool(index["simulated"])) if index else "a dataset (not run here)"
    )


def _ablation_notes(
    params: Mapping[str, Any], cases: pd.DataFrame, budgets: pd.DataFrame, costs: Costs, index: Mapping[str, Any], setting: Setting,
    default: str, peers: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Notes of Tables 2 and 3; ``peers`` are the methods, beside GridReg, that the table has."""
    notes = [SIMULATED] if index and index["simulated"] else []
    bases = params["ablation"].get("base", {})
    size = sizes_in_words("; ".join(reductions({name: bases[name] for name in peers if name in bases})))
    pairs = f" ({test_pairs_in_words(cases, {params['ablation']['dataset']: index})})" if len(cases) else ""
    budget = _ablation_budget(budgets, setting.budgets.get(params["ablation"].get("dataset"), {}))
    notes += [
        f"Profile {params['profile']}. {budget} {size}".strip(),
        f"Values: mean ± SD over test pairs{pairs}. Bold: the best of the column; means that print equal are equally good. –: "
        "not run in this profile.",
        f"p: two-sided paired t-test against the default ({default}), not corrected for the number of tests. A large p means no "
        "significant difference; equivalence was not tested.",
        DEPENDENT,
        cost_note(costs),
        PAPER_MARKS,
        "The paper's memory is that of Dataset 1.",
    ]
    return notes


def _ablation_budget(budgets: pd.DataFrame, main: Mapping[str, tuple[int, int]]) -> str:
    """The budget of the ablations, and how it compares with ``main``, those of the runs of Table 1."""
    own = sorted({(int(row.steps), int(row.batch)) for row in budgets.itertuples()})
    words = "; ".join(f"{steps:,} steps × batch {batch}" for steps, batch in own) or "none"
    samples, others = ({steps * batch for steps, batch in some} for some in (own, main.values()))
    beside = ""
    if samples and samples == others:
        beside = ", as in Table 1"
    elif samples and others and (max(samples) < min(others) or min(samples) > max(others)):
        beside = f", {'shorter' if max(samples) < min(others) else 'longer'} than in Table 1"
    return f"Training budget of every run: {words}{beside}. Compare rows with each other only."


def seed_spread(cases: pd.DataFrame, params: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """How much trainings of the default differ by their seed alone: a difference in the table has to exceed it."""
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
        f"The default, trained with {len(runs)} seeds, reached: {'; '.join(parts)}. No test or interval here includes this "
        "spread."
    ]
