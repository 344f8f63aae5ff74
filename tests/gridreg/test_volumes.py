"""Reading and writing volumes: orientation, every refusal, and displacement fields as ITK understands them."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from gridreg.errors import InputError
from gridreg.scans.volumes import (
    apply_affine,
    read_displacement,
    read_field_mm,
    read_image,
    read_labels,
    read_landmarks,
    read_points,
    write_displacement,
    write_landmarks,
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
        ("nan", "1 voxels that are NaN", "finite"),
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
    labels = read_labels(path, image)
    assert labels.dtype == np.int16 and labels[0, 1, 2] == stored[-1, 1, 2], "flipped to RAS with its image"
    assert set(np.unique(read_labels(path, image, keep=[2]))) == {0, 2}
    close = OBLIQUE + 1e-4  # a header rounded to single precision is no mismatch
    assert read_labels(save(tmp_path / "c.nii.gz", stored.astype(np.uint8), close), image).any()
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


def test_landmarks_in_both_units(tmp_path, ramp):
    image = read_image(save(tmp_path / "i.nii.gz", ramp, OBLIQUE))
    stored = np.array((2.0, 3.5, 4.0))  # voxel of the file, which is not RAS
    world = apply_affine(OBLIQUE, stored)
    (tmp_path / "v.csv").write_text("name,x_voxel,y_voxel,z_voxel\ncyst,2,3.5,4\n")
    (tmp_path / "w.csv").write_text("name,x_mm,y_mm,z_mm\n\ncyst," + ",".join(map(str, world)) + "\n")
    for table in ("v.csv", "w.csv"):
        np.testing.assert_allclose(read_landmarks(tmp_path / table, image)["cyst"], world)
    write_landmarks(tmp_path / "o.csv", {"cyst, left": stored})
    points, unit = read_points(tmp_path / "o.csv")
    assert unit == "voxel" and points["cyst, left"].tolist() == stored.tolist()


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("", "an empty file", "landmarks"),
        ("name,x_mm,y_mm,z_mm\n", "a header and no landmarks", "at least one"),
        ("12.5,3,4\n1,2,3\n", "states no unit", "x_voxel,y_voxel,z_voxel"),
        ("name,x,y,z\na,1,2,3\n", "states no unit", "x_mm"),
        ("name,x_voxel,y_voxel,z_voxel\na,1,2,30\n", "landmark 'a' at voxel [1.0, 2.0, 30.0]", "inside the 9×11×7"),
        ("name,x_mm,y_mm,z_mm\na,1,2\n", "the row 'a,1,2'", "three finite"),
        ("name,x_mm,y_mm,z_mm\na,1,2,nan\n", "nan", "finite"),
        ("name,x_mm,y_mm,z_mm\na,1,2,3\na,1,2,4\n", "the row 'a,1,2,4'", "a new name"),
        (None, "no such file", "table"),
    ],
)
def test_landmarks_refused(tmp_path, ramp, text, found, expected):
    image = read_image(save(tmp_path / "i.nii.gz", ramp))
    if text is not None:
        (tmp_path / "points.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_landmarks(tmp_path / "points.csv", image)
    message = str(error.value)
    assert "points.csv: found" in message and found in message
    assert expected in message.split("expected", 1)[1]


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
