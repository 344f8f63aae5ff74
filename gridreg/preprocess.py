"""Preprocess a cohort: one grid, one orientation, intensities in [0, 1] (Section 4 of the paper, Data).

Each scan is turned to canonical RAS, optionally aligned to a reference by an affine map, resampled to isotropic voxels
and cropped or padded to one shape, all in a single interpolation. Labels, landmarks and, for the held-out
subjects of simulated cohorts, the true deformation go along.

The grid. affine = diag(spacing) with the grid's centre, voxel (shape - 1) / 2, at

* the world origin without a reference; each scan's own centre (of its canonical volume) is moved there, so the crop is
  a centre crop and headers need not agree; scan axes stay parallel to the world's;
* the centre of the reference's bounding box with one; the world is then the reference's, e.g. MNI152 millimetres.

``index.json`` keeps for every subject ``to_source``, the 4×4 matrix from this world to the world of the scan (RAS mm):
a point or a warp can always be taken back to the scanner's coordinates.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from gridreg.align import Reference, align, read_reference
from gridreg.errors import InputError
from gridreg.learn2reg import Cohort, limit, read_cohort
from gridreg.resample import normalise, resample_field, resample_image, resample_labels
from gridreg.splits import Subject
from gridreg.volumes import (
    SMALLEST, Volume, apply_affine, inside, read_field_mm, read_image, read_labels, read_landmarks, write_field_mm,
    write_landmarks, write_volume,
)


@dataclass(frozen=True)
class Target:
    """The grid every scan is brought to."""

    shape: tuple[int, int, int]
    spacing_mm: float
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)  # world RAS

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel → world RAS mm."""
        affine = np.diag([self.spacing_mm] * 3 + [1.0])
        affine[:3, 3] = np.array(self.centre_mm) - self.spacing_mm * (np.array(self.shape) - 1) / 2
        return affine


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
        raise InputError(f"dataset '{name}': found the shape {shape} and the spacing {spacing_mm} mm, "
                         f"expected three numbers of voxels from {SMALLEST} up and a positive spacing.")
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
    volume = read_image(subject.image)
    image = normalise(volume.data)
    if reference is None:
        to_source = centred(volume, target)
    else:
        to_source = align(image, volume.affine, reference, str(subject.image))
    grid_to_source = np.linalg.inv(volume.affine) @ to_source @ target.affine

    moved = resample_image(image, grid_to_source, target.shape)
    if moved.min() == moved.max():
        raise InputError(f"{subject.image}: found no overlap between the image and the {_size(target)} crop, "
                         "expected a crop that contains part of it.")
    write_volume(out / "images" / f"{subject.id}.nii.gz", moved, target.affine)
    record = {
        "split": subject.split, "patient": subject.patient, "label": subject.label is not None,
        "landmarks": subject.landmarks is not None, "truth": subject.truth is not None and subject.split != "train",
        "orientation": "".join(nibabel.aff2axcodes(volume.file_affine)),
        # share of the image's total intensity inside the crop: low means that the shape cuts it
        "kept": round(float(moved.sum() * abs(np.linalg.det(grid_to_source)) / image.sum()), 3),
        "to_source": to_source.round(6).tolist(),
    }
    if subject.label is not None:
        label_map = resample_labels(read_labels(subject.label, volume, labels), grid_to_source, target.shape)
        if not label_map.any():
            raise InputError(f"{subject.label}: found no labelled voxel inside the {_size(target)} crop, "
                             "expected a crop that contains part of the mask.")
        write_volume(out / "labels" / f"{subject.id}.nii.gz", label_map, target.affine)
        record["label_values"] = [int(v) for v in np.unique(label_map) if v]
    if subject.landmarks is not None:
        from_source = np.linalg.inv(to_source @ target.affine)
        points = {k: apply_affine(from_source, p) for k, p in read_landmarks(subject.landmarks, volume).items()}
        for key, point in points.items():
            if not inside(point, target.shape):
                raise InputError(f"{subject.landmarks}: found landmark '{key}' at voxel {point.round(1).tolist()}, "
                                 f"expected it inside the {_size(target)} crop; a larger shape would contain it.")
        write_landmarks(out / "landmarks" / f"{subject.id}.csv", points)
    if record["truth"]:  # nothing may learn from that of a training subject, and 3000 of them would fill a disk
        field, lattice = read_field_mm(subject.truth)
        carried = resample_field(field, lattice, target.affine, to_source, target.shape)
        write_field_mm(out / "truth" / f"{subject.id}.nii.gz", carried, target.affine)
    return record


def centred(volume: Volume, target: Target) -> np.ndarray:
    """World of the target → world of the scan (4, 4): a shift that puts the scan's centre on the target's centre.

    Where the voxels differ by a shift only, it is rounded to whole voxels: then nothing is interpolated at all.
    """
    to_source = np.eye(4)
    middle = apply_affine(volume.affine, (np.array(volume.data.shape) - 1) / 2)
    to_source[:3, 3] = middle - np.array(target.centre_mm)
    grid_to_source = np.linalg.inv(volume.affine) @ to_source @ target.affine
    if np.allclose(grid_to_source[:3, :3], np.eye(3), atol=1e-3):
        fraction = grid_to_source[:3, 3] - np.floor(grid_to_source[:3, 3] + 0.5)
        to_source[:3, 3] -= volume.affine[:3, :3] @ fraction
    return to_source


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """A pool of new processes (spawned: a forked ITK can hang, and would not read its number of threads again)."""
    return ProcessPoolExecutor(number, mp_context=get_context("spawn"))


def _run(job: partial, subjects: list[Subject], processes: int, title: str | None) -> dict[str, dict]:
    """The job for every subject, in so many other processes or, with 0, here; {id: record} in the subjects' order."""
    with fresh_processes(processes) if processes else nullcontext() as executor:
        results = executor.map(job, subjects) if executor else map(job, subjects)
        bar = tqdm(results, desc=title, total=len(subjects), unit="scan", disable=title is None)
        return {subject.id: record for record, subject in zip(bar, subjects)}


def _index(cohort: Cohort, records: dict, name: str, target: Target, reference: str | Path | None,
           labels: list[int] | None) -> dict:
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
        "name": name, "simulated": cohort.simulated, "shape": list(target.shape), "spacing_mm": target.spacing_mm,
        "labels": {str(v): cohort.label_names.get(v, f"label {v}") for v in values},
        "subjects": records, "pairs": {split: [list(p) for p in pairs] for split, pairs in cohort.pairs.items()},
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


def _size(target: Target) -> str:
    return "×".join(str(n) for n in target.shape) + f" voxels ({target.spacing_mm:g} mm)"
