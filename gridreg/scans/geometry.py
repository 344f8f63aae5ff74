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
from nibabel.affines import apply_affine, voxel_sizes
from scipy.linalg import polar

from gridreg.errors import refused

RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])  # ITK's world has x and y the other way round
SHEAR = 2e-4  # ITK takes direction cosines that are orthonormal to about this
SAME_SIZE = 1e-3  # relative difference of two voxel sizes that is rounding
CORNER_TOLERANCE = 0.1  # voxels by which two matrices may put a corner apart (rounded headers differ by less)
LARGEST_TURN = 45.0  # degrees: two forms that are turned further against each other disagree which side is which
UNITS = {1: ("metre", 1000.0), 3: ("micron", 0.001)}  # xyzt_units → name, mm
NOT_ORIENTED = "no orientation in the header (sform_code and qform_code are 0)"


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


def corners(shape: tuple[int, ...]) -> np.ndarray:
    """(8, 3) voxel positions of the corners of a volume."""
    return np.indices((2, 2, 2)).reshape(3, 8).T * (np.array(shape) - 1)


def sheared(affine: np.ndarray) -> bool:
    """Whether the axes of a 4×4 matrix are not at right angles: ITK and a qform cannot hold it."""
    directions = affine[:3, :3] / voxel_sizes(affine)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > SHEAR)


def check_orientations(geometries: list[Geometry]) -> None:
    """Refuse scans with and without a stated orientation side by side: one of them could be mirrored."""
    known = [g for g in geometries if g.oriented]
    unknown = [g for g in geometries if not g.oriented]
    if known and unknown:
        raise refused(unknown[0].path, NOT_ORIENTED, f"one as in {known[0].path}: the scan could be mirrored")


def geometry_of(path: Path, image: nibabel.spatialimages.SpatialImage) -> Geometry:
    """The geometry of an opened file. InputError where none can be made of its header, or two forms mirror each other."""
    header, shape = image.header, tuple(int(n) for n in image.shape[:3])
    not_oriented = (
        f"{path}: the header states no orientation (sform_code and qform_code are 0); axes are taken to run to the left, "
        "back and head, as in ITK and ANTs, and which side is left is not known"
    )
    unusable = path, "a header without a usable voxel size", "an invertible affine"
    if not isinstance(header, nibabel.Nifti1Header):  # MGH and its like state one matrix in mm; Analyze states none
        if not _usable(image.affine):
            raise refused(*unusable)
        oriented = not isinstance(header, nibabel.AnalyzeHeader)
        return Geometry(path, image.affine, shape, oriented, () if oriented else (not_oriented,))
    unit, scale = UNITS.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))
    notes = []
    if scale != 1:
        notes.append(f"{path}: the header states {unit}; voxel sizes and positions are taken times {scale:g}, as mm")
    sizes = np.abs(header["pixdim"][1:4].astype(float))
    sized = np.isfinite(sizes).all() and (sizes > 0).all()
    codes = {name: int(header[f"{name}_code"]) for name in ("sform", "qform")}
    forms = {}
    for name, read in (("sform", header.get_sform), ("qform", header.get_qform)):
        if codes[name] > 0:
            try:
                matrix = read()
            except (ValueError, np.linalg.LinAlgError, nibabel.spatialimages.HeaderDataError):
                matrix = np.zeros((4, 4))
            if _usable(matrix):
                forms[name] = matrix
            else:
                notes.append(f"{path}: the {name} (code {codes[name]}) is no invertible matrix and is passed over")
    if not forms:
        if any(codes.values()) or not sized:
            raise refused(*unusable)
        affine = np.diag([*(RAS_TO_LPS * sizes * scale), 1.0])
        return Geometry(path, affine, shape, False, (*notes, not_oriented))
    name = _chosen(forms, codes["sform"])
    matrix = forms[name].copy()
    if len(forms) == 2:
        how = _difference(path, *forms.values(), shape, scale)
        if how:
            notes.append(f"{path}: sform (code {codes['sform']}) and qform (code {codes['qform']}) differ by {how}; the {name} "
                         "is used, as in ITK and ANTs")  # fmt: skip
    lengths = voxel_sizes(matrix)
    if sheared(matrix):
        notes.append(
            f"{path}: the {name} is sheared; it is used as it stands, and ITK, ANTs and 3D Slicer refuse the file"
        )
    elif sized and not np.allclose(lengths, sizes, rtol=SAME_SIZE):
        form, pixdim = ("×".join(f"{v:.4g}" for v in values * scale) for values in (lengths, sizes))
        notes.append(
            f"{path}: the {name} states voxels of {form} mm and pixdim {pixdim} mm; pixdim is used, as in ITK and ANTs"
        )
        matrix[:3, :3] *= sizes / lengths
    matrix[:3] *= scale
    return Geometry(path, matrix, shape, True, tuple(notes), tuple(forms.values()))


def _chosen(forms: dict[str, np.ndarray], sform_code: int) -> str:
    """The form that ITK reads."""
    if len(forms) == 1:
        return next(iter(forms))
    same = np.allclose(forms["sform"], forms["qform"], atol=1e-3)  # but for rounding, and the sform is rounded less
    return "sform" if (sform_code == 1 or same) and not sheared(forms["sform"]) else "qform"


def _difference(path: Path, sform: np.ndarray, qform: np.ndarray, shape: tuple[int, int, int], scale: float) -> str:
    """By how much two forms differ in mm; "" where it is rounding. InputError where they disagree which side is which."""
    apart = np.linalg.norm(apply_affine(sform, corners(shape)) - apply_affine(qform, corners(shape)), axis=1)
    if apart.max() <= CORNER_TOLERANCE * voxel_sizes(qform).min():
        return ""
    turn = polar(sform[:3, :3])[0] @ polar(qform[:3, :3])[0].T
    angle = np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    if np.linalg.det(turn) < 0 or angle > LARGEST_TURN:
        axes = ["".join(nibabel.aff2axcodes(form)) for form in (sform, qform)]
        raise refused(
            path,
            f"a sform that says {axes[0]} and a qform that says {axes[1]}",
            "two forms that agree which side is which: a guess could mirror the patient; set the code of the wrong form to 0",
        )
    if np.allclose(sform[:3, :3], qform[:3, :3], atol=1e-4):
        return f"({', '.join(f'{v:.3g}' for v in (sform - qform)[:3, 3] * scale + 0.0)}) mm"
    return f"{apart.min() * scale:.3g} to {apart.max() * scale:.3g} mm"


def _usable(matrix: np.ndarray) -> bool:
    lengths = voxel_sizes(matrix)
    return bool(np.isfinite(matrix).all() and lengths.all() and abs(np.linalg.det(matrix[:3, :3] / lengths)) > 1e-6)
