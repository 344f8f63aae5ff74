"""Statistics of per-case results: summaries, paired tests and false discovery rates (paper, end of section 4).

Values are compared *within* a pair of images: run A with run B on the same fixed and the same moving image.

Choice of tests
    GridReg is compared with the baselines by a one-sided paired t-test (``scipy.stats.ttest_rel``) with the alternative
    "GridReg is better". ``METRICS`` gives its direction. ``test="wilcoxon"`` selects the signed-rank test, which does not
    assume normal differences. Benjamini–Hochberg (``scipy.stats.false_discovery_control``) turns the p-values of a family
    into q-values. A family consists of the baselines of one dataset and metric. A q near 1 does not mean "no difference":
    GridReg may be *worse*. The unregistered images are not a baseline, so their one-sided p is outside the family.
    Variants of GridReg are compared two-sided and without correction, as are the ablations, because no claim says that
    they are worse.

Failures
    A vanished landmark or mask leaves an empty (or infinite) distance. Such a case is a failure, and failures are counted
    beside the mean. If only one of two runs failed, the case enters the test as the largest difference of all. A t-test
    cannot represent this, so the signed-rank test is then used. Column ``test`` names the test.

Like the paper, the tests treat pairs as independent. Pairs that share a patient are dependent, so the p-values are too
small.
``clustered_interval`` is for pairs within patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import scipy.stats
from statsmodels.stats.weightstats import DescrStatsW

from gridreg.errors import InputError
from study.reporting.results import CASE_METRICS, METRICS, PAIR, REFERENCE, chosen_rows, describe, in_order

Test = Literal["t", "wilcoxon"]


class PairedTest(NamedTuple):
    """Result of a paired comparison; ``p`` is NaN where no test is possible (n < 2, or equal differences)."""

    difference: float  # mean of reference - other over the cases that were measured in both runs
    p: float
    n: int
    test: Test


# --- summaries ---------------------------------------------------------------------------------------------------


def summarise(cases: pd.DataFrame, metrics: Iterable[str] = tuple(CASE_METRICS)) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over cases at the chosen grid.

    Returns columns dataset, metric, run, grid, mean, sd, n, failures. ``n`` counts the values in the mean. ``failures``
    counts the cases without a value for which another run of the dataset has one. A metric that no run of a dataset has
    (pelvis: no landmarks) has no row. A metric that can fail keeps its row even if every case failed. InputError where a
    metric that cannot fail is empty in some cases.
    """
    rows = []
    for dataset, group in chosen_rows(cases).groupby("dataset", sort=False):
        for metric in metrics:
            can_fail = METRICS[metric].can_fail
            measurable = set(_pairs(group[np.isfinite(group[metric])]))
            if not measurable:
                continue
            for run in in_order(group["run"]):
                own = group[group["run"] == run]
                good = own.loc[np.isfinite(own[metric]), metric].to_numpy(float)
                lost = own[~np.isfinite(own[metric])]
                if METRICS[metric].tested and not can_fail and 0 < len(good) < len(own):
                    raise InputError(f"cases of {describe(lost.iloc[0])}: {metric} is empty, expected a number")
                failures = sum(pair in measurable for pair in _pairs(lost)) if can_fail else 0
                if len(good) == 0 and failures == 0:
                    continue
                rows.append((dataset, metric, run, own["grid"].iloc[0], *_mean_sd(good), len(good), failures))
    return pd.DataFrame(rows, columns=["dataset", "metric", "run", "grid", "mean", "sd", "n", "failures"])


def _mean_sd(values: np.ndarray) -> tuple[float, float]:
    return (values.mean() if len(values) else np.nan), (values.std(ddof=1) if len(values) > 1 else np.nan)


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student-t confidence interval of the mean of ``values`` (n,); (NaN, NaN) with fewer than two finite values."""
    good = np.asarray(values, float)
    good = good[np.isfinite(good)]
    if len(good) < 2:
        return np.nan, np.nan
    low, high = DescrStatsW(good).tconfint_mean(alpha=1 - confidence)
    return float(low), float(high)


def clustered_interval(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, float, float]:
    """(mean, low, high): the mean over patients of the mean of each patient's ``values`` (n,), and its ``interval``.

    clusters (n,) names the patient of every value. The result equals weighted least squares with cluster-robust errors
    where each patient has weight 1. Values that are not finite are left out; without any, all three are NaN.
    """
    frame = pd.DataFrame({"value": np.asarray(values, float), "cluster": list(clusters)})
    means = frame[np.isfinite(frame["value"])].groupby("cluster")["value"].mean().to_numpy()
    return (float(means.mean()), *interval(means)) if len(means) else (np.nan, np.nan, np.nan)


# --- paired tests ------------------------------------------------------------------------------------------------


def matched(reference: pd.DataFrame, other: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of ``metric`` of two runs on the same pairs, in the same order: two arrays (n,).

    Both frames hold one row per pair. Raises InputError naming the first pair that only one of them has.
    """
    values = [dict(zip(_pairs(frame), frame[metric])) for frame in (reference, other)]
    for (have, lack), frame, lacking in zip((values, values[::-1]), (reference, other), (other, reference)):
        alone = have.keys() - lack.keys()
        if alone:
            first = frame[[pair in alone for pair in _pairs(frame)]].iloc[0]
            name = lacking["run"].iloc[0] if len(lacking) else "the other run"
            raise InputError(f"cases of {describe(first)}: missing from run {name}, expected the same pairs in both")
    ours, theirs = values
    return np.array(list(ours.values()), float), np.array([theirs[pair] for pair in ours], float)


