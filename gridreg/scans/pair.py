"""One pair of images on one grid, with all that is known about it: the object that the rest of the code hands on.

A cohort's preprocessed pair and two NIfTI files are both a ``Pair``; metrics, error maps, figures and the
explorer take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gridreg.errors import refused
from gridreg.scans.align import align, as_reference, content_box, read_reference, working_copy
from gridreg.scans.geometry import apply_affine, check_orientations
from gridreg.scans.intensity import Intensity, Loaded, read_normalised
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
    paths = []
    for role, path in (("fixed", fixed), ("moving", moving)):
        if not isinstance(path, (str, Path)) or not str(path).strip():
            raise refused(role, repr(path), "the path of a NIfTI file")
        paths.append(Path(path).expanduser())
        if paths[-1].is_dir():
            raise refused(path, "a folder", "a NIfTI file")
    if paths[0].resolve() == paths[1].resolve():
        raise refused(fixed, "the same file as fixed and moving image", "two scans")
    scans = tuple(map(Scan, paths))
    title = f"{paths[0].name} ← {paths[1].name}"
    target = Target(tuple(shape), float(spacing_mm), intensity=intensity)
    return prepare_pair(title, scans, target, affine_reference, start)


def prepare_pair(
    title: str,
    scans: tuple[Scan, Scan],
    target: Target,
    affine_reference: Path | str | None = None,
    start: str | None = None,
) -> Pair:
    """Two scans with what belongs to them on a grid, ``affine_reference`` and ``start`` as in ``read_pair``.

    With a reference, the centre of the grid is that of the reference.
    """
    if start not in (*STARTS, None):
        raise refused("start", repr(start), f"one of {', '.join(STARTS)}")
    if affine_reference is None:
        loaded = [read_normalised(scan.image, target.intensity) for scan in scans]
        maps, notes = _to_source(loaded, target, start)
        return as_pair(title, scans, target, list(map(prepare, scans, loaded, [target] * 2, maps)), notes)
    if start not in ("affine", None):
        raise refused("start", f"{start!r} and an affine_reference", "affine or null beside one")
    reference = read_reference(affine_reference)
    target = replace(target, centre_mm=tuple(reference.centre))
    with fresh_processes(1) as pool:  # alignment is only reproducible in a process in which ITK has not run yet
        prepared = list(pool.map(prepare_scan, scans, [target] * 2, [reference] * 2))
    note = "millimetres shown here are those of the reference, to which both scans were aligned"
    return as_pair(title, scans, target, prepared, (note,))


def as_pair(
    title: str, scans: Sequence[Scan], target: Target, prepared: Sequence[Prepared], notes: tuple[str, ...] = ()
) -> Pair:
    """The pair of two prepared scans."""
    cut = [f"the crop keeps {each.kept:.0%} of the intensity of {scan.image.name}"
           for scan, each in zip(scans, prepared) if each.kept < LITTLE_KEPT]  # fmt: skip
    fixed, moving = prepared
    return Pair(
        title, fixed.image, moving.image, target.affine, target.spacing_mm,
        files=(scans[0].image, scans[1].image), to_source=(fixed.to_source, moving.to_source),
        labels=(fixed.labels, moving.labels), landmarks=(fixed.landmarks, moving.landmarks),
        notes=tuple(dict.fromkeys([*fixed.notes, *moving.notes, *notes, *cut])),
    )  # fmt: skip


def _to_source(loaded: list[Loaded], target: Target, start: str | None) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """``to_source`` of both scans, by headers, centres or alignment, and notes."""
    geometries = [volume.geometry for volume, _ in loaded]
    boxes = [content_box(image, volume.affine) for volume, image in loaded]
    middle = boxes[0].mean(axis=0)
    if start == "affine":
        check_orientations(geometries)
        (fixed, fixed_image), (moving, moving_image) = loaded
        reference = as_reference(str(fixed.path), *working_copy(fixed_image, fixed.affine))
        with fresh_processes(1) as pool:
            matrix = pool.submit(align, moving_image, moving.affine, reference, str(moving.path)).result()
        moved = np.linalg.norm(apply_affine(matrix, middle) - middle)
        note = (
            f"start: affine; the alignment of the moving scan departs from the headers by {moved:.1f} mm at the centre"
        )
        to_fixed = centred(fixed, target, middle)
        return [to_fixed, matrix @ to_fixed], (note,)
    chosen = decide_start(geometries, boxes, middle, target, start, [loaded])
    if chosen.kind == "headers":
        return [placed(target, chosen.centre_mm)] * 2, chosen.notes
    both = [centred_on_content(*each, target) for each in loaded]
    return [to_source for to_source, _ in both], chosen.notes + both[0][1] + both[1][1]
