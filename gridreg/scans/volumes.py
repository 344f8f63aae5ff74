"""Read and write NIfTI volumes, label maps and ITK displacement fields, refusing what cannot be used.

Everything read comes back in canonical RAS order (axes i, j, k = x, y, z) with its voxel → world affine (mm), which
``geometry`` reads from the header. Every refusal is one sentence that names the file, what was found and what was
expected (InputError). Every file is written under a temporary name beside its destination and then renamed, so none is
half-written.
"""

from __future__ import annotations

import gzip
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from shutil import copyfileobj

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from gridreg.errors import InputError
from gridreg.scans.files import named, renamed
from gridreg.scans.geometry import (
    CORNER_TOLERANCE,
    RAS_TO_LPS,
    Geometry,
    apply_affine,
    corners,
    geometry_of,
    sheared,
)

SMALLEST = 4  # voxels per axis: fewer is a slice, not a volume
WHOLE = 1e-3  # a label value so near to a whole number is that number: scaled and resaved maps are off by less
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
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_geometry(path: Path | str) -> Geometry:
    """Where the voxels of a 3-D volume lie; its voxels are not read. Refused as ``read_image`` refuses the header."""
    return _open(Path(path))[1]


def read_image(path: Path | str, nan: str = "refuse") -> Volume:
    """Read a 3-D image as float32. Refused: anything but one finite, non-constant 3-D volume with a usable affine.

    nan: "refuse", or "background": NaN voxels, as SPM writes them around a brain, stay NaN here, and ``normalise`` makes
    them background.
    """
    volume = _read(Path(path), np.float32)
    bad = np.isinf(volume.data) if nan == "background" else ~np.isfinite(volume.data)
    if bad.any():
        what, hint = ("infinite", "") if nan == "background" else ("NaN or infinite", "; `nan: background` accepts NaN")
        raise InputError(f"{path}: found {int(bad.sum())} voxels that are {what}, expected finite intensities{hint}.")
    low, high = np.nanmin(volume.data), np.nanmax(volume.data)
    if not low < high:
        raise InputError(f"{path}: found the value {low:g} in every voxel, expected an image with contrast.")
    return volume


