"""Table 1 as data: our value of every cell, its q-value, and the paper's value facing it (paper Section 5.1).

``table1`` returns a tidy frame with one row per dataset × metric × run; how it looks in Markdown and LaTeX is decided in
``gridreg.table_text``. A cell in which GridReg loses is shown like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from gridreg.errors import InputError
from gridreg.metrics import THICKNESS_MM
from study.benchmark.published import Costs, reductions
from study.evaluation.statistics import Test, compare, summarise
from study.reporting.paper_numbers import PAPER_COLUMN, PAPER_COLUMN_LABELS, PAPER_DATASETS, facing_text
from study.reporting.results import (
    CASE_METRICS,
    METRICS,
    REFERENCE,
    chosen_rows,
    in_order,
    pairs_in_words,
    refined_name,
    run_label,
)

COLUMNS = ["dataset", "dataset_label", "simulated", "metric", "unit", "method", "method_label", "grid", "mean", "sd", "n",
           "failures", "p", "q", "test", "sides", "paper", "paper_note", "best", "note"]  # fmt: skip
ALL = "all"  # the rows that are not of one dataset
SKIPPED = "skipped"  # metric of the one row that stands for a dataset without results
FDR = 0.05
SIMULATED = (
    "Datasets marked (simulated) are simulated cohorts, not patients; the paper's values come from other, real "
    "cohorts and stand beside ours for orientation, not as a target."
)
PAPER_MARKS = (
    "Paper: * bold there and lost from the table we have, taken from its text; ? uncertain (the CSV says why); blank: cannot "
    "be read, or not in the paper."
)
DEPENDENT = "The tests treat pairs as independent, as the paper does; pairs that share a patient are not, which makes the tests too sure."


@dataclass(frozen=True)
class Setting:
    """What a reader must know of how the numbers were made."""

    profile: str  # smoke, demo or paper
    budgets: dict[str, dict[str, tuple[int, int]]]  # dataset → run → (steps, batch)
    sizes: str  # of the methods that are smaller than published, in words; "" if none is
    refinement: str = ""  # what instance refinement did, in words
    syn: str = ""  # what ANTs SyN was given, in words


def setting(params: dict[str, Any], costs: pd.DataFrame) -> Setting:
    """The setting of results made with ``params`` (of params.yaml), its budgets as ``read_costs`` found them."""
    budgets: dict[str, dict[str, tuple[int, int]]] = {}
    for row in costs.dropna(subset=["steps"]).itertuples():
        budgets.setdefault(row.dataset, {})[row.run] = (int(row.steps), int(row.batch))
    used = {name: params["runs"][name] for name in params["use"]["trained"]}
    syn = next(
        (params["runs"][name] for name in params["use"]["untrained"] if params["runs"][name]["method"] == "syn"), None
    )
    words = syn_in_words(syn, params["use"]["datasets"]) if syn else ""
    refined = "{refine_steps} steps of the losses of training, the bending weight times {refine_bending:g}, without the labels"
    return Setting(params["profile"], budgets, "; ".join(reductions(used)), refined.format(**params["evaluate"]), words)


def syn_in_words(run: Mapping[str, Any], datasets: list[str]) -> str:
    """What ANTs SyN, a run of ``params.yaml``, was given: its iterations, and the labels that no other method sees."""
    words = (
        f"ANTs SyN: {', '.join(map(str, run['iterations']))} iterations, from the coarsest level to the full resolution"
    )
    margin = run.get("mask_margin")
    margins = margin if isinstance(margin, dict) else dict.fromkeys(datasets, margin)
    masked = {name: margins.get(name) for name in datasets if margins.get(name) is not None}
    if not masked:
        return f"{words}; no masks."
    near = ", ".join(f"{name} {voxels}" for name, voxels in masked.items())
    elsewhere = [name for name in datasets if name not in masked]
    return (
        f"{words}. It sees the organ labels of both images of every test pair, which no other method does: its metric is "
        f"evaluated in them and so many voxels around ({near}){'; no masks for ' + ', '.join(elsewhere) if elsewhere else ''}. "
        "The paper gave it masks, too, and does not say on which datasets."
    )


@dataclass(frozen=True)
class Table:
    """A table of the paper: ``rows`` is tidy; ``title`` and ``notes`` are plain sentences.

    A column is a method and a row a metric (COLUMNS); in a listing a column is a metric, and a row a configuration.
    """

    name: str
    title: str
    rows: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    listing: bool = False


def dataset_label(dataset: str, simulated: bool) -> str:
    """``Prostate, Dataset 1 (simulated)``; a dataset the paper does not have keeps its own name."""
    paper = PAPER_DATASETS.get(dataset)
    name = dataset.capitalize() + f", {paper}" if paper else dataset
    return f"{name} (simulated)" if simulated else name


def table1(
    cases: pd.DataFrame,
    costs: Costs,
    skipped: dict[str, str],
    indexes: dict[str, dict[str, Any]],
    setting: Setting,
    test: Test = "t",
) -> Table:
    """Table 1 of the paper on our own cases.

    ``cases`` as from ``gridreg.results``, ``costs`` as from ``gridreg.published``; ``skipped`` maps a dataset without results to
    the reason; ``indexes`` maps every dataset of ``cases`` to its preprocessed ``index.json`` ("simulated", and patients).
    """
    datasets = in_order(cases["dataset"], PAPER_DATASETS)
    for dataset in datasets:
        if "simulated" not in indexes.get(dataset, {}):
            raise InputError(f"index.json of {dataset}: no key 'simulated', expected true or false")
    summary = summarise(cases)
    keys = ["dataset", "metric", "run"]
    tests = compare(cases, test=test)[[*keys, "p", "q", "test", "sides"]]
    rows = [summary.merge(tests, on=keys, how="left"), _costs(cases, costs)]
    tidy = pd.concat([part for part in rows if len(part)], ignore_index=True)
    tidy = _complete(tidy, datasets, indexes)
    missing = [
        {"dataset": name, "dataset_label": dataset_label(name, False), "metric": SKIPPED, "note": reason}
        for name, reason in sorted(skipped.items())
    ]
    if missing:
        tidy = pd.concat([tidy, pd.DataFrame(missing)], ignore_index=True)
    tidy = tidy.reindex(columns=COLUMNS)
    return Table("table1", _title(datasets, indexes), tidy, _notes(tidy, cases, costs, indexes, skipped, setting, test))


def _costs(cases: pd.DataFrame, costs: Costs) -> pd.DataFrame:
    """Memory, parameters and seconds of every run in its published size; not for the identity."""
    runs = in_order(set(cases["run"]) - {"identity"})
    rows = [{"metric": name, "run": run, "mean": costs.of(run, name)} for name in costs.rows.columns for run in runs]
    return pd.DataFrame(rows).assign(dataset=ALL, n=np.nan)


def _complete(tidy: pd.DataFrame, datasets: list[str], indexes: dict[str, dict[str, Any]]) -> pd.DataFrame:
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


def best_of(group: pd.DataFrame, metric: str) -> pd.Index:
    """Rows with the best mean among registration methods; none where all are equal, or where there is no other.

    Equal as printed is equal; fewer failed cases come first. No parameters is no merit: nothing was learned.
    """
    ranked = group[(group["method"] != "identity") & np.isfinite(group["mean"])]
    if metric == "parameters":
        ranked = ranked[ranked["mean"] > 0]
    able = ranked[ranked["failures"] == ranked["failures"].min()]
    shown = able["mean"].map(lambda value: float(METRICS[metric].format.format(value).replace(",", "")))
    best = able.index[shown == (shown.max() if METRICS[metric].better == "higher" else shown.min())]
    return best if len(best) < len(ranked) else best[:0]


def _title(datasets: list[str], indexes: dict[str, dict[str, Any]]) -> str:
    return f"Registration of the test pairs of {cohorts_in_words(datasets, indexes)}, the paper's values facing ours."


def cohorts_in_words(datasets: list[str], indexes: Mapping[str, Mapping[str, Any]]) -> str:
    """What a title says the test pairs are of."""
    return "simulated cohorts" if all(indexes[name]["simulated"] for name in datasets) else "the cohorts named below"


def _notes(
    tidy: pd.DataFrame,
    cases: pd.DataFrame,
    costs: Costs,
    indexes: dict[str, dict[str, Any]],
    skipped: dict[str, str],
    setting: Setting,
    test: Test,
) -> list[str]:
    notes = []
    if any(index["simulated"] for name, index in indexes.items() if name in set(cases["dataset"])):
        notes.append(SIMULATED)
    notes.append(setting_in_words(setting))
    if refined_name(REFERENCE) in set(cases["run"]):
        notes.append(
            f"{run_label(refined_name(REFERENCE))}: the control points of {run_label(REFERENCE)}, optimised for every test pair by "
            f"{setting.refinement}; it costs that much more time."
        )
    notes.append(
        f"Mean ± SD over test pairs ({test_pairs_in_words(cases, indexes)}); bold: best mean among registration methods, equal "
        "as printed being equal, nothing where all are."
    )
    kind = {"t": "paired t-test", "wilcoxon": "Wilcoxon signed-rank test"}[test]
    notes.append(
        f"q: one-sided {kind}, alternative {run_label(REFERENCE)} better than the baseline of the column on the same pairs, "
        f"Benjamini–Hochberg over the baselines within dataset × metric; q ≤ {FDR:g} is significant at a false discovery rate of "
        f"{FDR:.0%}. A q near 1 means that GridReg is no better and may be worse. p, for GridReg's own variants: two-sided "
        f"{kind} against {run_label(REFERENCE)}, not corrected."
    )
    notes.append(DEPENDENT)
    tested = tidy.loc[tidy["metric"].isin(CASE_METRICS), "test"].dropna()
    if (tested != test).any():
        notes.append(
            "Where only one of two methods failed on a case, the signed-rank test was used, the failure ranked worst."
        )
    if (tidy["failures"] > 0).any():
        notes.append("n failed: cases whose landmark or mask vanished; counted here, not part of the mean.")
    chosen = chosen_rows(cases)
    missing = chosen.loc[chosen["run"] == REFERENCE, "landmarks_missing"].sum()
    if missing:
        notes.append(f"{missing:.0f} landmarks of fixed images have no partner in the moving one and are in no mean.")
    if chosen["tre_interior_mm"].notna().any():
        notes.append(
            f"True TRE, interior and boundary: of the one organ that is labelled, more and at most {THICKNESS_MM:g} mm below "
            "its surface."
        )
    lost = chosen[chosen["labels_lost"] > 0].groupby("run", sort=False)["labels_lost"].sum()
    if len(lost):
        counts = ", ".join(f"{run_label(run)} {lost[run]:.0f}" for run in in_order(lost.index))
        notes.append(f"Labels that vanished under the warp, their Dice 0 and no part of the mask distance: {counts}.")
    if setting.syn and "ants-syn" in set(cases["run"]):
        note = costs.notes.get("ants-syn", "")
        notes.append(setting.syn + (f" In the benchmark: {note}." if note else ""))
    notes.append(cost_note(costs))
    absent = [PAPER_COLUMN_LABELS[column] for run, column in PAPER_COLUMN.items() if run not in set(cases["run"])]
    if absent:
        notes.append(f"In the paper but not run here: {', '.join(absent)}.")
    notes.append(PAPER_MARKS)
    notes.append(
        "Of the paper, the alignment of the first Dice row is uncertain; memory is that of Datasets 1 / 2 / 3 (–: cannot be read), "
        "folding is from its Table 4; true TRE, non-diffeomorphic volume and log det J are not in its Table 1."
    )
    notes += [f"Dataset {name} was skipped: {reason}" for name, reason in sorted(skipped.items())]
    return notes


def test_pairs_in_words(cases: pd.DataFrame, indexes: Mapping[str, Mapping[str, Any]]) -> str:
    """``prostate: 12 pairs of 5 patients, up to 6 pairs each; …``"""
    datasets = {name: cases[cases["dataset"] == name] for name in in_order(cases["dataset"], PAPER_DATASETS)}
    return "; ".join(f"{name}: {pairs_in_words(own, indexes.get(name, {}))}" for name, own in datasets.items())


def setting_in_words(setting: Setting) -> str:
    """Profile, budgets, and what is smaller than published."""
    return f"Profile {setting.profile}. {budgets_in_words(setting)} {sizes_in_words(setting.sizes)}".strip()


def sizes_in_words(sizes: str) -> str:
    """A sentence on ``sizes``, the methods that are smaller than published; "" if none is."""
    return f"Smaller than published, for this profile: {sizes}." if sizes else ""


def cost_note(costs: Costs) -> str:
    """What the costs are of."""
    return (
        "Memory (at the peak of a registration, beyond weights and images), parameters and time are of every method in its "
        f"published size, measured on {costs.in_words()} (figures/benchmark.md); –: not measured. The paper's were measured on "
        "one 32 GB GPU."
    )


def budgets_in_words(setting: Setting) -> str:
    """``Training budget: 600 steps × batch 4 for prostate, pelvis (every run); …``, equal budgets named together."""
    who: dict[tuple[int, int], dict[str, list[str]]] = {}  # budget → runs in words → datasets
    for dataset, budgets in setting.budgets.items():
        for budget in dict.fromkeys(map(tuple, budgets.values())):
            runs = [run for run in budgets if tuple(budgets[run]) == budget]
            words = "every run" if len(runs) == len(budgets) else ", ".join(map(run_label, runs))
            who.setdefault(budget, {}).setdefault(words, []).append(dataset)
    if not who:
        return "Training budget unknown."
    parts = []
    for (steps, batch), members in who.items():
        names = "; ".join(f"{', '.join(datasets)} ({words})" for words, datasets in members.items())
        parts.append(f"{steps:,} steps × batch {batch} for {names}")
    return f"Training budget: {'; '.join(parts)}."
