"""Read and write NIfTI volumes, label maps and ITK displacement fields, refusing what cannot be used.

Everything read comes back in canonical RAS order (axes i, j, k = x, y, z) with its voxel → world affine in mm (``geometry``).
Every refusal is an InputError. Every file is written under a temporary name and then renamed, so none is half-written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from gridreg.errors import InputError, refused
from gridreg.scans.files import renamed
from gridreg.scans.geometry import CORNER_TOLERANCE, RAS_TO_LPS, Geometry, apply_affine, corners, geometry_of, sheared

SMALLEST = 4  # voxels per axis: fewer is a slice, not a volume
WHOLE = 1e-3  # a label value so near to a whole number is that number: scaled and resaved maps are off by less
HIGHEST = np.iinfo(np.int16).max  # label value
DISPLACEMENT, VECTOR = 1006, 1007  # NIfTI intents: vectors in RAS, and (as ITK, ANTs and 3D Slicer write them) in LPS


@dataclass(frozen=True)
class Volume:
    """A volume in canonical RAS order and where it came from."""

    data: np.ndarray  # (W, H, D)
    affine: np.ndarray  # (4, 4) voxel of `data` -> world RAS mm
    geometry: Geometry  # of the file as stored

    @property
    def path(self) -> Path:
        return self.geometry.path

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along each array axis, (3,)."""
        return voxel_sizes(self.affine)


def read_geometry(path: Path | str) -> Geometry:
    """Where the voxels of a 3-D volume lie; its voxels are not read. Refused as ``read_image`` refuses the header."""
    return open_image(path)[1]


def read_image(path: Path | str, nan: str = "refuse") -> Volume:
    """Read a 3-D image as float32. Refused: anything but one finite, non-constant 3-D volume with a usable affine.

    nan: "refuse", or "background": NaN voxels, as SPM writes them around a brain, stay NaN here, and ``normalise`` makes
    them background.
    """
    volume = _read(path, np.float32)
    if nan == "background":
        bad, what, hint = np.isinf(volume.data), "infinite", ""
    else:
        bad, what, hint = ~np.isfinite(volume.data), "NaN or infinite", "; `nan: background` accepts NaN"
    if bad.any():
        raise refused(path, f"{int(bad.sum())} voxels that are {what}", f"finite intensities{hint}")
    low, high = np.nanmin(volume.data), np.nanmax(volume.data)
    if not low < high:
        raise refused(path, f"the value {low:g} in every voxel", "an image with contrast")
    return volume


