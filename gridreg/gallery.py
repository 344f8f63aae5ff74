"""The pictured cases of an evaluation, gathered for Figures 5 and 6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd

from gridreg.dataset import Preprocessed
from gridreg.results import REFERENCE, in_order
from gridreg.volumes import read_displacement

OWN = "gridreg"  # the method of which one run is pictured
SCORES = ("dice", "tre_mm", "landmark_mm")


def pictured_runs(cases: pd.DataFrame) -> list[str]:
    """The runs of Figures 5 and 6, as in the paper: every other method, and GridReg's main run."""
    methods = cases.groupby("run")["method"].first()
    return in_order(run for run, method in methods.items() if run == REFERENCE or method not in (OWN, "identity"))


def pictured_cases(data: Preprocessed, folder: Path | str, runs: list[str], cases: pd.DataFrame) -> list[dict[str, Any]]:
    """One dict a case for ``panels.registration_figure``, for the test pairs that every run has pictures of.

    folder  results/evaluate/<dataset>
    cases   per-case results at the chosen grids (``results.chosen_rows``)
    """
    gathered = []
    for fixed, moving in data.pairs("test"):
        stems = {run: Path(folder) / run / "pictures" / f"{fixed}__{moving}" for run in runs}
        if not all(Path(f"{stem}.nii.gz").is_file() for stem in stems.values()):
            continue
        of_pair = cases[(cases["fixed"] == fixed) & (cases["moving"] == moving)].set_index("run")
        gathered.append({
            "name": fixed, "pair": (fixed, moving),
            "fixed": data.image(fixed), "fixed_labels": data.labels(fixed),
            "moving": data.image(moving), "moving_labels": data.labels(moving),
            "methods": {run: _warped(stem) for run, stem in stems.items()},
            "scores": {run: of_pair.loc[run, list(SCORES)].to_dict() for run in of_pair.index},
        })  # fmt: skip
    return gathered


def _warped(stem: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(warped image, warped labels or None, displacement in voxels) of one saved case."""
    labels = Path(f"{stem}_labels.nii.gz")
    return (
        np.asarray(nibabel.load(f"{stem}.nii.gz").dataobj, np.float32),
        np.asarray(nibabel.load(labels).dataobj, np.int16) if labels.is_file() else None,
        read_displacement(f"{stem}_displacement.nii.gz")[0],
    )
