"""What we write, as others read it: displacement fields in SimpleITK and ANTs, landmarks, and the files of the explorer."""

from __future__ import annotations

import errno
import json

import ants
import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from small_scans import OBLIQUE, body, moved, upright, write_scan

from gridreg.scans import export
from gridreg.scans.export import save
from gridreg.scans.geometry import apply_affine
from gridreg.scans.intensity import Intensity
from gridreg.scans.pair import read_pair
from gridreg.scans.volumes import read_field_mm, read_geometry, read_image, write_displacement, write_volume
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


def smooth_displacement(pair, amplitude: float = 2.0) -> np.ndarray:
    u = np.stack([gaussian_filter(np.random.default_rng(n).standard_normal(pair.shape), 3) for n in range(3)])
    return (u / np.abs(u).max() * amplitude).astype(np.float32)


SAGITTAL = np.array([[0, 0, 2.0, -40], [2.0, 0, 0, -44], [0, 2.0, 0, -30], [0, 0, 0, 1]])
STORED = {  # of the fixed scan: stored array, keyword arguments of write_scan
    "RAS": (body(), {"affine": upright()}),
    "LAS": (body(), {"affine": upright((-2, 2, 2), (40, -44, -30))}),
    "sagittal": (np.ascontiguousarray(body().transpose(1, 2, 0)), {"affine": SAGITTAL}),
    "oblique": (body(), {"affine": moved(OBLIQUE @ np.diag((1.3, 1.2, 0.8, 1)), -70, -40, -40)}),
    "two forms, sform read": (body(), {"affine": moved(upright(), 12, -7, 5), "qform": upright()}),
    "two forms, qform read": (body(), {"affine": moved(upright(), 12, -7, 5), "qform": upright(), "codes": (2, 1)}),
    "sheared sform and a qform": (
        body(),
        {"affine": upright() + 0.4 * np.eye(4, k=1) * np.diag((1, 0, 0, 0)), "qform": upright()},
    ),
    "micron": (body(), {"affine": upright((2000, 2000, 2000), (-40000, -44000, -30000)), "units": "micron"}),
}


@pytest.mark.parametrize("apply", [applied_by_simpleitk, applied_by_ants])
@pytest.mark.parametrize("kind", STORED)
def test_exports_lie_on_the_stored_voxels_and_fit_the_originals(tmp_path, kind, apply):
    """Stored order, shape and affine of the fixed scan, whatever its header; ITK and ANTs make the same of the field."""
    data, header = STORED[kind]
    fixed = write_scan(tmp_path / "fixed.nii", data, **header)
    moving = write_scan(tmp_path / "moving.nii", body(seed=3), **STORED["two forms, qform read"][1])
    pair = read_pair(fixed, moving, (36, 38, 28), 2.2)
    warped, field, sigma, record = save(
        pair, smooth_displacement(pair), tmp_path / "out", np.ones((3, *pair.shape), np.float32)
    )
    geometry = read_geometry(fixed)
    for file in (warped, field, sigma):
        image = nibabel.load(file)
        assert image.shape[:3] == data.shape and image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.affine, geometry.affine, atol=1e-4)
        header = image.header
        np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-4, err_msg="no contradiction")
        theirs, original = (sitk.ReadImage(str(path)) for path in (file, fixed))
        for stated in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(theirs, stated)(), getattr(original, stated)(), atol=1e-4)
    theirs, ours = apply(str(moving), str(field), str(fixed)), nibabel.load(warped).get_fdata()
    assert ours[INNER].std() > 50
    np.testing.assert_allclose(theirs[INNER], ours[INNER], atol=0.05)
    np.testing.assert_allclose(nibabel.load(sigma).get_fdata(), 3**0.5, rtol=1e-5)
    said = json.loads(record.read_text())
    assert said["notes"] == list(pair.notes) and said["fixed"] == str(fixed)
    assert any("sform (code 2) and qform (code 1)" in note and str(moving) in note for note in said["notes"])


def test_an_export_of_a_scan_without_orientation_claims_none(tmp_path):
    fixed, moving = (write_scan(tmp_path / f"{n}.nii", body(seed=n), upright(), codes=(0, 0)) for n in (1, 2))
    pair = read_pair(fixed, moving, (36, 38, 28), 2.2)
    warped, field, _ = save(pair, smooth_displacement(pair), tmp_path / "out")
    for file in (warped, field):
        header = nibabel.load(file).header
        assert header["sform_code"] == 0 and header["qform_code"] == 0
        np.testing.assert_allclose(nibabel.load(file).affine, nibabel.load(fixed).affine)
    theirs = applied_by_simpleitk(str(moving), str(field), str(fixed))
    np.testing.assert_allclose(theirs[INNER], nibabel.load(warped).get_fdata()[INNER], atol=0.05)


