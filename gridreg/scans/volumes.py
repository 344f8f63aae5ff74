"""Read and write NIfTI volumes, label maps, landmark tables and ITK displacement fields, refusing what cannot be used.

Everything read comes back in canonical RAS order (axes i, j, k = x, y, z) with its voxel → world affine (mm).
Every refusal is one sentence that names the file, what was found and what was expected (InputError).
Every file is written under a temporary name beside its destination and then renamed, so none is half-written.
"""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from gridreg.errors import InputError

SMALLEST = 4  # voxels per axis: fewer is a slice, not a volume
CORNER_TOLERANCE = 0.1  # voxels by which image and label corners may differ (rounded headers differ by less)
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])  # ITK's world has x and y the other way round


@dataclass(frozen=True)
class Volume:
    """A volume in canonical RAS order and where it came from."""

    data: np.ndarray  # (W, H, D)
    affine: np.ndarray  # (4, 4) voxel of `data` -> world RAS mm
    path: Path
    file_affine: np.ndarray  # (4, 4) voxel of the file as stored -> world RAS mm
    file_shape: tuple[int, int, int]

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along each array axis, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_image(path: Path | str) -> Volume:
    """Read a 3-D image as float32. Refused: anything but one finite, non-constant 3-D volume with a usable affine."""
    volume = _read(Path(path), np.float32)
    if not np.isfinite(volume.data).all():
        number = int((~np.isfinite(volume.data)).sum())
        raise InputError(f"{path}: found {number} voxels that are NaN or infinite, expected finite intensities.")
    if volume.data.min() == volume.data.max():
        raise InputError(
            f"{path}: found the value {volume.data.flat[0]:g} in every voxel, expected an image with contrast."
        )
    return volume


def read_labels(path: Path | str, image: Volume, keep: list[int] | None = None) -> np.ndarray:
    """Read the label map of ``image`` as int16 (W, H, D); labels not in ``keep`` become 0 (None keeps all).

    Refused: another shape or affine than the image's, values that are no whole numbers from 0 to 32767, and a map
    without any (kept) label.
    """
    volume = _read(Path(path), np.float32)
    check_same_grid(volume, image)
    labels = np.rint(volume.data)
    if not np.array_equal(labels, volume.data) or labels.min() < 0 or labels.max() > np.iinfo(np.int16).max:
        raise InputError(
            f"{path}: found label values from {volume.data.min():g} to {volume.data.max():g}, "
            "not all of them usable, expected whole numbers from 0 to 32767."
        )
    labels = labels.astype(np.int16)
    if keep is not None:
        labels = np.where(np.isin(labels, keep), labels, 0).astype(np.int16)
    if not labels.any():
        wanted = "labelled voxels" if keep is None else f"voxels with one of the labels {list(keep)}"
        raise InputError(f"{path}: found an empty mask, expected {wanted}.")
    return labels


def check_same_grid(volume: Volume, image: Volume) -> None:
    """Refuse a label map that does not lie on its image's voxels (shape and affine)."""
    if volume.data.shape != image.data.shape:
        raise InputError(
            f"{volume.path}: found the shape {_times(volume.file_shape)}, "
            f"expected {_times(image.file_shape)} as in {image.path}."
        )
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (*volume.data.shape, 1)
    apart = np.abs((corners @ (volume.affine - image.affine).T)[:, :3]).max()
    if apart > CORNER_TOLERANCE * image.spacing.min():
        raise InputError(
            f"{volume.path}: found an affine that puts its corners {apart:.3g} mm away from those of "
            f"{image.path}, expected the same affine."
        )


def read_landmarks(path: Path | str, image: Volume) -> dict[str, np.ndarray]:
    """Read a landmark table as {name: world RAS mm, (3,)}.

    The header states the unit: ``name,x_mm,y_mm,z_mm`` (world, RAS) or ``name,x_voxel,y_voxel,z_voxel`` (indices from
    0 into the image file as stored). Refused: another header, an empty table, a repeated name, a value that is no
    finite number, and a point outside the image.
    """
    points, unit = read_points(path)
    for name, point in points.items():
        if unit == "voxel":
            points[name] = apply_affine(image.file_affine, point)
        voxel = apply_affine(np.linalg.inv(image.affine), points[name])
        if not inside(voxel, image.data.shape):
            raise InputError(
                f"{path}: found landmark '{name}' at voxel {np.round(voxel, 1).tolist()} (RAS order), "
                f"expected it inside the {_times(image.data.shape)} voxels of {image.path}."
            )
    return points


def read_points(path: Path | str) -> tuple[dict[str, np.ndarray], str]:
    """The rows of a landmark table, {name: (3,)}, as they stand, and their unit: "mm" or "voxel"."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise InputError(f"{path}: found no such file, expected a landmark table.") from None
    if not rows:
        raise InputError(f"{path}: found an empty file, expected landmarks.")
    units = {("name", *(f"{axis}_{unit}" for axis in "xyz")): unit for unit in ("mm", "voxel")}
    unit = units.get(tuple(rows[0]))
    if unit is None:
        raise InputError(
            f"{path}: found the header '{','.join(rows[0])}', which states no unit, "
            "expected 'name,x_mm,y_mm,z_mm' or 'name,x_voxel,y_voxel,z_voxel'."
        )
    if len(rows) == 1:
        raise InputError(f"{path}: found a header and no landmarks, expected at least one.")
    points: dict[str, np.ndarray] = {}
    for row in rows[1:]:
        try:
            point = np.array([float(cell) for cell in row[1:]])
        except ValueError:
            point = np.array([])
        if point.shape != (3,) or not np.isfinite(point).all() or row[0] in points:
            raise InputError(f"{path}: found the row '{','.join(row)}', expected a new name and three finite numbers.")
        points[row[0]] = point
    return points, unit


def inside(voxel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Whether voxel positions (..., 3) lie in a volume of ``shape``, to the outer faces of its border voxels."""
    return ((voxel >= -0.5) & (voxel <= np.asarray(shape) - 0.5)).all(axis=-1)


