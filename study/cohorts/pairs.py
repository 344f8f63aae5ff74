"""What the interactive notebooks open: a pair of a cohort that params.yaml names, or two files on the grid of a cohort.

Either is preprocessed here and now, as ``make repro`` would preprocess the whole cohort.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gridreg.errors import InputError
from gridreg.explorer.widgets import Source
from gridreg.scans.intensity import Intensity
from gridreg.scans.pair import Pair, as_pair, prepare_pair, read_pair
from gridreg.scans.prepare import Target, prepare_scan
from gridreg.scans.start import Start
from study import ROOT
from study.cohorts.dataset import Preprocessed, load_index
from study.cohorts.learn2reg import Cohort, limit, read_cohort
from study.cohorts.preprocess import choose_start
from study.cohorts.truth import carried_truth, correspondence


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
    labels, title = settings.get("labels"), f"{fixed.id} ← {moving.id}"
    target = Target(tuple(settings["shape"]), float(settings["spacing_mm"]), labels=labels and tuple(labels),
                    intensity=_intensity(settings))  # fmt: skip
    reference = _reference(settings)
    if reference is None:
        start = _start(cohort, target, settings.get("start"))  # its notes are on the whole cohort, not on this pair
        prepared = [prepare_scan(scan, target, None, start.centre_mm) for scan in scans]
        pair = as_pair(title, scans, target, prepared)
    else:
        pair = prepare_pair(title, scans, target, reference)
    truth = None
    if (not cohort.template_per_patient or fixed.patient == moving.patient) and fixed.truth and moving.truth:
        to_voxels = np.linalg.inv(pair.affine[:3, :3])
        fields = [
            carried_truth(scan.truth, pair.affine, to_source, pair.shape)
            for scan, to_source in zip(scans, pair.to_source)
        ]
        truth = correspondence(*(np.einsum("ab,bijk->aijk", to_voxels, field).astype(np.float32) for field in fields))
    return replace(pair, label_names=cohort.label_names, truth=truth, simulated=cohort.simulated)


def own_pair(
    values: dict[str, Any], fixed: Path | str, moving: Path | str, dataset: str, start: str | None = None
) -> Pair:
    """Two NIfTI files on the grid (shape, spacing, reference, intensities) of ``dataset``, whose model will register them.

    start: as in ``read_pair``; it is a matter of the two files, so the dataset's own is not taken.
    """
    return _two_files(_settings(values, dataset), fixed, moving, start)


def sources(
    values: dict[str, Any],
    fixed: Path | str | None = None,
    moving: Path | str | None = None,
    start: str | None = None,
    results: Path | str = ROOT / "results",
    checkpoints: Path | str = ROOT / "checkpoints",
) -> dict[str, Source]:
    """What the explorer can open: every trained GridReg, each with the test pairs of its dataset or with two files.

    Models are looked for in ``checkpoints/<dataset>`` (with the clone) and ``results/train/<dataset>/<run>`` (trained here).
    A dataset that params.yaml does not name any more is opened as it was preprocessed, from ``results/preprocess``; without
    that, or without the cohort, its models are left out. ``start``: of two files, as in ``read_pair``. InputError for one
    file alone, and where nothing is found.
    """
    if bool(fixed) != bool(moving):
        raise InputError("found only one of the fixed and the moving file, expected both or neither.")
    found, missing = {}, ""
    for name, dataset, folder in trained_models(values, results, checkpoints):
        try:
            if fixed:
                settings = _settings(values, dataset, results)
                source = Source(folder, (f"{Path(fixed).name} ← {Path(moving).name}",),
                                lambda _, settings=settings: _two_files(settings, fixed, moving, start))  # fmt: skip
            else:
                source = Source(folder, *_test_pairs(values, dataset, results))
        except InputError as error:  # neither its cohort nor its preprocessed images are there
            missing = f" ({name}: {str(error).rstrip('.')})"
            continue
        found[name] = source
    if not found:
        raise InputError(
            f"{results}: found no trained GridReg whose images are there{missing}, expected one under "
            f"{checkpoints}/<dataset> or {results}/train/<dataset>/<run>."
        )
    return found


def trained_models(
    values: dict[str, Any], results: Path | str = ROOT / "results", checkpoints: Path | str = ROOT / "checkpoints"
) -> list[tuple[str, str, Path]]:
    """(what to call it, dataset, folder) of every trained GridReg: those in ``checkpoints`` first, then those in ``results``."""
    order = list(values["datasets"])
    with_clone = [(each.name, each.name, each) for each in _folders(checkpoints)]
    trained = []
    for group in _folders(Path(results) / "train"):
        dataset = group.name
        if dataset == "ablation" and dataset not in values["datasets"]:
            dataset = (values.get("ablation") or {}).get("dataset") or dataset
        trained += [(f"{group.name}, {run.name}", dataset, run) for run in _folders(group)]
    for models in (with_clone, trained):  # in the order of params.yaml, then by name
        models.sort(key=lambda model: order.index(model[1]) if model[1] in order else len(order))
    return [model for model in [*with_clone, *trained] if _is_gridreg(model[2])]


def _test_pairs(
    values: dict[str, Any], dataset: str, results: Path | str
) -> tuple[tuple[str, ...], Callable[[int], Pair]]:
    """The titles of a dataset's test pairs, and what opens the pair of a number."""
    if dataset in values["datasets"]:
        pairs, opens = demo_pairs(values, dataset), partial(demo_pair, values, dataset)
    else:
        data = Preprocessed(Path(results) / "preprocess" / dataset)
        pairs = data.pairs("test")

        def opens(number: int) -> Pair:
            return data.pair(*pairs[number])

    return tuple(" ← ".join(side.removeprefix(f"{dataset}_") for side in ids) for ids in pairs), opens


