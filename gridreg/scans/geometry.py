"""Where a scan's voxels lie: its voxel → world matrix in mm, read as ITK reads it, and a note on whatever is in doubt.

A NIfTI header may state the matrix twice (sform and qform), once or not at all, and in other units than mm. ITK, ANTs and
3D Slicer read such a header in one way and nibabel in another. Exports are made for the former, so their way is taken:

* the sform, where it is stated (code above 0), free of shear, and either its code is 1 (scanner) or no qform is stated;
* otherwise the qform, where it is stated;
* a sheared sform without a qform is taken as it stands; ITK refuses the file;
* voxel sizes come from ``pixdim``, where the sform says otherwise;
* ``xyzt_units`` of micron or metre are scaled to mm; every other unit is taken for mm;
* without any form, voxel axes run to the left, back and head, from the world's origin. Which side is left is not known
  then: ``oriented`` is False, and such a scan is never brought together with one whose orientation is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from gridreg.errors import InputError

RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])  # ITK's world has x and y the other way round
SHEAR = 2e-4  # ITK takes direction cosines that are orthonormal to about this
SAME_SIZE = 1e-3  # relative difference of two voxel sizes that is rounding
CORNER_TOLERANCE = 0.1  # voxels by which two matrices may put a corner apart (rounded headers differ by less)
LARGEST_TURN = 45.0  # degrees: two forms that are turned further against each other disagree which side is which
MM = {1: 1000.0, 3: 0.001}  # xyzt_units: metre, micron


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a file, in stored order, lie.

    affine    (4, 4) stored voxel → world RAS mm
    shape     (W, H, D) as stored
    oriented  whether the file says which side is which
    notes     a sentence for whatever the header leaves open or says twice
    stated    every matrix that the header states, as it stands, whichever was taken
    """

    path: Path
    affine: np.ndarray
    shape: tuple[int, int, int]
    oriented: bool = True
    notes: tuple[str, ...] = ()
    stated: tuple[np.ndarray, ...] = ()

    @property
    def centre(self) -> np.ndarray:
        """World RAS mm of the centre of the volume, (3,)."""
        return apply_affine(self.affine, (np.array(self.shape) - 1) / 2)


def apply_affine(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 3) through a 4×4 matrix."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def corners(shape: tuple[int, ...]) -> np.ndarray:
    """(8, 3) voxel positions of the corners of a volume."""
    return np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(shape) - 1)


