"""One pair of scans, from its files to the grid of a dataset, and the registration back to the scanner's millimetres.

What the interactive notebooks open: a pair of a cohort that params.yaml names, or two NIfTI files of one's own. Either is
preprocessed here and now, in a temporary folder, as ``make repro`` would preprocess the whole cohort.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates

from gridreg.align import read_reference
from gridreg.dataset import Preprocessed
from gridreg.errors import InputError
from gridreg.learn2reg import Cohort, read_cohort
from gridreg.preprocess import Target, fresh_processes, preprocess_subject
from gridreg.resample import resample_field
from gridreg.splits import Subject
from gridreg.volumes import Volume, apply_affine, read_image, write_field_mm, write_volume

CUT = 0.5  # share of a scan's intensity: where the crop keeps less, a note says so


@dataclass(frozen=True)
class Case:
    """A pair on the grid of its dataset, (W, H, D) in canonical RAS, and what is known about it.

    fixed, moving        float32 in [0, 1]
    affine               (4, 4) voxel → world mm of the preprocessed grid, the same for both
    files                (fixed, moving), the scans
    to_source            (fixed, moving): (4, 4) from that world to the world of the scan, RAS mm
    labels               (fixed, moving) int16 maps, or None where a scan has none
    truth                (true displacement (3, W, H, D) in voxels, where it is known (W, H, D) bool), or None
    """

    title: str
    fixed: np.ndarray
    moving: np.ndarray
    affine: np.ndarray
    files: tuple[Path, Path]
    to_source: tuple[np.ndarray, np.ndarray]
    labels: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    label_names: dict[int, str] = field(default_factory=dict)
    truth: tuple[np.ndarray, np.ndarray] | None = None
    simulated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.fixed.shape

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm: voxel size along each array axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def region(self) -> np.ndarray:
        """(W, H, D) bool, where results are measured: the fixed mask, or everything where there is none."""
        return np.ones(self.shape, bool) if self.labels[0] is None else self.labels[0] > 0

    def scan_mm(self, voxel: tuple[float, float, float]) -> np.ndarray:
        """World position (3,), RAS mm, of a voxel of this grid in the fixed scan."""
        return apply_affine(self.to_source[0] @ self.affine, np.array(voxel, float))


def demo_pairs(values: dict[str, Any], dataset: str, split: str = "test") -> list[tuple[str, str]]:
    """(fixed id, moving id) of a split of a dataset of params.yaml. InputError on names that are not there."""
    return _cohort(values, dataset).pairs[split]


def demo_case(values: dict[str, Any], dataset: str, number: int = 0, split: str = "test") -> Case:
    """Pair ``number`` of a split, with labels and truth. ``values``: params.yaml as ``params.load`` reads it."""
    cohort = _cohort(values, dataset)
    pairs = cohort.pairs[split]
    if not 0 <= number < len(pairs):
        raise InputError(f"dataset '{dataset}': found the {split} pair {number}, expected 0 to {len(pairs) - 1}.")
    fixed, moving = (cohort.subjects[name] for name in pairs[number])
    same = not cohort.template_per_patient or fixed.patient == moving.patient
    return _prepare((fixed, moving), values["datasets"][dataset], f"{fixed.id} ← {moving.id}", cohort, same)


def own_case(values: dict[str, Any], fixed: Path | str, moving: Path | str, dataset: str) -> Case:
    """Two NIfTI files on the grid (shape, spacing, reference) of ``dataset``, whose model will register them.

    Without a reference each scan's centre comes to the centre of the grid: headers need not agree. InputError for a file
    that cannot be used, or the same file twice.
    """
    roles = {"fixed": fixed, "moving": moving}
    for role, path in roles.items():
        if not isinstance(path, (str, Path)) or not str(path).strip():
            raise InputError(f"{role}: found {path!r}, expected the path of a NIfTI file.")
        roles[role] = Path(path).expanduser()
        if roles[role].is_dir():
            raise InputError(f"{path}: found a folder, expected a NIfTI file.")
    if roles["fixed"].resolve() == roles["moving"].resolve():
        raise InputError(f"{fixed}: found the same file as fixed and moving image, expected two scans.")
    pair = tuple(Subject(role, role, "test", path) for role, path in roles.items())
    return _prepare(pair, _settings(values, dataset), f"{roles['fixed'].name} ← {roles['moving'].name}")


def _settings(values: dict[str, Any], dataset: str) -> dict[str, Any]:
    if dataset not in values["datasets"]:
        raise InputError(f"params.yaml: found no dataset '{dataset}', expected one of {', '.join(values['datasets'])}.")
    return values["datasets"][dataset]


def _cohort(values: dict[str, Any], dataset: str) -> Cohort:
    return read_cohort(_settings(values, dataset)["path"])


def _prepare(
    pair: tuple[Subject, Subject], settings: dict[str, Any], title: str, cohort: Cohort | None = None, same: bool = False
) -> Case:
    """Preprocess two subjects as ``preprocess_dataset`` does; ``same``: both were made from one template."""
    reference = settings.get("affine_reference")
    reference = None if reference is None else read_reference(reference)
    centre = (0.0, 0.0, 0.0) if reference is None else tuple(reference.centre)
    target = Target(tuple(settings["shape"]), float(settings["spacing_mm"]), centre)
    with TemporaryDirectory() as folder:
        job = (Path(folder), target, settings.get("labels"), reference)
        if reference is None:
            records = [preprocess_subject(subject, *job) for subject in pair]
        else:  # alignment is only reproducible in a process in which ITK has not run yet
            with fresh_processes(1) as pool:
                records = [pool.submit(preprocess_subject, subject, *job).result() for subject in pair]
        for subject, record in zip(pair, records):
            record["template"] = "one" if same else subject.id
        index = {"shape": target.shape, "spacing_mm": target.spacing_mm,
                 "subjects": {subject.id: record for subject, record in zip(pair, records)}}  # fmt: skip
        Path(folder, "index.json").write_text(json.dumps(index), encoding="utf-8")
        data, names = Preprocessed(folder), [subject.id for subject in pair]
        cut = [f"the crop keeps {record['kept']:.0%} of the intensity of {subject.image.name}"
               for subject, record in zip(pair, records) if record["kept"] < CUT]  # fmt: skip
        if reference is not None:
            cut.append("millimetres shown here are those of the reference, to which both scans were aligned")
        return Case(
            title, *(data.image(name) for name in names), target.affine,
            files=tuple(subject.image for subject in pair),
            to_source=tuple(np.array(record["to_source"]) for record in records),
            labels=tuple(data.labels(name) for name in names),
            label_names=cohort.label_names if cohort else {},
            truth=data.truth(*names) if same else None,
            simulated=bool(cohort and cohort.simulated), notes=tuple(cut),
        )  # fmt: skip


def save(case: Case, displacement: np.ndarray, folder: Path | str, sigma_mm: np.ndarray | None = None) -> list[Path]:
    """Write a registration on the voxels of the fixed scan, in the scanner's world; returns the files.

    displacement      (3, W, H, D) in voxels of the case's grid
    sigma_mm          (3, W, H, D) standard deviation along each array axis, or None
    warped.nii.gz     the moving scan at full resolution and with its own intensities; its lowest value outside it
    displacement.nii.gz   ITK displacement field (LPS mm) from the fixed to the moving scan, for ITK, ANTs and 3D Slicer
    sigma_mm.nii.gz   √(σx² + σy² + σz²), in the millimetres of the moving scan where an affine alignment scaled it

    Outside the preprocessed grid the values of its border are continued.
    """
    fixed, moving = (read_image(path) for path in case.files)
    world = voxel_mm(fixed)
    field = scan_field_mm(case, displacement, fixed)
    at = np.moveaxis(apply_affine(np.linalg.inv(moving.affine), world + np.moveaxis(field, 0, -1)), -1, 0)
    warped = map_coordinates(moving.data, at, order=1, mode="constant", cval=float(moving.data.min()))
    folder = Path(folder)
    files = [folder / "warped.nii.gz", folder / "displacement.nii.gz"]
    write_volume(files[0], warped.astype(np.float32), fixed.affine)
    write_field_mm(files[1], field, fixed.affine)
    if sigma_mm is not None:
        to_grid = np.linalg.inv(case.to_source[0] @ case.affine)
        at = np.moveaxis(apply_affine(to_grid, world), -1, 0)
        stretch = np.linalg.norm(case.to_source[1][:3, :3] @ (case.affine[:3, :3] / case.spacing), axis=0)
        length = np.sqrt(np.square(sigma_mm * stretch[:, None, None, None]).sum(0))
        files.append(folder / "sigma_mm.nii.gz")
        write_volume(files[2], map_coordinates(length, at, order=1, mode="nearest").astype(np.float32), fixed.affine)
    return files


def voxel_mm(volume: Volume) -> np.ndarray:
    """(W, H, D, 3) world RAS mm of every voxel of a volume."""
    return apply_affine(volume.affine, np.moveaxis(np.indices(volume.data.shape), 0, -1))


def scan_field_mm(case: Case, displacement: np.ndarray, fixed: Volume) -> np.ndarray:
    """The displacement between the scans, on the fixed scan's voxels: (3, W', H', D') in world RAS mm.

    A point p of the fixed scan is q on the preprocessed grid, q + u(q) is its partner there, and the partner's own
    ``to_source`` brings it to the moving scan.
    """
    mm = np.einsum("ab,bijk->aijk", case.affine[:3, :3], displacement)
    to_grid = np.linalg.inv(case.to_source[0])
    from_p = resample_field(mm, case.affine, fixed.affine, to_grid, fixed.data.shape)  # q + u(q) - p
    world = voxel_mm(fixed)
    partner = apply_affine(case.to_source[1], world + np.moveaxis(from_p, 0, -1))
    return np.moveaxis(partner - world, -1, 0).astype(np.float32)
