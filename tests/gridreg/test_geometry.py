"""Headers: read as ITK and ANTs read them, with a note on whatever is in doubt, and a refusal of what could mirror a patient."""

from __future__ import annotations

from pathlib import Path

import ants
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation
from small_scans import body, moved, upright, write_scan

from gridreg.errors import InputError
from gridreg.scans.geometry import apply_affine
from gridreg.scans.volumes import read_geometry, read_image, read_labels, write_field_mm, write_volume

DATA = body((8, 9, 7))
UPRIGHT = upright()
FLIP = np.diag((-1.0, -1, 1, 1))


def turned(degrees: float, affine: np.ndarray = UPRIGHT) -> np.ndarray:
    affine = affine.copy()
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() @ affine[:3, :3]
    return affine


def sheared_by(amount: float) -> np.ndarray:
    affine = UPRIGHT.copy()
    affine[0, 1] = 2 * amount
    return affine


def as_itk(path: Path) -> np.ndarray:
    """The matrix that SimpleITK reads, in RAS."""
    image, affine = sitk.ReadImage(str(path)), np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return FLIP @ affine


def as_ants(path: Path) -> np.ndarray:
    image, affine = ants.image_read(str(path)), np.eye(4)
    affine[:3, :3] = image.direction @ np.diag(image.spacing)
    affine[:3, 3] = image.origin
    return FLIP @ affine