def _folders(path: Path | str) -> list[Path]:
    return sorted(each for each in Path(path).iterdir() if each.is_dir()) if Path(path).is_dir() else []


def _is_gridreg(folder: Path) -> bool:
    """Whether a folder holds the model of a GridReg; what cannot be read is none."""
    try:
        config = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        return config["run"]["method"] == "gridreg"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _settings(values: dict[str, Any], dataset: str, results: Path | str | None = None) -> dict[str, Any]:
    """The block of a dataset in params.yaml, or else what its preprocessing in ``results`` says of itself."""
    if dataset in values["datasets"]:
        return values["datasets"][dataset]
    if results is not None:
        return load_index(Path(results) / "preprocess" / dataset)
    raise InputError(f"params.yaml: found no dataset '{dataset}', expected one of {', '.join(values['datasets'])}.")


def _two_files(settings: dict[str, Any], fixed: Path | str, moving: Path | str, start: str | None) -> Pair:
    shape, spacing_mm = settings["shape"], settings["spacing_mm"]
    return read_pair(fixed, moving, shape, spacing_mm, _reference(settings), start, _intensity(settings))


def _reference(settings: dict[str, Any]) -> Path | str | None:
    reference = settings.get("affine_reference")
    return reference if reference in (None, "mni152") else _from_root(reference)


def _from_root(path: str) -> Path:
    """A path of params.yaml: relative ones count from the repository, wherever a notebook runs."""
    found = Path(path).expanduser()
    return found if found.exists() else ROOT / found


def _intensity(settings: dict[str, Any]) -> Intensity:
    window = settings.get("window")
    return Intensity(window and tuple(window), settings.get("padding_value"), settings.get("nan") or "refuse")


def _start(cohort: Cohort, target: Target, wanted: str | None) -> Start:
    """Where the preprocessing of the cohort would start. Headers of all its images are read unless centres are wanted."""
    if wanted == "centre":
        return Start("centre")
    return _chosen(tuple(subject.image for subject in cohort.subjects.values()), target, wanted)


@lru_cache(maxsize=8)
def _chosen(files: tuple[Path, ...], target: Target, wanted: str | None) -> Start:
    return choose_start(files, target, wanted)


def _cohort(values: dict[str, Any], dataset: str) -> Cohort:
    settings = _settings(values, dataset)
    return limit(read_cohort(_from_root(settings["path"])), settings.get("max_subjects"), settings.get("max_pairs"))
