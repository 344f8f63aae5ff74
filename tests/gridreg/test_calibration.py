"""Calibration, against what can be worked out by hand: Gaussian errors, perfect and blind rankings, a known factor."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from gridreg import calibration

N = 20000


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Errors drawn from the very sigmas that are predicted, (3, N) mm."""
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.5, 4, (3, N))
    return sigma * rng.standard_normal((3, N)), sigma


def quantiles() -> np.ndarray:
    """Errors at the quantiles of the standard Gaussian: no chance in them."""
    return scipy.stats.norm.ppf((np.arange(3 * N) + 0.5) / (3 * N)).reshape(3, N)


def test_the_coverage_of_gaussian_errors_is_nominal():
    error, levels = quantiles(), (0.1, 0.5, 0.9, 0.95, 0.99)
    np.testing.assert_allclose(calibration.coverage(error, np.ones_like(error), levels), levels, atol=1e-4)
    assert calibration.coverage_error(error, np.ones_like(error)) < 1e-4


def test_the_coverage_of_a_sigma_too_small_by_half_is_that_of_half_the_interval():
    error = quantiles()
    wanted = 2 * scipy.stats.norm.cdf(scipy.stats.norm.ppf(0.95) / 2) - 1  # 0.589 in place of 0.90
    assert calibration.coverage(error, np.full_like(error, 0.5), [0.9])[0] == pytest.approx(wanted, abs=1e-4)


def test_what_is_drawn_from_sigma_is_calibrated_in_every_bin(drawn):
    assert calibration.coverage_error(*drawn) < 0.005
    assert calibration.spread_error(*drawn) < 0.02
    predicted, found = calibration.spread_bins(*drawn)
    assert len(predicted) == 10 and (np.diff(predicted) > 0).all()
    np.testing.assert_allclose(found, predicted, rtol=0.05)


def test_bins_see_what_the_mean_hides(drawn):
    """Nearly one sigma for all, right on average: coverage is off by a little, the spread of the bins by a lot."""
    error, sigma = drawn
    flat = np.sqrt(np.mean(sigma**2)) * np.linspace(0.999, 1.001, N)[np.argsort(np.argsort(sigma, axis=1), axis=1)]
    assert calibration.coverage_error(error, flat) < 0.1
    assert calibration.spread_error(error, flat) > 0.3


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_rescaling_recovers_a_known_factor(drawn, factor):
    error, sigma = drawn
    found = calibration.scale(error, sigma / factor)
    assert found == pytest.approx(factor, rel=0.01)
    assert calibration.scale(error, sigma / factor * found) == pytest.approx(1)
    assert calibration.coverage_error(error, sigma / factor * found) < 0.005


def test_rescaling_is_the_most_likely_factor(drawn):
    error, sigma = drawn
    best = calibration.scale(error, sigma / 3)
    likelihood = [scipy.stats.norm.logpdf(error, scale=sigma / 3 * s).sum() for s in (0.99 * best, best, 1.01 * best)]
    assert likelihood[1] == max(likelihood)


def test_a_perfect_ranking_has_no_area_and_a_factor_changes_no_ranking(drawn):
    error, sigma = drawn
    assert calibration.ause(error, np.broadcast_to(np.sqrt(np.sum(error**2, 0)), error.shape)) == pytest.approx(
        0, abs=1e-12
    )
    assert calibration.ause(error, 5 * sigma) == pytest.approx(calibration.ause(error, sigma), abs=1e-12)
    assert 0 < calibration.ause(error, sigma) < calibration.ause(error, np.ones_like(sigma))


def test_sparsification_of_errors_spread_evenly_is_a_straight_line():
    """Lengths evenly on (0, 1): without the largest fraction f their mean is (1 - f) / 2, so the curve is 1 - f."""
    error = np.zeros((3, N))
    error[1] = (np.arange(N) + 0.5) / N
    fractions, left, best = calibration.sparsification(error, np.ones_like(error))
    np.testing.assert_allclose(best, 1 - fractions, atol=1e-3)
    np.testing.assert_allclose(left, 1)  # equal sigmas know nothing, in whatever order the voxels come
    assert calibration.ause(error, np.ones_like(error)) == pytest.approx(0.99**2 / 2, abs=1e-3)  # fractions end at 0.99
    _, worst, _ = calibration.sparsification(error, np.broadcast_to(2 - error[1], error.shape))
    np.testing.assert_allclose(worst, 1 + fractions, atol=1e-3)  # the wrong way round


def test_no_error_at_all():
    fractions, left, best = calibration.sparsification(np.zeros((3, 50)), np.ones((3, 50)))
    assert not left.any() and not best.any()


def test_report_holds_every_number(drawn):
    row = calibration.report(*drawn)
    assert row["coverage_90"] == pytest.approx(0.9, abs=0.01) and row["components"] == 3 * N
    assert row["rms_error_mm"] == pytest.approx(row["rms_sigma_mm"], rel=0.02)
    shaped = calibration.report(*(values.reshape(3, 20, 10, -1) for values in drawn))
    assert shaped == row


@pytest.mark.parametrize(
    "error, sigma, message",
    [
        (np.zeros((3, 5)), np.ones((3, 6)), "expected \\(3, ...\\) twice"),
        (np.zeros((2, 5)), np.ones((2, 5)), "expected \\(3, ...\\) twice"),
        (np.zeros((3, 0)), np.ones((3, 0)), "with voxels"),
        (np.full((3, 5), np.nan), np.ones((3, 5)), "finite"),
        (np.zeros((3, 5)), np.zeros((3, 5)), "above 0"),
        (np.zeros((3, 2)), np.ones((3, 2)), "each of 10 bins"),
    ],
)
def test_what_is_refused(error, sigma, message):
    with pytest.raises(ValueError, match=message):
        calibration.spread_error(error, sigma)