def apply_affine(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 3) through a 4×4 matrix."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def write_landmarks(path: Path | str, points: dict[str, np.ndarray]) -> None:
    """Write {name: voxel position} as ``name,x_voxel,y_voxel,z_voxel``."""
    with _renamed(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["name", "x_voxel", "y_voxel", "z_voxel"])
        table.writerows([name, *(f"{v:.4f}" for v in point)] for name, point in points.items())


def write_volume(path: Path | str, data: np.ndarray, affine: np.ndarray) -> None:
    """Write an array (W, H, D) with its voxel → world RAS mm affine, in the array's own data type."""
    _save(Path(path), nibabel.Nifti1Image(data, affine), affine)


def write_displacement(path: Path | str, displacement: np.ndarray, affine: np.ndarray) -> None:
    """Write a displacement field as ITK reads it: 5-D NIfTI, vector intent (1007), LPS components in mm.

    displacement: (3, W, H, D), voxels of the fixed grid, pull-back; affine: (4, 4) of the fixed grid, oblique or
    anisotropic if need be. The world vector is affine[:3, :3] @ u, so that world(x) + vector = world(x + u).
    """
    write_field_mm(path, np.einsum("ab,bijk->aijk", affine[:3, :3], displacement), affine)


def read_displacement(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Read an ITK displacement field as (displacement (3, W, H, D) float32 in voxels of its grid, affine (4, 4))."""
    field, affine = read_field_mm(path)
    return np.einsum("ab,bijk->aijk", np.linalg.inv(affine[:3, :3]), field).astype(np.float32), affine


def write_field_mm(path: Path | str, field: np.ndarray, affine: np.ndarray) -> None:
    """Write a vector field (3, W, H, D) in world RAS mm as an ITK displacement field (LPS, mm)."""
    vectors = np.moveaxis(np.asarray(field, np.float32) * RAS_TO_LPS[:, None, None, None].astype(np.float32), 0, -1)
    image = nibabel.Nifti1Image(np.ascontiguousarray(vectors[:, :, :, None, :]), affine)
    image.header.set_intent("vector")
    _save(Path(path), image, affine)


def read_field_mm(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Read an ITK displacement field on its own lattice as (vectors (3, W, H, D) in world RAS mm, affine (4, 4))."""
    image = _open(Path(path))
    if len(image.shape) != 5 or image.shape[3:] != (1, 3):
        raise InputError(
            f"{path}: found the shape {_times(image.shape)}, expected an ITK displacement field, W×H×D×1×3."
        )
    vectors = _voxels(Path(path), image, np.float32)[:, :, :, 0, :] * RAS_TO_LPS.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: found vectors that are NaN or infinite, expected finite displacements.")
    return np.ascontiguousarray(np.moveaxis(vectors, -1, 0)), image.affine


def _open(path: Path) -> nibabel.Nifti1Image:
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a NIfTI volume.")
    try:
        image = nibabel.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        why = _why(error)
        raise InputError(f"{path}: found a file that cannot be read ({why}), expected a NIfTI volume.") from error
    affine = getattr(image, "affine", None)
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: found a header without a usable voxel size, expected an invertible affine.")
    return image


def _voxels(path: Path, image: nibabel.Nifti1Image, dtype: type) -> np.ndarray:
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: found voxels of type {image.get_data_dtype()}, expected one real number per voxel.")
    try:
        return np.asanyarray(image.dataobj).astype(dtype)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: found a damaged file ({_why(error)}), expected a complete NIfTI volume.") from error


def _read(path: Path, dtype: type) -> Volume:
    """One 3-D volume in canonical order; trailing axes of length one are dropped."""
    image = _open(path)
    shape = tuple(image.shape[:3])
    if len(shape) < 3 or any(n != 1 for n in image.shape[3:]) or min(shape) < SMALLEST:
        raise InputError(
            f"{path}: found the shape {_times(image.shape)}, expected one 3-D volume W×H×D "
            f"of at least {SMALLEST} voxels per axis."
        )
    plain = nibabel.Nifti1Image(_voxels(path, image, dtype).reshape(shape), image.affine)
    canonical = nibabel.as_closest_canonical(plain)
    return Volume(np.ascontiguousarray(canonical.dataobj), canonical.affine, path, image.affine, shape)


def _save(path: Path, image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner", strip_shears=True)  # some readers look at the qform first
    with _renamed(path) as temporary:
        nibabel.save(image, temporary)


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; renamed to it on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _why(error: Exception) -> str:
    """The library's own message on one line."""
    return " ".join(str(error).split())


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)
