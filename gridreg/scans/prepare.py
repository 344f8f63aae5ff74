"""Bring one scan, with what belongs to it, to a common grid: one orientation, isotropic voxels, intensities in [0, 1].

A scan is turned to canonical RAS, optionally aligned to a reference by an affine map, resampled and cropped or padded,
all in a single interpolation. Labels and landmarks go along.

The grid. affine = diag(spacing) with the grid's centre, voxel (shape - 1) / 2, at

* the world origin without a reference; the scan's own centre, or a point of the scanner's world that all scans share, is
  moved there (``start``); scan axes stay parallel to the world's;
* the centre of the reference's bounding box with one; the world is then the reference's, e.g. MNI152 millimetres.

``to_source`` is the 4×4 matrix from this world to the world of the scan (RAS mm): a point or a warp can always be
taken back to the scanner's coordinates.
"""

from __future__ import annotations

import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import from_matvec

from gridreg.errors import refused
from gridreg.scans.align import Reference, align, content_box
from gridreg.scans.geometry import NOT_ORIENTED, apply_affine
from gridreg.scans.intensity import Intensity, Loaded, read_normalised
from gridreg.scans.landmarks import inside, read_landmarks
from gridreg.scans.resample import resample_image, resample_labels
from gridreg.scans.volumes import Volume, read_labels, times

LITTLE_KEPT = 0.5  # share of a scan's intensity inside the grid below which its content may lie off its centre


@dataclass(frozen=True)
class Target:
    """What every scan is brought to: a grid, the labels to keep (None: all; others become background), and intensities."""

    shape: tuple[int, int, int]
    spacing_mm: float
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)  # world RAS
    labels: tuple[int, ...] | None = None
    intensity: Intensity = Intensity()

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel → world RAS mm."""
        first = np.array(self.centre_mm) - self.spacing_mm * (np.array(self.shape) - 1) / 2
        return from_matvec(np.diag([self.spacing_mm] * 3), first)

    @property
    def extent_mm(self) -> np.ndarray:
        """(3,) size of the grid."""
        return np.array(self.shape) * self.spacing_mm


@dataclass(frozen=True)
class Scan:
    """One image file and the files that belong to it; None where there is no such file."""

    image: Path
    label: Path | None = None
    landmarks: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A scan on the target grid, (W, H, D) in canonical RAS; None where the scan has no such file.

    image        float32 in [0, 1]
    labels       int16
    landmarks    {name: position in voxels, (3,)}
    to_source    (4, 4) world of the grid → world of the scan, mm
    orientation  axis codes of the file as stored, e.g. "LPS"
    kept         share of the scan's total intensity inside the grid; a low value means that the shape cuts it
    notes        a sentence on whatever was in doubt and what was chosen
    """

    image: np.ndarray
    labels: np.ndarray | None
    landmarks: dict[str, np.ndarray] | None
    to_source: np.ndarray
    orientation: str
    kept: float
    notes: tuple[str, ...] = ()


def prepare_scan(
    scan: Scan, target: Target, reference: Reference | None = None, centre_mm: np.ndarray | None = None
) -> Prepared:
    """Read one scan and bring it to the target grid.

    reference  what the scan is aligned to, or None
    centre_mm  without a reference: (3,) world RAS mm of the scan that comes to the centre of the grid (``start``); None: the
               scan's own centre

    Raises InputError for a file that cannot be used, and where image, mask or a landmark lies outside the grid.
    """
    volume, image = loaded = read_normalised(scan.image, target.intensity)
    if reference is not None:
        if reference.oriented and not volume.geometry.oriented:
            expected = f"one for the alignment to {reference.name}: the scan could be mirrored"
            raise refused(scan.image, NOT_ORIENTED, expected)
        return prepare(scan, loaded, target, align(image, volume.affine, reference, str(scan.image)))
    if centre_mm is not None:
        return prepare(scan, loaded, target, placed(target, centre_mm))
    return prepare(scan, loaded, target, *centred_on_content(volume, image, target))


