"""Is the uncertainty right? Predicted standard deviations against errors that are known.

error, sigma   (3, ...) in mm: u - u_true, and the predicted standard deviation, along each array axis. The shape after
               the first axis is free, usually (3, N) with the voxels of a region, from one case or several. One error
               and its sigma along one axis are called a component below.

An uncertainty can be right in one of two respects and wrong in the other. *Ranking*: is it large where the error is large
(sparsification)? *Scale*: is an error of one sigma as frequent as it should be (coverage, calibration errors)? One factor,
fitted on validation cases, corrects the scale. It does not change the ranking.

Every function raises ValueError if the shapes differ or are not (3, ...), if a value is not finite, or if a sigma is not
above 0.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

LEVELS = tuple(np.round(np.arange(0.05, 1, 0.05), 2))  # of central intervals: 5 %, 10 %, ..., 95 %
BINS = 10  # of sigma, each with the same number of components
STEPS = 100  # points of a sparsification curve


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

    Fit s on validation cases and use s·sigma on test cases.
    """
    error, sigma = _checked(error, sigma)
    return float(np.sqrt(np.mean(np.square(error / sigma))))


def coverage(error: np.ndarray, sigma: np.ndarray, levels=(0.5, 0.9, 0.95)) -> np.ndarray:
    """(L,) fraction of components within the central Gaussian interval of each level; ideally it equals the level."""
    error, sigma = _checked(error, sigma)
    within = np.sort(np.abs(error / sigma), axis=None)
    limits = scipy.stats.norm.ppf(0.5 + np.asarray(levels, float) / 2)
    return np.searchsorted(within, limits, side="right") / within.size


def coverage_error(error: np.ndarray, sigma: np.ndarray, levels=LEVELS) -> float:
    """Expected calibration error: mean |coverage - level| over the levels, between 0 and 1.

    After Kuleshov et al., "Accurate uncertainties for deep learning using calibrated regression" (ICML 2018), but with
    central intervals instead of quantiles, and absolute instead of squared differences.
    """
    return float(np.abs(coverage(error, sigma, levels) - np.asarray(levels, float)).mean())


def spread_error(error: np.ndarray, sigma: np.ndarray, bins: int = BINS) -> float:
    """Expected normalised calibration error: mean over bins of |RMS sigma - RMS error| / RMS sigma; 0 is ideal.

    Unlike coverage, it tests whether *each* predicted sigma is right, not only all of them together. After Levi et al.,
    "Evaluating and calibrating uncertainty prediction in regression tasks" (Sensors 2022).
    """
    predicted, found = spread_bins(error, sigma, bins)
    return float(np.mean(np.abs(predicted - found) / predicted))


def spread_bins(error: np.ndarray, sigma: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """(RMS sigma, RMS error) of each bin of sigma, (bins,) twice, in mm: the points of a reliability diagram.

    Components are sorted by sigma into bins whose sizes differ by at most one. ValueError with fewer components than
    bins.
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

    The error of a voxel is the length |error|. Its uncertainty is the root of the summed variances of the three axes. The
    voxels with the largest uncertainty are left out first; voxels of equal uncertainty are left out in equal shares. The
    oracle leaves out the voxels with the largest error first. "Error left" is the mean error of the remaining voxels,
    divided by the mean error of all voxels; it is 0 if every error is 0.

    After Ilg et al., "Uncertainty estimates and multi-hypotheses networks for optical flow" (ECCV 2018).
    """
    error, sigma = _checked(error, sigma)
    length, spread = (np.sqrt(np.square(values).sum(0)) for values in (error, sigma))
    fractions = np.arange(steps) / steps
    return fractions, _left(length, spread, fractions), _left(length, length, fractions)


def _left(length: np.ndarray, ranked_by: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Mean of ``length`` without the fraction that ranks highest, divided by the mean of all."""
    _, group = np.unique(ranked_by, return_inverse=True)
    shared = (np.bincount(group, length) / np.bincount(group))[group]  # voxels of equal rank share their error equally
    total = np.concatenate([[0], np.cumsum(shared[np.argsort(group, kind="stable")])])
    kept = (1 - fractions) * length.size  # number of voxels, which may be fractional
    return np.interp(kept, np.arange(length.size + 1), total) / kept / (length.mean() or 1)


def ause(error: np.ndarray, sigma: np.ndarray, steps: int = STEPS) -> float:
    """Area between the two curves of ``sparsification``, in units of the mean error. It is 0 if sigma ranks like the error.

    A constant uncertainty gets the area above the oracle's curve. That area depends on the errors, so report it beside
    this one.
    """
    fractions, left, best = sparsification(error, sigma, steps)
    return float(np.trapezoid(left - best, fractions))


def report(error: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    """All of these measures by name, for one row of a table: lengths in mm, the rest without unit.

    ause_uninformed is the AUSE of a constant uncertainty. rms_error_mm and rms_sigma_mm are per component.
    """
    error, sigma = _checked(error, sigma)
    row = dict(zip(("coverage_50", "coverage_90", "coverage_95"), map(float, coverage(error, sigma))))
    row |= {"coverage_error": coverage_error(error, sigma), "spread_error": spread_error(error, sigma)}
    row |= {"ause": ause(error, sigma), "ause_uninformed": ause(error, np.ones_like(sigma))}
    row |= {f"rms_{k}_mm": float(np.sqrt(np.square(v).mean())) for k, v in (("error", error), ("sigma", sigma))}
    return row | {"components": error.size}
