"""Paired tests, false discovery rates and the reading of per-case results."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.regression.linear_model import WLS

from gridreg.errors import InputError
from study.evaluation import statistics as stats
from study.reporting import results

RUNS = {"identity": 1.0, "voxelmorph": 0.7, "gridreg-10": 0.6, "gridreg-adaptive": 0.5}


def make_cases(n: int = 8, seed: int = 0, datasets: tuple[str, ...] = ("prostate",)) -> pd.DataFrame:
    """Cases whose error falls with the quality of the run; the adaptive run has two grid sizes."""
    rng, rows = np.random.default_rng(seed), []
    for dataset in datasets:
        for run, level in RUNS.items():
            grids = {"gridreg-10": ["10x10x10"], "gridreg-adaptive": ["5x5x5", "10x10x10"]}.get(run, [""])
            for grid in grids:
                for case in range(n):
                    error = level * (1 + 0.1 * rng.normal())
                    folds = 0.0 if run == "identity" else abs(error)
                    row = {"dataset": dataset, "run": run, "method": run.split("-")[0], "grid": grid}
                    row |= {"chosen": grid != "5x5x5", "fixed": f"f{case}", "moving": f"m{case}"}
                    row |= {
                        "dice": 1 - 0.3 * error,
                        "landmark_mm": 9 * error,
                        "mask_mm": 7 * error,
                        "tre_mm": 8 * error,
                    }
                    row |= {
                        "tre_interior_mm": 9 * error,
                        "tre_boundary_mm": np.nan,
                        "ncc": 0.5,
                        "mse": 0.1,
                        "identical_mm": 0.2,
                    }
                    row |= {"logdet_mean": 0.0, "logdet_std": folds, "folding_percent": folds}
                    row |= {
                        "nondiffeomorphic_percent": folds,
                        "labels_lost": 0,
                        "landmarks_missing": 0,
                        "seconds": 0.1,
                        "peak_mb": np.nan,
                    }
                    rows.append(row)
    return pd.DataFrame(rows)


def test_benjamini_hochberg_by_hand():
    # p(4)=0.2 → 0.2; p(3)=0.04 → 4/3·0.04 = 0.0533; p(2)=0.03 → min(4/2·0.03, 0.0533) = 0.0533; p(1)=0.005 → 0.02
    q = stats.benjamini_hochberg([0.03, 0.2, 0.005, 0.04])
    np.testing.assert_allclose(q, [0.16 / 3, 0.2, 0.02, 0.16 / 3])


def test_benjamini_hochberg_agrees_with_scipy_and_leaves_nan_out_of_the_family():
    p = np.random.default_rng(0).uniform(size=20)
    np.testing.assert_allclose(stats.benjamini_hochberg(p), scipy.stats.false_discovery_control(p))
    q = stats.benjamini_hochberg([*p, np.nan])
    np.testing.assert_allclose(q[:-1], scipy.stats.false_discovery_control(p))
    assert np.isnan(q[-1])
    assert np.isnan(stats.benjamini_hochberg([np.nan, np.nan])).all()
    assert stats.benjamini_hochberg([]).shape == (0,)


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_one_sided_direction(test):
    rng = np.random.default_rng(1)
    high = rng.normal(0.9, 0.01, 12)
    low = high - 0.05 - 0.01 * rng.normal(size=12)
    assert stats.one_sided(high, low, "higher", test).p < 0.001  # Dice
    assert stats.one_sided(high, low, "lower", test).p > 0.999  # the same numbers as a distance: worse, not "different"
    assert stats.one_sided(low, high, "lower", test).p < 0.001


def test_t_test_is_scipys():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 9))
    assert stats.one_sided(a, b, "higher").p == scipy.stats.ttest_rel(a, b, alternative="greater").pvalue
    assert stats.two_sided(a, b).p == scipy.stats.ttest_rel(a, b).pvalue
    assert stats.two_sided(a, b).difference == pytest.approx((a - b).mean())


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_no_test_without_differences(values, test):
    result = stats.one_sided(np.array(values), np.array(values), "lower", test)
    assert np.isnan(result.p) and result.n == len(values)


def test_constant_difference_has_no_t_test():
    a = np.array([0.1, 0.2, 0.3])
    assert np.isnan(stats.one_sided(a, a + 0.1, "lower").p)


def test_bad_arguments_are_named():
    a = np.arange(4.0)
    with pytest.raises(InputError, match="'bigger'"):
        stats.one_sided(a, a, "bigger")
    with pytest.raises(InputError, match="'z'"):
        stats.one_sided(a, a, "lower", "z")
    with pytest.raises(InputError, match="equal lengths"):
        stats.one_sided(a, a[1:], "lower")


def test_failures_count_against_the_method_that_failed():
    a = np.array([1.0, 1.1, 0.9, 1.0, 1.2, 1.05, 0.95, 1.15])
    b = a + np.array([0.3, 0.2, 0.25, 0.4, 0.1, 0.5, 0.35, 0.45])
    clean = stats.one_sided(a, b, "lower", "wilcoxon").p
    failed = a.copy()
    failed[0] = np.nan
    ours = stats.one_sided(failed, b, "lower")
    theirs = stats.one_sided(a, np.where(np.arange(8) == 0, np.inf, b), "lower")
    assert ours.test == theirs.test == "wilcoxon" and ours.n == theirs.n == 8
    assert ours.p > clean and theirs.p == clean
    both = stats.one_sided(failed, np.where(np.arange(8) == 0, np.nan, b), "lower")
    assert both.test == "t" and both.n == 7


def test_interval_is_students():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    expected = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(stats.interval(values), expected)
    assert np.isnan(stats.interval(np.array([1.0, np.nan]))).all()


def test_an_interval_over_patients_counts_each_once():
    values, patients = np.array([1.0, 3.0, 5.0, 4.0, 0.0, np.nan]), ["a", "a", "a", "b", "c", "d"]
    mean, low, high = stats.clustered_interval(values, patients)
    assert mean == pytest.approx((3 + 4 + 0) / 3) and (low, high) == stats.interval(np.array([3.0, 4.0, 0.0]))
    alone = stats.clustered_interval(values[:3], ["x", "y", "z"])
    assert alone == (3.0, *stats.interval(values[:3]))
    assert (
        np.isnan(stats.clustered_interval(values[:3], ["a"] * 3)[1:]).all()
        and np.isnan(stats.clustered_interval([np.nan], "a")).all()
    )


def test_an_interval_over_patients_is_that_of_cluster_robust_least_squares():
    """Every patient has weight 1, however many pairs: statsmodels' errors, robust to clusters, give the same interval."""
    rng = np.random.default_rng(3)
    patients = rng.integers(0, 6, 25)
    values = rng.normal(size=25) + patients
    weights = 1 / np.bincount(patients)[patients]
    fit = WLS(values, np.ones(25), weights=weights).fit(cov_type="cluster", cov_kwds={"groups": patients}, use_t=True)
    expected = (*fit.params, *fit.conf_int()[0])
    np.testing.assert_allclose(stats.clustered_interval(values, patients), expected, rtol=1e-12)


