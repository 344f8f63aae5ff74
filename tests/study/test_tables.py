"""Table 1: the numbers, what is bold, what faces them, and that both texts can be read back."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from small_results import COSTS, LOSING, SETTING, SYN, blind_cases, make_cases

from gridreg.errors import InputError
from study.benchmark.published import Costs
from study.reporting.paper_numbers import TABLE1, facing
from study.reporting.provenance import syn_in_words
from study.reporting.results import dataset_label
from study.reporting.table_text import latex_escape, lines, to_latex, to_markdown, write_table
from study.reporting.tables import table1


def make_table(means=LOSING, skipped=None, index=None, dataset="prostate"):
    cases = make_cases(means, dataset)
    return table1(cases, COSTS, skipped or {}, {dataset: index or {"simulated": True}}, SETTING)


@functools.cache
def default_table():
    return make_table()


def test_nothing_is_best_where_all_are_equal_and_no_parameters_are_no_merit():
    table = default_table()
    assert not table.rows.loc[table.rows["metric"] == "folding_percent", "best"].any()
    costs = Costs(
        pd.DataFrame({"parameters": [0, 105, 252]}, index=["ants-syn", "voxelmorph", "gridreg-adaptive"]),
        "1x1x1",
        "cpu",
        1,
    )
    means = {"ants-syn": 0.9, "voxelmorph": 0.8, "gridreg-adaptive": 0.85}
    table = table1(make_cases(means), costs, {}, {"prostate": {"simulated": True}}, SETTING)
    assert [cell(table, "parameters", name)["best"] for name in means] == [False, True, False]


def test_a_refined_run_is_told_from_the_network_s_own_answer_and_tested_as_its_variant():
    means = {"voxelmorph": 0.8, "gridreg-adaptive": 0.85, "gridreg-adaptive-refined": 0.9}
    table = table1(
        make_cases(means), COSTS, {}, {"prostate": {"simulated": True}}, replace(SETTING, refinement="40 steps of this")
    )
    assert any(
        note.startswith("GridReg (refined) optimises the control points of GridReg (adaptive)") and " 40 steps " in note
        for note in table.notes
    )
    assert (
        cell(table, "dice", "gridreg-adaptive-refined")["best"]
        and cell(table, "dice", "gridreg-adaptive-refined")["sides"] == "two-sided"
    )
    assert not any("refined" in note for note in default_table().notes)


def test_what_syn_sees_is_said_where_syn_is():
    costs = COSTS._replace(notes={"ants-syn": "9, 5, 0 iterations, on one thread"})
    means = {"ants-syn": 0.9, "voxelmorph": 0.8, "gridreg-adaptive": 0.85}
    notes = table1(make_cases(means), costs, {}, {"prostate": {"simulated": True}}, SETTING).notes
    said = next(note for note in notes if note.startswith("ANTs SyN runs "))
    for words in (
        "9, 5, 0 iterations, from the coarsest",
        "(prostate: 6 voxels). It gets no masks for brain.",
        "In the benchmark: 9, 5, 0 iterations, on one",
    ):
        assert words in said
    assert syn_in_words(SYN | {"mask_margin": None}, ["prostate"]).endswith(", without masks.")
    assert "(brain: 2 voxels)" in syn_in_words(SYN | {"mask_margin": 2}, ["brain"])
    assert not any(note.startswith("ANTs SyN runs ") for note in default_table().notes)


def test_baselines_have_q_and_variants_a_p_that_says_so():
    table = default_table()
    dice = next(line for line in lines(table.rows)[1] if line.kind == "q")
    assert [text for text, _ in dice.cells[:3]] == ["", "1.000", ""]  # original, VoxelMorph, GridReg itself
    assert dice.cells[3][0] == f"p {cell(table, 'dice', 'gridreg-10')['p']:.3f}" or dice.cells[3][0] == "p <0.001"
    assert np.isnan(cell(table, "dice", "identity")["q"]) and cell(table, "dice", "identity")["p"] < 0.01
    assert any("6 pairs of 12 patients" in note for note in table.notes)


def cell(table, metric, method):
    rows = table.rows[(table.rows["metric"] == metric) & (table.rows["method"] == method)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_best_is_the_best_registration_method_even_where_gridreg_loses():
    rows = default_table().rows
    for metric in ("dice", "landmark_mm", "tre_mm"):  # higher, then lower is better
        best = rows[(rows["metric"] == metric) & rows["best"]]
        assert list(best["method"]) == ["voxelmorph"]
    assert rows.loc[rows["metric"] == "dice", "q"].dropna().min() > 0.5  # one-sided: GridReg is worse


@pytest.mark.parametrize("before, best", [(0.849, ["voxelmorph"]), (0.8601, []), (0.95, [])])
def test_nothing_is_best_where_the_unregistered_images_are_as_good(before, best):
    rows = make_table({"identity": before, "voxelmorph": 0.86, "gridreg-adaptive": 0.8}).rows
    for metric in ("dice", "tre_mm"):
        assert list(rows.loc[(rows["metric"] == metric) & rows["best"], "method"]) == best


def test_the_smallest_deformation_is_not_best():
    rows = default_table().rows
    moved = rows[rows["metric"].isin(["logdet_std", "folding_percent", "nondiffeomorphic_percent"])]
    assert moved.loc[moved["metric"] == "logdet_std", "mean"].nunique() > 1 and not moved["best"].any()
    assert any("not moving anything is perfect" in note for note in default_table().notes)


def test_without_labels_the_images_are_compared_and_accuracy_is_said_to_be_unknown():
    indexes = {"prostate": {"simulated": True}, "mine": {"simulated": False}}
    table = table1(blind_cases(), COSTS, {}, indexes, SETTING)
    mine = table.rows[table.rows["dataset"] == "mine"]
    assert not {"dice", "landmark_mm", "mask_mm", "tre_mm"} & set(mine["metric"])
    similarity = mine[mine["metric"] == "ncc"].set_index("method")
    assert similarity["mean"].to_dict() == pytest.approx({"identity": 0.5, "voxelmorph": 0.7, "gridreg-adaptive": 0.6})
    assert similarity["best"].to_dict() == {"identity": False, "voxelmorph": True, "gridreg-adaptive": False}
    assert similarity["q"].isna().all() and set(mine["note"]) == {"accuracy not measured"}
    assert not mine.loc[mine["metric"].isin(["logdet_std", "folding_percent"]), "best"].any()
    assert not {"ncc", "mse"} & set(table.rows.loc[table.rows["dataset"] == "prostate", "metric"])
    text = to_markdown(table)
    assert (
        "**mine: accuracy not measured**" in text
        and "Image correlation" in text
        and "mine: accuracy was not measured" in text
    )
    assert "accuracy" not in to_markdown(default_table()) and "accuracy not measured" in to_latex(table)


def test_equal_as_printed_is_equally_best():
    means = {"identity": 0.7, "voxelmorph": 0.8601, "gridreg-10": 0.8599, "gridreg-adaptive": 0.8592}
    rows = make_table(means).rows
    best = rows[(rows["metric"] == "dice") & rows["best"]]
    assert list(best["method"]) == ["voxelmorph", "gridreg-10"]


def test_fewer_failures_before_a_better_mean():
    cases = make_cases(LOSING)
    hard = (cases["run"] == "voxelmorph") & (cases["fixed"] == "f0")
    cases.loc[hard, "landmark_mm"] = np.nan
    table = table1(cases, COSTS, {}, {"prostate": {"simulated": True}}, SETTING)
    assert not cell(table, "landmark_mm", "voxelmorph")["best"] and cell(table, "landmark_mm", "gridreg-10")["best"]
    assert cell(table, "landmark_mm", "voxelmorph")["failures"] == 1
    assert "(1 failed)" in to_markdown(table) and any("signed-rank" in note for note in table.notes)


def test_tidy_values_are_those_of_the_cases():
    table, cases = default_table(), make_cases(LOSING)
    dice = cases.loc[cases["run"] == "voxelmorph", "dice"]
    row = cell(table, "dice", "voxelmorph")
    assert row["mean"] == pytest.approx(dice.mean()) and row["sd"] == pytest.approx(dice.std(ddof=1)) and row["n"] == 6
    assert cell(table, "parameters", "gridreg-adaptive")["mean"] == 251_000
    assert cell(table, "seconds", "voxelmorph")["mean"] == 0.8


def test_costs_are_those_of_the_published_size_and_say_where_they_were_measured():
    table = default_table()
    assert cell(table, "memory_mb", "voxelmorph")["mean"] == 1029 and cell(table, "memory_mb", "gridreg-10")["best"]
    assert np.isnan(cell(table, "memory_mb", "gridreg-adaptive")["mean"])
    assert any(
        "published size, measured on 128×128×102 voxels, cpu (2 cores), 2 threads" in note for note in table.notes
    )
    assert any(
        note.endswith("This profile uses networks that are smaller than published: width 16_32.")
        for note in table.notes
    )


def test_the_papers_values_face_ours_with_their_marks():
    table = default_table()
    assert cell(table, "dice", "voxelmorph")["paper"] == "0.86 ± 0.02?"
    assert "uncertain" in cell(table, "dice", "voxelmorph")["paper_note"]
    assert cell(table, "dice", "gridreg-adaptive")["paper"] == "0.88 ± 0.02*"
    assert cell(table, "dice", "gridreg-10")["paper"] == ""
    assert cell(table, "mask_mm", "gridreg-adaptive")["paper"] == ""  # bold and lost: blank, not guessed
    assert cell(table, "folding_percent", "voxelmorph")["paper"] == "0.4"
    assert cell(table, "parameters", "gridreg-adaptive")["paper"] == "252,960"
    assert cell(table, "memory_mb", "voxelmorph")["paper"] == "208 / 168 / 317"
    assert cell(table, "memory_mb", "gridreg-adaptive")["paper"] == "146* / – / –"
    assert facing("oasis", "dice", "voxelmorph") is None


def test_every_value_of_the_first_dice_row_in_the_table_is_marked():
    assert all(value.mark for value in TABLE1["prostate", "dice"].values())
    for row in TABLE1.values():
        assert all(bool(value.mark) == bool(value.note) for value in row.values())


def test_simulated_is_said_in_name_title_and_notes():
    table = default_table()
    assert (
        table.rows.loc[table.rows["dataset"] == "prostate", "dataset_label"] == "Prostate, Dataset 1 (simulated)"
    ).all()
    for text in (to_markdown(table), to_latex(table)):
        assert "Prostate, Dataset 1 (simulated)" in text and "simulated cohorts, not patients" in text
    notes = " ".join(table.notes)
    assert "Profile demo" in notes and "600 steps × batch 4" in notes and "900 steps × batch 4" in notes
    real = make_table(index={"simulated": False}, dataset="oasis")
    assert dataset_label("oasis", False) == "oasis"
    assert "simulated" not in to_markdown(real)


def test_dataset_of_unknown_origin_is_refused():
    with pytest.raises(InputError, match="no key 'simulated'"):
        make_table(index={"name": "prostate"})


def test_skipped_datasets_have_their_line_everywhere():
    table = make_table(skipped={"lumir": "data/lumir_50% & more is not there."})
    assert table.rows.iloc[-1][["dataset", "metric", "note"]].tolist() == [
        "lumir",
        "skipped",
        "data/lumir_50% & more is not there.",
    ]
    assert "lumir: skipped. data/lumir" in to_markdown(table)
    assert r"lumir: skipped. data/lumir\_50\% \& more is not there." in to_latex(table)
    assert any(note.startswith("Dataset lumir was skipped") for note in table.notes)
    assert table.rows["n"].dtype == "Int64"  # a row without numbers must not turn counts into 6.0


def test_markdown_reads_back():
    table = make_table(skipped={"lumir": "not | there"})
    rows = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    split = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert {len(cells) for cells in split} == {len(LOSING) + 1}
    heads = [cell.strip() for cell in split[0]]
    assert heads == ["", "Original", "VoxelMorph", "GridReg (adaptive)", "GridReg-10"]
    dice = next(cells for cells in split if cells[0].strip() == "Dice")
    assert re.fullmatch(r"0\.550 ± 0\.0\d\d", dice[1].strip())
    assert [cell.strip().startswith("**") for cell in dice[1:]] == [False, True, False, False]


def test_grid_is_named():
    _, printed = lines(default_table().rows)
    grid = next(line for line in printed if line.kind == "grid")
    assert [text for text, _ in grid.cells] == ["–", "–", "10×10×10", "10×10×10"]


def test_latex_escapes_each_character_once():
    assert latex_escape(r"a_b 5% ±1 <0.1 {x} \y & #1 $~^") == (
        r"a\_b 5\% $\pm$1 $<$0.1 \{x\} \textbackslash{}y \& \#1 \$\textasciitilde{}\textasciicircum{}"
    )
    assert latex_escape("10×10×10 – ok") == r"10$\times$10$\times$10 -- ok"


def test_latex_is_balanced_and_rectangular():
    text = to_latex(make_table(skipped={"lumir_1": "100% missing"}))
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    for row in [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]:
        assert len(re.findall(r"(?<!\\)&", row)) == len(LOSING)
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.count(r"\begin{") == text.count(r"\end{")
    text.encode("ascii")  # whatever is not ASCII would need another package


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path):
    write_table(make_table(skipped={"lumir_1": "100% & missing"}), tmp_path)
    document = (
        r"\documentclass{article}\usepackage{booktabs,graphicx,xcolor}\begin{document}\input{table1.tex}\end{document}"
    )
    (tmp_path / "document.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-1500:]
    assert "Missing character" not in done.stdout


def test_files_are_written_whole_and_csv_keeps_full_precision(tmp_path):
    table = default_table()
    paths = write_table(table, tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["table1.csv", "table1.md", "table1.tex"]
    read = pd.read_csv(paths[0])
    np.testing.assert_array_equal(read["mean"], table.rows["mean"])
    columns = {"dataset", "metric", "method", "mean", "sd", "n", "q", "paper", "paper_note", "best"}
    assert columns <= set(read.columns)
