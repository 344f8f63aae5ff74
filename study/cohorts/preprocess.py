"""Preprocess a cohort: one grid, one orientation, intensities in [0, 1] (Section 4 of the paper, Data).

``gridreg.scans.prepare`` does the work for one scan. ``index.json`` names every subject, its split and what it has.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gridreg.errors import InputError
from gridreg.scans.align import Reference, read_reference
from gridreg.scans.files import renamed
from gridreg.scans.geometry import apply_affine, corners
from gridreg.scans.intensity import Intensity, read_normalised
from gridreg.scans.prepare import Target, fresh_processes, prepare_scan
from gridreg.scans.start import Start, decide_start
from gridreg.scans.volumes import SMALLEST, read_geometry, write_field_mm, write_volume
from study.cohorts.learn2reg import Cohort, limit, read_cohort
from study.cohorts.splits import Subject
from study.cohorts.truth import carried_truth
from study.locks import whole_folder

COUPLES = 5  # scans of a cohort that are looked at two by two
FILES = {  # what a record of the index promises → folder and ending
    "image": ("images", ".nii.gz"),
    "label": ("labels", ".nii.gz"),
    "landmarks": ("landmarks", ".csv"),
    "truth": ("truth", ".nii.gz"),
}
NOTES_SHOWN = 3  # of those on single scans; all are in the records of the index


def preprocess_dataset(
    source: Path | str,
    out: Path | str,
    *,
    name: str,
    shape: tuple[int, int, int],
    spacing_mm: float,
    affine_reference: str | Path | None = None,
    start: str | None = None,
    window: tuple[float, float] | None = None,
    padding_value: float | None = None,
    nan: str = "refuse",
    labels: list[int] | None = None,
    max_subjects: int | dict[str, int] | None = None,
    max_pairs: int | dict[str, int] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> dict:
    """Preprocess the cohort in ``source`` into the folder ``out`` and return its index (also ``out/index.json``).

    shape             (W, H, D) in voxels
    spacing_mm        isotropic
    affine_reference  None, "mni152" or a NIfTI path
    start             where scans lie before registration: "headers", "centre", "affine" (with a reference) or None, see
                      ``gridreg.scans.start``
    window, padding_value, nan    see ``gridreg.scans.intensity.Intensity``
    labels            those to keep, the others become background (None: all)
    max_subjects, max_pairs       a number for each split or {"train" | "val" | "test": number}
    progress          show a bar, and print what was found and noted

    ``out`` appears complete or not at all, an older result there is replaced, and two processes take turns
    (``study.locks``). Raises InputError for input that cannot be used, and for a full disk.
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
    if affine_reference is None and start == "affine":
        raise InputError(f"dataset '{name}': found start: affine, expected affine_reference: mni152 or an image file.")
    if affine_reference is not None and start not in (None, "affine"):
        raise InputError(
            f"dataset '{name}': found start: {start} beside affine_reference, expected one of the two: "
            "scans that are aligned start from the alignment."
        )
    intensity = Intensity(None if window is None else tuple(window), padding_value, nan)
    cohort = limit(read_cohort(source), max_subjects, max_pairs)
    reference = None if affine_reference is None else read_reference(affine_reference)
    centre = (0.0, 0.0, 0.0) if reference is None else tuple(reference.centre)
    target = Target(shape, float(spacing_mm), centre, None if labels is None else tuple(labels), intensity)
    if reference is None:
        begin = choose_start([subject.image for subject in cohort.subjects.values()], target, start)
    else:
        begin = Start("affine")

    with whole_folder(out, check=_check_complete) as folder:
        job = partial(preprocess_subject, out=folder, target=target, reference=reference, start=begin)
        # alignment is only reproducible in a process in which ITK has not run yet, so never in this one
        processes = workers if workers > 1 or reference is not None else 0
        records = _run(job, list(cohort.subjects.values()), processes, f"preprocess {name}" if progress else None)
        index = _index(cohort, records, name, target, begin, affine_reference, labels)
        (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for sentence in [*index["found"], *index["notes"]] if progress else ():
        print(f"{name}: {sentence}")
    return index


def choose_start(files: Sequence[Path | str], target: Target, wanted: str | None = None) -> Start:
    """The start of a whole cohort, from the headers of its images and, where it must be decided, a few of the images.

    wanted  "headers", "centre" or None

    With headers, the median of the scans' centres comes to the centre of the grid. InputError where scans with and
    without an orientation are mixed, and for ``headers`` where there is none.
    """
    geometries = [read_geometry(file) for file in files]
    ends = [apply_affine(g.affine, corners(g.shape)) for g in geometries]
    boxes = [np.stack([points.min(axis=0), points.max(axis=0)]) for points in ends]
    first = np.unique(np.linspace(0, max(len(files) - 2, 0), COUPLES).round().astype(int))[: len(files) - 1]
    couples = ([read_normalised(file, Intensity(nan="background")) for file in files[n : n + 2]] for n in first)
    return decide_start(geometries, boxes, np.median([g.centre for g in geometries], axis=0), target, wanted, couples)


def preprocess_subject(
    subject: Subject,
    out: Path,
    target: Target,
    reference: Reference | None = None,
    start: Start = Start("centre"),
) -> dict:
    """Bring one subject to the target grid, write its files under ``out`` and return its entry of the index."""
    scan = prepare_scan(subject, target, reference, start.centre_mm)
    write_volume(out / "images" / f"{subject.id}.nii.gz", scan.image, target.affine)
    # nothing may learn from the truth, and that of 3000 subjects would fill a disk
    with_truth = subject.truth is not None and subject.split != "train"
    record = {
        "split": subject.split, "patient": subject.patient, "label": scan.labels is not None,
        "landmarks": scan.landmarks is not None, "truth": with_truth,
        "orientation": scan.orientation, "kept": round(scan.kept, 3), "to_source": scan.to_source.round(6).tolist(),
    }  # fmt: skip
    if scan.labels is not None:
        write_volume(out / "labels" / f"{subject.id}.nii.gz", scan.labels, target.affine)
        record["label_values"] = [int(v) for v in np.unique(scan.labels) if v]
    if scan.landmarks is not None:
        write_landmarks(out / "landmarks" / f"{subject.id}.csv", scan.landmarks)
    if with_truth:
        truth = carried_truth(subject.truth, target.affine, scan.to_source, target.shape)
        write_field_mm(out / "truth" / f"{subject.id}.nii.gz", truth, target.affine)
    if scan.notes:
        record["notes"] = list(scan.notes)
    return record


def write_landmarks(path: Path | str, points: dict[str, np.ndarray]) -> None:
    """Write {name: voxel position} as ``name,x_voxel,y_voxel,z_voxel``."""
    with renamed(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["name", "x_voxel", "y_voxel", "z_voxel"])
        table.writerows([name, *(f"{v:.4f}" for v in point)] for name, point in points.items())


def _run(job: partial, subjects: list[Subject], processes: int, title: str | None) -> dict[str, dict]:
    """The job for every subject, in so many other processes or, with 0, here; {id: record} in the subjects' order."""
    with fresh_processes(processes) if processes else nullcontext() as executor:
        results = executor.map(job, subjects) if executor else map(job, subjects)
        bar = tqdm(results, desc=title, total=len(subjects), unit="scan", disable=title is None)
        return {subject.id: record for record, subject in zip(bar, subjects)}


def _index(
    cohort: Cohort,
    records: dict,
    name: str,
    target: Target,
    start: Start,
    reference: str | Path | None,
    labels: list[int] | None,
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
    doubtful = [record["notes"][0] for record in records.values() if "notes" in record]
    how_many = [f"{len(doubtful)} of {len(records)} scans have notes, the first of them:"] if doubtful else []
    return {
        "name": name,
        "simulated": cohort.simulated,
        "shape": list(target.shape),
        "spacing_mm": target.spacing_mm,
        "start": start.kind,
        "labels": {str(v): cohort.label_names.get(v, f"label {v}") for v in values},
        "subjects": records,
        "pairs": {split: [list(p) for p in pairs] for split, pairs in cohort.pairs.items()},
        "source": f"{cohort.name} ({cohort.file.name})",
        "affine_reference": None if reference is None else str(reference),
        "found": list(cohort.found),
        "notes": [
            *cohort.notes, *start.notes, *turned, f"the crop keeps {min(kept):.0%} to {max(kept):.0%} of a scan's intensity",
            *how_many, *doubtful[:NOTES_SHOWN],
        ],
    }  # fmt: skip


def _check_complete(folder: Path) -> None:
    """InputError unless every file that the index promises is there."""
    index = folder / "index.json"
    subjects = json.loads(index.read_text(encoding="utf-8"))["subjects"] if index.is_file() else {}
    promised = [folder / name / f"{subject}{ending}" for kind, (name, ending) in FILES.items()
                for subject, record in subjects.items() if record.get(kind, kind == "image")]  # fmt: skip
    missing = [path for path in promised if not path.is_file() or not path.stat().st_size]
    if missing or not promised:
        lost = (missing or [index])[0]
        raise InputError(
            f"{lost}: found no such file after preprocessing ({len(promised) - len(missing)} of {len(promised)} are there), "
            "expected it until the folder is renamed; has another process removed it?"
        )
