"""Verdicts: better, equal and undecided in cases made to be so, and the notes that a reader needs beside them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from small_results import MEANS, SETTING, blind_cases, make_cases
from small_results import PARAMS as ABLATIONS

from study.benchmark.published import Costs
from study.reporting import claims as module
from study.reporting.claims import Claim, Finding, better, claims, equal

COSTS = Costs(pd.DataFrame({"parameters": [250.0, 100.0, 41e6], "memory_mb": [100.0, 900.0, np.nan], "seconds": [1.0, 2.0, 4.0]},
                           index=["gridreg-adaptive", "voxelmorph", "transmorph"]), "128x128x102", "cpu", 2)  # fmt: skip
PARAMS = {"profile": "demo", "ablation": {"use": []}, "use": {"trained": ["voxelmorph", "gridreg-10", "gridreg-adaptive"]},
          "runs": {"voxelmorph": {"method": "voxelmorph", "width": 8}, "gridreg-10": {"method": "gridreg"},
                   "gridreg-adaptive": {"method": "gridreg"}}}  # fmt: skip
INDEXES = {"prostate": {"simulated": True}}


def pairs(values) -> pd.DataFrame:
    return pd.DataFrame({"dataset": "prostate", "run": "a", "grid": "", "dice": values, "tre_mm": values}).assign(
        fixed=[f"f{n}" for n in range(len(values))], moving="m", patient=[f"p{n}" for n in range(len(values))]
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


def test_a_mean_outside_the_margin_is_no_proof():
    found = equal("x", pairs([0.80, 0.80, 0.80]), pairs([0.81, 0.83, 0.86]))[0]
    assert found.effect < -module.MARGIN and found.low < -module.MARGIN < 0 < found.high and found.holds is None


@pytest.mark.parametrize("low, high, answer", [(-0.01, 0.01, True), (-0.03, 0.01, None), (-0.03, 0.03, None), (0.01, 0.03, None),
                                               (0.021, 0.03, False), (-0.5, -0.021, False), (np.nan, np.nan, None)])  # fmt: skip
def test_one_rule_judges_an_interval(low, high, answer):
    assert module.judge(low, high, -0.02, 0.02) is answer


def test_a_patient_counts_once_however_many_pairs():
    ours, theirs = pairs([1.0, 1.1, 0.9, 1.0, 3.0, 2.0]), pairs([2.0] * 6)
    alone = better("x", ours, theirs, "tre_mm")[0]
    shared = better("x", ours.assign(patient=["p", "p", "p", "p", "q", "r"]), theirs, "tre_mm")[0]
    assert alone.effect == pytest.approx(-0.5) and shared.effect == pytest.approx(0.0)
    assert shared.high - shared.low > alone.high - alone.low


def test_a_verdict_says_what_its_findings_say():
    def claim(*answers):
        return Claim("t", "p", "r", [Finding("w", "dice", 0, 0, 0, "", answer) for answer in answers])

    verdicts = {(): "not tested here", (True, True): "holds here", (False,): "does not hold here", (True, False): "holds in part",
                (None, False): "does not hold here", (None,): "undecided here", (True, None): "holds in part"}  # fmt: skip
    for answers, verdict in verdicts.items():
        assert claim(*answers).verdict == verdict


@pytest.fixture(scope="module")
def titled() -> dict[str, Claim]:
    cases = make_cases({"identity": 0.6, "voxelmorph": 0.7, "gridreg-10": 0.801, "gridreg-adaptive": 0.8})
    cases.loc[cases["run"] == "gridreg-adaptive", "nondiffeomorphic_percent"] = 0.1
    return {claim.title: claim for claim in claims(cases, pd.DataFrame(), COSTS, PARAMS, INDEXES, SETTING)}


def test_every_claim_of_the_paper_has_its_verdict(titled):
    assert len(titled) == 11
    assert titled["GridReg outperforms dense displacement fields on landmarks"].verdict == "holds here"
    for title in ("KeyMorph needs depth, GridReg does not", "GridReg beats KeyMorph at every encoder depth"):
        assert titled[title].verdict == "not tested here"
    assert (
        titled["GridReg needs fewer parameters"].verdict == "holds in part"
        and titled["GridReg needs less memory"].verdict == "holds here"
    )
    assert [
        round(f.effect, 2)
        for title in ("GridReg needs fewer parameters", "GridReg needs less memory")
        for f in titled[title].findings
    ] == [
        2.5,
        0.0,
        0.11,
    ]
    folded = titled["GridReg does not fold"].findings
    assert [(f.metric, f.holds) for f in folded] == [("folding_percent", True), ("nondiffeomorphic_percent", False)]


def test_verdicts_say_what_they_rest_on(titled):
    dense = " ".join(titled["GridReg outperforms dense displacement fields on landmarks"].notes)
    assert "VoxelMorph: width 8 (published 16)" in dense and "600 steps × batch 4" in dense and "300 epochs" in dense
    assert any(
        "organ labels" in note for note in titled["GridReg outperforms classical registration on landmarks"].notes
    )
    (note,) = titled["GridReg needs fewer parameters"].notes  # TransMorph's number is the paper's, as near as a tenth
    assert note.startswith("VoxelMorph's package has 100 parameters; the paper prints 524,181")


def test_ablations_stand_beside_the_spread_of_seeds():
    base = make_cases({"identity": 0.5}, n=8)
    ablated = pd.concat([base.assign(run=run, dice=base["dice"] - 0.5 + mean) for run, mean in MEANS.items()])
    cases = make_cases({"voxelmorph": 0.7, "gridreg-adaptive": 0.8})
    params = PARAMS | {"ablation": ABLATIONS["ablation"]}
    titled = {claim.title: claim for claim in claims(cases, ablated, COSTS, params, INDEXES, SETTING)}
    deep = titled["KeyMorph needs depth, GridReg does not"]
    assert [f.words for f in deep.findings] == ["GridReg: 4 layers minus 5"]
    assert "with 2 seeds, reached: Dice 0.800, 0.810" in " ".join(deep.notes) and "width 4" in " ".join(deep.notes)
    assert not titled["GridReg beats KeyMorph at every encoder depth"].findings  # no depth that both have
    section = dict(
        ABLATIONS["ablation"], runs=ABLATIONS["ablation"]["runs"] | {"deep": {"of": "keymorph", "layers": 5}}
    )
    both = claims(cases, ablated, COSTS, PARAMS | {"ablation": section}, INDEXES, SETTING)
    found = next(claim for claim in both if claim.title == "GridReg beats KeyMorph at every encoder depth").findings
    assert (
        [f.words for f in found] == ["5 layers: GridReg minus KeyMorph"]
        and found[0].effect == pytest.approx(0.1)
        and found[0].holds
    )


def test_a_cohort_without_labels_proves_nothing_on_accuracy():
    indexes = {"prostate": {"simulated": True}, "mine": {"simulated": False}}
    found = [
        f for claim in claims(blind_cases(), pd.DataFrame(), COSTS, PARAMS, indexes, SETTING) for f in claim.findings
    ]
    assert {f.metric for f in found if f.words.startswith("Mine")} == {"folding_percent", "nondiffeomorphic_percent"}


def test_margin_is_the_papers_own_difference():
    assert module.MARGIN == 0.02
