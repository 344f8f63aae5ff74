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
from gridreg.interpolation import upsample, upsample_sigma

COLUMNS = ["dataset", "run", "simulated", "grid", "propagation", "scaling", "factor", "fitted_on", "pairs"]

# From the control points to the voxels between them. The head predicts no correlations, so either is an assumption, and
# they are the two ends: neighbours that err together are neither independent nor one.
INDEPENDENT, CORRELATED = "independent", "fully correlated"
PROPAGATIONS = {
    INDEPENDENT: upsample_sigma,  # variances add up with squared weights: between control points errors average out
    CORRELATED: upsample,  # σ is interpolated like the displacement: they do not
}


class Uncertain(NamedTuple):
    """One pair, registered by a network with a Bayesian head; arrays on the fixed grid, mm along each array axis."""

    fixed: str
    moving: str
    sigma_mm: dict[str, np.ndarray]  # by propagation: (3, W, H, D)
    error_mm: np.ndarray  # (3, W, H, D) displacement minus the true one; NaN where that is not known
    region: np.ndarray  # (W, H, D) bool: the fixed mask (everything without one), as far as the truth is known

    def within(self, propagation: str) -> tuple[np.ndarray, np.ndarray]:
        """(error, sigma), (3, N) each, in the region."""
        return self.error_mm[:, self.region], self.sigma_mm[propagation][:, self.region]


def uncertain_pairs(data: Preprocessed, network: nn.Module, grid: Shape, split: str) -> list[Uncertain]:
    """Every pair of a split, registered at ``grid``."""
    where = device()
    network, found = network.to(where).eval(), []
    for fixed, moving in data.pairs(split):
        registration = register(network, data.image(fixed), data.image(moving), grid, where)[0]
        sigma = {
            name: propagate(registration.sigma, data.shape, network.upsampling)[0].cpu().numpy() * data.spacing
            for name, propagate in PROPAGATIONS.items()
        }
        truth, labels = data.truth(fixed, moving), data.labels(fixed)
        region = np.ones(data.shape, bool) if labels is None else labels > 0
        error = np.full((3, *data.shape), np.nan)
        if truth is not None:
            found_mm = (registration.displacement[0].cpu().numpy() - truth[0]) * data.spacing
            error = np.where(truth[1], found_mm, np.nan)
        found.append(Uncertain(fixed, moving, sigma, error, region & np.isfinite(error).all(0)))
    return found


def joined(pairs: Sequence[Uncertain]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Propagation → (error, sigma), (3, N) each, of the voxels of all pairs whose truth is known; empty without any."""
    known = [pair for pair in pairs if pair.region.any()]
    return {
        name: tuple(np.concatenate(side, axis=1) for side in zip(*(pair.within(name) for pair in known)))
        for name in (PROPAGATIONS if known else ())
    }


def calibration_rows(
    dataset: str, run: str, grid: str, simulated: bool, test: Sequence[Uncertain], validation: Sequence[Uncertain]
) -> pd.DataFrame:
    """``calibration.report`` on the test pairs, as predicted and after one factor fitted on the validation pairs.

    Two rows for either propagation. No row where the truth of either is not known.
    """
    measured, fitted = joined(test), joined(validation)
    rows = []
    for name in measured if fitted else ():
        (error, sigma), factor = measured[name], calibration.scale(*fitted[name])
        for words, times in (("as predicted", 1.0), ("rescaled", factor)):
            values = (dataset, run, simulated, grid, name, words, times, f"{len(validation)} validation pairs", len(test))
            rows.append(dict(zip(COLUMNS, values)) | calibration.report(error, times * sigma))
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=COLUMNS)
