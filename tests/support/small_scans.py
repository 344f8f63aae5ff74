"""Small scans as NIfTI files, with headers of every kind."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (8, -6, 5), degrees=True).as_matrix() @ np.diag((1.5, 1.6, 2.4))
OBLIQUE[:3, 3] = (30, -12, 5)


def body(shape: tuple[int, int, int] = (40, 44, 30), seed: int = 0) -> np.ndarray:
    """An ellipsoid with texture, brighter on one side, in air: float32, (W, H, D), 0 to about 1000."""
    x = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    inside = (np.square(x / np.reshape((0.75, 0.8, 0.7), (3, 1, 1, 1))).sum(0) < 1).astype(float)
    texture = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.5)
    tissue = 500 + 200 * texture / np.abs(texture).max() - 200 * x[0]
    return (gaussian_filter(inside, 0.8) * tissue).astype(np.float32)


def upright(
    spacing: tuple[float, ...] = (2.0, 2.0, 2.0), origin: tuple[float, ...] = (-40.0, -44.0, -30.0)
) -> np.ndarray:
    """A 4×4 voxel → world matrix in RAS order."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def moved(affine: np.ndarray, *by: float) -> np.ndarray:
    """The matrix with its origin moved by so many mm."""
    affine = affine.copy()
    affine[:3, 3] += by
    return affine


def write_scan(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray,
    qform: np.ndarray | None = None,
    codes: tuple[int, int] = (1, 1),
    units: str = "mm",
) -> Path:
    """A NIfTI file whose sform is ``affine`` and whose qform is another matrix, if one is given; codes of both."""
    image = nibabel.Nifti1Image(data, None)
    image.header.set_qform(affine if qform is None else qform, codes[1], strip_shears=True)
    image.header.set_sform(affine, codes[0])
    image.header.set_xyzt_units(units)
    image.header["vox_offset"] = 352
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.header.binaryblock + bytes(4) + np.asarray(data).tobytes(order="F"))
    return path
