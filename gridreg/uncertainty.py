"""Predicted uncertainty beside the error that is known: what Figure 7 and the calibration are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from gridreg import calibration
from gridreg.dataset import Preprocessed
from gridreg.devices import device
from gridreg.evaluate import register
from gridreg.grid import Shape
from gridreg.interpolation import upsample_sigma

COLUMNS = ["dataset", "run", "simulated", "grid", "scaling", "factor", "fitted_on", "pairs"]


class Uncertain(NamedTuple):
    """One pair, registered by a network with a Bayesian head; arrays on the fixed grid, mm along each array axis."""

    fixed: str
    moving: str
    sigma_mm: np.ndarray  # (3, W, H, D)
    error_mm: np.ndarray  # (3, W, H, D) displacement minus the true one; NaN where that is not known
    region: np.ndarray  # (W, H, D) bool: the fixed mask (everything without one), as far as the truth is known

    @property
    def within(self) -> tuple[np.ndarray, np.ndarray]:
        """(error, sigma), (3, N) each, in the region."""
        return self.error_mm[:, self.region], self.sigma_mm[:, self.region]


def uncertain_pairs(data: Preprocessed, network: nn.Module, grid: Shape, split: str) -> list[Uncertain]:
    """Every pair of a split, registered at ``grid``."""
    where = device()
    network, found = network.to(where).eval(), []
    for fixed, moving in data.pairs(split):
        registration = register(network, data.image(fixed), data.image(moving), grid, where)[0]
        sigma = upsample_sigma(registration.sigma, data.shape, network.upsampling)[0].cpu().numpy() * data.spacing
        truth, labels = data.truth(fixed, moving), data.labels(fixed)
        region = np.ones(data.shape, bool) if labels is None else labels > 0
        error = np.full(sigma.shape, np.nan)
        if truth is not None:
            found_mm = (registration.displacement[0].cpu().numpy() - truth[0]) * data.spacing
            error = np.where(truth[1], found_mm, np.nan)
        found.append(Uncertain(fixed, moving, sigma, error, region & np.isfinite(error).all(0)))
    return found


def joined(pairs: Sequence[Uncertain]) -> tuple[np.ndarray, np.ndarray] | None:
    """(error, sigma), (3, N) each, of the voxels of all pairs whose truth is known; None without any."""
    known = [pair.within for pair in pairs if pair.region.any()]
    return tuple(np.concatenate(side, axis=1) for side in zip(*known)) if known else None


def calibration_rows(
    dataset: str, run: str, grid: str, simulated: bool, test: Sequence[Uncertain], validation: Sequence[Uncertain]
) -> pd.DataFrame:
    """``calibration.report`` on the test pairs, as predicted and after one factor fitted on the validation pairs.

    No row where the truth of either is not known.
    """
    measured, fitted = joined(test), joined(validation)
    if measured is None or fitted is None:
        return pd.DataFrame(columns=COLUMNS)
    (error, sigma), factor = measured, calibration.scale(*fitted)
    rows = []
    for words, times in (("as predicted", 1.0), ("rescaled", factor)):
        row = dict(zip(COLUMNS, (dataset, run, simulated, grid, words, times, f"{len(validation)} validation pairs", len(test))))
        rows.append(row | calibration.report(error, times * sigma))
    return pd.DataFrame(rows)