def read_labels(
    path: Path | str, image: Volume, keep: list[int] | None = None, nan: str = "refuse"
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read the label map of ``image`` as int16 (W, H, D), and notes on it; labels not in ``keep`` become 0 (None keeps all).

    Refused: another shape or affine than the image's, values that are no whole numbers from 0 to 32767, and a map
    without any (kept) label. With ``keep``, values that are not kept may be anything. nan: "background" takes NaN for 0.
    """
    volume = _read(Path(path), np.float64)
    notes = volume.geometry.notes + check_same_grid(volume, image)
    data = volume.data
    if nan == "background":
        data = np.nan_to_num(data, nan=0.0)
    labels = np.rint(data)
    with np.errstate(invalid="ignore"):
        whole = np.abs(labels - data) <= WHOLE
    highest = np.iinfo(np.int16).max
    if keep is not None:
        if not all(0 <= value <= highest for value in keep):
            raise InputError(f"{path}: found the wanted labels {list(keep)}, expected numbers from 0 to {highest}.")
        if not whole.all():
            notes += (f"{path}: {int((~whole).sum())} voxels hold no whole number and count as background",)
        labels = np.where(whole & np.isin(labels, keep), labels, 0)
    elif not whole.all() or labels.min() < 0 or labels.max() > highest:
        if np.isnan(data).any():
            raise InputError(
                f"{path}: found {int(np.isnan(data).sum())} label values that are NaN, expected whole numbers from 0 to "
                f"{highest}; `nan: background` accepts them."
            )
        raise InputError(
            f"{path}: found label values from {data.min():g} to {data.max():g}, "
            f"not all of them usable, expected whole numbers from 0 to {highest}; `labels` can name those to use."
        )
    labels = labels.astype(np.int16)
    if not labels.any():
        wanted = "labelled voxels" if keep is None else f"voxels with one of the labels {list(keep)}"
        raise InputError(f"{path}: found an empty mask, expected {wanted}.")
    return labels, notes


def check_same_grid(volume: Volume, image: Volume) -> tuple[str, ...]:
    """Refuse a label map that does not lie on its image's voxels (shape and affine); notes on it.

    A map may state one of the two forms of an image alone, as many programs write it: that is a note and no refusal.
    """
    ours, theirs = volume.geometry, image.geometry
    if volume.data.shape != image.data.shape:
        raise InputError(
            f"{ours.path}: found the shape {times(ours.shape)}, expected {times(theirs.shape)} as in {theirs.path}."
        )
    if not (ours.oriented or theirs.oriented):
        return ()  # both by voxel alone
    at, allowed = corners(volume.data.shape), CORNER_TOLERANCE * image.spacing.min()
    apart = np.abs(apply_affine(volume.affine, at) - apply_affine(image.affine, at)).max()
    if apart <= allowed:
        return ()
    if ours.shape == theirs.shape and nibabel.aff2axcodes(ours.affine) == nibabel.aff2axcodes(theirs.affine):
        allowed = CORNER_TOLERANCE * min(
            np.linalg.norm(form[:3, :3], axis=0).min() for form in (*theirs.stated, np.eye(4))
        )
        at = corners(ours.shape)
        for one, other in product((*ours.stated, ours.affine), (*theirs.stated, theirs.affine)):
            if np.abs(apply_affine(one, at) - apply_affine(other, at)).max() <= allowed:
                return (f"{ours.path}: lies {apart:.3g} mm away from {theirs.path} as both are read, but states the affine of one "
                        "of its forms; it is taken to lie on the same voxels",)  # fmt: skip
    raise InputError(
        f"{ours.path}: found an affine that puts its corners {apart:.3g} mm away from those of "
        f"{theirs.path}, expected the same affine."
    )


def write_volume(path: Path | str, data: np.ndarray, affine: np.ndarray) -> None:
    """Write an array (W, H, D) with its voxel → world RAS mm affine, in the array's own data type."""
    image = nibabel.Nifti1Image(data, affine)
    _state(image.header, affine)
    with renamed(Path(path)) as temporary:
        nibabel.save(image, temporary)


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
    vectors = np.moveaxis(np.asarray(field, np.float32) * RAS_TO_LPS[:, None, None, None].astype(np.float32), 0, -1)
    image = nibabel.Nifti1Image(np.ascontiguousarray(vectors[:, :, :, None, :]), affine)
    image.header.set_intent("vector")
    _state(image.header, affine)
    with renamed(Path(path)) as temporary:
        nibabel.save(image, temporary)


def read_field_mm(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Read a displacement field on its own lattice as (vectors (3, W, H, D) in world RAS mm, affine (4, 4)).

    The intent of the file says what its vectors are: 1006 (displacement vector) RAS, 1007 (vector) LPS, as ITK reads both.
    InputError on another intent, as FSL's warps have, and on another shape than W×H×D×1×3.
    """
    image, geometry = _open(Path(path))
    if len(image.shape) != 5 or image.shape[3:] != (1, 3):
        raise InputError(
            f"{path}: found the shape {times(image.shape)}, expected an ITK displacement field, W×H×D×1×3."
        )
    intent = int(image.header["intent_code"])
    if intent not in (DISPLACEMENT, VECTOR):
        raise InputError(
            f"{path}: found the NIfTI intent {intent}, expected {VECTOR} (vectors in LPS mm, as ITK, ANTs and 3D Slicer write "
            f"them) or {DISPLACEMENT} (displacements in RAS mm)."
        )
    vectors = _voxels(Path(path), image, np.float32)[:, :, :, 0, :]
    if intent == VECTOR:
        vectors = vectors * RAS_TO_LPS.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: found vectors that are NaN or infinite, expected finite displacements.")
    return np.ascontiguousarray(np.moveaxis(vectors, -1, 0)), geometry.affine


@dataclass(frozen=True)
class StoredVoxels:
    """The voxels of a file as they are stored: value = slope × raw + inter. Integers stay as small as they are.

    raw       (W, H, D) in stored order
    geometry  of the file
    """

    raw: np.ndarray
    slope: float
    inter: float
    geometry: Geometry

    @property
    def lowest(self) -> float:
        """The lowest raw value, or the highest where the slope is negative: what lies outside the volume."""
        return float(self.raw.min() if self.slope >= 0 else self.raw.max())


def read_stored(path: Path | str) -> StoredVoxels:
    """The voxels of a 3-D file without a copy of them in floating point; NaN becomes the lowest value there is."""
    image, geometry = _open(Path(path))
    try:
        raw = np.asanyarray(image.dataobj.get_unscaled()).reshape(geometry.shape, order="F")
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise _damaged(Path(path), error) from error
    if raw.dtype.kind == "f" and np.isnan(raw).any():
        raw = np.where(np.isnan(raw), np.nanmin(raw), raw)
    if not raw.dtype.isnative:
        raw = raw.astype(raw.dtype.newbyteorder("="))
    slope, inter = (float(v) for v in (image.dataobj.slope, image.dataobj.inter))
    return StoredVoxels(raw, slope, inter, geometry)


class SlabWriter:
    """Float32 NIfTI files (.nii.gz) on one geometry, written slab by slab along the last axis: never whole in memory.

    The three components of a vector field lie behind each other in a file, so each is compressed into a part of its own;
    the parts, one after the other, are the file (gzip allows that). Use as a context: the files appear at its end, whole.
    """

    def __init__(self, files: dict[Path, int], geometry: Geometry):
        """files: for each its number of components, 1 or 3."""
        self.geometry, self.components = geometry, files

    def __enter__(self) -> SlabWriter:
        with ExitStack() as stack:
            self.parts: dict[Path, list] = {}
            self.temporary = {path: stack.enter_context(renamed(path)) for path in self.components}
            for path, number in self.components.items():
                names = [self.temporary[path].with_name(f"{self.temporary[path].name}.{n}") for n in range(number)]
                for name in names:
                    stack.callback(name.unlink, missing_ok=True)
                with named(path):
                    self.parts[path] = [_gzip(stack.enter_context(name.open("w+b"))) for name in names]
            self._stack = stack.pop_all()
        return self

    def write(self, path: Path, slab: np.ndarray) -> None:
        """The next slab of a file: (W, H, d), or (3, W, H, d) in LPS mm for a vector field."""
        with named(path):
            for part, values in zip(self.parts[path], slab.reshape(self.components[path], *slab.shape[-3:])):
                part.write(values.astype("<f4").tobytes(order="F"))

    def __exit__(self, kind, error, traceback) -> bool | None:
        if kind is None:
            try:
                for path, parts in self.parts.items():
                    with named(path), self.temporary[path].open("wb") as file:
                        head = _gzip(file)
                        head.write(self._header(self.components[path]))
                        head.close()
                        for part in parts:
                            part.close()
                            part.fileobj_behind.seek(0)
                            copyfileobj(part.fileobj_behind, file)
            except BaseException as failure:
                self._stack.__exit__(type(failure), failure, failure.__traceback__)
                raise
        return self._stack.__exit__(kind, error, traceback)

    def _header(self, components: int) -> bytes:
        header = nibabel.Nifti1Header(endianness="<")
        header.set_data_dtype(np.float32)
        header.set_data_shape(self.geometry.shape if components == 1 else (*self.geometry.shape, 1, components))
        _state(header, self.geometry.affine, self.geometry.oriented)
        if components > 1:
            header.set_intent("vector")
        header["vox_offset"], header["magic"] = 352, b"n+1"
        return header.binaryblock + bytes(4)


def _gzip(file) -> gzip.GzipFile:
    """A gzip stream without a name and a time, so that the same voxels make the same bytes."""
    stream = gzip.GzipFile("", "wb", 1, file, mtime=0)
    stream.fileobj_behind = file
    return stream


def _open(path: Path) -> tuple[nibabel.Nifti1Image, Geometry]:
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a NIfTI volume.")
    try:
        image = nibabel.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            f"{path}: found a file that cannot be read ({_why(error)}), expected a NIfTI volume."
        ) from error
    if not isinstance(image, nibabel.spatialimages.SpatialImage):
        raise InputError(f"{path}: found a file without voxels, expected a NIfTI volume.")
    if len(image.shape) < 3:
        raise _no_volume(path, image.shape)
    return image, geometry_of(path, image)


def _voxels(path: Path, image: nibabel.Nifti1Image, dtype: type) -> np.ndarray:
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: found voxels of type {image.get_data_dtype()}, expected one real number per voxel.")
    try:
        return np.asanyarray(image.dataobj).astype(dtype)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: found a damaged file ({_why(error)}), expected a complete NIfTI volume.")


def _no_volume(path: Path, shape: tuple[int, ...]) -> InputError:
    return InputError(
        f"{path}: found the shape {times(shape)}, expected one 3-D volume W×H×D of at least {SMALLEST} voxels per axis."
    )


def _read(path: Path, dtype: type) -> Volume:
    """One 3-D volume in canonical order; trailing axes of length one are dropped."""
    image, geometry = _open(path)
    if any(n != 1 for n in image.shape[3:]) or min(geometry.shape) < SMALLEST:
        raise _no_volume(path, image.shape)
    plain = nibabel.Nifti1Image(_voxels(path, image, dtype).reshape(geometry.shape), geometry.affine)
    canonical = nibabel.as_closest_canonical(plain)
    return Volume(np.ascontiguousarray(canonical.dataobj), canonical.affine, geometry)


def _state(header: nibabel.Nifti1Header, affine: np.ndarray, oriented: bool = True) -> None:
    """Put an affine into a header: in mm, and never two forms that contradict each other."""
    header.set_xyzt_units("mm")
    if not oriented:  # as in the scan itself: every program reads both in the same way
        header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
        header.set_sform(None, code="unknown")
        header.set_qform(None, code="unknown")
        return
    header.set_sform(affine, code="scanner")
    if sheared(affine):  # a qform cannot hold it
        header.set_qform(affine, code="unknown", strip_shears=True)
    else:
        header.set_qform(affine, code="scanner", strip_shears=True)  # some readers look at the qform first


def _why(error: Exception) -> str:
    """The library's own message on one line."""
    return " ".join(str(error).split())


def times(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)
