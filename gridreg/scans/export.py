"""A registration back on the voxels of the fixed scan, in the scanner's millimetres, for ITK, ANTs and 3D Slicer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates

from gridreg.scans.pair import Pair
from gridreg.scans.resample import resample_field
from gridreg.scans.volumes import Volume, apply_affine, read_image, write_field_mm, write_volume


def save(pair: Pair, displacement: np.ndarray, folder: Path | str, sigma_mm: np.ndarray | None = None) -> list[Path]:
    """Write a registration on the voxels of the fixed scan, in the scanner's world; returns the files.

    displacement      (3, W, H, D) in voxels of the pair's grid
    sigma_mm          (3, W, H, D) standard deviation along each array axis, or None
    warped.nii.gz     the moving scan at full resolution and with its own intensities; its lowest value outside it
    displacement.nii.gz   ITK displacement field (LPS mm) from the fixed to the moving scan, for ITK, ANTs and 3D Slicer
    sigma_mm.nii.gz   √(σx² + σy² + σz²), in the millimetres of the moving scan where an affine alignment scaled it

    Outside the preprocessed grid the values of its border are continued.
    """
    fixed, moving = (read_image(path) for path in pair.files)
    world = voxel_mm(fixed)
    field = scan_field_mm(pair, displacement, fixed)
    at = np.moveaxis(apply_affine(np.linalg.inv(moving.affine), world + np.moveaxis(field, 0, -1)), -1, 0)
    warped = map_coordinates(moving.data, at, order=1, mode="constant", cval=float(moving.data.min()))
    folder = Path(folder)
    files = [folder / "warped.nii.gz", folder / "displacement.nii.gz"]
    write_volume(files[0], warped.astype(np.float32), fixed.affine)
    write_field_mm(files[1], field, fixed.affine)
    if sigma_mm is not None:
        to_grid = np.linalg.inv(pair.to_source[0] @ pair.affine)
        at = np.moveaxis(apply_affine(to_grid, world), -1, 0)
        stretch = np.linalg.norm(pair.to_source[1][:3, :3] @ (pair.affine[:3, :3] / pair.spacing), axis=0)
        length = np.sqrt(np.square(sigma_mm * stretch[:, None, None, None]).sum(0))
        files.append(folder / "sigma_mm.nii.gz")
        write_volume(files[2], map_coordinates(length, at, order=1, mode="nearest").astype(np.float32), fixed.affine)
    return files


def voxel_mm(volume: Volume) -> np.ndarray:
    """(W, H, D, 3) world RAS mm of every voxel of a volume."""
    return apply_affine(volume.affine, np.moveaxis(np.indices(volume.data.shape), 0, -1))


def scan_field_mm(pair: Pair, displacement: np.ndarray, fixed: Volume) -> np.ndarray:
    """The displacement between the scans, on the fixed scan's voxels: (3, W', H', D') in world RAS mm.

    A point p of the fixed scan is q on the preprocessed grid, q + u(q) is its partner there, and the partner's own
    ``to_source`` brings it to the moving scan.
    """
    mm = np.einsum("ab,bijk->aijk", pair.affine[:3, :3], displacement)
    to_grid = np.linalg.inv(pair.to_source[0])
    from_p = resample_field(mm, pair.affine, fixed.affine, to_grid, fixed.data.shape)  # q + u(q) - p
    world = voxel_mm(fixed)
    partner = apply_affine(pair.to_source[1], world + np.moveaxis(from_p, 0, -1))
    return np.moveaxis(partner - world, -1, 0).astype(np.float32)