def read_labels(
    path: Path | str, image: Volume, keep: list[int] | None = None, nan: str = "refuse"
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read the label map of ``image`` as int16 (W, H, D), and notes on it; labels not in ``keep`` become 0 (None keeps all).

    Refused: another shape or affine than the image's, values that are no whole numbers from 0 to 32767, and a map
    without any (kept) label. With ``keep``, values that are not kept may be anything. nan: "background" takes NaN for 0.
    """
    volume = _read(path, np.float64)
    notes = volume.geometry.notes + _same_grid(volume, image)
    data = np.nan_to_num(volume.data, nan=0.0) if nan == "background" else volume.data
    labels, allowed = np.rint(data), f"whole numbers from 0 to {HIGHEST}"
    with np.errstate(invalid="ignore"):
        whole = np.abs(labels - data) <= WHOLE
    if keep is None:
        if np.isnan(data).any():
            found = f"{int(np.isnan(data).sum())} label values that are NaN"
            raise refused(path, found, f"{allowed}; `nan: background` accepts them")
        if not whole.all() or labels.min() < 0 or labels.max() > HIGHEST:
            found = f"label values from {data.min():g} to {data.max():g}, not all of them usable"
            raise refused(path, found, f"{allowed}; `labels` can name those to use")
    else:
        if not all(0 <= value <= HIGHEST for value in keep):
            raise refused(path, f"the wanted labels {list(keep)}", f"numbers from 0 to {HIGHEST}")
        if not whole.all():
            notes += (f"{path}: {int((~whole).sum())} voxels hold no whole number and count as background",)
        labels = np.where(whole & np.isin(labels, keep), labels, 0)
    labels = labels.astype(np.int16)
    if not labels.any():
        wanted = "labelled voxels" if keep is None else f"voxels with one of the labels {list(keep)}"
        raise refused(path, "an empty mask", wanted)
    return labels, notes


def _same_grid(volume: Volume, image: Volume) -> tuple[str, ...]:
    """Refuse a label map that does not lie on its image's voxels (shape and affine); notes on it.

    A map may state one of the two forms of an image alone, as many programs write it: that is a note and no refusal.
    """
    ours, theirs = volume.geometry, image.geometry
    if volume.data.shape != image.data.shape:
        raise refused(ours.path, f"the shape {times(ours.shape)}", f"{times(theirs.shape)} as in {theirs.path}")
    if not (ours.oriented or theirs.oriented):
        return ()  # both by voxel alone

    def apart_mm(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
        return np.abs(apply_affine(one, corners(shape)) - apply_affine(other, corners(shape))).max()

    apart = apart_mm(volume.affine, image.affine, image.data.shape)
    if apart <= CORNER_TOLERANCE * image.spacing.min():
        return ()
    if ours.shape == theirs.shape and nibabel.aff2axcodes(ours.affine) == nibabel.aff2axcodes(theirs.affine):
        allowed = CORNER_TOLERANCE * min(voxel_sizes(form).min() for form in (*theirs.stated, np.eye(4)))
        forms = product((*ours.stated, ours.affine), (*theirs.stated, theirs.affine))
        if any(apart_mm(one, other, ours.shape) <= allowed for one, other in forms):
            return (f"{ours.path}: lies {apart:.3g} mm away from {theirs.path} as both are read, but states the affine of one of "
                    "its forms; it is taken to lie on the same voxels",)  # fmt: skip
    found = f"an affine that puts its corners {apart:.3g} mm away from those of {theirs.path}"
    raise refused(ours.path, found, "the same affine")


def write_volume(path: Path | str, data: np.ndarray, affine: np.ndarray) -> None:
    """Write an array (W, H, D) with its voxel → world RAS mm affine, in the array's own data type."""
    _write(path, nibabel.Nifti1Image(data, affine))


def write_displacement(path: Path | str, displacement: np.ndarray, affine: np.ndarray) -> None:
    """Write a displacement field as ITK reads it: 5-D NIfTI, vector intent (1007), LPS components in mm.

    displacement: (3, W, H, D), voxels of the fixed grid, pull-back; affine: (4, 4) of the fixed grid, oblique or
    anisotropic if need be. The world vector is affine[:3, :3] @ u, so that world(x) + vector = world(x + u).
    """
    write_field_mm(path, np.einsum("ab,bijk->aijk", affine[:3, :3], displacement), affine)


def read_displacement(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Read a displacement field as (displacement (3, W, H, D) float32 in voxels of its grid, affine (4, 4))."""
    field, affine = read_field_mm(path)
    return np.einsum("ab,bijk->aijk", np.linalg.inv(affine[:3, :3]), field).astype(np.float32), affine


def write_field_mm(path: Path | str, field: np.ndarray, affine: np.ndarray) -> None:
    """Write a vector field (3, W, H, D) in world RAS mm as an ITK displacement field (LPS, mm)."""
    vectors = np.moveaxis(np.asarray(field, np.float32), 0, -1) * RAS_TO_LPS.astype(np.float32)
    image = nibabel.Nifti1Image(np.ascontiguousarray(vectors[:, :, :, None, :]), affine)
    image.header.set_intent("vector")
    _write(path, image)


def read_field_mm(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Read a displacement field on its own lattice as (vectors (3, W, H, D) in world RAS mm, affine (4, 4)).

    The intent of the file says what its vectors are: 1006 (displacement vector) RAS, 1007 (vector) LPS, as ITK reads both.
    InputError on another intent, as FSL's warps have, and on another shape than W×H×D×1×3.
    """
    image, geometry = open_image(path)
    if len(image.shape) != 5 or image.shape[3:] != (1, 3):
        raise refused(path, f"the shape {times(image.shape)}", "an ITK displacement field, W×H×D×1×3")
    intent = int(image.header["intent_code"])
    if intent not in (DISPLACEMENT, VECTOR):
        expected = f"{VECTOR} (vectors in LPS mm, as ITK, ANTs and 3D Slicer write them) or {DISPLACEMENT} (displacements in RAS mm)"
        raise refused(path, f"the NIfTI intent {intent}", expected)
    vectors = _voxels(path, image, np.float32)[:, :, :, 0, :]
    if intent == VECTOR:
        vectors = vectors * RAS_TO_LPS.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise refused(path, "vectors that are NaN or infinite", "finite displacements")
    return np.ascontiguousarray(np.moveaxis(vectors, -1, 0)), geometry.affine


def open_image(path: Path | str) -> tuple[SpatialImage, Geometry]:
    """A file of voxels and its geometry; the voxels are not read yet."""
    path = Path(path)
    if not path.is_file():
        raise refused(path, "no such file", "a NIfTI volume")
    with readable(path, "a file that cannot be read", "a NIfTI volume"):
        image = nibabel.load(path)
    if not isinstance(image, SpatialImage):
        raise refused(path, "a file without voxels", "a NIfTI volume")
    if len(image.shape) < 3:
        raise _no_volume(path, image.shape)
    return image, geometry_of(path, image)


@contextmanager
def readable(
    path: Path | str, found: str = "a damaged file", expected: str = "a complete NIfTI volume"
) -> Iterator[None]:
    """An error of nibabel becomes an InputError with nibabel's own words."""
    try:
        yield
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise refused(path, f"{found} ({' '.join(str(error).split())})", expected) from error


def _voxels(path: Path | str, image: SpatialImage, dtype: type) -> np.ndarray:
    if image.get_data_dtype().kind not in "iuf":
        raise refused(path, f"voxels of type {image.get_data_dtype()}", "one real number per voxel")
    with readable(path):
        return np.asanyarray(image.dataobj).astype(dtype)


def _no_volume(path: Path | str, shape: tuple[int, ...]) -> InputError:
    return refused(path, f"the shape {times(shape)}", f"one 3-D volume W×H×D of at least {SMALLEST} voxels per axis")


def _read(path: Path | str, dtype: type) -> Volume:
    """One 3-D volume in canonical order; trailing axes of length one are dropped."""
    image, geometry = open_image(path)
    if any(n != 1 for n in image.shape[3:]) or min(geometry.shape) < SMALLEST:
        raise _no_volume(path, image.shape)
    plain = nibabel.Nifti1Image(_voxels(path, image, dtype).reshape(geometry.shape), geometry.affine)
    canonical = nibabel.as_closest_canonical(plain)
    return Volume(np.ascontiguousarray(canonical.dataobj), canonical.affine, geometry)


def _write(path: Path | str, image: nibabel.Nifti1Image) -> None:
    state_affine(image.header, image.affine)
    with renamed(Path(path)) as temporary:
        nibabel.save(image, temporary)


def state_affine(header: nibabel.Nifti1Header, affine: np.ndarray, oriented: bool = True) -> None:
    """Put an affine into a header: in mm, and never two forms that contradict each other."""
    header.set_xyzt_units("mm")
    if not oriented:  # as in the scan itself: every program reads both in the same way
        header["pixdim"][1:4] = voxel_sizes(affine)
        header.set_sform(None, code="unknown")
        header.set_qform(None, code="unknown")
        return
    header.set_sform(affine, code="scanner")
    # a qform cannot hold shear; elsewhere it is stated, too, since some readers look at it first
    header.set_qform(affine, code="unknown" if sheared(affine) else "scanner", strip_shears=True)


def times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