def test_pairs_know_their_patients():
    index = {"subjects": {f"v{n}": {"patient": "p" if n < 3 else f"q{n}"} for n in range(5)}}
    pairs = [("v0", "v1"), ("v0", "v2"), ("v1", "v2"), ("v3", "v4"), ("v4", "v3")]
    cases = pd.DataFrame([{"dataset": "d", "run": run, "fixed": f, "moving": m} for run in "ab" for f, m in pairs])
    assert list(results.with_patients(cases, {"d": index})["patient"][:5]) == ["p", "p", "p", "q3 q4", "q3 q4"]
    assert results.pairs_in_words(cases, index) == "5 pairs of 3 patients, up to 3 pairs each"
    assert results.pairs_in_words(cases[:1], {}) == "1 pair of 2 patients"


def test_summary_counts_failures_and_keeps_to_the_chosen_grid():
    cases = make_cases(6)
    lost = (cases["run"] == "voxelmorph") & cases["fixed"].isin(["f0", "f4"])
    cases.loc[lost, "landmark_mm"] = np.nan
    summary = stats.summarise(cases).set_index(["metric", "run"])
    row = summary.loc[("landmark_mm", "voxelmorph")]
    kept = cases.loc[(cases["run"] == "voxelmorph") & ~lost, "landmark_mm"]
    assert (row["n"], row["failures"]) == (4, 2)
    assert row["mean"] == pytest.approx(kept.mean()) and row["sd"] == pytest.approx(kept.std(ddof=1))
    assert summary.loc[("dice", "gridreg-adaptive"), "grid"] == "10x10x10"
    assert summary.loc[("dice", "gridreg-adaptive"), "n"] == 6


def test_a_run_that_lost_every_landmark_is_all_failures():
    cases = make_cases(5)
    cases.loc[cases["run"] == "voxelmorph", "landmark_mm"] = np.nan
    row = stats.summarise(cases).set_index(["metric", "run"]).loc[("landmark_mm", "voxelmorph")]
    assert np.isnan(row["mean"]) and row["failures"] == 5
    test = stats.compare(cases).set_index(["metric", "run"]).loc[("landmark_mm", "voxelmorph")]
    assert test["p"] == pytest.approx(1 / 2**5)  # lost on 5 of 5 cases: the least a signed-rank test can give


def test_metric_nobody_has_gets_no_row_and_a_hole_is_an_error():
    cases = make_cases(5)
    cases["landmark_mm"] = np.nan
    assert "landmark_mm" not in set(stats.summarise(cases)["metric"])
    assert "landmark_mm" not in set(stats.compare(cases)["metric"])
    cases.loc[3, "dice"] = np.nan
    with pytest.raises(InputError, match="fixed f3, moving m3: dice is empty"):
        stats.summarise(cases)


