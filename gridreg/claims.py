"""What the paper claims, and whether it holds here: effect sizes with intervals, computed from per-case results.

Every finding is a difference of two runs on the same pairs, with the 95 % Student-t interval of its mean. A claim of *better*
holds where the whole interval is on the better side, and fails where all of it is on the worse; a claim of *equal* holds
where the whole interval lies within ``MARGIN``, and fails where its middle lies outside. All else is left open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gridreg.listings import FULL_DEPTH, GRIDREG, KEYMORPH, configurations, layer_runs
from gridreg.paper_numbers import PAPER_DATASETS
from gridreg.published import Costs
from gridreg.results import METRICS, REFERENCE, chosen_rows, in_order, run_label
from gridreg.stats import interval, matched
from gridreg.tables import dataset_label

MARGIN = 0.02  # of Dice: the one difference between adaptive and separate models that the paper reports as such
BAYESIAN = "gridreg-bayesian"
GRIDS = (5, 8, 10, 15)
TRILINEAR, BSPLINE = 4, 7  # configurations of Table 3


class Finding(NamedTuple):
    """One comparison: ``effect`` with its 95 % interval (NaN where it is no mean), and what it says of the claim."""

    words: str
    effect: float
    low: float
    high: float
    unit: str
    holds: bool | None  # None: left open


class Claim(NamedTuple):
    title: str
    paper: str  # what the paper says, in our words
    rule: str  # what counts as holding here
    findings: list[Finding]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Findings that hold, that do not, and that are open."""
        answers = [finding.holds for finding in self.findings]
        return answers.count(True), answers.count(False), answers.count(None)

    @property
    def verdict(self) -> str:
        yes, no, unclear = self.counts
        if not self.findings:
            return "not run here"
        if not no and not unclear:
            return "holds here"
        if yes:
            return "holds in part"
        return "does not hold here" if no else "not shown here"


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, metric: str) -> tuple[float, float, float]:
    """Mean of ours - theirs over the pairs that both could be measured on, and its interval; NaN where there are none."""
    if ours.empty or theirs.empty:
        return np.nan, np.nan, np.nan
    values = np.subtract(*matched(ours, theirs, metric))
    values = values[np.isfinite(values)]
    return (float(values.mean()), *interval(values)) if len(values) else (np.nan, np.nan, np.nan)


def better(words: str, ours: pd.DataFrame, theirs: pd.DataFrame, metric: str) -> list[Finding]:
    """A finding on "ours is better"; none where the metric was not measured."""
    effect, low, high = difference(ours, theirs, metric)
    if not np.isfinite(effect):
        return []
    sign = 1 if METRICS[metric].better == "higher" else -1
    sides = sorted((sign * low, sign * high))
    holds = True if sides[0] > 0 else False if sides[1] < 0 else None
    return [Finding(f"{words}, {METRICS[metric].label}", effect, low, high, METRICS[metric].unit, holds)]


def equal(words: str, ours: pd.DataFrame, theirs: pd.DataFrame, metric: str = "dice", margin: float = MARGIN) -> list[Finding]:
    """A finding on "ours is as good"; none where the metric was not measured."""
    effect, low, high = difference(ours, theirs, metric)
    if not np.isfinite(effect):
        return []
    holds = True if -margin < low and high < margin else False if abs(effect) > margin else None
    return [Finding(f"{words}, {METRICS[metric].label}", effect, low, high, METRICS[metric].unit, holds)]


