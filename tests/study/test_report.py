"""The page that shows the verdicts is whole and self-contained, opens with what holds, and says everything once."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gridreg.errors import InputError
from study.reporting.claims import Claim, Finding
from study.reporting.provenance import data_hashes
from study.reporting.report import FIGURES, TABLES, calibration, effect, report, summary

INDEXES = {"prostate": {"simulated": True}}
FOUND = [
    Claim("Better <here>", "p", "r", [Finding("Prostate: A minus B", "tre_mm", -2.9, -3.6, -2.2, "mm", True),
                                      Finding("Brain: A minus C", "tre_mm", 0.5, -0.1, 1.1, "mm", None),
                                      Finding("Pelvis: A minus B", "tre_mm", -1.0, -3.6, -2.2, "mm", True)], ["so & so"]),
    Claim("Nothing folds", "p", "r", [Finding(w, "folding_percent", 0.0, np.nan, np.nan, "%", True) for w in ("x", "y")]),
    Claim("Not run", "p", "r", [], ["a note on nothing"]),
]  # fmt: skip
CALIBRATION = pd.DataFrame({
    "dataset": "prostate", "run": "gridreg-bayesian", "simulated": True, "grid": "10x10x10",
    "scaling": ["as predicted", "rescaled"],
    "factor": [1.0, 2.214], "fitted_on": "8 validation pairs", "pairs": 12, "coverage_50": [0.311, 0.579], "coverage_90": 0.9,
    "coverage_95": 0.95, "coverage_error": 0.05, "spread_error": 0.1, "ause": 0.4747, "ause_uninformed": 0.468,
    "how_it_spreads": "both <ways>",
})  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in TABLES:
        own = f"- Of {name} alone.\n" + "- Said of two.\n" * (name in ("table2", "table4"))
        table = "| | a | b |\n|---|---|---|\n| **Head** |  |  |\n| &emsp;q | 1 | 2 |\n"
        (tmp_path / f"{name}.md").write_text(f"**Table {name[-1]}.** T\n\n{table}\n{own}")
    for name in FIGURES:
        Image.new("RGB", (30, 20), "white").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"Title of {name} & more. Simulated slices, not patients.\n")
    CALIBRATION.to_csv(tmp_path / "calibration.csv", index=False)
    return tmp_path


def page_of(folder, indexes=INDEXES, skipped=None, facts=None) -> str:
    return report(folder, FOUND, "prostate: 12 pairs of 5 patients", indexes, skipped or {}, facts or {})


def test_the_page_stands_alone_and_names_what_is_simulated(folder):
    page = page_of(folder, skipped={"lumir": "its folder <was> not found"}, facts={"Seed": "1 & 2"})
    assert page.count("data:image/webp") == len(FIGURES) and page.count("<table>") >= len(TABLES) + 2
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    assert "<dd>Simulated, not patients: prostate; skipped: lumir (its folder &lt;was&gt; not found).</dd>" in page
    assert "1 &amp; 2" in page and '<td class="below">q</td>' in page
    for claim in FOUND[1:]:
        assert claim.title in page and claim.verdict in page
    (folder / "figure3.png").unlink()
    with pytest.raises(InputError, match="figure3.png: not found"):
        page_of(folder)


def test_a_caption_is_the_text_beside_its_figure(folder):
    page = page_of(folder)
    for name in FIGURES:
        assert page.count(f"Title of {name} &amp; more. Simulated slices, not patients.</figcaption>") == 1
    assert 'alt="Title of figure3 &amp; more"' in page and "<b>Figure 3.</b> Title of figure3" in page
    assert "<b>" not in page[page.index('id="oracle"') : page.index('id="calibration"')].split("<figcaption>")[1]
    (folder / "figure3.txt").unlink()
    with pytest.raises(InputError, match="figure3.txt: not found"):
        page_of(folder)


def test_the_first_screen_says_what_holds_what_does_not_and_what_was_not_tested():
    found = [
        Claim("A", "p", "r", [Finding("w", "dice", 0.1, 0.05, 0.2, "", True)]),
        Claim("B", "p", "r", [Finding("w", "dice", 0.1, 0.05, 0.2, "", answer) for answer in (True, None, False)]),
        Claim("C", "p", "r", [Finding("w", "dice", 0.1, 0.05, 0.2, "", False)]),
        Claim("D", "p", "r", [Finding("w", "dice", 0.1, -0.05, 0.2, "", None)]),
        Claim("E", "p", "r", []),
    ]
    said = summary(found, INDEXES, {"lumir": "not there."}, ["mine"])
    assert list(said) == ["Holds", "Holds in part", "Does not hold", "Undecided", "Not tested", "Cohorts"]
    assert [said[head] for head in list(said)[:4]] == [["A"], ["B (1 of 3 findings)"], ["C"], ["D"]]
    assert said["Not tested"][0] == "E" and said["Not tested"][1].startswith("the accuracy on mine")
    assert any("patients" in words for words in said["Not tested"])
    assert said["Cohorts"] == ["simulated, not patients: prostate", "skipped: lumir (not there)"]
    real = summary(found, {"oasis": {"simulated": False}}, {})
    assert real["Cohorts"] == ["real scans: oasis"] and not any("patients" in words for words in real["Not tested"])


def test_data_are_named_by_a_hash_of_what_was_read(tmp_path):
    folder = tmp_path / "results" / "lung" / "images"
    folder.mkdir(parents=True)
    (folder / "a.nii.gz").write_bytes(b"1")
    values = {"use": {"datasets": ["lung"]}, "datasets": {"lung": {"path": "/data/lung"}}}
    first = data_hashes(values, tmp_path / "results", tmp_path / "none")
    (folder / "a.nii.gz").write_bytes(b"2")
    assert first != data_hashes(values, tmp_path / "results", tmp_path / "none") and first["lung"].startswith(
        "/data/lung: pre"
    )


def test_verdicts_name_their_extremes_and_their_rule(folder):
    page = page_of(folder)
    page = page[page.index('id="verdicts"') :]
    row = page[page.index("Better &lt;here&gt;") : page.index("Nothing folds")]
    short = row[: row.index("<details")]
    assert '−2.90 (−3.60 to −2.20) mm <span class="small">Prostate: A minus B' in short and "Brain: A minus C" in short
    assert "Pelvis" not in short and "Pelvis" in row and "so &amp; so" in row and "undecided</td>" in row
    assert '0.00 % <span class="small">in all 2' in page and "a note on nothing" not in page
    assert "within ±0.02 of Dice" in page and "12 pairs of 5 patients" in page


def test_what_several_tables_say_is_said_once(folder):
    page = page_of(folder)
    assert page.count("Said of two.") == 1 and "Tables 2, 4: Said of two." in page
    assert all(page.count(f"Of {name} alone.") == 1 for name in TABLES)
    assert page.count('<td class="heading" colspan="3"><strong>Head</strong></td>') == len(TABLES)


def test_calibration_shows_every_row_and_every_word(tmp_path):
    path = tmp_path / "calibration.csv"
    CALIBRATION.to_csv(path, index=False)
    page = calibration(path)
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert len(rows) == 2 and re.findall(r"<td>(.*?)</td>", rows[1])[:7] == [
        "Prostate (simulated)", "10×10×10", "rescaled", "both &lt;ways&gt;", "2.21", "58%", "90%"]  # fmt: skip
    assert "<th>How it spreads</th>" in page and "<th>AUSE, uninformed</th>" in page and "GridReg (Bayesian)" in page
    CALIBRATION.assign(propagation="independent").to_csv(path, index=False)
    assert "Control points: " in calibration(path) and "Control points: " not in page
    CALIBRATION[:0].to_csv(path, index=False)
    assert calibration(path) == ""
    path.unlink()
    with pytest.raises(InputError, match="calibration.csv: not found"):
        calibration(path)


def test_signs_and_units_are_written_out():
    assert effect(Finding("", "dice", -2.904, -3.6, -2.21, "mm", True)) == "−2.90 (−3.60 to −2.21) mm"
    assert effect(Finding("", "dice", 0.0111, np.nan, np.nan, "", True)) == "+0.011"
    assert effect(Finding("", "dice", 0.114, np.nan, np.nan, "×", True)) == "0.11×"
    assert effect(Finding("", "dice", 0.00613, np.nan, np.nan, "×", True)) == "0.0061×"
