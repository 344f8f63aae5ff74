"""One pair of images on one grid, with all that is known about it: the object that the rest of the code hands on.

A cohort's preprocessed pair and two NIfTI files of one's own are both a ``Pair``; metrics, error maps, figures and the
explorer take it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gridreg.errors import InputError
from gridreg.scans.align import align, as_reference, content_box, read_reference, working_copy
from gridreg.scans.geometry import apply_affine, check_orientations
from gridreg.scans.intensity import Intensity, normalise
from gridreg.scans.prepare import (
    LITTLE_KEPT,
    Prepared,
    Scan,
    Target,
    centred,
    centred_on_content,
    fresh_processes,
    placed,
    prepare,
    prepare_scan,
)
from gridreg.scans.start import STARTS, decide_start
from gridreg.scans.volumes import read_image


@dataclass(frozen=True, eq=False)
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
    notes                sentences on whatever was in doubt and what was chosen
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
    start: str | None = None,
    intensity: Intensity = Intensity(),
) -> Pair:
    """Two NIfTI files on a grid of ``shape`` voxels of ``spacing_mm``.

    affine_reference  None, "mni152" or an image file, to which both scans are aligned first
    start             without a reference: "headers", "centre", "affine" (the moving scan is aligned to the fixed one) or None:
                      headers where both scans state an orientation and their contents overlap by them, else centre

    InputError for a file that cannot be used, or the same file twice.
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
    target, prepared, notes = prepare_pair(scans, shape, spacing_mm, affine_reference, start=start, intensity=intensity)
    return as_pair(f"{files['fixed'].name} ← {files['moving'].name}", scans, target, prepared, notes=notes)


def prepare_pair(
    scans: tuple[Scan, Scan],
    shape: tuple[int, int, int],
    spacing_mm: float,
    affine_reference: Path | str | None = None,
    labels: list[int] | None = None,
    start: str | None = None,
    intensity: Intensity = Intensity(),
) -> tuple[Target, tuple[Prepared, Prepared], tuple[str, ...]]:
    """The grid, both scans on it, and notes on how they were brought there. ``start`` as in ``read_pair``."""
    if start not in (*STARTS, None):
        raise InputError(f"start: found {start!r}, expected one of {', '.join(STARTS)}.")
    target = Target(tuple(shape), float(spacing_mm))
    if affine_reference is not None:
        if start not in ("affine", None):
            raise InputError(f"start: found {start!r} and an affine_reference, expected affine or null beside one.")
        reference = read_reference(affine_reference)
        target = Target(target.shape, target.spacing_mm, tuple(reference.centre))
        with fresh_processes(1) as pool:  # alignment is only reproducible in a process in which ITK has not run yet
            jobs = [pool.submit(prepare_scan, scan, target, labels, reference, None, intensity) for scan in scans]
            prepared = tuple(job.result() for job in jobs)
        return (
            target,
            prepared,
            ("millimetres shown here are those of the reference, to which both scans were aligned",),
        )
    volumes = [read_image(scan.image, intensity.nan) for scan in scans]
    images = [normalise(volume.data, intensity, str(volume.path)) for volume in volumes]
    maps, notes = _maps(volumes, images, target, start)
    return (
        target,
        tuple(
            prepare(scan, volume, image, target, to_source, labels, intensity)
            for scan, volume, image, to_source in zip(scans, volumes, images, maps)
        ),
        notes,
    )


def _maps(volumes: list, images: list, target: Target, start: str | None) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """``to_source`` of both scans, by headers, centres or alignment, and notes."""
    geometries = [volume.geometry for volume in volumes]
    boxes = [content_box(image, volume.affine) for image, volume in zip(images, volumes)]
    middle = boxes[0].mean(axis=0)
    if start == "affine":
        check_orientations(geometries)
        fixed = centred(volumes[0], target, middle)
        reference = as_reference(str(volumes[0].path), *working_copy(images[0], volumes[0].affine))
        with fresh_processes(1) as pool:
            matrix = pool.submit(align, images[1], volumes[1].affine, reference, str(volumes[1].path)).result()
        moved = np.linalg.norm(apply_affine(matrix, middle) - middle)
        return [fixed, matrix @ fixed], (
            f"start: affine; the alignment of the moving scan departs from the headers by {moved:.1f} mm at the centre",
        )
    chosen = decide_start(geometries, boxes, middle, target, start, lambda: [tuple(zip(volumes, images))])
    if chosen.kind == "headers":
        return [placed(target, chosen.centre_mm)] * 2, chosen.notes
    both = [centred_on_content(volume, image, target) for volume, image in zip(volumes, images)]
    return [to_source for to_source, _ in both], chosen.notes + tuple(note for _, more in both for note in more)


def as_pair(
    title: str,
    scans: tuple[Scan, Scan],
    target: Target,
    prepared: tuple[Prepared, Prepared],
    notes: tuple[str, ...] = (),
    **known,
) -> Pair:
    """The pair of two prepared scans; ``known``: label_names, truth, simulated."""
    cut = [f"the crop keeps {each.kept:.0%} of the intensity of {scan.image.name}"
           for scan, each in zip(scans, prepared) if each.kept < LITTLE_KEPT]  # fmt: skip
    return Pair(
        title, *(each.image for each in prepared), target.affine, target.spacing_mm, files=tuple(scan.image for scan in scans),
        to_source=tuple(each.to_source for each in prepared), labels=tuple(each.labels for each in prepared),
        landmarks=tuple(each.landmarks for each in prepared),
        notes=tuple(dict.fromkeys([*prepared[0].notes, *prepared[1].notes, *notes, *cut])), **known,
    )  # fmt: skip
