"""Affine alignment of a scan to a reference, with ANTs at 2 mm.

Scanner headers of pooled cohorts are not to be trusted (lost crop offsets, swapped origins), so alignment starts from
the centres of mass. It is deterministic, with one thread and one seed, in a process in which ITK has not run before
(it reads its number of threads once). The result is a matrix; only the 2 mm working copy is resampled here.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from nibabel.affines import from_matvec
from nibabel.spaces import vox2out_vox

from gridreg.errors import extra, refused
from gridreg.scans.geometry import RAS_TO_LPS, apply_affine
from gridreg.scans.intensity import normalise, read_normalised
from gridreg.scans.resample import resample_image

WORKING_MM = 2.0
# at 12, 8, 4 and 2 mm; ANTs' default (2100, 1200, 1200, 10) took three times as long and, on three real scans,
# correlated with the template by at most 0.0013 more
ITERATIONS = (200, 100, 50, 0)
SEED = 1
FOREGROUND = 0.05  # of the normalised intensity
VOLUME_RATIO = (0.2, 5.0)  # no two heads differ more than this: beyond it the alignment has failed


@dataclass(frozen=True)
class Reference:
    """What scans are aligned to: a head or organ without its surroundings, in [0, 1]."""

    name: str
    image: np.ndarray  # (W, H, D) at WORKING_MM
    affine: np.ndarray  # (4, 4) voxel -> world RAS mm
    centre: np.ndarray  # (3,) world RAS mm, centre of the foreground's bounding box
    oriented: bool = True  # whether it is known which side is left


def read_reference(reference: str | Path) -> Reference:
    """``"mni152"`` (the T1 template inside nilearn, within its brain mask) or the path of a NIfTI volume."""
    if str(reference) == "mni152":
        with extra("align", "affine_reference mni152"):
            from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

        template = load_mni152_template(resolution=int(WORKING_MM))
        mask = load_mni152_brain_mask(resolution=int(WORKING_MM))
        brain = template.get_fdata(dtype=np.float32) * mask.get_fdata(dtype=np.float32)
        return as_reference("mni152", normalise(brain), template.affine)
    volume, image = read_normalised(reference)
    return as_reference(str(reference), *working_copy(image, volume.affine), volume.geometry.oriented)


def as_reference(name: str, image: np.ndarray, affine: np.ndarray, oriented: bool = True) -> Reference:
    """What an image in [0, 1] on an upright 2 mm grid is as a reference."""
    return Reference(name, image, affine, content_box(image, affine).mean(axis=0), oriented)


def content_box(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The world box, RAS mm, around the foreground of an image in [0, 1]: (lowest, highest), (2, 3)."""
    along = [np.flatnonzero((image > FOREGROUND).any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    world = apply_affine(affine, np.array(list(product(*((at[0], at[-1]) for at in along))), float))
    return np.stack([world.min(axis=0), world.max(axis=0)])


def working_copy(image: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole image on an upright 2 mm grid: (array, voxel → world affine)."""
    shape, grid = vox2out_vox((image.shape, affine), [WORKING_MM] * 3)
    return resample_image(image, np.linalg.inv(affine) @ grid, shape), grid


def align(image: np.ndarray, affine: np.ndarray, reference: Reference, name: str = "image") -> np.ndarray:
    """The affine map (4, 4) from the reference's world to the image's world, RAS mm.

    image: (W, H, D) in [0, 1] (``normalise``), affine: its voxel → world matrix. Mutual information, 12 parameters,
    about 3 s on one thread. Raises InputError, naming ``name``, where no plausible map is found.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # sums in a fixed order; read when ITK first runs
    with extra("align", "affine alignment"):
        import ants

    fixed, moving = _to_ants(reference.image, reference.affine), _to_ants(*working_copy(image, affine))
    ants.config.set_ants_deterministic(on=False, seed_value=SEED)  # `on` would allow nothing but SyN
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = ants.registration(fixed, moving, "Affine", outprefix=f"{folder}/", aff_iterations=ITERATIONS)
            matrix = _to_matrix(ants.read_transform(result["fwdtransforms"][0]))
    except RuntimeError as error:
        found = f"no affine alignment to {reference.name} ({error})"
        raise refused(name, found, "a scan of the same body part") from error
    finally:
        ants.config.set_ants_deterministic(on=False, seed_value=None)
    ratio = np.linalg.det(matrix[:3, :3])
    if not VOLUME_RATIO[0] < ratio < VOLUME_RATIO[1]:
        found = f"an affine alignment to {reference.name} that scales volumes by {ratio:.2g}"
        raise refused(name, found, "{:g} to {:g} for a scan of the same body part".format(*VOLUME_RATIO))
    return matrix


def _to_ants(image: np.ndarray, affine: np.ndarray):
    """An array on an upright grid (diagonal affine, RAS) as an ANTs image, whose world is LPS."""
    import ants

    spacing, origin = np.diag(affine)[:3], RAS_TO_LPS * affine[:3, 3]
    return ants.from_numpy(image, origin=tuple(origin), spacing=tuple(spacing), direction=np.diag(RAS_TO_LPS))


def _to_matrix(transform) -> np.ndarray:
    """An ITK affine transform (LPS: y = A (x - c) + c + t) as a 4×4 matrix in RAS."""
    parameters, centre = np.asarray(transform.parameters), np.asarray(transform.fixed_parameters)
    linear = parameters[:9].reshape(3, 3)
    flip = np.diag([*RAS_TO_LPS, 1.0])
    return flip @ from_matvec(linear, parameters[9:] + centre - linear @ centre) @ flip