def test_compare_corrects_over_the_baselines_within_dataset_and_metric():
    cases = make_cases(9, datasets=("prostate", "brain"))
    more = cases[cases["run"] == "voxelmorph"]
    noise = 1 + 0.05 * np.random.default_rng(5).normal(size=len(more))
    cases = pd.concat(
        [cases, more.assign(run="keymorph", method="keymorph", dice=more["dice"] * noise)], ignore_index=True
    )
    table = stats.compare(cases)
    baselines = table[table["run"].isin(["voxelmorph", "keymorph"])]
    assert len(baselines) and (baselines["sides"] == "one-sided").all()
    for _, family in baselines.groupby(["dataset", "metric"]):
        np.testing.assert_allclose(family["q"], scipy.stats.false_discovery_control(family["p"]))
    others = table.drop(baselines.index)
    assert others["q"].isna().all() and others["p"].notna().all()
    ours, variant = (cases[(cases["run"] == run) & cases["chosen"] & (cases["dataset"] == "brain")].sort_values("fixed")
                     for run in ("gridreg-adaptive", "gridreg-10"))  # fmt: skip
    row = table.set_index(["dataset", "metric", "run"]).loc[("brain", "tre_mm", "gridreg-10")]
    assert row["sides"] == "two-sided"
    assert row["p"] == pytest.approx(
        scipy.stats.ttest_rel(ours["tre_mm"].to_numpy(), variant["tre_mm"].to_numpy()).pvalue
    )
    dice = table[table["metric"] == "dice"]
    assert list(dice["run"].unique()) == ["identity", "voxelmorph", "keymorph", "gridreg-10"]
    assert (dice["p"] < 0.05).all() and (dice["difference"] > 0).all()
    assert "identity" not in set(table.loc[table["metric"] == "folding_percent", "run"])


def test_compare_pairs_by_case_not_by_order():
    cases = make_cases(9)
    shuffled = cases.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(stats.compare(cases), stats.compare(shuffled), check_exact=False)


@pytest.mark.parametrize("run, lacking", [("voxelmorph", "voxelmorph"), ("gridreg-adaptive", "gridreg-adaptive")])
def test_missing_case_is_named(run, lacking):
    cases = make_cases(5)
    cases = cases[~((cases["run"] == run) & (cases["fixed"] == "f2"))]
    with pytest.raises(InputError, match=rf"fixed f2, moving m2: missing from run {lacking}"):
        stats.compare(cases)


def test_missing_reference_and_two_chosen_grids_are_named():
    cases = make_cases(4)
    with pytest.raises(InputError, match="no run gridreg-adaptive"):
        stats.compare(cases[cases["run"] != "gridreg-adaptive"])
    cases["chosen"] = True
    with pytest.raises(InputError, match="10x10x10 and 5x5x5 marked as chosen"):
        stats.compare(cases)


def test_results_round_trip(tmp_path):
    cases = make_cases(3)
    for run, group in cases.groupby("run"):
        folder = tmp_path / "prostate" / run
        folder.mkdir(parents=True)
        group.to_csv(folder / "cases.csv", index=False)
        record = {"device": "cuda (some GPU)"} if run == "identity" else {"parameters": 252_960}
        (folder / "metrics.json").write_text(json.dumps(record))
    read, costs = results.read_results(tmp_path, ["prostate"], cases["run"].unique())
    key = ["run", "grid", "fixed"]
    expected = cases.sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(read.sort_values(key, ignore_index=True), expected, check_dtype=False)
    costs = costs.set_index("run")
    assert costs.loc["voxelmorph", "parameters"] == 252_960 and costs.loc["voxelmorph", "device"] == "cpu"
    assert np.isnan(costs.loc["identity", "parameters"]) and costs.loc["identity", "device"].startswith("cuda")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda frame: frame.drop(columns="tre_mm"), "no column tre_mm"),
        (lambda frame: frame.assign(dice="good"), "column dice holds 'good'"),
        (lambda frame: frame.assign(chosen="maybe"), "column chosen holds 'maybe'"),
        (lambda frame: frame.head(0), "no case in it"),
        (lambda frame: pd.concat([frame, frame.head(1)]), "is there twice"),
    ],
)
def test_unusable_results_are_named(tmp_path, change, message):
    path = tmp_path / "cases.csv"
    change(make_cases(2)).to_csv(path, index=False)
    with pytest.raises(InputError, match=message) as error:
        results.read_cases([path])
    assert "cases.csv" in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="not found"):
        results.read_cases([tmp_path / "cases.csv"])
    with pytest.raises(InputError, match="prostate/identity/cases.csv: not found"):
        results.read_results(tmp_path, ["prostate"], ["identity"])
    (tmp_path / "cases.csv").touch()
    with pytest.raises(InputError, match="the file is empty"):
        results.read_cases([tmp_path / "cases.csv"])