HEADERS = {
    "forms agree": (UPRIGHT, None, (1, 1), "mm"),
    "scanner and scanner, apart": (moved(UPRIGHT, 12, -7, 5), UPRIGHT, (1, 1), "mm"),
    "scanner and aligned, apart": (moved(UPRIGHT, 12, -7, 5), UPRIGHT, (1, 2), "mm"),
    "aligned and scanner, apart": (moved(UPRIGHT, 12, -7, 5), UPRIGHT, (2, 1), "mm"),
    "template and template, apart": (moved(UPRIGHT, 12, -7, 5), UPRIGHT, (4, 4), "mm"),
    "sform alone": (moved(UPRIGHT, 12, -7, 5), UPRIGHT, (2, 0), "mm"),
    "qform alone": (moved(UPRIGHT, 12, -7, 5), UPRIGHT, (0, 1), "mm"),
    "none": (UPRIGHT, None, (0, 0), "mm"),
    "turned by 6 degrees": (turned(6), UPRIGHT, (2, 1), "mm"),
    "sheared, with a qform": (sheared_by(0.3), UPRIGHT, (1, 1), "mm"),
    "barely sheared, with a qform": (sheared_by(0.001), moved(UPRIGHT, 3, 0, 0), (1, 1), "mm"),
    "scaled against pixdim": (upright((2.2, 2, 2)), UPRIGHT, (1, 0), "mm"),
    "micron": (upright((25, 25, 30), (7, 8, 9)), None, (1, 1), "micron"),
    "metre": (upright((0.002, 0.002, 0.002), (0, 0, 0.1)), None, (1, 1), "meter"),
    "unit unknown": (UPRIGHT, None, (1, 1), "unknown"),
    "micron, qform alone": (UPRIGHT, upright((25, 25, 30)), (0, 1), "micron"),
    "micron, none": (UPRIGHT, upright((25, 25, 30)), (0, 0), "micron"),
    "LAS": (UPRIGHT @ np.diag((-1.0, 1, 1, 1)), None, (1, 1), "mm"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_are_read_as_itk_and_ants_read_them(tmp_path, kind):
    sform, qform, codes, units = HEADERS[kind]
    path = write_scan(tmp_path / "scan.nii", DATA, sform, qform, codes, units)
    geometry = read_geometry(path)
    for theirs in (as_itk(path), as_ants(path)):
        np.testing.assert_allclose(geometry.affine, theirs, atol=1e-4)
    noted = kind not in ("forms agree", "sform alone", "qform alone", "unit unknown", "LAS")
    assert bool(geometry.notes) is noted and all(str(path) in note for note in geometry.notes), geometry.notes
    # what is written with that geometry is read in one way by everybody
    volume = read_image(path)
    write_volume(tmp_path / "again.nii.gz", volume.data, volume.affine)
    for theirs in (nibabel.load(tmp_path / "again.nii.gz").affine, as_itk(tmp_path / "again.nii.gz")):
        np.testing.assert_allclose(theirs, volume.affine, atol=1e-4)


def test_a_note_names_file_values_and_choice(tmp_path):
    path = write_scan(tmp_path / "scan.nii", DATA, moved(UPRIGHT, 12, -7, 5), UPRIGHT, (1, 2))
    assert read_geometry(path).notes == (
        f"{path}: sform (code 1) and qform (code 2) differ by (12, -7, 5) mm; the sform is used, as in ITK and ANTs",
    )
    path = write_scan(tmp_path / "scan.nii", DATA, turned(6), UPRIGHT, (2, 1))
    (note,) = read_geometry(path).notes
    assert "differ by" in note and note.endswith("the qform is used, as in ITK and ANTs")
    path = write_scan(tmp_path / "scan.nii", DATA, upright((25, 25, 25)), None, units="micron")
    assert "micron" in read_geometry(path).notes[0]
    np.testing.assert_allclose(read_image(path).spacing, 0.025)
    path = write_scan(tmp_path / "scan.nii", DATA, UPRIGHT, None, (0, 0))
    assert not read_geometry(path).oriented and "which side is left is not known" in read_geometry(path).notes[0]
    path = write_scan(tmp_path / "scan.nii", DATA, upright((2.2, 2, 2)), UPRIGHT, (1, 0))
    assert "2.2×2×2 mm and pixdim 2×2×2 mm" in read_geometry(path).notes[0]


@pytest.mark.parametrize("sform", [UPRIGHT @ np.diag((-1.0, 1, 1, 1)), turned(180), turned(90)])
def test_forms_that_disagree_which_side_is_which_are_refused(tmp_path, sform):
    path = write_scan(tmp_path / "scan.nii", DATA, sform, UPRIGHT)
    with pytest.raises(InputError, match=r"scan\.nii: found a sform that says .* and a qform that says RAS, .* mirror"):
        read_image(path)
    assert read_image(write_scan(tmp_path / "one.nii", DATA, sform, UPRIGHT, (1, 0))).geometry.oriented


def test_a_sheared_sform_alone_is_used_and_noted(tmp_path):
    affine = sheared_by(0.3)
    path = write_scan(tmp_path / "scan.nii", DATA, affine, UPRIGHT, (1, 0))
    with pytest.raises(RuntimeError, match="orthonormal"):
        as_itk(path)
    geometry = read_geometry(path)
    np.testing.assert_allclose(geometry.affine, affine, atol=1e-5)
    assert "sheared" in geometry.notes[0] and "refuse" in geometry.notes[0]
    write_volume(tmp_path / "out.nii.gz", DATA, affine)
    write_field_mm(tmp_path / "field.nii.gz", np.zeros((3, *DATA.shape)), affine)
    for name in ("out", "field"):  # a qform cannot hold the shear: none is stated
        header = nibabel.load(tmp_path / f"{name}.nii.gz").header
        assert header["sform_code"] == 1 and header["qform_code"] == 0
        np.testing.assert_allclose(header.get_sform(), affine, atol=1e-5)


def test_a_form_that_is_no_matrix_is_passed_over(tmp_path):
    broken = np.zeros((4, 4))
    path = write_scan(tmp_path / "scan.nii", DATA, broken, UPRIGHT, (1, 1))
    geometry = read_geometry(path)
    np.testing.assert_allclose(geometry.affine, as_itk(path), atol=1e-5)
    assert "sform (code 1) is no invertible matrix" in geometry.notes[0]
    with pytest.raises(InputError, match="without a usable voxel size"):
        read_geometry(write_scan(tmp_path / "none.nii", DATA, broken, UPRIGHT, (1, 0)))


def test_other_formats(tmp_path):
    nibabel.save(nibabel.MGHImage(DATA, UPRIGHT), tmp_path / "scan.mgz")
    volume = read_image(tmp_path / "scan.mgz")
    np.testing.assert_allclose(volume.affine, UPRIGHT, atol=1e-5)
    assert volume.geometry.oriented and not volume.geometry.notes
    nibabel.save(nibabel.AnalyzeImage(DATA, UPRIGHT), tmp_path / "scan.img")
    assert not read_image(tmp_path / "scan.img").geometry.oriented
    nibabel.save(nibabel.Nifti2Image(DATA, UPRIGHT), tmp_path / "two.nii")
    np.testing.assert_allclose(read_geometry(tmp_path / "two.nii").affine, UPRIGHT)


def test_positions_do_not_depend_on_the_stored_order(tmp_path):
    sagittal = np.array([[0, 0, 2.0, -40], [2.0, 0, 0, -44], [0, 2.0, 0, -30], [0, 0, 0, 1]])
    volume = read_image(write_scan(tmp_path / "s.nii", np.ascontiguousarray(DATA.transpose(1, 2, 0)), sagittal))
    np.testing.assert_array_equal(volume.data, DATA)
    np.testing.assert_allclose(volume.affine, UPRIGHT)
    assert volume.geometry.shape == (9, 7, 8)
    np.testing.assert_allclose(volume.geometry.centre, apply_affine(UPRIGHT, (np.array(DATA.shape) - 1) / 2))


def test_a_label_map_may_state_one_form_of_its_image_alone(tmp_path):
    """An image with two forms, of which ITK reads the qform; its labels were written with the sform, by nibabel."""
    sform = moved(UPRIGHT, 12, -7, 5)
    image = read_image(write_scan(tmp_path / "image.nii", DATA, sform, UPRIGHT, (2, 1)))
    labels = (DATA > 300).astype(np.uint8)
    for affine in (sform, UPRIGHT):
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "labels.nii")
        found, notes = read_labels(tmp_path / "labels.nii", image)
        assert np.array_equal(found, labels) and bool(notes) is (affine is sform)
    nibabel.save(nibabel.Nifti1Image(labels, moved(sform, 5, 0, 0)), tmp_path / "labels.nii")
    with pytest.raises(InputError, match="expected the same affine"):
        read_labels(tmp_path / "labels.nii", image)
    micron = read_image(write_scan(tmp_path / "micron.nii", DATA, upright((25, 25, 25)), units="micron"))
    nibabel.save(nibabel.Nifti1Image(labels, upright((25, 25, 25))), tmp_path / "labels.nii")  # the unit got lost
    found, (note,) = read_labels(tmp_path / "labels.nii", micron)
    assert np.array_equal(found, labels) and "it is taken to lie on the same voxels" in note
    nibabel.save(nibabel.Nifti1Image(labels, None), tmp_path / "labels.nii")
    with pytest.raises(InputError, match="expected the same affine"):
        read_labels(tmp_path / "labels.nii", image)