def sheared(affine: np.ndarray) -> bool:
    """Whether the axes of a 4×4 matrix are not at right angles: ITK and a qform cannot hold it."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > SHEAR)


def geometry_of(path: Path, image: nibabel.spatialimages.SpatialImage) -> Geometry:
    """The geometry of an opened file. InputError where none can be made of its header, or two forms mirror each other."""
    header, shape = image.header, tuple(int(n) for n in image.shape[:3])
    if not isinstance(header, nibabel.Nifti1Header):  # MGH and its like state one matrix in mm; Analyze states none
        if not _usable(image.affine):
            raise _unusable(path)
        if isinstance(header, nibabel.AnalyzeHeader):
            return Geometry(path, image.affine, shape, False, (_not_oriented(path),))
        return Geometry(path, image.affine, shape)
    scale = MM.get(int(header["xyzt_units"]) & 7, 1.0)
    notes = []
    if scale != 1:
        unit = "micron" if scale < 1 else "metre"
        notes.append(f"{path}: the header states {unit}; voxel sizes and positions are taken times {scale:g}, as mm")
    sizes = np.abs(header["pixdim"][1:4].astype(float))
    codes = int(header["sform_code"]), int(header["qform_code"])
    forms = {}
    for name, code, read in (("sform", codes[0], header.get_sform), ("qform", codes[1], header.get_qform)):
        if code > 0:
            matrix = _attempt(read)
            if matrix is None:
                notes.append(f"{path}: the {name} (code {code}) is no invertible matrix and is passed over")
            else:
                forms[name] = matrix
    if not forms:
        if any(codes) or not (np.isfinite(sizes).all() and (sizes > 0).all()):
            raise _unusable(path)
        affine = np.diag([*(RAS_TO_LPS * sizes * scale), 1.0])
        return Geometry(path, affine, shape, False, (*notes, _not_oriented(path)))
    stated = tuple(forms.values())
    name, matrix = _chosen(forms, codes[0])
    if len(forms) == 2:
        notes += _difference(path, forms, name, codes, shape, scale)
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if sheared(matrix):
        notes.append(
            f"{path}: the {name} is sheared; it is used as it stands, and ITK, ANTs and 3D Slicer refuse the file"
        )
    elif (sizes > 0).all() and np.isfinite(sizes).all() and not np.allclose(lengths, sizes, rtol=SAME_SIZE):
        notes.append(f"{path}: the {name} states voxels of {_mm(lengths * scale)} mm and pixdim {_mm(sizes * scale)} mm; "
                     "pixdim is used, as in ITK and ANTs")  # fmt: skip
        matrix = matrix.copy()
        matrix[:3, :3] *= sizes / lengths
    if scale != 1:
        matrix = np.diag([scale, scale, scale, 1.0]) @ matrix
    return Geometry(path, matrix, shape, True, tuple(notes), stated)


def check_orientations(geometries: list[Geometry]) -> None:
    """Refuse scans with and without a stated orientation side by side: one of them could be mirrored."""
    known = [g for g in geometries if g.oriented]
    unknown = [g for g in geometries if not g.oriented]
    if known and unknown:
        raise InputError(
            f"{unknown[0].path}: found no orientation in the header (sform_code and qform_code are 0), expected one as in "
            f"{known[0].path}: the scan could be mirrored."
        )


def _chosen(forms: dict[str, np.ndarray], sform_code: int) -> tuple[str, np.ndarray]:
    """The form that ITK reads."""
    if "qform" not in forms:
        return "sform", forms["sform"]
    if "sform" in forms and sform_code == 1 and not sheared(forms["sform"]):
        return "sform", forms["sform"]
    if "sform" in forms and np.allclose(forms["sform"], forms["qform"], atol=1e-3) and not sheared(forms["sform"]):
        return "sform", forms["sform"]  # the same but for rounding, and the sform is rounded less
    return "qform", forms["qform"]


def _difference(path: Path, forms: dict, name: str, codes: tuple[int, int], shape: tuple, scale: float) -> list[str]:
    """A note on two forms that differ. InputError where they disagree which side is which."""
    sform, qform = forms["sform"], forms["qform"]
    at = corners(shape)
    apart = np.linalg.norm(apply_affine(sform, at) - apply_affine(qform, at), axis=1)
    if apart.max() <= CORNER_TOLERANCE * np.linalg.norm(qform[:3, :3], axis=0).min():
        return []
    turns = [np.linalg.svd(m[:3, :3]) for m in (sform, qform)]
    turn = (turns[0][0] @ turns[0][2]) @ (turns[1][0] @ turns[1][2]).T
    angle = np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    if np.linalg.det(turn) < 0 or angle > LARGEST_TURN:
        axes = ["".join(nibabel.aff2axcodes(m)) for m in (sform, qform)]
        raise InputError(
            f"{path}: found a sform that says {axes[0]} and a qform that says {axes[1]}, expected two forms that agree which "
            "side is which: a guess could mirror the patient; set the code of the wrong form to 0."
        )
    shift = (sform - qform)[:3, 3] * scale
    how = f"differ by ({', '.join(f'{v:.3g}' for v in shift + 0.0)}) mm"
    if not np.allclose(sform[:3, :3], qform[:3, :3], atol=1e-4):
        how = f"differ by {apart.min() * scale:.3g} to {apart.max() * scale:.3g} mm"
    return [
        f"{path}: sform (code {codes[0]}) and qform (code {codes[1]}) {how}; the {name} is used, as in ITK and ANTs"
    ]


def _attempt(read) -> np.ndarray | None:
    """A form as a matrix, or None where it is none."""
    try:
        matrix = read()
    except (ValueError, np.linalg.LinAlgError, nibabel.spatialimages.HeaderDataError):
        return None
    return matrix if _usable(matrix) else None


def _usable(matrix: np.ndarray | None) -> bool:
    if matrix is None or not np.isfinite(matrix).all():
        return False
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    return bool((lengths > 0).all() and abs(np.linalg.det(matrix[:3, :3] / lengths)) > 1e-6)


def _unusable(path: Path) -> InputError:
    return InputError(f"{path}: found a header without a usable voxel size, expected an invertible affine.")


def _not_oriented(path: Path) -> str:
    return (
        f"{path}: the header states no orientation (sform_code and qform_code are 0); axes are taken to run to the left, "
        "back and head, as in ITK and ANTs, and which side is left is not known"
    )


def _mm(values: np.ndarray) -> str:
    return "×".join(f"{v:.4g}" for v in values)
