"""Is the uncertainty right? Predicted standard deviations against errors that are known.

error, sigma   (3, ...) in mm, any shape after the first axis, usually (3, N) with the voxels of a region, of one case or
               of several joined: u - u_true, and the predicted standard deviation, along each array axis. One error and
               its sigma along one axis are called a component below.

Two questions, and an uncertainty can answer one without the other. *Ranking*: is it large where the error is large
(sparsification)? *Scale*: is an error of one sigma as frequent as it should be (coverage, calibration errors)? A single
factor, fitted on validation cases, mends the scale and leaves the ranking as it is.

Every function raises ValueError on shapes that differ or are not (3, ...), values that are not finite, or a sigma that is
not above 0.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

LEVELS = tuple(np.round(np.arange(0.05, 1, 0.05), 2))  # of central intervals: 5 %, 10 %, ..., 95 %
BINS = 10  # of sigma, with equally many components in each
STEPS = 100  # of the fraction left out along a sparsification curve


def _checked(error: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as (3, N) float64."""
    error, sigma = np.asarray(error, float), np.asarray(sigma, float)
    if error.shape != sigma.shape or error.ndim < 2 or error.shape[0] != 3 or error.size == 0:
        raise ValueError(f"error is {error.shape} and sigma {sigma.shape}, expected (3, ...) twice, with voxels")
    if not (np.isfinite(error).all() and np.isfinite(sigma).all() and (sigma > 0).all()):
        raise ValueError("expected finite errors and finite sigmas above 0")
    return error.reshape(3, -1), sigma.reshape(3, -1)


def scale(error: np.ndarray, sigma: np.ndarray) -> float:
    """The factor s for which errors are most likely under N(0, (s·sigma)²): s² = mean(error² / sigma²).

    Fit it on validation cases, apply it as s·sigma to test cases.
    """
    error, sigma = _checked(error, sigma)
    return float(np.sqrt(np.mean(np.square(error / sigma))))


def coverage(error: np.ndarray, sigma: np.ndarray, levels=(0.5, 0.9, 0.95)) -> np.ndarray:
    """Fraction of components within the central Gaussian interval of each level, (L,); the levels themselves are ideal."""
    error, sigma = _checked(error, sigma)
    within = np.sort(np.abs(error / sigma), axis=None)
    limits = scipy.stats.norm.ppf(0.5 + np.asarray(levels, float) / 2)
    return np.searchsorted(within, limits, side="right") / within.size


def coverage_error(error: np.ndarray, sigma: np.ndarray, levels=LEVELS) -> float:
    """Expected calibration error: mean |coverage - level| over the levels, between 0 and 1.

    After Kuleshov et al., "Accurate uncertainties for deep learning using calibrated regression" (ICML 2018), with
    central intervals for quantiles and absolute for squared differences.
    """
    return float(np.abs(coverage(error, sigma, levels) - np.asarray(levels, float)).mean())


def spread_error(error: np.ndarray, sigma: np.ndarray, bins: int = BINS) -> float:
    """Expected normalised calibration error: mean over bins of |RMS sigma - RMS error| / RMS sigma; 0 is ideal.

    Unlike coverage it asks whether *each* predicted spread is right, not only their mixture. After Levi et al.,
    "Evaluating and calibrating uncertainty prediction in regression tasks" (Sensors 2022).
    """
    predicted, found = spread_bins(error, sigma, bins)
    return float(np.mean(np.abs(predicted - found) / predicted))


def spread_bins(error: np.ndarray, sigma: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """(RMS sigma, RMS error) of each bin of sigma, (bins,) twice, in mm: the points of a reliability diagram.

    Components are sorted by sigma into bins of equal size (to one). ValueError with fewer components than bins.
    """
    error, sigma = _checked(error, sigma)
    if error.size < bins:
        raise ValueError(f"found {error.size} components, expected at least one in each of {bins} bins")
    parts = np.array_split(np.argsort(sigma, axis=None, kind="stable"), bins)
    return tuple(np.array([np.sqrt(np.square(v.flat[p]).mean()) for p in parts]) for v in (sigma, error))


def sparsification(
    error: np.ndarray, sigma: np.ndarray, steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(fraction left out, error left by sigma, error left by the oracle), each (steps,), fractions in [0, 1).

    The error of a voxel is the length |error|, its uncertainty the root of the summed variances of its three axes. The
    voxels with the largest uncertainty are left out first, those of equal uncertainty in equal shares; the oracle leaves
    out those with the largest error. Left is the mean error of the remaining voxels over that of all voxels, 0 if every
    error is 0. After Ilg et al., "Uncertainty estimates and multi-hypotheses networks for optical flow" (ECCV 2018).
    """
    error, sigma = _checked(error, sigma)
    length, spread = (np.sqrt(np.square(values).sum(0)) for values in (error, sigma))
    fractions = np.arange(steps) / steps
    return fractions, _left(length, spread, fractions), _left(length, length, fractions)


def _left(length: np.ndarray, ranked_by: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Mean of ``length`` without the fraction that ranks highest, over the mean of all of it."""
    _, group = np.unique(ranked_by, return_inverse=True)
    shared = (np.bincount(group, length) / np.bincount(group))[group]  # equal rank, equal share of the error
    total = np.concatenate([[0], np.cumsum(shared[np.argsort(group, kind="stable")])])
    kept = (1 - fractions) * length.size  # a number of voxels that need not be whole
    return np.interp(kept, np.arange(length.size + 1), total) / kept / (length.mean() or 1)


def ause(error: np.ndarray, sigma: np.ndarray, steps: int = STEPS) -> float:
    """Area between the two curves of ``sparsification``, in units of the mean error; 0: sigma ranks as the errors do.

    An uncertainty that knows nothing gets the area above the oracle's curve, which depends on the errors, so show that
    beside it.
    """
    fractions, left, best = sparsification(error, sigma, steps)
    return float(np.trapezoid(left - best, fractions))


def report(error: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    """Every number at once, for one row of a table: lengths in mm, the rest without unit.

    ause_uninformed is the AUSE of an uncertainty that knows nothing; rms_error_mm and rms_sigma_mm are per component.
    """
    error, sigma = _checked(error, sigma)
    row = dict(zip(("coverage_50", "coverage_90", "coverage_95"), map(float, coverage(error, sigma))))
    row |= {"coverage_error": coverage_error(error, sigma), "spread_error": spread_error(error, sigma)}
    row |= {"ause": ause(error, sigma), "ause_uninformed": ause(error, np.ones_like(sigma))}
    row |= {f"rms_{k}_mm": float(np.sqrt(np.square(v).mean())) for k, v in (("error", error), ("sigma", sigma))}
    return row | {"components": error.size}
