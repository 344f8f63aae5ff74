"""Reading and writing volumes: orientation, every refusal, and displacement fields as ITK understands them."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from gridreg.errors import InputError
from gridreg.scans.geometry import apply_affine
from gridreg.scans.intensity import Intensity, normalise
from gridreg.scans.volumes import (
    read_displacement,
    read_field_mm,
    read_image,
    read_labels,
    write_displacement,
    write_volume,
)

SHAPE = (9, 11, 7)
# oblique, anisotropic, off-centre and left-handed
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (12, -20, 9), degrees=True).as_matrix() @ np.diag((-1.0, 1.5, 2.2))
OBLIQUE[:3, 3] = (30, -12, 5)


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def ramp(rng=np.random.default_rng(0)) -> np.ndarray:
    return rng.random(SHAPE).astype(np.float32)


def test_canonical_orientation_keeps_world_positions(tmp_path, ramp):
    affine = np.array([[0, 0, -2.0, 40], [-1.0, 0, 0, 3], [0, 1.5, 0, 7], [0, 0, 0, 1]])  # P, S, L
    volume = read_image(save(tmp_path / "psl.nii.gz", ramp, affine))
    assert volume.data.shape == (7, 9, 11) and volume.data.dtype == np.float32
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    np.testing.assert_allclose(volume.spacing, (2, 1, 1.5))
    world = apply_affine(affine, np.array((2, 3, 4)))
    i, j, k = np.rint(apply_affine(np.linalg.inv(volume.affine), world)).astype(int)
    assert volume.data[i, j, k] == ramp[2, 3, 4]


def test_trailing_singleton_axes_and_scaled_integers(tmp_path, ramp):
    image = nibabel.Nifti1Image(ramp[..., None], np.eye(4))
    image.set_data_dtype(np.int16)  # stored with a scale
    nibabel.save(image, tmp_path / "x.nii")
    np.testing.assert_allclose(read_image(tmp_path / "x.nii").data, ramp, atol=1e-4)


def broken(kind: str, folder: Path, ramp: np.ndarray) -> Path:
    path = folder / "image.nii.gz"
    if kind == "4-D":
        return save(path, np.stack([ramp, ramp], -1))
    if kind == "2-D":
        return save(path, ramp[:, :, 0])
    if kind == "one slice":
        return save(path, ramp[:, :, :1])
    if kind in ("nan", "inf"):
        ramp[1, 2, 3] = float(kind)
        return save(path, ramp)
    if kind == "constant":
        return save(path, np.full(SHAPE, 7, np.int16))
    if kind == "complex":
        return save(path, ramp.astype(np.complex64))
    if kind == "flat affine":
        image = nibabel.Nifti1Image(ramp, None)
        image.header.set_sform(np.zeros((4, 4)), code=1)
        nibabel.save(image, path)
        return path
    if kind == "text":
        path.write_text("no image")
    if kind == "truncated":
        whole = save(path, ramp).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    if kind == "short":
        whole = gzip.decompress(save(path, ramp).read_bytes())
        path.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    return path


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        ("4-D", "the shape 9×11×7×2", "one 3-D volume"),
        ("2-D", "the shape 9×11,", "one 3-D volume"),
        ("one slice", "the shape 9×11×1,", "at least 4 voxels per axis"),
        ("nan", "1 voxels that are NaN", "`nan: background` accepts NaN"),
        ("inf", "1 voxels that are NaN or infinite", "finite"),
        ("constant", "the value 7 in every voxel", "contrast"),
        ("complex", "complex64", "one real number"),
        ("flat affine", "without a usable voxel size", "invertible"),
        ("text", "cannot be read", "a NIfTI volume"),
        ("truncated", "damaged", "complete NIfTI"),
        ("short", "damaged", "complete NIfTI"),
        ("missing", "no such file", "a NIfTI volume"),
    ],
)
def test_images_refused(tmp_path, ramp, kind, found, expected):
    path = broken(kind, tmp_path, ramp)
    with pytest.raises(InputError) as error:
        read_image(path)
    message = str(error.value)
    assert message.startswith(f"{path}: found ") and message.endswith(".") and "\n" not in message
    assert found in message and expected in message.split("expected", 1)[1], message


def test_labels(tmp_path, ramp):
    image = read_image(save(tmp_path / "i.nii.gz", ramp, OBLIQUE))
    stored = np.arange(ramp.size).reshape(SHAPE) % 4
    path = save(tmp_path / "l.nii.gz", stored.astype(np.uint8), OBLIQUE)
    labels, notes = read_labels(path, image)
    assert notes == ()
    assert labels.dtype == np.int16 and labels[0, 1, 2] == stored[-1, 1, 2], "flipped to RAS with its image"
    assert set(np.unique(read_labels(path, image, keep=[2])[0])) == {0, 2}
    close = OBLIQUE + 1e-4  # a header rounded to single precision is no mismatch
    assert read_labels(save(tmp_path / "c.nii.gz", stored.astype(np.uint8), close), image)[0].any()
    shifted = OBLIQUE.copy()
    shifted[0, 3] += 1
    for data, affine, keep, message in (
        (stored[:-1], OBLIQUE, None, r"found the shape 8×11×7, expected 9×11×7 as in .*i\.nii\.gz"),
        (stored, shifted, None, r"puts its corners 1 mm away .* expected the same affine"),
        (stored * 0.5, OBLIQUE, None, "label values from 0 to 1.5, .* expected whole numbers from 0 to 32767"),
        (stored * -1, OBLIQUE, None, "expected whole numbers"),
        (stored * 0, OBLIQUE, None, "found an empty mask, expected labelled voxels"),
        (stored, OBLIQUE, [9], r"found an empty mask, expected voxels with one of the labels \[9\]"),
    ):
        bad = save(tmp_path / "bad.nii.gz", data.astype(np.float32), affine)
        with pytest.raises(InputError, match=r"bad\.nii\.gz: .*" + message):
            read_labels(bad, image, keep)


def test_unusual_label_values_matter_only_where_they_are_wanted(tmp_path, ramp):
    image = read_image(save(tmp_path / "i.nii.gz", ramp, OBLIQUE))
    stored = (np.arange(ramp.size).reshape(SHAPE) % 5).astype(np.float64)
    wanted = np.where(np.isin(stored, (1, 2)), stored, 0)[::-1]
    for change in (
        lambda v: np.where(v == 3, -1, v),
        lambda v: np.where(v == 3, 40000, v),
        lambda v: np.where(v == 4, 70000, v),
    ):
        path = save(tmp_path / "l.nii.gz", change(stored), OBLIQUE)
        labels, notes = read_labels(path, image, [1, 2])
        assert np.array_equal(labels, wanted) and labels.dtype == np.int16 and notes == ()
        with pytest.raises(InputError, match="l.nii.gz: found label values from .* `labels` can name those to use"):
            read_labels(path, image)
    path = save(tmp_path / "l.nii.gz", stored + np.where(stored > 0, 1e-6, -1e-6), OBLIQUE)  # rounding is no fraction
    assert np.array_equal(read_labels(path, image)[0], stored[::-1])
    path = save(tmp_path / "l.nii.gz", np.where(stored == 4, 1.5, stored), OBLIQUE)
    labels, notes = read_labels(path, image, [1, 2])
    assert np.array_equal(labels, wanted) and "voxels hold no whole number" in notes[0] and str(path) in notes[0]
    with pytest.raises(InputError, match="from 0 to 32767"):
        read_labels(path, image, [40000])


def test_nan_may_be_background(tmp_path, ramp):
    data = ramp.copy()
    data[:3] = np.nan
    path = save(tmp_path / "spm.nii.gz", data, OBLIQUE)
    volume = read_image(path, "background")
    labels, _ = read_labels(
        save(tmp_path / "l.nii.gz", np.where(np.isnan(data), np.nan, 1.0), OBLIQUE), volume, None, "background"
    )
    image = normalise(volume.data, Intensity(nan="background"))
    assert (image[-3:] == 0).all() and not labels[-3:].any() and labels[:-3].all(), "flipped to RAS"
    np.testing.assert_array_equal(image[:-3], normalise(ramp[3:][::-1]))
    with pytest.raises(InputError, match="NaN"):
        read_labels(tmp_path / "l.nii.gz", volume)
    data[5, 5, 5] = np.inf
    with pytest.raises(InputError, match="1 voxels that are infinite"):
        read_image(save(tmp_path / "spm.nii.gz", data, OBLIQUE), "background")
    with pytest.raises(InputError, match="in every voxel"):
        read_image(save(tmp_path / "spm.nii.gz", np.where(data < 2, np.nan, 5.0), OBLIQUE), "background")


def ct(pad: float | None = None, metal: float | None = None, air: float = -1000) -> np.ndarray:
    """A trunk of fat (-100 HU) around a liver (60 HU) and bone (900 HU)."""
    scan = np.full((40, 40, 24), air, np.float32)
    scan[6:34, 6:34, 3:21] = -100
    scan[14:28, 12:28, 6:18] = 60
    scan[18:20, 28:30, 3:21] = 900
    if pad is not None:
        scan[:3] = scan[-3:] = pad
    if metal is not None:
        scan[29:32, 16:22, 8:18] = metal
    return scan


def contrast(scan: np.ndarray, intensity: Intensity = Intensity()) -> float:
    """Liver minus fat."""
    image = normalise(scan, intensity)
    return float(image[20, 20, 10] - image[8, 8, 10])


def test_padding_and_metal_do_not_cost_contrast():
    plain = contrast(ct())
    assert plain == pytest.approx(160 / 1900, rel=1e-3)
    for pad in (None, -3024, -2000, -2048, -32768):
        for metal in (None, 2500, 3071, 30000):
            assert contrast(ct(pad, metal)) == pytest.approx(plain, rel=0.05), (pad, metal)
    smeared, unpadded = (gaussian_filter(ct(pad), (1, 0, 0)) for pad in (-3024, None))  # as a resampling leaves it
    assert contrast(smeared) == pytest.approx(contrast(unpadded), rel=0.05)
    inner = ct()[8:32, 8:32, 4:20]  # without air around it
    padded = inner.copy()
    padded[:2] = -3024
    assert contrast(padded) == pytest.approx(contrast(inner), rel=0.05)
    # what is no CT is scaled as ever: the lowest value is the background
    other = ct() * 2 + 5000
    assert normalise(other).min() == 0 and contrast(other) == pytest.approx(plain, rel=1e-3)


def test_window_and_padding_value():
    window = Intensity(window=(-160, 240))
    for scan in (ct(), ct(-3024, 3071)):
        image = normalise(scan, window)
        assert image.min() == 0 and image.max() == 1 and image[8, 8, 10] == np.float32(0.15)
        assert contrast(scan, window) == pytest.approx(0.4)
    shifted = np.where(ct() == -1000, 4095, ct() + 1024)  # padding may be the highest value
    image = normalise(shifted, Intensity(padding_value=4095))
    assert (image[shifted == 4095] == 0).all() and image[20, 20, 10] > image[8, 8, 10]
    with pytest.raises(InputError, match="the lower one first"):
        Intensity(window=(5, 5))
    with pytest.raises(InputError, match="expected refuse or background"):
        Intensity(nan="zero")
    with pytest.raises(InputError, match=r"ct\.nii: found no contrast within the window 5000 to 6000"):
        normalise(ct(), Intensity(window=(5000, 6000)), "ct.nii")


def test_nothing_half_written(tmp_path, ramp, monkeypatch):
    target = tmp_path / "new" / "x.nii.gz"
    write_volume(target, ramp, OBLIQUE)
    before = target.read_bytes()
    write_volume(target, ramp, OBLIQUE)
    assert target.read_bytes() == before, "same bytes for the same array, as DVC needs"

    def fails(image, path):
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(nibabel, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        write_volume(target, ramp + 1, OBLIQUE)
    assert [p.name for p in target.parent.iterdir()] == ["x.nii.gz"] and target.read_bytes() == before


def test_a_full_disk_names_the_file(tmp_path, ramp, monkeypatch):
    def full(image, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_volume(tmp_path / "x.nii.gz", ramp, OBLIQUE)
    assert error.value.filename == str(tmp_path / "x.nii.gz") and not list(tmp_path.iterdir())


def test_displacement_fields_are_read_by_their_intent(tmp_path):
    """The same displacement as RAS (1006) and as LPS (1007), as SimpleITK reads both."""
    for intent, vector in ((1006, (1, 2, 3)), (1007, (-1, -2, 3))):
        path = tmp_path / f"{intent}.nii.gz"
        image = nibabel.Nifti1Image(np.broadcast_to(np.float32(vector), (*SHAPE, 1, 3)).copy(), OBLIQUE)
        image.header.set_intent(intent)
        nibabel.save(image, path)
        field, affine = read_field_mm(path)
        np.testing.assert_allclose(field[:, 4, 5, 3], (1, 2, 3))
        np.testing.assert_allclose(sitk.ReadImage(str(path)).GetPixel(4, 5, 3), (-1, -2, 3))
        np.testing.assert_allclose(affine, OBLIQUE, atol=1e-5)
    for intent in (0, 1008, 2006):  # none, a point set, and a warp of FSL
        image.header["intent_code"] = intent
        nibabel.save(image, tmp_path / "other.nii.gz")
        with pytest.raises(InputError, match=f"other.nii.gz: found the NIfTI intent {intent}, expected 1007"):
            read_field_mm(tmp_path / "other.nii.gz")
    vectors = sitk.GetImageFromArray(np.broadcast_to(np.float32((-1, -2, 3)), (*SHAPE[::-1], 3)).copy(), isVector=True)
    sitk.WriteImage(vectors, str(tmp_path / "sitk.nii.gz"))
    np.testing.assert_allclose(read_field_mm(tmp_path / "sitk.nii.gz")[0][:, 4, 5, 3], (1, 2, 3))
    image = nibabel.Nifti1Image(np.ones((*SHAPE, 1, 3), np.float32), OBLIQUE)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("micron")  # of the lattice; ITK takes vectors as they are
    nibabel.save(image, tmp_path / "micron.nii.gz")
    np.testing.assert_allclose(read_field_mm(tmp_path / "micron.nii.gz")[1][:3], OBLIQUE[:3] / 1000, atol=1e-7)


def test_displacement_is_an_itk_field(tmp_path):
    u = np.zeros((3, *SHAPE), np.float32)
    u[1] = 2  # two voxels along j
    write_displacement(tmp_path / "u.nii.gz", u, OBLIQUE)
    image = nibabel.load(tmp_path / "u.nii.gz")
    assert image.shape == (*SHAPE, 1, 3) and image.header["intent_code"] == 1007
    np.testing.assert_allclose(image.dataobj[0, 0, 0, 0], 2 * OBLIQUE[:3, 1] * (-1, -1, 1), rtol=1e-5)
    field, affine = read_field_mm(tmp_path / "u.nii.gz")
    np.testing.assert_allclose(field[:, 4, 5, 3], 2 * OBLIQUE[:3, 1], rtol=1e-5)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(read_displacement(tmp_path / "u.nii.gz")[0], u, atol=1e-5)
    save(tmp_path / "plain.nii.gz", u[0])
    with pytest.raises(InputError, match="found the shape 9×11×7, expected an ITK displacement field"):
        read_displacement(tmp_path / "plain.nii.gz")
    u[0, 0, 0, 0] = np.nan
    write_displacement(tmp_path / "u.nii.gz", u, OBLIQUE)
    with pytest.raises(InputError, match="NaN"):
        read_displacement(tmp_path / "u.nii.gz")