def _pairs(cases: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(*(cases[column] for column in PAIR)))


def one_sided(
    reference: np.ndarray, other: np.ndarray, better: Literal["higher", "lower"], test: Test = "t"
) -> PairedTest:
    """Test whether ``reference`` (n,) is better than ``other`` (n,). Non-finite values are failures (module docstring)."""
    if better not in ("higher", "lower"):
        raise InputError(f"better={better!r}, expected 'higher' or 'lower'")
    return _paired(reference, other, "greater" if better == "higher" else "less", better, test)


def two_sided(reference: np.ndarray, other: np.ndarray, test: Test = "t") -> PairedTest:
    """Test whether two variants of one method differ, on the cases that were measured in both."""
    both = np.isfinite(reference) & np.isfinite(other)
    return _paired(np.asarray(reference)[both], np.asarray(other)[both], "two-sided", "lower", test)


def _paired(reference: np.ndarray, other: np.ndarray, alternative: str, better: str, test: Test) -> PairedTest:
    reference, other = np.asarray(reference, float), np.asarray(other, float)
    if reference.shape != other.shape or reference.ndim != 1:
        raise InputError(f"paired test of shapes {reference.shape} and {other.shape}, expected two equal lengths")
    if test not in get_args(Test):
        raise InputError(f"test {test!r} is unknown, expected one of {', '.join(get_args(Test))}")
    lost_reference, lost_other = ~np.isfinite(reference), ~np.isfinite(other)
    measured = ~lost_reference & ~lost_other
    difference = reference[measured] - other[measured]
    mean = float(difference.mean()) if len(difference) else np.nan
    # If both runs failed, neither is better. If one failed, only the rank and the sign of the difference matter.
    worst = (1 if better == "lower" else -1) * (1 + np.abs(difference).max(initial=0))
    lost = [worst] * int((lost_reference & ~lost_other).sum()) + [-worst] * int((lost_other & ~lost_reference).sum())
    if lost:
        test, difference = "wilcoxon", np.concatenate([difference, lost])
    n = len(difference)
    spread = np.ptp(difference) if test == "t" and n else np.inf
    if n < 2 or not difference.any() or spread <= 1e-12 * np.abs(difference).max():
        return PairedTest(mean, np.nan, n, test)
    if test == "t":
        p = scipy.stats.ttest_rel(reference[measured], other[measured], alternative=alternative).pvalue
    else:
        p = scipy.stats.wilcoxon(difference, alternative=alternative).pvalue
    return PairedTest(mean, float(p), n, test)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values (n,) of a family of p-values (n,). A NaN (no test possible) stays NaN and is not part of the family."""
    p = np.asarray(p, float)
    q, tested = np.full(p.shape, np.nan), np.isfinite(p)
    if tested.any():
        q[tested] = scipy.stats.false_discovery_control(p[tested], method="bh")
    return q


def compare(cases: pd.DataFrame, reference: str = REFERENCE, test: Test = "t") -> pd.DataFrame:
    """Compare ``reference`` at its chosen grid with every other run on every dataset and metric.

    Returns columns dataset, metric, run, difference (reference - run), p, q, n, test, sides. Baselines (runs of another
    method) are tested one-sided and corrected within the family of a dataset and metric. The identity is also tested
    one-sided, but without a q. Runs of the reference's method are tested two-sided, without a q (module docstring).
    Metrics that were not measured have no row. Nor have metrics of the transformation alone (folding …) for the identity,
    which is perfect there by definition. InputError where a dataset lacks the reference.
    """
    rows = []
    for dataset, group in chosen_rows(cases).groupby("dataset", sort=False):
        ours = group[group["run"] == reference]
        if ours.empty:
            runs = ", ".join(in_order(group["run"]))
            raise InputError(f"cases of {dataset}: no run {reference} among {runs}, expected the run to compare with")
        methods = group.groupby("run")["method"].first()
        for metric in CASE_METRICS:
            rule = METRICS[metric]
            for run in in_order(set(group["run"]) - {reference}):
                values = matched(ours, group[group["run"] == run], metric)
                has_values = [np.isfinite(side).any() for side in values]
                lacking = not any(has_values) if rule.can_fail else not all(has_values)
                if lacking or (rule.trivial_for_identity and run == "identity"):
                    continue
                variant = methods[run] == methods[reference]
                result = two_sided(*values, test) if variant else one_sided(*values, rule.better, test)
                rows.append((dataset, metric, run, result.difference, result.p, np.nan, result.n, result.test,
                             "two-sided" if variant else "one-sided"))  # fmt: skip
    table = pd.DataFrame(rows, columns=["dataset", "metric", "run", "difference", "p", "q", "n", "test", "sides"])
    baselines = table[(table["sides"] == "one-sided") & (table["run"] != "identity")]
    for _, family in baselines.groupby(["dataset", "metric"]):
        table.loc[family.index, "q"] = benjamini_hochberg(family["p"].to_numpy())
    return table
