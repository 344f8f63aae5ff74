"""Bring one scan, with what belongs to it, to a common grid: one orientation, isotropic voxels, intensities in [0, 1].

A scan is turned to canonical RAS, optionally aligned to a reference by an affine map, resampled and cropped or padded,
all in a single interpolation. Labels, landmarks and a known true deformation go along.

The grid. affine = diag(spacing) with the grid's centre, voxel (shape - 1) / 2, at

* the world origin without a reference; each scan's own centre (of its canonical volume) is moved there, so the crop is
  a centre crop and headers need not agree; scan axes stay parallel to the world's;
* the centre of the reference's bounding box with one; the world is then the reference's, e.g. MNI152 millimetres.

``to_source`` is the 4×4 matrix from this world to the world of the scan (RAS mm): a point or a warp can always be
taken back to the scanner's coordinates.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np

from gridreg.errors import InputError
from gridreg.scans.align import Reference, align
from gridreg.scans.resample import normalise, resample_field, resample_image, resample_labels
from gridreg.scans.volumes import Volume, apply_affine, inside, read_field_mm, read_image, read_labels, read_landmarks


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


@dataclass(frozen=True)
class Scan:
    """One image file and the files that belong to it; None where there is no such file.

    truth: a displacement field to the template that a simulated scan was made from.
    """

    image: Path
    label: Path | None = None
    landmarks: Path | None = None
    truth: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A scan on the target grid, (W, H, D) in canonical RAS; None where the scan has no such file.

    image        float32 in [0, 1]
    labels       int16
    landmarks    {name: position in voxels, (3,)}
    truth_mm     (3, W, H, D) displacement to the template, world RAS mm
    to_source    (4, 4) world of the grid → world of the scan, mm
    orientation  axis codes of the file as stored, e.g. "LPS"
    kept         share of the scan's total intensity inside the grid; a low value means that the shape cuts it
    """

    image: np.ndarray
    labels: np.ndarray | None
    landmarks: dict[str, np.ndarray] | None
    truth_mm: np.ndarray | None
    to_source: np.ndarray
    orientation: str
    kept: float


def prepare_scan(
    scan: Scan, target: Target, labels: list[int] | None = None, reference: Reference | None = None
) -> Prepared:
    """Read one scan and bring it to the target grid.

    labels: those to keep, the others become background (None: all). Raises InputError for a file that cannot be used,
    and where image, mask or a landmark lies outside the grid.
    """
    volume = read_image(scan.image)
    image = normalise(volume.data)
    if reference is None:
        to_source = centred(volume, target)
    else:
        to_source = align(image, volume.affine, reference, str(scan.image))
    grid_to_source = np.linalg.inv(volume.affine) @ to_source @ target.affine

    moved = resample_image(image, grid_to_source, target.shape)
    if moved.min() == moved.max():
        raise InputError(
            f"{scan.image}: found no overlap between the image and the {_size(target)} crop, "
            "expected a crop that contains part of it."
        )
    label_map, points, carried = None, None, None
    if scan.label is not None:
        label_map = resample_labels(read_labels(scan.label, volume, labels), grid_to_source, target.shape)
        if not label_map.any():
            raise InputError(
                f"{scan.label}: found no labelled voxel inside the {_size(target)} crop, "
                "expected a crop that contains part of the mask."
            )
    if scan.landmarks is not None:
        from_source = np.linalg.inv(to_source @ target.affine)
        points = {k: apply_affine(from_source, p) for k, p in read_landmarks(scan.landmarks, volume).items()}
        for key, point in points.items():
            if not inside(point, target.shape):
                raise InputError(
                    f"{scan.landmarks}: found landmark '{key}' at voxel {point.round(1).tolist()}, "
                    f"expected it inside the {_size(target)} crop; a larger shape would contain it."
                )
    if scan.truth is not None:
        field, lattice = read_field_mm(scan.truth)
        carried = resample_field(field, lattice, target.affine, to_source, target.shape)
    kept = float(moved.sum() * abs(np.linalg.det(grid_to_source)) / image.sum())
    orientation = "".join(nibabel.aff2axcodes(volume.file_affine))
    return Prepared(moved, label_map, points, carried, to_source, orientation, kept)


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


def _size(target: Target) -> str:
    return "×".join(str(n) for n in target.shape) + f" voxels ({target.spacing_mm:g} mm)"
