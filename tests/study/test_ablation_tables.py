"""Tables 2 to 4: the numbers are those of the cases, the paper's face them, and what was not run says so."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from small_results import COSTS, MEANS, PARAMS, RUNS, SETTING, make_cases

from study.benchmark.published import Costs
from study.reporting import tables
from study.reporting.provenance import Setting
from study.reporting.results import read_ablations
from study.reporting.table_text import listing_lines, to_latex, to_markdown

ABLATED = Costs(pd.DataFrame({"parameters": [252_000.0], "memory_mb": [101.0], "seconds": [0.05]}, index=["default"]),
                "128x128x102", "cpu", 2)  # fmt: skip
INDEX = {"simulated": True}


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    frame = make_cases({"identity": 0.5}, n=8)
    parts = [
        frame.assign(run=run, method="gridreg", dice=mean + rng.normal(size=8) * 0.01) for run, mean in MEANS.items()
    ]
    return pd.concat(parts, ignore_index=True)


BUDGETS = pd.DataFrame({"dataset": "ablation", "run": list(RUNS), "steps": 200, "batch": 2})


def row(table, label: str, metric: str):
    found = table.rows[(table.rows["label"].str.startswith(label)) & (table.rows["metric"] == metric)]
    assert len(found) == 1
    return found.iloc[0]


def test_table3_is_computed_from_the_cases(cases):
    arguments = cases, BUDGETS, ABLATED, PARAMS, INDEX, SETTING
    table = tables.table3(*arguments)
    deconv, default = (cases.loc[cases["run"] == run, "dice"].to_numpy() for run in ("deconv", "default"))
    found = row(table, "6:", "dice")
    assert found["mean"] == pytest.approx(deconv.mean()) and found["sd"] == pytest.approx(deconv.std(ddof=1))
    assert found["p"] == pytest.approx(scipy.stats.ttest_rel(deconv, default).pvalue) and found["best"]
    assert np.isnan(row(table, "4:", "dice")["p"]) and row(table, "4:", "memory_mb")["mean"] == 101
    assert row(table, "6:", "dice")["paper"] == "0.89 ± 0.04" and row(table, "7:", "memory_mb")["paper"] == "290"
    assert len(table.rows) == 9 * 5
    notes = " ".join(table.notes)
    assert "200 steps × batch 2, shorter than in Table 1." in notes and "2 seeds" in notes and "not patients" in notes
    assert "8 pairs of 16 patients" in notes and "KeyMorph" not in notes
    assert "keypoints 32, width 4, poolings 2 (published 80, 12, 4)" in " ".join(tables.table2(*arguments).notes)


@pytest.mark.parametrize("steps, batch, said", [(1200, 2, ", as in Table 1."), (600, 4, ", as in Table 1."),
                                                (900, 4, ", longer than in Table 1."), (599, 4, ", shorter than in Table 1."),
                                                (None, None, "none. Compare")])  # fmt: skip
def test_budgets_are_compared_and_not_supposed(cases, steps, batch, said):
    setting = Setting("demo", {"prostate": {"voxelmorph": (600, 4)}}, "")
    budgets = BUDGETS.assign(steps=steps, batch=batch) if steps else BUDGETS[:0]
    assert said in " ".join(tables.table3(cases, budgets, ABLATED, PARAMS, INDEX, setting).notes)


def test_a_configuration_that_was_not_run_keeps_its_row(cases):
    table = tables.table3(cases, BUDGETS, ABLATED, PARAMS, INDEX, SETTING)
    assert np.isnan(row(table, "9:", "dice")["mean"]) and row(table, "9:", "dice")["paper"]
    text = to_markdown(table)
    line = next(line for line in text.splitlines() if line.startswith("| 9: 15×15×15"))
    assert line.count("–") == 5


def test_table2_has_both_methods_at_every_depth(cases):
    table = tables.table2(cases, BUDGETS, ABLATED, PARAMS, INDEX, SETTING)
    assert table.rows.groupby("group")["label"].nunique().to_dict() == {"GridReg": 6, "KeyMorph": 6}
    four = table.rows[(table.rows["group"] == "GridReg") & (table.rows["label"] == "4 layers")]
    assert four.set_index("metric").loc["dice", "p"] < 0.05
    heads, _ = listing_lines(table.rows)
    assert heads == ["Dice", "Landmark distance (mm)", "True TRE (mm)", "Memory (MB)", "Parameters"]
    body = to_latex(table)
    body = body[body.index(r"\toprule") : body.index(r"\bottomrule")]
    for line in [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]:
        assert len(re.findall(r"(?<!\\)&", line)) == len(heads)


def test_without_any_ablation_the_papers_numbers_stand_alone():
    nothing, no_budget = read_ablations("nowhere", [])
    empty = PARAMS | {"ablation": {"use": []}}
    for make in (tables.table2, tables.table3):
        table = make(nothing, no_budget, COSTS, empty, {}, SETTING)
        assert table.rows["mean"].isna().all() and not table.rows["best"].any() and (table.rows["paper"] != "").any()
        to_latex(table)


def test_table4_ranks_nothing():
    cases = make_cases({"voxelmorph": 0.8, "gridreg-adaptive": 0.9})
    cases.loc[cases["run"] == "voxelmorph", "folding_percent"] = 0.5
    table = tables.table4(cases, {"prostate": INDEX}, SETTING)
    best = table.rows[table.rows["best"]]
    assert best.empty, "moving nothing is perfect here"
    folded = table.rows[table.rows["metric"] == "folding_percent"].set_index("run")
    assert folded.loc["voxelmorph", "mean"] == 0.5 and folded.loc["voxelmorph", "paper"] == "0.4"
    identical = table.rows[table.rows["metric"] == "identical_mm"].set_index("run")
    assert identical.loc["voxelmorph", "mean"] == pytest.approx(
        cases.loc[cases["run"] == "voxelmorph", "identical_mm"].mean()
    )
    cases["logdet_mean"] = -0.05
    text = to_markdown(tables.table4(cases, {"prostate": INDEX}, SETTING))
    assert "−0.050 ± 0.000" in text and "-0.050" not in text
    assert "$-$0.050" in to_latex(tables.table4(cases, {"prostate": INDEX}, SETTING))
    assert "Dataset 1 (simulated)" in to_markdown(table)
