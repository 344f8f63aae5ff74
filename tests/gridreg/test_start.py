"""Where scans lie before registration: by their headers, by their centres, or by an alignment."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from small_scans import body, moved, upright, write_scan

from gridreg.errors import InputError
from gridreg.scans.export import save
from gridreg.scans.geometry import apply_affine
from gridreg.scans.intensity import Intensity
from gridreg.scans.pair import read_pair
from gridreg.scans.prepare import Scan, Target, prepare_scan
from gridreg.scans.start import mutual_information
from gridreg.scans.volumes import read_field_mm
from study.cohorts.preprocess import choose_start

LARGE = body((60, 66, 45), seed=1)
AT = upright((2, 2, 2), (-60, -66, -45))
GRID = {"shape": (48, 48, 40), "spacing_mm": 2.5}


@pytest.fixture
def two_views(tmp_path):
    """One body in two fields of view, which the headers place exactly; their centres lie about 50 mm apart."""
    part = moved(AT, *(AT[:3, :3] @ (20, 22, 9)))
    return write_scan(tmp_path / "fixed.nii", LARGE[:, :44], AT), write_scan(
        tmp_path / "moving.nii", LARGE[20:, 22:, 9:], part
    )


def apart_mm(pair) -> float:
    """How far a voxel of the grid is from the same place in the two scans' world: what is left to be found."""
    corners = np.array([(0, 0, 0), pair.shape], float)
    one, two = (apply_affine(to_source @ pair.affine, corners) for to_source in pair.to_source)
    return float(np.abs(one - two).max())


def test_headers_are_taken_where_they_can_be(two_views, tmp_path):
    pair = read_pair(*two_views, **GRID, intensity=Intensity(window=(0, 1000)))
    assert apart_mm(pair) == 0
    common = (pair.fixed > 0.1) & (pair.moving > 0.1)
    assert common.sum() > 1000 and np.isclose(pair.fixed, pair.moving, atol=1e-5)[common].mean() > 0.9, (
        "but for the edges"
    )
    (note,) = [note for note in pair.notes if note.startswith("start")]
    distance = np.linalg.norm((20, 22 + 22, 9))  # mm: half of what was cut off, of voxels of 2 mm
    assert note == f"start: headers; headers and centres disagree by up to {distance:.1f} mm"
    files = save(pair, np.zeros((3, *pair.shape), np.float32), tmp_path / "out")
    assert np.abs(read_field_mm(files[1])[0]).max() < 1e-4
    assert note in files[-1].read_text()


def test_centres_on_request(two_views):
    pair = read_pair(*two_views, **GRID, start="centre")
    middles = [
        apply_affine(nibabel.load(file).affine, (np.array(nibabel.load(file).shape) - 1) / 2) for file in two_views
    ]
    assert apart_mm(pair) == pytest.approx(np.abs(middles[0] - middles[1]).max(), abs=1e-4)
    distance = np.linalg.norm(middles[0] - middles[1])
    assert f"start: centre; headers and centres disagree by up to {distance:.1f} mm" in pair.notes


def test_padding_on_one_side(tmp_path):
    fixed = write_scan(tmp_path / "fixed.nii", body(), upright())
    padded = np.zeros((40, 44, 120), np.float32)
    padded[:, :, :30] = body(seed=2)
    moving = write_scan(tmp_path / "padded.nii", padded, upright())
    for first, second in ((fixed, moving), (moving, fixed)):
        pair = read_pair(first, second, (24, 24, 16), 3.0)
        assert apart_mm(pair) == 0 and min(pair.fixed.std(), pair.moving.std()) > 0.1
        pair = read_pair(first, second, (24, 24, 16), 3.0, start="centre")
        assert min(pair.fixed.std(), pair.moving.std()) > 0.1 and apart_mm(pair) < 6
        assert any("about its content" in note and "padded.nii" in note for note in pair.notes)


def test_centres_where_headers_do_not_overlap(tmp_path):
    fixed = write_scan(tmp_path / "fixed.nii", body(), upright())
    moving = write_scan(tmp_path / "moving.nii", body(seed=2), moved(upright(), 300, 0, 0))
    pair = read_pair(fixed, moving, (24, 24, 16), 3.0)
    assert any(note.startswith("start: centre, since") and "300.0 mm" in note for note in pair.notes)
    assert min(pair.fixed.std(), pair.moving.std()) > 0.1
    with pytest.raises(InputError, match=r"moving\.nii: found next to nothing .* `start: centre`"):
        read_pair(fixed, moving, (24, 24, 16), 3.0, start="headers")


def test_centres_where_headers_have_lost_their_origins(tmp_path):
    """Crops of two patients whose headers all put the same corner to the same place, as pooled cohorts have it."""
    whole, cut = body((60, 66, 45), seed=1), body((60, 66, 45), seed=2)[6:52, 16:60, 2:]
    fixed, moving = (
        write_scan(tmp_path / f"{n}.nii", np.ascontiguousarray(v), upright()) for n, v in enumerate((whole, cut))
    )
    pair = read_pair(fixed, moving, (30, 34, 24), 4.0)
    (note,) = pair.notes
    assert note.startswith("start: centre, since the images agree better by it (mutual information")
    files = [
        write_scan(tmp_path / f"c{n}.nii", body((60 - 8 * (n % 2), 66, 45 - 6 * (n % 3)), seed=n), upright())
        for n in range(6)
    ]
    start = choose_start(files, Target((30, 34, 24), 4.0))
    assert start.kind == "centre" and "the images agree better" in start.notes[0]