def test_a_sheared_scan_keeps_its_shear_in_one_form(tmp_path):
    """ITK reads neither the scan nor the export; nibabel reads both, and the warp is right."""
    affine = upright()
    affine[0, 1] = 0.8
    fixed = write_scan(tmp_path / "fixed.nii", body(), affine, codes=(1, 0))
    moving = write_scan(tmp_path / "moving.nii", body(), upright())
    pair = read_pair(fixed, moving, (36, 38, 28), 2.2, start="headers")
    warped, *_ = save(pair, np.zeros((3, *pair.shape), np.float32), tmp_path / "out")
    image = nibabel.load(warped)
    assert image.header["qform_code"] == 0 and any("sheared" in note for note in pair.notes)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    at = apply_affine(np.linalg.inv(upright()) @ affine, np.moveaxis(np.indices(body().shape), 0, -1))
    expected = map_coordinates(body(), np.moveaxis(at, -1, 0), order=1, cval=float(body().min()))
    np.testing.assert_allclose(image.get_fdata()[INNER], expected[INNER], atol=1e-2)


@pytest.mark.parametrize("kind", ["int16", "scaled int16", "uint8", "float64 with NaN", "big-endian", "4-D"])
def test_any_stored_type_is_warped_in_its_own_intensities(tmp_path, kind, monkeypatch):
    """Slabs of one slice give what the whole volume at once gives, for every stored type."""
    monkeypatch.setattr(export, "SLAB", 1)
    values = np.round(body(seed=3) / 4)
    if kind == "float64 with NaN":
        values = np.where(values < 1, np.nan, values)
    if kind == "4-D":
        values = values[..., None]
    image = nibabel.Nifti1Image(values.astype({"uint8": np.uint8, "int16": np.int16}.get(kind, np.float64)), upright())
    if kind == "scaled int16":
        image.set_data_dtype(np.int16)
    if kind == "big-endian":
        image = nibabel.Nifti1Image(values.astype(">f4"), upright(), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(image, tmp_path / "moving.nii.gz")
    fixed = write_scan(tmp_path / "fixed.nii", body(), upright())
    pair = read_pair(fixed, tmp_path / "moving.nii.gz", (36, 38, 28), 2.2, intensity=Intensity(nan="background"))
    u = smooth_displacement(pair)
    warped, field, _ = save(pair, u, tmp_path / "out")
    vectors, affine = read_field_mm(field)
    world = apply_affine(affine, np.moveaxis(np.indices(body().shape), 0, -1)) + np.moveaxis(vectors, 0, -1)
    stored = nibabel.load(tmp_path / "moving.nii.gz").get_fdata().reshape(body().shape)
    stored = np.where(np.isnan(stored), np.nanmin(stored), stored)
    at = np.moveaxis(apply_affine(np.linalg.inv(upright()), world), -1, 0)
    expected = map_coordinates(stored, at, order=1, mode="constant", cval=stored.min())
    np.testing.assert_allclose(nibabel.load(warped).get_fdata(), expected, atol=1e-2)
    grid = np.linalg.inv(pair.to_source[0] @ pair.affine) @ upright()
    inner = np.moveaxis(apply_affine(grid, np.moveaxis(np.indices(body().shape), 0, -1)), -1, 0)
    there = np.stack([map_coordinates(component, inner, order=1, mode="nearest") for component in u])
    np.testing.assert_allclose(
        vectors, there * 2.2, atol=1e-4, err_msg="headers agree: the field is the displacement alone"
    )


def test_an_export_that_fails_leaves_what_was_there(pair, registered, tmp_path, monkeypatch):
    files = save(pair, registered.displacement, tmp_path, registered.sigma_mm)
    before = {file: file.read_bytes() for file in files}
    assert sorted(tmp_path.iterdir()) == sorted(files)
    save(pair, registered.displacement, tmp_path, registered.sigma_mm)
    assert {file: file.read_bytes() for file in files} == before, "same bytes for the same registration"

    def full(self, path, slab):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(export.SlabWriter, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(pair, 0 * registered.displacement, tmp_path, registered.sigma_mm)
    assert sorted(tmp_path.iterdir()) == sorted(files) and {file: file.read_bytes() for file in files} == before
