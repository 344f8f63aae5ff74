"""Verdicts: better, equal and open in cases made to be so; and the page that shows them is whole and self-contained."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_tables import make_cases

from gridreg import claims as module
from gridreg.claims import Claim, Finding, better, claims, equal
from gridreg.errors import InputError
from gridreg.published import Costs
from gridreg.report import FIGURES, TABLES, captioned, data_hashes, effect, report

COSTS = Costs(pd.DataFrame({"parameters": [250.0, 100.0], "memory_mb": [100.0, 900.0], "seconds": [1.0, 2.0]},
                           index=["gridreg-adaptive", "voxelmorph"]), "128x128x102", "cpu", 2)  # fmt: skip
PARAMS = {"profile": "demo", "ablation": {"use": []}}
INDEXES = {"prostate": {"simulated": True}}


def pairs(values) -> pd.DataFrame:
    return pd.DataFrame({"dataset": "prostate", "run": "a", "grid": "", "dice": values, "tre_mm": values}).assign(
        fixed=[f"f{n}" for n in range(len(values))], moving="m"
    )


def test_better_holds_fails_or_stays_open():
    low, high = pairs([1.0, 2.0, 3.0, 4.0]), pairs([2.1, 3.0, 4.1, 5.0])
    assert [f.holds for f in better("x", low, high, "tre_mm") + better("x", high, low, "tre_mm")] == [True, False]
    assert better("x", low, high, "dice")[0].holds is False
    assert better("x", low, pairs([2.0, 1.0, 4.0, 3.5]), "tre_mm")[0].holds is None
    found = better("x", low, high, "tre_mm")[0]
    assert found.effect == pytest.approx(-1.05) and found.low < found.effect < found.high and found.unit == "mm"
    assert better("x", low, pd.DataFrame(), "tre_mm") == [] and better("x", low, pairs([np.nan] * 4), "tre_mm") == []


def test_equal_is_an_interval_within_the_margin_not_a_large_p():
    same = pairs([0.800, 0.850, 0.900, 0.810])
    assert equal("x", same, pairs([0.801, 0.849, 0.901, 0.809]))[0].holds is True
    assert equal("x", same, pairs([0.9, 0.94, 0.99, 0.9]))[0].holds is False
    assert equal("x", same, pairs([0.9, 0.75, 0.99, 0.72]))[0].holds is None  # no difference to be seen, nor none


def test_a_verdict_says_what_its_findings_say():
    def claim(*answers):
        return Claim("t", "p", "r", [Finding("w", 0, 0, 0, "", answer) for answer in answers])

    verdicts = {(): "not run here", (True, True): "holds here", (False,): "does not hold here", (True, False): "holds in part",
                (None, False): "does not hold here", (None,): "not shown here", (True, None): "holds in part"}  # fmt: skip
    for answers, verdict in verdicts.items():
        assert claim(*answers).verdict == verdict


@pytest.fixture(scope="module")
def found() -> list[Claim]:
    cases = make_cases({"identity": 0.6, "voxelmorph": 0.7, "gridreg-10": 0.801, "gridreg-adaptive": 0.8})
    return claims(cases, pd.DataFrame(), COSTS, PARAMS, INDEXES)


def test_every_claim_of_the_paper_has_its_verdict(found):
    titles = {claim.title: claim for claim in found}
    assert len(titles) == 9
    assert titles["Outperforms dense displacement fields on landmarks"].verdict == "holds here"
    assert titles["KeyMorph needs depth, GridReg does not"].verdict == "not run here"
    costs = titles["Fewer parameters and less memory"]
    assert costs.verdict == "holds in part" and [round(f.effect, 2) for f in costs.findings] == [2.5, 0.11]
    assert titles["No folding"].findings[0].holds is True


def test_signs_and_units_are_written_out():
    assert effect(Finding("", -2.904, -3.6, -2.21, "mm", True)) == "−2.90 (−3.60 to −2.21) mm"
    assert effect(Finding("", 0.0111, np.nan, np.nan, "", True)) == "+0.011"
    assert effect(Finding("", 0.114, np.nan, np.nan, "×", True)) == "0.11×"


def test_the_page_stands_alone_and_names_what_is_simulated(tmp_path, found):
    for name in TABLES:
        (tmp_path / f"{name}.md").write_text(f"**Table {name[-1]}.** T\n\n| | a |\n|---|---|\n| &emsp;q | 1 |\n")
    for name in FIGURES:
        Image.new("RGB", (30, 20), "white").save(tmp_path / f"{name}.png")
    page = report(tmp_path, found, INDEXES, {"lumir": "its folder <was> not found"}, {"Seed": "1 & 2"})
    assert page.count("data:image/webp") == len(FIGURES) and page.count("<table>") >= len(TABLES) + 2
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    assert "simulated, not patients: prostate" in page and "&lt;was&gt;" in page and "1 &amp; 2" in page and '<td class="below">q</td>' in page
    for claim in found:
        assert claim.title in page and claim.verdict in page
    (tmp_path / "figure3.png").unlink()
    with pytest.raises(InputError, match="figure3.png: not found"):
        report(tmp_path, found, INDEXES, {}, {})


def test_captions_follow_what_is_simulated():
    assert "Simulated cohorts, not patients." in captioned(INDEXES)["figure5"]
    assert captioned(INDEXES | {"lumir": {"simulated": False}})["figure8"].endswith("Simulated: prostate.")
    assert "imulated" not in captioned({"lumir": {"simulated": False}})["figure5"]
    assert "Simulated slices" in captioned({"lumir": {"simulated": False}})["figure1"]


def test_data_are_named_by_a_hash_of_what_was_read(tmp_path):
    folder = tmp_path / "results" / "lung" / "images"
    folder.mkdir(parents=True)
    (folder / "a.nii.gz").write_bytes(b"1")
    values = {"use": {"datasets": ["lung"]}, "datasets": {"lung": {"path": "/data/lung"}}}
    first = data_hashes(values, tmp_path / "results", tmp_path / "none")
    (folder / "a.nii.gz").write_bytes(b"2")
    assert first != data_hashes(values, tmp_path / "results", tmp_path / "none") and first["lung"].startswith("/data/lung: pre")


def test_margin_is_the_papers_own_difference():
    assert module.MARGIN == 0.02
