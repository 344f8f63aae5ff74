"""One pair of images on one grid, with all that is known about it: the object that the rest of the code hands on.

A cohort's preprocessed pair and two NIfTI files of one's own are both a ``Pair``; metrics, error maps, figures and the
explorer take it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gridreg.errors import InputError
from gridreg.scans.align import read_reference
from gridreg.scans.prepare import Prepared, Scan, Target, fresh_processes, prepare_scan
from gridreg.scans.volumes import apply_affine

LITTLE_KEPT = 0.5  # share of a scan's intensity inside the grid below which a note says so


@dataclass(frozen=True)
class Pair:
    """A fixed and a moving image on one grid, (W, H, D) in canonical RAS, and what is known about them.

    fixed, moving        float32 in [0, 1]
    affine               (4, 4) voxel → world mm of the grid, the same for both
    spacing_mm           of the grid, the same along every axis
    files                (fixed, moving), the scans
    to_source            (fixed, moving): (4, 4) from the world of the grid to the world of the scan, RAS mm
    labels               (fixed, moving) int16 maps, or None where a scan has none
    landmarks            (fixed, moving) {name: (3,) voxels}, or None where a scan has none
    truth                (true displacement (3, W, H, D) in voxels, where it is known (W, H, D) bool), or None
    """

    title: str
    fixed: np.ndarray
    moving: np.ndarray
    affine: np.ndarray
    spacing_mm: float
    files: tuple[Path, Path]
    to_source: tuple[np.ndarray, np.ndarray]
    labels: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    label_names: dict[int, str] = field(default_factory=dict)
    landmarks: tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None] = (None, None)
    truth: tuple[np.ndarray, np.ndarray] | None = None
    simulated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.fixed.shape

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm: voxel size along each array axis."""
        return np.full(3, self.spacing_mm)

    @property
    def region(self) -> np.ndarray:
        """(W, H, D) bool, where results are measured: the fixed mask, or everything where there is none."""
        return np.ones(self.shape, bool) if self.labels[0] is None else self.labels[0] > 0

    def scan_mm(self, voxel: tuple[float, float, float]) -> np.ndarray:
        """World position (3,), RAS mm, of a voxel of this grid in the fixed scan."""
        return apply_affine(self.to_source[0] @ self.affine, np.array(voxel, float))

    def common_landmarks(self) -> tuple[np.ndarray, np.ndarray]:
        """Landmarks that both images have, row by row the same: (N, 3) voxels of the fixed and of the moving one."""
        fixed, moving = (side or {} for side in self.landmarks)
        names = [name for name in fixed if name in moving]
        return tuple(np.array([side[name] for name in names]).reshape(-1, 3) for side in (fixed, moving))


def read_pair(
    fixed: Path | str,
    moving: Path | str,
    shape: tuple[int, int, int],
    spacing_mm: float,
    affine_reference: Path | str | None = None,
) -> Pair:
    """Two NIfTI files on a grid of ``shape`` voxels of ``spacing_mm``.

    affine_reference: None, "mni152" or an image file, to which both scans are aligned first. Without it each scan's
    centre comes to the centre of the grid: headers need not agree. InputError for a file that cannot be used, or the
    same file twice.
    """
    files = {"fixed": fixed, "moving": moving}
    for role, path in files.items():
        if not isinstance(path, (str, Path)) or not str(path).strip():
            raise InputError(f"{role}: found {path!r}, expected the path of a NIfTI file.")
        files[role] = Path(path).expanduser()
        if files[role].is_dir():
            raise InputError(f"{path}: found a folder, expected a NIfTI file.")
    if files["fixed"].resolve() == files["moving"].resolve():
        raise InputError(f"{fixed}: found the same file as fixed and moving image, expected two scans.")
    scans = tuple(Scan(path) for path in files.values())
    target, prepared = prepare_pair(scans, shape, spacing_mm, affine_reference)
    return as_pair(
        f"{files['fixed'].name} ← {files['moving'].name}", scans, target, prepared, affine_reference is not None
    )


def prepare_pair(
    scans: tuple[Scan, Scan],
    shape: tuple[int, int, int],
    spacing_mm: float,
    affine_reference: Path | str | None = None,
    labels: list[int] | None = None,
) -> tuple[Target, tuple[Prepared, Prepared]]:
    """The grid, and both scans on it."""
    reference = None if affine_reference is None else read_reference(affine_reference)
    centre = (0.0, 0.0, 0.0) if reference is None else tuple(reference.centre)
    target = Target(tuple(shape), float(spacing_mm), centre)
    if reference is None:
        return target, tuple(prepare_scan(scan, target, labels) for scan in scans)
    with fresh_processes(1) as pool:  # alignment is only reproducible in a process in which ITK has not run yet
        return target, tuple(pool.submit(prepare_scan, scan, target, labels, reference).result() for scan in scans)


def as_pair(
    title: str, scans: tuple[Scan, Scan], target: Target, prepared: tuple[Prepared, Prepared], aligned: bool, **known
) -> Pair:
    """The pair of two prepared scans; ``aligned``: to a reference; ``known``: label_names, truth, simulated."""
    notes = [f"the crop keeps {each.kept:.0%} of the intensity of {scan.image.name}"
             for scan, each in zip(scans, prepared) if each.kept < LITTLE_KEPT]  # fmt: skip
    if aligned:
        notes.append("millimetres shown here are those of the reference, to which both scans were aligned")
    return Pair(
        title, *(each.image for each in prepared), target.affine, target.spacing_mm, files=tuple(scan.image for scan in scans),
        to_source=tuple(each.to_source for each in prepared), labels=tuple(each.labels for each in prepared),
        landmarks=tuple(each.landmarks for each in prepared), notes=tuple(notes), **known,
    )  # fmt: skip
