"""What the paper claims, and whether it holds here: effect sizes with intervals, computed from per-case results.

A finding is a difference of two runs on the same pairs, with the 95 % Student-t interval of its mean over patients; a
patient with six pairs counts once. One rule judges all findings. Yes: the whole interval lies where the claim wants it. No:
the whole interval lies elsewhere. Undecided: everything else. *Better* wants the interval on the better side of 0, *equal*
wants it within ``MARGIN``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from study.benchmark.published import Costs, reductions
from study.evaluation.statistics import clustered_interval, matched
from study.reporting.paper_numbers import PAPER_DATASETS, facing
from study.reporting.provenance import Setting, budgets_in_words, sizes_in_words
from study.reporting.results import METRICS, REFERENCE, chosen_rows, in_order, run_label, with_patients
from study.reporting.tables import FULL_DEPTH, GRIDREG, KEYMORPH, configurations, layer_runs, seed_spread

MARGIN = 0.02  # of Dice: the one difference between adaptive and separate models that the paper reports as such
BAYESIAN = "gridreg-bayesian"
GRIDS = (5, 8, 10, 15)
TRILINEAR, BSPLINE = 4, 7  # configurations of Table 3
DENSE = ("voxelmorph", "transmorph")
LEARNED = (*DENSE, "keymorph")


class Finding(NamedTuple):
    """One comparison: ``effect`` with its 95 % interval (NaN where it is no mean), and what it says of the claim."""

    words: str  # what is compared, and on which dataset
    metric: str  # a key of METRICS
    effect: float
    low: float
    high: float
    unit: str
    holds: bool | None  # None: undecided


class Claim(NamedTuple):
    title: str
    paper: str  # what the paper says, in our words
    rule: str  # what counts as holding here
    findings: list[Finding]
    notes: Sequence[str] = ()  # what else a reader of the verdict needs to know

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of findings that hold, that do not, and that are undecided."""
        answers = [finding.holds for finding in self.findings]
        return answers.count(True), answers.count(False), answers.count(None)

    @property
    def verdict(self) -> str:
        yes, no, undecided = self.counts
        if not self.findings:
            return "not tested here"
        if not no and not undecided:
            return "holds here"
        if yes:
            return "holds in part"
        return "does not hold here" if no else "undecided here"


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, metric: str) -> tuple[float, float, float]:
    """(mean, low, high) of ours - theirs over patients, on the pairs that both could be measured on; NaN without any."""
    if ours.empty or theirs.empty:
        return np.nan, np.nan, np.nan
    return clustered_interval(np.subtract(*matched(ours, theirs, metric)), ours["patient"])


def better(words: str, ours: pd.DataFrame, theirs: pd.DataFrame, metric: str) -> list[Finding]:
    """A finding on "ours is better"; none where the metric was not measured."""
    return _finding(words, ours, theirs, metric, (0, np.inf) if METRICS[metric].better == "higher" else (-np.inf, 0))


def equal(
    words: str, ours: pd.DataFrame, theirs: pd.DataFrame, metric: str = "dice", margin: float = MARGIN
) -> list[Finding]:
    """A finding on "ours is as good"; none where the metric was not measured."""
    return _finding(words, ours, theirs, metric, (-margin, margin))


def _finding(
    words: str, ours: pd.DataFrame, theirs: pd.DataFrame, metric: str, wanted: tuple[float, float]
) -> list[Finding]:
    effect, low, high = difference(ours, theirs, metric)
    if not np.isfinite(effect):
        return []
    return [Finding(words, metric, effect, low, high, METRICS[metric].unit, judge(low, high, *wanted))]


def judge(low: float, high: float, least: float, most: float) -> bool | None:
    """The rule: whether the whole interval lies between ``least`` and ``most``; None where it straddles one of them."""
    if least < low and high < most:
        return True
    return False if high < least or most < low else None  # an interval that is NaN shows nothing


