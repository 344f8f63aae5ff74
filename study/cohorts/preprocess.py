"""Preprocess a cohort: one grid, one orientation, intensities in [0, 1] (Section 4 of the paper, Data).

``gridreg.scans.prepare`` does the work for one scan. ``index.json`` names every subject, its split and what it has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gridreg.errors import InputError
from gridreg.scans.align import Reference, read_reference
from gridreg.scans.prepare import Target, fresh_processes, prepare_scan
from gridreg.scans.volumes import SMALLEST, write_field_mm, write_landmarks, write_volume
from study.cohorts.learn2reg import Cohort, limit, read_cohort
from study.cohorts.splits import Subject


def preprocess_dataset(
    source: Path | str,
    out: Path | str,
    *,
    name: str,
    shape: tuple[int, int, int],
    spacing_mm: float,
    affine_reference: str | Path | None = None,
    labels: list[int] | None = None,
    max_subjects: int | dict[str, int] | None = None,
    max_pairs: int | dict[str, int] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> dict:
    """Preprocess the cohort in ``source`` into the folder ``out`` and return its index (also ``out/index.json``).

    shape: (W, H, D) in voxels; spacing_mm: isotropic; affine_reference: None, "mni152" or a NIfTI path; labels: those
    to keep, the others become background (None: all); max_subjects, max_pairs: a number for each split or
    {"train" | "val" | "test": number}.
    ``out`` appears complete or not at all; an older result there is replaced. Raises InputError for input that
    cannot be used.
    """
    out = Path(out)
    ours = (out / "index.json").is_file()
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: found files that are no preprocessed dataset, expected a folder free to write.")
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < SMALLEST or not spacing_mm > 0:
        raise InputError(
            f"dataset '{name}': found the shape {shape} and the spacing {spacing_mm} mm, "
            f"expected three numbers of voxels from {SMALLEST} up and a positive spacing."
        )
    cohort = limit(read_cohort(source), max_subjects, max_pairs)
    reference = None if affine_reference is None else read_reference(affine_reference)
    target = Target(shape, float(spacing_mm), (0.0, 0.0, 0.0) if reference is None else tuple(reference.centre))

    for left in out.parent.glob(f".{out.name}.*"):  # by a run that was killed
        if left.suffix[1:].isdecimal():
            shutil.rmtree(left, ignore_errors=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    try:
        job = partial(preprocess_subject, out=temporary, target=target, labels=labels, reference=reference)
        # alignment is only reproducible in a process in which ITK has not run yet, so never in this one
        processes = workers if workers > 1 or reference is not None else 0
        records = _run(job, list(cohort.subjects.values()), processes, f"preprocess {name}" if progress else None)
        index = _index(cohort, records, name, target, affine_reference, labels)
        (temporary / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def preprocess_subject(
    subject: Subject, out: Path, target: Target, labels: list[int] | None = None, reference: Reference | None = None
) -> dict:
    """Bring one subject to the target grid, write its files under ``out`` and return its entry of the index."""
    if subject.split == "train":  # nothing may learn from the truth, and that of 3000 subjects would fill a disk
        subject = replace(subject, truth=None)
    scan = prepare_scan(subject, target, labels, reference)
    write_volume(out / "images" / f"{subject.id}.nii.gz", scan.image, target.affine)
    record = {
        "split": subject.split, "patient": subject.patient, "label": scan.labels is not None,
        "landmarks": scan.landmarks is not None, "truth": scan.truth_mm is not None,
        "orientation": scan.orientation, "kept": round(scan.kept, 3), "to_source": scan.to_source.round(6).tolist(),
    }  # fmt: skip
    if scan.labels is not None:
        write_volume(out / "labels" / f"{subject.id}.nii.gz", scan.labels, target.affine)
        record["label_values"] = [int(v) for v in np.unique(scan.labels) if v]
    if scan.landmarks is not None:
        write_landmarks(out / "landmarks" / f"{subject.id}.csv", scan.landmarks)
    if scan.truth_mm is not None:
        write_field_mm(out / "truth" / f"{subject.id}.nii.gz", scan.truth_mm, target.affine)
    return record


def _run(job: partial, subjects: list[Subject], processes: int, title: str | None) -> dict[str, dict]:
    """The job for every subject, in so many other processes or, with 0, here; {id: record} in the subjects' order."""
    with fresh_processes(processes) if processes else nullcontext() as executor:
        results = executor.map(job, subjects) if executor else map(job, subjects)
        bar = tqdm(results, desc=title, total=len(subjects), unit="scan", disable=title is None)
        return {subject.id: record for record, subject in zip(bar, subjects)}


def _index(
    cohort: Cohort, records: dict, name: str, target: Target, reference: str | Path | None, labels: list[int] | None
) -> dict:
    """The content of index.json."""
    values = sorted({v for record in records.values() for v in record.pop("label_values", [])})
    missing = sorted(set(labels or []) - set(values))
    if missing and values:
        raise InputError(f"{cohort.file}: found the labels {values} in the cohort, expected {missing} among them.")
    for record in records.values():  # only subjects of one template correspond by their true deformations
        record["template"] = record["patient"] if cohort.template_per_patient else cohort.name
    orientations = Counter(record["orientation"] for record in records.values() if record["orientation"] != "RAS")
    turned = [f"{n} of {len(records)} scans were turned from {o} to RAS" for o, n in orientations.items()]
    kept = [record["kept"] for record in records.values()]
    return {
        "name": name,
        "simulated": cohort.simulated,
        "shape": list(target.shape),
        "spacing_mm": target.spacing_mm,
        "labels": {str(v): cohort.label_names.get(v, f"label {v}") for v in values},
        "subjects": records,
        "pairs": {split: [list(p) for p in pairs] for split, pairs in cohort.pairs.items()},
        "source": f"{cohort.name} ({cohort.file.name})",
        "affine_reference": None if reference is None else str(reference),
        "notes": [*cohort.notes, *turned, f"the crop keeps {min(kept):.0%} to {max(kept):.0%} of a scan's intensity"],
    }


def _replace(temporary: Path, out: Path) -> None:
    """Put the finished folder in the place of an older one."""
    old = temporary.with_name(temporary.name + ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)