def test_mutual_information_of_known_images():
    rng = np.random.default_rng(0)
    one, noise = rng.random((20, 20, 20)), rng.random((20, 20, 20))
    assert mutual_information(one, one) == pytest.approx(1)
    assert mutual_information(one, 1 - one) == pytest.approx(1), "whatever the contrast"
    assert mutual_information(one, noise) < 0.02
    half = np.where(np.arange(20)[:, None, None] < 10, one, np.nan)
    assert mutual_information(half, np.where(np.isnan(half), noise, one)) == pytest.approx(1), "where both are known"
    assert mutual_information(one, np.full_like(one, np.nan)) == 0 and mutual_information(one, 0 * one) == 0


def test_scans_without_an_orientation(tmp_path):
    known = write_scan(tmp_path / "known.nii", body(), upright())
    one, two = (write_scan(tmp_path / f"{n}.nii", body(seed=n), upright(), codes=(0, 0)) for n in (1, 2))
    for pair in ((known, one), (one, known)):
        with pytest.raises(InputError, match=r"1\.nii: found no orientation .*known\.nii: the scan could be mirrored"):
            read_pair(*pair, (24, 24, 16), 3.0)
    pair = read_pair(one, two, (24, 24, 16), 3.0)
    assert "start: centre, since the headers state no orientation" in pair.notes
    assert sum("which side is left is not known" in note for note in pair.notes) == 2
    with pytest.raises(InputError, match="expected one for `start: headers`"):
        read_pair(one, two, (24, 24, 16), 3.0, start="headers")
    with pytest.raises(InputError, match="could be mirrored"):
        choose_start([known, one], Target((24, 24, 16), 3.0))
    with pytest.raises(InputError, match="start: found 'left', expected one of headers, centre, affine"):
        read_pair(one, two, (24, 24, 16), 3.0, start="left")


def test_an_alignment_of_the_moving_scan_to_the_fixed_one(tmp_path):
    """The moving scan is the fixed one, turned and shifted in its header: the alignment takes that back."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (5, -6, 12), degrees=True).as_matrix()
    turn[:3, 3] = (30, -18, 9)
    fixed = write_scan(tmp_path / "fixed.nii", body(), upright())
    moving = write_scan(tmp_path / "moving.nii", body(), turn @ upright())
    pair = read_pair(fixed, moving, (32, 32, 24), 2.5, start="affine")
    inside = np.argwhere(pair.fixed > 0.3)
    world = apply_affine(pair.to_source[0] @ pair.affine, inside)
    found = apply_affine(pair.to_source[1] @ pair.affine, inside)
    assert np.linalg.norm(found - apply_affine(turn, world), axis=1).mean() < 2.0
    assert any(note.startswith("start: affine") for note in pair.notes)


def test_the_start_of_a_cohort(tmp_path):
    target = Target((24, 24, 16), 3.0)
    views = [(0, 0, 0), (3, 1, 0), (0, 4, 2)]  # voxels cut off in front
    files = [write_scan(tmp_path / f"{n}.nii", np.ascontiguousarray(LARGE[a:50, b:60, c:40]), moved(AT, *(2 * np.array((a, b, c)))))
             for n, (a, b, c) in enumerate(views)]  # fmt: skip
    start = choose_start(files, target)
    assert start.kind == "headers" and start.notes[0].startswith(
        "start: headers; headers and centres disagree by up to 4"
    )
    prepared = [prepare_scan(Scan(file), target, centre_mm=start.centre_mm) for file in files]
    for each in prepared[1:]:
        np.testing.assert_array_equal(each.to_source, prepared[0].to_source)
    assert choose_start(files, target, "centre").centre_mm is None
    far = write_scan(tmp_path / "far.nii", LARGE, moved(AT, 0, 0, 500))
    start = choose_start([*files, far], target)
    assert start.kind == "centre" and "far.nii" in start.notes[0]
    with pytest.raises(InputError, match="far.nii: found next to nothing"):
        choose_start([*files, far], target, "headers")


def test_voxels_that_differ_by_a_shift_are_not_interpolated(tmp_path):
    fixed = write_scan(tmp_path / "fixed.nii", body(), upright())
    moving = write_scan(tmp_path / "moving.nii", body(), moved(upright(), 0.7, 0, 0))
    pair = read_pair(fixed, moving, (32, 32, 24), 2.0, intensity=Intensity(window=(0, 1000)))
    assert set(np.round(pair.fixed[pair.fixed > 0], 5)) <= set(np.round(np.clip(body() / 1000, 0, 1).ravel(), 5))
    assert apart_mm(pair) == 0, "and the moving scan stays where its header puts it"
