"""What we write, as others read it: displacement fields in SimpleITK and ANTs, landmarks, and the files of the explorer."""

from __future__ import annotations

import ants
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter
from small_scans import OBLIQUE

from gridreg.scans.export import save
from gridreg.scans.geometry import apply_affine
from gridreg.scans.volumes import read_image, write_displacement, write_volume
from gridreg.spatial import transform_points, warp

SHAPE = (26, 22, 18)
INNER = (slice(5, -5),) * 3  # at the border the two pad differently


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, moving (W, H, D), displacement (3, W, H, D) in voxels) of an oblique, anisotropic image."""
    folder, rng = tmp_path_factory.mktemp("exports"), np.random.default_rng(1)
    moving = gaussian_filter(rng.random(SHAPE), 2).astype(np.float32)
    u = np.stack([gaussian_filter(rng.standard_normal(SHAPE), 4) for _ in range(3)])
    u = (u / np.abs(u).max() * 2.5).astype(np.float32)
    write_volume(folder / "moving.nii.gz", moving, OBLIQUE)
    write_displacement(folder / "u.nii.gz", u, OBLIQUE)
    return folder, moving, u


def applied_by_simpleitk(moving: str, field: str, fixed: str) -> np.ndarray:
    """The moving file resampled on the fixed one through a displacement-field file: (W, H, D)."""
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(field, sitk.sitkVectorFloat64))
    image, reference = sitk.ReadImage(moving, sitk.sitkFloat32), sitk.ReadImage(fixed, sitk.sitkFloat32)
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.GetArrayFromImage(sitk.Resample(image, reference, transform, sitk.sitkLinear, lowest)).T


def applied_by_ants(moving: str, field: str, fixed: str) -> np.ndarray:
    return ants.apply_transforms(
        ants.image_read(fixed), ants.image_read(moving), [field], interpolator="linear"
    ).numpy()


@pytest.mark.parametrize("apply", [applied_by_simpleitk, applied_by_ants])
def test_a_written_field_warps_as_our_warp_does(written, apply):
    folder, moving, u = written
    theirs = apply(*(str(folder / name) for name in ("moving.nii.gz", "u.nii.gz", "moving.nii.gz")))
    ours = warp(torch.from_numpy(moving)[None, None], torch.from_numpy(u)[None])[0, 0].numpy()
    assert np.abs(ours - moving)[INNER].max() > 0.008, "the field moves something"
    np.testing.assert_allclose(theirs[INNER], ours[INNER], atol=2e-4)


@pytest.mark.parametrize("apply", [applied_by_simpleitk, applied_by_ants])
def test_the_explorers_files_fit_together_in_the_scans_own_space(pair, registered, tmp_path, apply):
    """Fixed and moving lie 50 mm apart in the scanner and have other voxels than the network's grid."""
    warped, field, *_ = save(pair, registered.displacement, tmp_path, registered.sigma_mm)
    theirs = apply(str(pair.files[1]), str(field), str(pair.files[0]))
    ours = read_image(warped).data
    np.testing.assert_allclose(theirs[INNER], ours[INNER], atol=5e-4)


def test_points_go_where_ants_sends_them(written):
    folder, _, u = written
    points = np.random.default_rng(2).uniform(6, np.array(SHAPE) - 7, (20, 3))
    ours = transform_points(torch.from_numpy(points)[None], torch.from_numpy(u)[None])[0].numpy()
    lps = np.array([-1, -1, 1])
    frame = pd.DataFrame(apply_affine(OBLIQUE, points) * lps, columns=["x", "y", "z"])
    theirs = ants.apply_transforms_to_points(3, frame, [str(folder / "u.nii.gz")])[["x", "y", "z"]].to_numpy() * lps
    moved = np.linalg.norm(ours - points, axis=1)
    assert moved.max() > 0.5
    np.testing.assert_allclose(apply_affine(np.linalg.inv(OBLIQUE), theirs), ours, atol=0.02)