def claims(
    cases: pd.DataFrame, ablated: pd.DataFrame, costs: Costs, params: Mapping[str, Any], indexes: Mapping[str, Mapping],
    setting: Setting,
) -> list[Claim]:  # fmt: skip
    """Every claim with its findings, in the order of the report.

    cases, ablated  per-case results of the runs of Table 1 and of the ablations
    costs           as from ``benchmark.published.costs``
    """
    cases, ablated = with_patients(cases, indexes), with_patients(ablated, indexes)
    datasets = in_order(cases["dataset"], PAPER_DATASETS)
    chosen = {name: chosen_rows(cases[cases["dataset"] == name]) for name in datasets}
    names = {name: name.capitalize() for name in datasets}

    def run(dataset: str, name: str) -> pd.DataFrame:
        return chosen[dataset][chosen[dataset]["run"] == name]

    def ablation(name: str | None) -> pd.DataFrame:
        return ablated[ablated["run"] == name] if name and len(ablated) else pd.DataFrame()

    def against(others: Sequence[str]) -> list[Finding]:
        return [
            finding
            for dataset in datasets for other in others for metric in ("landmark_mm", "tre_mm")
            for finding in better(f"{names[dataset]}: GridReg minus {run_label(other)}",
                                  run(dataset, REFERENCE), run(dataset, other), metric)
        ]  # fmt: skip

    smaller = (
        "the whole interval of the difference lies below 0, for landmark distance and for true TRE where they are known"
    )
    same = f"the whole interval of the difference in Dice lies within ±{MARGIN:g}"
    cost_rule = f"the ratio of the published sizes is below 1 ({costs.in_words()}); one measurement, no interval"
    depth, layers = layer_runs(params, KEYMORPH), layer_runs(params, GRIDREG)
    setups = configurations(params)
    once = [f"Each configuration was trained once. {words}" for words in seed_spread(ablated, params, ("dice",))]
    narrow = _narrow(params.get("ablation", {}).get("base", {}), [KEYMORPH])
    peers = {name: params["runs"][name] for name in params["use"]["trained"]}
    trained = f"{budgets_in_words(setting)} The paper trains for 300 epochs with batch 4."
    return [
        Claim("GridReg outperforms dense displacement fields on landmarks",
              "GridReg has a lower landmark distance than VoxelMorph and TransMorph.",
              smaller, against(DENSE), [*_narrow(peers, DENSE), trained]),
        Claim("GridReg outperforms classical registration on landmarks",
              "GridReg has a lower landmark distance than ANTs SyN.",
              smaller, against(("ants-syn",)), [setting.syn] if setting.syn else []),
        Claim("GridReg needs fewer parameters", "GridReg has fewer than VoxelMorph, TransMorph and KeyMorph.",
              cost_rule, _ratios(costs, "parameters"), _other_sizes(costs)),
        Claim("GridReg needs less memory", "GridReg needs less than VoxelMorph, TransMorph and KeyMorph.", cost_rule, _ratios(costs, "memory_mb")),
        Claim("Accuracy hardly depends on the grid, from 5 to 15 control points per axis",
              "Accuracy is similar over these grids.", same + ", for each separately trained grid against grid 10",
              [finding for dataset in datasets for grid in GRIDS if grid != 10
               for finding in equal(f"{names[dataset]}: grid {grid} minus grid 10", run(dataset, f"gridreg-{grid}"),
                                    run(dataset, "gridreg-10"))]),
        Claim("One adaptive model equals separately trained ones", "There is no significant difference except at grid 5.",
              same + ", at the same grid",
              [finding for dataset in datasets for grid in GRIDS
               for finding in equal(f"{names[dataset]}: adaptive minus separate at grid {grid}",
                                    _at_grid(cases, dataset, grid), run(dataset, f"gridreg-{grid}"))]),
        Claim("B-spline and trilinear upsampling are equally accurate",
              "Accuracy is similar (Dice 0.89 and 0.88); B-splines need twice the memory.", same,
              equal("B-spline minus trilinear", ablation(setups[BSPLINE]), ablation(setups[TRILINEAR])), once),
        Claim("The Bayesian head costs no accuracy", "Dice is 0.88 with and without it.", same,
              [finding for dataset in datasets
               for finding in equal(f"{names[dataset]}: Bayesian minus GridReg", run(dataset, BAYESIAN), run(dataset, REFERENCE))]),
        Claim("GridReg does not fold", "0 % of the voxels fold, with and without the Bayesian head.",
              "no test pair has a folded voxel, or a volume between voxels in which the deformation is not a diffeomorphism",
              [Finding(f"{names[dataset]}: {run_label(name)}, worst test pair", metric, most, np.nan, np.nan, "%", most == 0)
               for metric in ("folding_percent", "nondiffeomorphic_percent")
               for dataset in datasets for name in (REFERENCE, BAYESIAN) if len(run(dataset, name))
               for most in [float(run(dataset, name)[metric].max())]]),
        Claim("GridReg beats KeyMorph at every encoder depth", "GridReg has the higher Dice with 4 to 9 layers.",
              "the whole interval of the difference in Dice lies above 0, at the same number of layers",
              [finding for number in layers
               for finding in better(f"{number} layers: GridReg minus KeyMorph", ablation(layers[number]), ablation(depth[number]),
                                     "dice")], [*once, *narrow]),
        Claim("KeyMorph needs depth, GridReg does not",
              "With 4 layers, KeyMorph falls from Dice 0.86 to 0.54; GridReg stays at 0.88.",
              f"KeyMorph is better with 9 layers than with 4 (whole interval above 0), and GridReg is equal with 4 and with "
              f"{FULL_DEPTH[GRIDREG]} (whole interval within ±{MARGIN:g})",
              better("KeyMorph: 9 layers minus 4", ablation(depth[9]), ablation(depth[4]), "dice")
              + equal(f"GridReg: 4 layers minus {FULL_DEPTH[GRIDREG]}", ablation(layers[4]), ablation(layers[FULL_DEPTH[GRIDREG]])),
              [*once, *narrow]),
    ]  # fmt: skip


def _at_grid(cases: pd.DataFrame, dataset: str, grid: int) -> pd.DataFrame:
    own = cases[(cases["dataset"] == dataset) & (cases["run"] == REFERENCE)]
    return own[own["grid"] == "x".join([str(grid)] * 3)]


def _narrow(runs: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Which of ``runs`` by these names are smaller than published, in words; empty if none is."""
    words = sizes_in_words("; ".join(reductions({name: runs[name] for name in names if name in runs})))
    return [words] if words else []


def _ratios(costs: Costs, metric: str) -> list[Finding]:
    found = [(other, costs.of(REFERENCE, metric) / costs.of(other, metric)) for other in LEARNED]
    return [Finding(f"GridReg / {run_label(other)}", metric, ratio, np.nan, np.nan, "×", bool(ratio < 1))
            for other, ratio in found if np.isfinite(ratio)]  # fmt: skip


def _other_sizes(costs: Costs) -> list[str]:
    """The peers whose package has another number of parameters than the paper prints, by more than a tenth."""
    notes = []
    for other in LEARNED:
        own, printed = costs.of(other, "parameters"), facing("", "parameters", other)
        if printed and abs(own / printed.mean - 1) > 0.1:
            notes.append(f"{run_label(other)}'s package has {own:,.0f} parameters; the paper prints {printed.mean:,.0f}. GridReg has "
                         f"{costs.of(REFERENCE, 'parameters') / printed.mean:.2f}× the printed number.")  # fmt: skip
    return notes
