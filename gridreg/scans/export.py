"""A registration back on the voxels of the fixed scan, in the scanner's millimetres, for ITK, ANTs and 3D Slicer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates

from gridreg.scans.files import renamed
from gridreg.scans.geometry import RAS_TO_LPS
from gridreg.scans.pair import Pair
from gridreg.scans.volumes import SlabWriter, read_geometry, read_stored

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
    fixed, moving = read_geometry(pair.files[0]), read_stored(pair.files[1])
    warped, field, sigma = (folder / f"{name}.nii.gz" for name in ("warped", "displacement", "sigma_mm"))
    files = {warped: 1, field: 3} | ({sigma: 1} if sigma_mm is not None else {})
    to_grid = np.linalg.inv(pair.to_source[0] @ pair.affine) @ fixed.affine  # voxel of the scan → voxel of the grid
    to_world = pair.to_source[1] @ pair.affine  # voxel of the grid → world of the moving scan
    to_moving = np.linalg.inv(moving.geometry.affine) @ to_world
    length = None
    if sigma_mm is not None:
        stretch = np.linalg.norm(pair.to_source[1][:3, :3] @ (pair.affine[:3, :3] / pair.spacing), axis=0)
        length = np.sqrt(np.square(sigma_mm * stretch[:, None, None, None]).sum(0))
    lowest = moving.lowest
    deep = max(1, SLAB // (fixed.shape[0] * fixed.shape[1]))
    with SlabWriter(files, fixed) as writer:
        for first in range(0, fixed.shape[2], deep):
            voxel = np.indices((*fixed.shape[:2], min(deep, fixed.shape[2] - first)), float)
            voxel[2] += first
            at = _mapped(to_grid, voxel)
            partner = at + [map_coordinates(u, at, order=1, mode="nearest") for u in displacement]
            raw = map_coordinates(
                moving.raw, _mapped(to_moving, partner), np.float64, order=1, mode="constant", cval=lowest
            )
            writer.write(warped, raw * moving.slope + moving.inter)
            vectors = _mapped(to_world, partner) - _mapped(fixed.affine, voxel)
            writer.write(field, vectors * RAS_TO_LPS[:, None, None, None])
            if length is not None:
                writer.write(sigma, map_coordinates(length, at, order=1, mode="nearest"))
    record = folder / "registration.json"
    content = {"fixed": str(pair.files[0]), "moving": str(pair.files[1]), "files": [path.name for path in files],
               "notes": list(pair.notes)}  # fmt: skip
    with renamed(record) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*files, record]


def _mapped(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (3, …) through a 4×4 matrix."""
    return np.tensordot(affine[:3, :3], points, 1) + affine[:3, 3, None, None, None]
