"""A registration back on the voxels of the fixed scan, in the scanner's millimetres, for ITK, ANTs and 3D Slicer."""

from __future__ import annotations

import gzip
import json
from contextlib import ExitStack
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile

import nibabel
import numpy as np
from scipy.ndimage import map_coordinates

from gridreg.scans.files import named, renamed
from gridreg.scans.geometry import RAS_TO_LPS, Geometry
from gridreg.scans.pair import Pair
from gridreg.scans.volumes import open_image, read_geometry, readable, state_affine

SLAB = 2**19  # voxels that are worked on at once


def save(pair: Pair, displacement: np.ndarray, folder: Path | str, sigma_mm: np.ndarray | None = None) -> list[Path]:
    """Write a registration on the voxels of the fixed scan, in stored order, shape and affine; returns the files.

    displacement      (3, W, H, D) in voxels of the pair's grid
    sigma_mm          (3, W, H, D) standard deviation along each array axis, or None
    warped.nii.gz     the moving scan at full resolution and with its own intensities; its lowest value outside it
    displacement.nii.gz   ITK displacement field (LPS mm) from the fixed to the moving scan, for ITK, ANTs and 3D Slicer
    sigma_mm.nii.gz   √(σx² + σy² + σz²), in the millimetres of the moving scan where an affine alignment scaled it
    registration.json     the two files, and the notes of the pair

    A point p of the fixed scan is q on the pair's grid, q + u(q) is its partner there, and the partner's own ``to_source``
    brings it to the moving scan. Outside the grid the values of its border are continued. It is all done in slabs: beside
    the moving scan as it is stored, little memory is needed. InputError where a scan cannot be read any more.
    """
    folder = Path(folder)
    fixed, (raw, slope, inter, moving) = read_geometry(pair.files[0]), _stored(pair.files[1])
    lowest = float(raw.min() if slope >= 0 else raw.max())
    warped, field, sigma = (folder / f"{name}.nii.gz" for name in ("warped", "displacement", "sigma_mm"))
    files = {warped: 1, field: 3} | ({sigma: 1} if sigma_mm is not None else {})
    to_grid = np.linalg.inv(pair.to_source[0] @ pair.affine) @ fixed.affine  # voxel of the scan → voxel of the grid
    to_world = pair.to_source[1] @ pair.affine  # voxel of the grid → world of the moving scan
    to_moving = np.linalg.inv(moving.affine) @ to_world
    if sigma_mm is not None:
        stretch = np.linalg.norm(pair.to_source[1][:3, :3] @ (pair.affine[:3, :3] / pair.spacing), axis=0)
        length = np.sqrt(np.square(sigma_mm * stretch[:, None, None, None]).sum(0))
    deep = max(1, SLAB // (fixed.shape[0] * fixed.shape[1]))
    with SlabWriter(files, fixed) as writer:
        for first in range(0, fixed.shape[2], deep):
            voxel = np.indices((*fixed.shape[:2], min(deep, fixed.shape[2] - first)), float)
            voxel[2] += first
            at = _mapped(to_grid, voxel)
            partner = at + [map_coordinates(u, at, order=1, mode="nearest") for u in displacement]
            values = map_coordinates(
                raw, _mapped(to_moving, partner), np.float64, order=1, mode="constant", cval=lowest
            )
            writer.write(warped, values * slope + inter)
            vectors = _mapped(to_world, partner) - _mapped(fixed.affine, voxel)
            writer.write(field, vectors * RAS_TO_LPS[:, None, None, None])
            if sigma_mm is not None:
                writer.write(sigma, map_coordinates(length, at, order=1, mode="nearest"))
        writer.finish()
    record = folder / "registration.json"
    fixed_file, moving_file = map(str, pair.files)
    content = {"fixed": fixed_file, "moving": moving_file, "files": [path.name for path in files], "notes": pair.notes}
    with renamed(record) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*files, record]


class SlabWriter(ExitStack):
    """Float32 NIfTI files (.nii.gz) on one geometry, written slab by slab along the last axis: never whole in memory.

    Use as a context. The voxels go to temporary files; ``finish`` compresses them, and all files appear at once.
    """

    def __init__(self, files: dict[Path, int], geometry: Geometry):
        """files: for each its number of components, 1 or 3."""
        super().__init__()
        self.files, self.geometry = files, geometry
        self.voxels, self.written = {}, dict.fromkeys(files, 0)
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.voxels[path] = self.enter_context(TemporaryFile(dir=path.parent))

    def write(self, path: Path, slab: np.ndarray) -> None:
        """The next slab of a file: (W, H, d), or (3, W, H, d) in LPS mm for a vector field, whose components lie apart."""
        wide, high, deep = self.geometry.shape
        with named(path):
            for number, values in enumerate(slab.reshape(self.files[path], *slab.shape[-3:])):
                self.voxels[path].seek(4 * wide * high * (number * deep + self.written[path]))
                self.voxels[path].write(values.astype("<f4").tobytes(order="F"))
        self.written[path] += slab.shape[-1]

    def finish(self) -> None:
        """Put every file in its place."""
        with ExitStack() as stack:
            for path, components in self.files.items():
                temporary = stack.enter_context(renamed(path))
                header = nibabel.Nifti1Header(endianness="<")
                header.set_data_dtype(np.float32)
                header.set_data_shape((*self.geometry.shape, 1, components) if components > 1 else self.geometry.shape)
                state_affine(header, self.geometry.affine, self.geometry.oriented)
                if components > 1:
                    header.set_intent("vector")
                self.voxels[path].seek(0)
                with named(path), temporary.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
                    header.write_to(packed)  # neither a name nor a time: the same voxels make the same bytes
                    copyfileobj(self.voxels[path], packed)


def _stored(path: Path) -> tuple[np.ndarray, float, float, Geometry]:
    """Voxels as stored (value = slope × raw + inter; integers stay as small as they are; NaN becomes the lowest value)."""
    image, geometry = open_image(path)
    with readable(path):
        raw = np.asanyarray(image.dataobj.get_unscaled()).reshape(geometry.shape, order="F")
    if raw.dtype.kind == "f" and np.isnan(raw).any():
        raw = np.where(np.isnan(raw), np.nanmin(raw), raw)
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    return raw, float(image.dataobj.slope), float(image.dataobj.inter), geometry


def _mapped(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (3, …) through a 4×4 matrix."""
    return np.tensordot(affine[:3, :3], points, 1) + affine[:3, 3, None, None, None]