def prepare(scan: Scan, loaded: Loaded, target: Target, to_source: np.ndarray, notes: tuple[str, ...] = ()) -> Prepared:
    """Bring a scan that was read (``read_normalised``) to the target grid by a known map ``to_source``."""
    volume, image = loaded
    notes = volume.geometry.notes + notes
    grid_to_source = np.linalg.inv(volume.affine) @ to_source @ target.affine
    crop = f"{times(target.shape)} voxels ({target.spacing_mm:g} mm) crop"
    moved = resample_image(image, grid_to_source, target.shape)
    if moved.min() == moved.max():
        found = f"no overlap between the image and the {crop}"
        raise refused(scan.image, found, "a crop that contains part of it")
    label_map, points = None, None
    if scan.label is not None:
        stored, more = read_labels(scan.label, volume, target.labels, target.intensity.nan)
        notes += more
        label_map = resample_labels(stored, grid_to_source, target.shape)
        if not label_map.any():
            found = f"no labelled voxel inside the {crop}"
            raise refused(scan.label, found, "a crop that contains part of the mask")
    if scan.landmarks is not None:
        world, more = read_landmarks(scan.landmarks, image, volume.affine, volume.geometry)
        notes += more
        from_source = np.linalg.inv(to_source @ target.affine)
        points = {name: apply_affine(from_source, point) for name, point in world.items()}
        for name, point in points.items():
            if not inside(point, target.shape):
                found = f"landmark '{name}' at voxel {point.round(1).tolist()}"
                raise refused(scan.landmarks, found, f"it inside the {crop}; a larger shape would contain it")
    kept = float(moved.sum() * abs(np.linalg.det(grid_to_source)) / image.sum())
    orientation = "".join(nibabel.aff2axcodes(volume.geometry.affine))
    return Prepared(moved, label_map, points, to_source, orientation, kept, notes)


def placed(target: Target, centre_mm: np.ndarray) -> np.ndarray:
    """World of the target → world of a scan (4, 4): a shift that puts a point (3,) of the scan on the target's centre."""
    return from_matvec(np.eye(3), np.asarray(centre_mm) - np.array(target.centre_mm))


def to_whole_voxels(affine: np.ndarray, target: Target, to_source: np.ndarray) -> np.ndarray:
    """How far to move ``to_source`` (3,), mm, less than a voxel, so that voxels of grid and scan coincide.

    Then nothing is interpolated at all. Zero where the voxels differ by more than a shift and the order of their axes.
    """
    grid_to_source = np.linalg.inv(affine) @ to_source @ target.affine
    axes = np.abs(grid_to_source[:3, :3])
    if np.rint(axes).sum() != 3 or not np.allclose(axes, np.rint(axes), atol=1e-3):
        return np.zeros(3)
    shift = grid_to_source[:3, 3]
    return -affine[:3, :3] @ (shift - np.floor(shift + 0.5))


def centred(volume: Volume, target: Target, centre_mm: np.ndarray | None = None) -> np.ndarray:
    """``placed`` on a point of the scan, by default the centre of its volume, but for ``to_whole_voxels``."""
    if centre_mm is None:
        centre_mm = apply_affine(volume.affine, (np.array(volume.data.shape) - 1) / 2)
    to_source = placed(target, centre_mm)
    to_source[:3, 3] += to_whole_voxels(volume.affine, target, to_source)
    return to_source


def centred_on_content(volume: Volume, image: np.ndarray, target: Target) -> tuple[np.ndarray, tuple[str, ...]]:
    """``centred``; where that crop holds little of the scan, as with padding on one side, on the centre of its content."""
    to_source = centred(volume, target)
    kept = _kept(volume, image, target, to_source)
    if kept < LITTLE_KEPT:
        other = centred(volume, target, content_box(image, volume.affine).mean(axis=0))
        more = _kept(volume, image, target, other)
        if more > 2 * kept:
            return other, (f"{volume.path}: a crop about the centre of the volume keeps {kept:.0%} of its intensity, one about "
                           f"its content {more:.0%}; the latter is taken",)  # fmt: skip
    return to_source, ()


def _kept(volume: Volume, image: np.ndarray, target: Target, to_source: np.ndarray) -> float:
    """The share of a scan's intensity inside the grid, from the voxels of the scan whose centres lie there."""
    from_source = np.linalg.inv(to_source @ target.affine) @ volume.affine
    box = []
    for axis in range(3):  # an upright grid: its box in the scan's voxels
        ends = np.sort((np.array([-0.5, target.shape[axis] - 0.5]) - from_source[axis, 3]) / from_source[axis, axis])
        first, last = np.clip(np.ceil(ends), 0, image.shape[axis]).astype(int)
        box.append(slice(first, last))
    return float(image[tuple(box)].sum() / image.sum())


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """A pool of new processes (spawned: a forked ITK can hang, and would not read its number of threads again).

    Jupyter ends a kernel by an interrupt to all of its processes. Theirs ends them at once: Python's own way to do so, a
    KeyboardInterrupt, would leave a traceback in the log of every notebook.
    """
    spawn, default = get_context("spawn"), (signal.SIGINT, signal.SIG_DFL)
    return ProcessPoolExecutor(number, mp_context=spawn, initializer=signal.signal, initargs=default)