def claims(
    cases: pd.DataFrame, ablated: pd.DataFrame, costs: Costs, params: Mapping[str, Any], indexes: Mapping[str, Mapping]
) -> list[Claim]:
    """Every claim with its findings, in the order of the report.

    cases, ablated  per-case results of the runs of Table 1 and of the ablations; costs as from ``gridreg.published``
    """
    datasets = in_order(cases["dataset"], PAPER_DATASETS)
    chosen = {name: chosen_rows(cases[cases["dataset"] == name]) for name in datasets}
    names = {name: dataset_label(name, bool(indexes[name]["simulated"])) for name in datasets}

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

    smaller = "95 % interval of the difference wholly below 0; landmarks where there are any, and true TRE"
    same = f"95 % interval of the difference in Dice within ±{MARGIN:g}"
    depth, layers = layer_runs(params, KEYMORPH), layer_runs(params, GRIDREG)
    setups = configurations(params)
    return [
        Claim("Outperforms dense displacement fields on landmarks", "Lower landmark distance than VoxelMorph and TransMorph.",
              smaller, against(("voxelmorph", "transmorph"))),
        Claim("Outperforms classical registration on landmarks", "Lower landmark distance than ANTs SyN.",
              smaller, against(("ants-syn",))),
        Claim("Fewer parameters and less memory", "Fewer parameters and less memory than VoxelMorph, TransMorph and KeyMorph.",
              f"ratio below 1, in the published sizes ({costs.in_words()}); one measurement, no interval", _ratios(costs)),
        Claim("Insensitive to the grid, from 5 to 15 control points an axis", "Similar accuracy over these grids.",
              same + ", each grid trained alone against 10",
              [finding for dataset in datasets for grid in GRIDS if grid != 10
               for finding in equal(f"{names[dataset]}: grid {grid} minus grid 10", run(dataset, f"gridreg-{grid}"),
                                    run(dataset, "gridreg-10"))]),
        Claim("One adaptive model equals separately trained ones", "No significant difference but at grid 5.",
              same + ", at the same grid",
              [finding for dataset in datasets for grid in GRIDS
               for finding in equal(f"{names[dataset]}: adaptive minus separate at grid {grid}",
                                    _at_grid(cases, dataset, grid), run(dataset, f"gridreg-{grid}"))]),
        Claim("B-spline against trilinear upsampling", "Similar accuracy (Dice 0.89 and 0.88) at twice the memory.", same,
              equal("B-spline minus trilinear", ablation(setups[BSPLINE]), ablation(setups[TRILINEAR]))),
        Claim("The Bayesian head costs no accuracy", "Dice as without it (0.88).", same,
              [finding for dataset in datasets
               for finding in equal(f"{names[dataset]}: Bayesian minus GridReg", run(dataset, BAYESIAN), run(dataset, REFERENCE))]),
        Claim("No folding", "0 % of voxels folded, with and without the Bayesian head.", "no folded voxel in any test pair",
              [Finding(f"{names[dataset]}: {run_label(name)}, most folded test pair", most, np.nan, np.nan, "%", most == 0)
               for dataset in datasets for name in (REFERENCE, BAYESIAN) if len(run(dataset, name))
               for most in [float(run(dataset, name)["folding_percent"].max())]]),
        Claim("KeyMorph needs depth, GridReg does not",
              "KeyMorph falls from Dice 0.86 to 0.54 with 4 layers, GridReg stays at 0.88.",
              f"9 layers of KeyMorph better than 4 (interval above 0); 4 of GridReg within ±{MARGIN:g} of its "
              f"{FULL_DEPTH[GRIDREG]}",
              better("KeyMorph: 9 layers minus 4", ablation(depth[9]), ablation(depth[4]), "dice")
              + equal(f"GridReg: 4 layers minus {FULL_DEPTH[GRIDREG]}", ablation(layers[4]), ablation(layers[FULL_DEPTH[GRIDREG]]))),
    ]  # fmt: skip


def _at_grid(cases: pd.DataFrame, dataset: str, grid: int) -> pd.DataFrame:
    own = cases[(cases["dataset"] == dataset) & (cases["run"] == REFERENCE)]
    return own[own["grid"] == "x".join([str(grid)] * 3)]


def _ratios(costs: Costs) -> list[Finding]:
    findings = []
    for name, words in (("parameters", "parameters"), ("memory_mb", "memory")):
        for other in ("voxelmorph", "transmorph", "keymorph"):
            ratio = costs.of(REFERENCE, name) / costs.of(other, name)
            if np.isfinite(ratio):
                findings.append(Finding(f"{words}, GridReg / {run_label(other)}", ratio, np.nan, np.nan, "×", bool(ratio < 1)))
    return findings
