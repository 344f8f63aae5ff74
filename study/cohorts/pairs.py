"""What the interactive notebooks open: a pair of a cohort that params.yaml names, or two files on the grid of a cohort.

Either is preprocessed here and now, as ``make repro`` would preprocess the whole cohort.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gridreg.errors import InputError
from gridreg.explorer.widgets import Source
from gridreg.scans.pair import Pair, as_pair, prepare_pair, read_pair
from study.cohorts.learn2reg import Cohort, read_cohort
from study.cohorts.truth import correspondence


def demo_pairs(values: dict[str, Any], dataset: str, split: str = "test") -> list[tuple[str, str]]:
    """(fixed id, moving id) of a split of a dataset of params.yaml. InputError on names that are not there."""
    return _cohort(values, dataset).pairs[split]


def demo_pair(values: dict[str, Any], dataset: str, number: int = 0, split: str = "test") -> Pair:
    """Pair ``number`` of a split, with labels, landmarks and truth. ``values``: params.yaml as ``params.load`` reads it."""
    cohort, settings = _cohort(values, dataset), _settings(values, dataset)
    pairs = cohort.pairs[split]
    if not 0 <= number < len(pairs):
        raise InputError(f"dataset '{dataset}': found the {split} pair {number}, expected 0 to {len(pairs) - 1}.")
    scans = fixed, moving = tuple(cohort.subjects[name] for name in pairs[number])
    target, prepared = prepare_pair(scans, **_grid(settings), labels=settings.get("labels"))
    truth = None
    if (not cohort.template_per_patient or fixed.patient == moving.patient) and all(
        p.truth_mm is not None for p in prepared
    ):
        to_voxels = np.linalg.inv(target.affine[:3, :3])
        truth = correspondence(
            *(np.einsum("ab,bijk->aijk", to_voxels, p.truth_mm).astype(np.float32) for p in prepared)
        )
    return as_pair(f"{fixed.id} ← {moving.id}", scans, target, prepared, settings.get("affine_reference") is not None,
                   label_names=cohort.label_names, truth=truth, simulated=cohort.simulated)  # fmt: skip


def own_pair(values: dict[str, Any], fixed: Path | str, moving: Path | str, dataset: str) -> Pair:
    """Two NIfTI files on the grid (shape, spacing, reference) of ``dataset``, whose model will register them."""
    return read_pair(fixed, moving, **_grid(_settings(values, dataset)))


def sources(
    values: dict[str, Any], checkpoints: Path | str, fixed: Path | str | None = None, moving: Path | str | None = None
) -> dict[str, Source]:
    """What the explorer can open: for each dataset with a model in ``checkpoints``, its test pairs or the two files."""
    if bool(fixed) != bool(moving):
        raise InputError("found only one of the fixed and the moving file, expected both or neither.")
    found = {}
    for name in values["datasets"]:
        model = Path(checkpoints) / name
        if not (model / "model.json").is_file():
            continue
        if fixed:
            found[name] = Source(model, (f"{Path(fixed).name} ← {Path(moving).name}",),
                                 lambda _, name=name: own_pair(values, fixed, moving, name))  # fmt: skip
        else:
            titles = (" ← ".join(side.removeprefix(f"{name}_") for side in ids) for ids in demo_pairs(values, name))
            found[name] = Source(model, tuple(titles), partial(demo_pair, values, name))
    return found


def _settings(values: dict[str, Any], dataset: str) -> dict[str, Any]:
    if dataset not in values["datasets"]:
        raise InputError(f"params.yaml: found no dataset '{dataset}', expected one of {', '.join(values['datasets'])}.")
    return values["datasets"][dataset]


def _grid(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in ("shape", "spacing_mm", "affine_reference")}


def _cohort(values: dict[str, Any], dataset: str) -> Cohort:
    return read_cohort(_settings(values, dataset)["path"])
