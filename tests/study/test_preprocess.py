"""Preprocessing: geometry with known answers, the true deformation carried along, and every refusal."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from gridreg.errors import InputError
from gridreg.scans.align import Reference, align
from gridreg.scans.geometry import apply_affine
from gridreg.scans.intensity import normalise
from gridreg.scans.prepare import Target, centred, fresh_processes
from gridreg.scans.resample import resample_image, resample_labels
from gridreg.scans.volumes import read_image, write_displacement, write_field_mm, write_volume
from study.cohorts import dataset, preprocess
from study.cohorts.dataset import Preprocessed, load_index
from study.cohorts.preprocess import preprocess_dataset
from study.cohorts.truth import correspondence, pair_truth, resample_field

LAS = np.diag((-1.0, 1.0, 1.0, 1.0))
LAS[:3, 3] = (300, -40, 11)  # an origin far away: headers lose their crop offsets


def blob(shape: tuple[int, ...], centre: np.ndarray, radius: float) -> np.ndarray:
    """A smooth bump, an asymmetric one, on a background of exactly 0."""
    x = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - centre
    image = np.exp(-((x / radius) ** 2).sum(-1)) * (1.5 + np.tanh(x[..., 0] / radius))
    return np.where(image > 0.05, image, 0).astype(np.float32)


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], amplitude: float, sigma: float) -> np.ndarray:
    field = np.stack([gaussian_filter(rng.standard_normal(shape), sigma, mode="nearest") for _ in range(3)])
    return (field / np.abs(field).max() * amplitude).astype(np.float32)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Six simulated LAS subjects with labels and truth, phi(p) = p + d(p); the test ones with landmarks."""
    rng, folder, shape = np.random.default_rng(3), tmp_path / "cohort", (32, 30, 28)
    lattice = LAS @ np.diag((4.0, 4.0, 4.0, 1.0))
    names = [f"brain_{n:04d}_0000" for n in range(6)]
    for name in names:
        part = "Ts" if name in names[4:] else "Tr"
        image = blob(shape, np.array((16, 15, 13)) + rng.uniform(-1, 1, 3), 6) * 700
        write_volume(folder / f"images{part}/{name}.nii.gz", image, LAS)
        write_volume(folder / f"labels{part}/{name}.nii.gz", (image > 300) + (image > 600).astype(np.int16), LAS)
        d = smooth_field(rng, (9, 9, 9), 3.0, 1.5)  # mm
        write_field_mm(folder / f"truth{part}/{name}.nii.gz", d, lattice)
        if part == "Ts":
            rows = [
                f"l{i}," + ",".join(f"{v:.6f}" for v in landmark(d, lattice, LAS, goal))
                for i, goal in enumerate(((12, 14, 13), (18, 16, 12)))
            ]
            (folder / "landmarksTs").mkdir(exist_ok=True)
            (folder / f"landmarksTs/{name}.csv").write_text("name,x_mm,y_mm,z_mm\n" + "\n".join(rows) + "\n")
    tr, ts = [f"./imagesTr/{n}.nii.gz" for n in names[:4]], [f"./imagesTs/{n}.nii.gz" for n in names[4:]]
    info = {
        "name": "Blobs",
        "simulated": True,
        "labels": {"1": "shell", "2": "core"},
        "training": [{"image": i} for i in tr],
        "test": [{"image": i} for i in ts],
        "registration_val": [{"fixed": tr[2], "moving": tr[3]}],
        "registration_test": [{"fixed": ts[0], "moving": ts[1]}],
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def landmark(d: np.ndarray, lattice: np.ndarray, affine: np.ndarray, goal: tuple[int, ...]) -> np.ndarray:
    """World position p with p + d(p) = goal (a voxel of the template), by fixed-point iteration."""
    goal = apply_affine(affine, np.array(goal, float))
    p = goal.copy()
    for _ in range(100):
        at = apply_affine(np.linalg.inv(lattice), p)[:, None]
        p = goal - np.array([map_coordinates(c, at, order=1, mode="nearest")[0] for c in d])
    return p


OPTIONS = dict(name="blobs", shape=(24, 24, 24), spacing_mm=1.0, start="centre", progress=False)


def test_whole_dataset(cohort, tmp_path):
    index = preprocess_dataset(cohort, tmp_path / "out", **OPTIONS)
    assert index == load_index(tmp_path / "out") and index["simulated"] and index["affine_reference"] is None
    assert index["labels"] == {"1": "shell", "2": "core"} and index["shape"] == [24, 24, 24]
    assert "6 of 6 scans were turned from LAS to RAS" in index["notes"] and index["start"] == "centre"
    assert index["found"] == [
        "6 patients inferred from the names of 6 scans, one scan each (brain_0000_0000 is patient brain_0000)",
        "6 images: 6 with labels, 2 with landmarks, 6 with a true deformation",
    ]
    data = Preprocessed(tmp_path / "out")
    assert data.pairs("test") == [("brain_0004_0000", "brain_0005_0000")] and len(data.pairs("train")) == 2
    np.testing.assert_allclose(data.affine @ (11.5, 11.5, 11.5, 1), (0, 0, 0, 1), err_msg="grid centre")
    name = data.subjects("train")[0]
    stored = nibabel.load(cohort / f"imagesTr/{name}.nii.gz").get_fdata()
    image, labels = data.image(name), data.labels(name)
    assert image.dtype == np.float32 and labels.dtype == np.int16 and image is data.image(name)
    cropped = stored[::-1][4:28, 3:27, 2:26]
    expected = np.clip(cropped / np.percentile(stored[stored > 0], 99.9), 0, 1)
    np.testing.assert_allclose(image, expected, atol=1e-6, err_msg="same spacing: cropped, not interpolated")
    assert np.array_equal(labels > 0, cropped > 300)
    record = index["subjects"][name]
    assert (record["split"], record["patient"], record["landmarks"]) == ("train", "brain_0000", False)
    world = apply_affine(np.array(record["to_source"]), apply_affine(data.affine, np.array((3, 4, 5))))
    np.testing.assert_allclose(apply_affine(np.linalg.inv(LAS), world), (31 - (4 + 3), 3 + 4, 2 + 5), atol=1e-5)
    assert data.landmarks(name) is None and data.truth(name, name) is None
    for wrong in (lambda: data.image("nobody"), lambda: data.pairs("dev"), lambda: load_index(tmp_path)):
        with pytest.raises(InputError, match="expected"):
            wrong()


def test_what_has_no_place_in_memory_is_read_anew(cohort, tmp_path, monkeypatch):
    preprocess_dataset(cohort, tmp_path / "out", **OPTIONS)
    free = iter([100, 51, 50, 50, 50, 100, 51])
    monkeypatch.setattr(dataset, "available_mb", lambda: next(free))  # at the start, and whenever something was read
    data = Preprocessed(tmp_path / "out")
    one, two = data.subjects("train")
    assert data.image(one) is data.image(one) and data.image(two) is not data.image(two)
    np.testing.assert_array_equal(data.image(two), Preprocessed(tmp_path / "out").image(two))


@pytest.mark.parametrize("spacing", [1.0, 1.3])
def test_truth_and_landmarks_are_carried_along(cohort, tmp_path, spacing):
    preprocess_dataset(cohort, tmp_path / "out", **OPTIONS | {"spacing_mm": spacing, "shape": (25, 24, 23)})
    data = Preprocessed(tmp_path / "out")
    ((fixed, moving),) = data.pairs("test")
    u, valid = data.truth(fixed, moving)
    assert u.shape == (3, 25, 24, 23) and u.dtype == np.float32 and valid.mean() > 0.6
    for name, x in data.landmarks(fixed).items():
        at = np.array([map_coordinates(c, x[:, None], order=1)[0] for c in u])
        np.testing.assert_allclose(x + at, data.landmarks(moving)[name], atol=0.1)
        assert np.linalg.norm(at) > 0.2, "something to find"
    assert data.truth(*data.pairs("val")[0]) is not None, "calibration is fitted on validation"
    carried = {path.name.removesuffix(".nii.gz") for path in (tmp_path / "out" / "truth").iterdir()}
    assert (
        carried == {*data.subjects("val"), *data.subjects("test")} and data.truth(*data.subjects("train")[:2]) is None
    )
    data.index["subjects"][fixed]["template"] = "another"
    assert data.truth(fixed, moving) is None, "phi of different templates do not compare"


def test_correspondence_solves_its_equation(tmp_path):
    rng, shape = np.random.default_rng(5), (20, 24, 18)
    fixed, moving = smooth_field(rng, shape, 4, 4), smooth_field(rng, shape, 4, 4)
    u, valid = correspondence(fixed, moving)
    x = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    carried = np.stack([map_coordinates(c, x + u, order=1, mode="nearest") for c in moving])
    assert np.abs(u + carried - fixed)[:, valid].max() < 0.01
    assert valid[4:-4, 4:-4, 4:-4].all() and not valid.all()
    y = x + u
    assert (y[:, valid] >= 0).all() and (y[:, valid] <= np.array(shape)[:, None] - 1).all()
    zero, everywhere = correspondence(fixed, fixed)
    assert np.abs(zero).max() < 1e-6 and everywhere.all()
    shift = np.zeros((3, *shape), np.float32)
    shift[1] = 3
    u, valid = correspondence(shift, 0 * shift)
    assert np.array_equal(u, shift) and valid[:, :-3].all() and not valid[:, -3:].any(), "fixed x lies at moving x + 3"
    for name, field in (("a", shift), ("b", 0 * shift)):
        write_displacement(tmp_path / f"truth/{name}.nii.gz", field, np.diag((2.0, 2, 2, 1)))
    np.testing.assert_allclose(pair_truth(tmp_path, "a", "b")[0], shift, atol=1e-5)
    write_displacement(tmp_path / "truth/b.nii.gz", shift[:, 1:], np.diag((2.0, 2, 2, 1)))
    with pytest.raises(InputError, match="on different grids, expected one grid"):
        pair_truth(tmp_path, "a", "b")


def test_field_through_an_affine_alignment():
    """A subject that is A(template): phi = A^-1. Aligned back by A, nothing of the deformation is left."""
    a = np.eye(4)
    a[:3, :3] = Rotation.from_euler("z", 20, degrees=True).as_matrix() * 1.2
    a[:3, 3] = (5, -3, 2)
    lattice = np.diag((3.0, 3, 3, 1))
    lattice[:3, 3] = -30
    p = apply_affine(lattice, np.stack(np.meshgrid(*[np.arange(21)] * 3, indexing="ij"), -1))
    d = np.moveaxis(apply_affine(np.linalg.inv(a), p) - p, -1, 0)
    grid = Target((8, 9, 10), 1.5).affine
    np.testing.assert_allclose(resample_field(d, lattice, grid, a, (8, 9, 10)), 0, atol=1e-4)
    np.testing.assert_allclose(resample_field(0 * d, lattice, grid, np.eye(4), (8, 9, 10)), 0, atol=1e-6)


def test_resampling_known_answers():
    ramp = np.stack(np.meshgrid(*[np.arange(12.0)] * 3, indexing="ij"))[0].astype(np.float32)
    half = np.eye(4)
    half[0, 3] = 0.5
    np.testing.assert_allclose(resample_image(ramp, half, (11, 12, 12)), ramp[:-1] + 0.5, err_msg="linear")
    stripes = (np.arange(32) % 2)[:, None, None] * np.ones((1, 32, 32), np.float32)
    coarse = np.diag((4.0, 4, 4, 1))
    smooth = resample_image(stripes, coarse, (8, 8, 8))[2:-2]
    assert np.abs(smooth - 0.5).max() < 0.05, "stripes finer than the grid average out instead of aliasing"
    labels = np.zeros((8, 8, 8), np.int16)
    labels[2:, :, :], labels[:, 5:, :] = 7, 9
    coarse = np.diag((2.0, 2, 2, 1))
    coarse[:3, 3] = 0.5
    votes = resample_labels(labels, coarse, (4, 4, 4))
    assert set(np.unique(votes)) == {0, 7, 9} and votes[0, 0, 0] == 0 and votes[1, 0, 0] == 7 and votes[3, 3, 3] == 9
    assert np.array_equal(resample_labels(labels, np.eye(4), (8, 8, 8)), labels)


def test_intensities():
    rng = np.random.default_rng(0)
    stripped = np.zeros((24, 24, 24), np.float32)
    stripped[4:20, 4:20, 4:20] = rng.uniform(200, 1000, (16, 16, 16))
    stripped[10, 10, 10] = 90000  # one bright vessel does not darken everything else
    out = normalise(stripped)
    assert out.dtype == np.float32 and out[0, 0, 0] == 0 and out.max() == 1 and 0.55 < out[4:9, 4:9, 4:9].mean() < 0.65
    np.testing.assert_allclose(normalise(stripped * 5 - 500), out, atol=1e-5, err_msg="gain and offset do not matter")
    noisy = rng.normal(100, 10, (20, 20, 20)).astype(np.float32)
    assert normalise(noisy).min() == 0 and normalise(noisy).max() == 1 and abs(normalise(noisy).mean() - 0.5) < 0.05


def test_padding_and_centre(tmp_path):
    write_volume(tmp_path / "x.nii.gz", blob((11, 13, 9), np.array((5, 6, 4)), 3), LAS)
    volume = read_image(tmp_path / "x.nii.gz")
    target = Target((15, 15, 15), 1.0)
    grid_to_source = np.linalg.inv(volume.affine) @ centred(volume, target) @ target.affine
    moved = resample_image(volume.data, grid_to_source, target.shape)
    np.testing.assert_allclose(moved[2:13, 1:14, 3:12], volume.data, atol=1e-6)
    assert moved.sum() == pytest.approx(volume.data.sum())


@pytest.mark.filterwarnings("ignore")
def test_affine_alignment_finds_a_known_map():
    """A turned, scaled and far-shifted copy is brought back, twice to the same numbers."""
    pytest.importorskip("ants")
    shape = (40, 44, 38)
    organ = blob(shape, np.array((18, 22, 19)), 9) + blob(shape, np.array((26, 28, 15)), 5) > 0.3
    image = normalise(organ * (0.5 + 10 * gaussian_filter(np.random.default_rng(0).random(shape) - 0.45, 2)))
    grid = np.diag((2.0, 2, 2, 1))
    true = np.eye(4)  # reference world -> scan world
    true[:3, :3] = Rotation.from_euler("xyz", (10, -6, 15), degrees=True).as_matrix() @ np.diag((1.1, 0.95, 1.05))
    true[:3, 3] = (150, -260, 90)
    with fresh_processes(1) as pool:
        arguments = (image, true @ grid, Reference("blob", image, grid, np.zeros(3)))
        matrices = [pool.submit(align, *arguments).result() for _ in range(2)]
    assert np.array_equal(*matrices)
    inside = apply_affine(grid, np.argwhere(image > 0.2))
    apart = np.linalg.norm(apply_affine(matrices[0], inside) - apply_affine(true, inside), axis=1)
    assert apart.mean() < 1.0, "mm, half a voxel"


def damage(kind: str, cohort: Path) -> dict:
    """Break the cohort in one way; the options that go with it."""
    test = cohort / "imagesTs/brain_0005_0000.nii.gz"
    if kind == "missing file":
        test.unlink()
    if kind == "nan":
        write_volume(test, np.full((32, 30, 28), np.nan, np.float32), LAS)
    if kind == "no overlap":  # headers that put one scan beside the others
        far = LAS.copy()
        far[:3, 3] += 500
        for part in ("images", "labels"):
            write_volume(
                cohort / f"{part}Ts/brain_0005_0000.nii.gz", nibabel.load(test).get_fdata(dtype=np.float32), far
            )
        (cohort / "landmarksTs/brain_0005_0000.csv").unlink()
    if kind == "label beside the crop":
        labels = np.zeros((32, 30, 28), np.int16)
        labels[0, 0, 0] = 1
        write_volume(cohort / "labelsTs/brain_0005_0000.nii.gz", labels, LAS)
    if kind == "label of another shape":
        write_volume(cohort / "labelsTs/brain_0005_0000.nii.gz", np.ones((32, 30, 27), np.int16), LAS)
    if kind == "landmark beside the crop":
        (cohort / "landmarksTs/brain_0005_0000.csv").write_text("name,x_voxel,y_voxel,z_voxel\nfar,0,15,14\n")
    return {
        "no overlap": {"start": "headers"},
        "shape": {"shape": (24, 24)},
        "spacing": {"spacing_mm": 0},
        "unknown label": {"labels": [1, 5]},
        "reference": {"affine_reference": "nowhere.nii.gz", "start": None},
        "start": {"start": "middle"},
        "start and reference": {"affine_reference": "mni152"},
        "start without reference": {"start": "affine"},
        "window": {"window": (300, 200)},
        "nan option": {"nan": "zero"},
    }.get(kind, {})


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        ("missing file", "brain_0005_0000.nii.gz: found no such file", "a NIfTI volume"),
        ("nan", "imagesTs/brain_0005_0000.nii.gz: found 26880 voxels that are NaN", "finite"),
        (
            "no overlap",
            "imagesTs/brain_0005_0000.nii.gz: found next to nothing of the scan",
            "an overlap by the headers",
        ),
        ("label beside the crop", "no labelled voxel inside the 24×24×24", "part of the mask"),
        ("label of another shape", "labelsTs/brain_0005_0000.nii.gz: found the shape 32×30×27", "32×30×28"),
        ("landmark beside the crop", "landmarksTs/brain_0005_0000.csv: found landmark 'far'", "inside the 24×24×24"),
        ("shape", "the shape (24, 24)", "three numbers"),
        ("spacing", "spacing 0", "positive spacing"),
        ("unknown label", "found the labels [1] in the cohort", "[5] among them"),
        ("reference", "nowhere.nii.gz: found no such file", "a NIfTI volume"),
        ("start", "start: found 'middle'", "headers, centre, affine"),
        ("start and reference", "found start: centre beside affine_reference", "one of the two"),
        ("start without reference", "found start: affine", "affine_reference: mni152"),
        ("window", "window: found (300, 200)", "the lower one first"),
        ("nan option", "nan: found 'zero'", "refuse or background"),
    ],
)
def test_refused_and_nothing_left(cohort, tmp_path, kind, found, expected):
    out = tmp_path / "results/blobs"
    options = damage(kind, cohort)
    with pytest.raises(InputError) as error:
        preprocess_dataset(cohort, out, **OPTIONS | options)
    assert found in str(error.value) and expected in str(error.value).split("expected", 1)[1], str(error.value)
    assert not out.parent.exists() or not list(out.parent.iterdir()), "nothing half-written"


def test_what_was_found_and_noted_is_on_screen_and_in_the_index(cohort, tmp_path, capsys):
    name = "brain_0005_0000"
    file = cohort / f"imagesTs/{name}.nii.gz"
    image = nibabel.load(file)
    image.set_qform(image.affine + np.eye(4, k=3) * 12, code="scanner")  # two forms that differ
    nibabel.save(image, file)
    info = json.loads((cohort / "dataset.json").read_text())
    (cohort / "dataset.json").write_text(json.dumps(info | {"numTraining": 30}))
    index = preprocess_dataset(cohort, tmp_path / "out", **OPTIONS | {"progress": True})
    (note,) = index["subjects"][name]["notes"]
    assert str(file) in note and [k for k, record in index["subjects"].items() if "notes" in record] == [name]
    assert index["notes"][0] == "numTraining says 30, 4 are listed" and index["notes"][-1] == note
    assert index["notes"][-2].startswith("1 of 6 scans have notes")
    assert capsys.readouterr().out.splitlines() == [f"blobs: {line}" for line in index["found"] + index["notes"]]
    data = Preprocessed(tmp_path / "out")
    assert data.pair(*data.pairs("test")[0]).notes == (note,)


def test_headers_or_centres(cohort, tmp_path):
    """One scan lies 6 mm to the left of where the others' headers put theirs: headers keep that, centres undo it."""
    far = LAS.copy()
    far[0, 3] -= 6
    for part in ("images", "labels"):
        file = cohort / f"{part}Ts/brain_0005_0000.nii.gz"
        write_volume(file, np.asarray(nibabel.load(file).dataobj), far)
    (cohort / "landmarksTs/brain_0005_0000.csv").unlink()
    centres = preprocess_dataset(cohort, tmp_path / "centre", **OPTIONS)
    headers = preprocess_dataset(cohort, tmp_path / "headers", **OPTIONS | {"start": None})
    assert headers["start"] == "headers" and any("6.0 mm" in note for note in headers["notes"])
    for name in centres["subjects"]:
        a, b = (Preprocessed(tmp_path / start).image(name) for start in ("centre", "headers"))
        moved = 6 if name == "brain_0005_0000" else 0
        np.testing.assert_allclose(b[: 24 - moved], a[moved:], atol=1e-5)


def test_intensity_options_reach_every_scan(cohort, tmp_path):
    """A window, a padding value and NaN backgrounds (SPM writes them) of a whole cohort."""
    plain = preprocess_dataset(cohort, tmp_path / "plain", **OPTIONS | {"window": (0, 1400)})
    for part in ("Tr", "Ts"):
        for file in (cohort / f"images{part}").iterdir():
            image = nibabel.load(file).get_fdata(dtype=np.float32)
            image[image == 0] = np.nan
            image[:2] = -3024
            write_volume(file, image, LAS)
    with pytest.raises(InputError, match="NaN"):
        preprocess_dataset(cohort, tmp_path / "out", **OPTIONS)
    options = {"window": (0, 1400), "padding_value": -3024, "nan": "background"}
    assert (
        preprocess_dataset(cohort, tmp_path / "out", **OPTIONS | options)["subjects"].keys() == plain["subjects"].keys()
    )
    for name in plain["subjects"]:
        a, b = (Preprocessed(tmp_path / folder).image(name) for folder in ("plain", "out"))
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_labels_name_those_to_use_of_maps_that_hold_anything(cohort, tmp_path):
    for part in ("Tr", "Ts"):
        for file in (cohort / f"labels{part}").iterdir():
            labels = nibabel.load(file).get_fdata()
            labels[labels == 1] += 1e-6
            labels[0, 0, :4] = -1, 40000, 0.5, np.nan
            write_volume(file, labels, LAS)
    for options in ({}, {"nan": "background"}):
        with pytest.raises(InputError, match="labelsTr/brain_0000_0000.nii.gz: found .*label values"):
            preprocess_dataset(cohort, tmp_path / "out", **OPTIONS | options)
    index = preprocess_dataset(cohort, tmp_path / "out", **OPTIONS | {"labels": [1, 2], "nan": "background"})
    assert index["labels"] == {"1": "shell", "2": "core"} and all(r["label"] for r in index["subjects"].values())


def test_two_at_once_take_turns_and_both_are_whole(cohort, tmp_path, capsys):
    out, indexes = tmp_path / "out", []
    threads = [
        threading.Thread(target=lambda: indexes.append(preprocess_dataset(cohort, out, **OPTIONS))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert indexes[0] == indexes[1] == load_index(out)
    assert len(list((out / "images").iterdir())) == 6 and sorted(p.name for p in tmp_path.iterdir()) == [
        "cohort",
        "out",
    ]
    assert capsys.readouterr().out.count("waiting until it has finished") == 1


def test_a_file_that_disappears_meanwhile_and_a_full_disk(cohort, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = preprocess_dataset(cohort, out, **OPTIONS)
    write = preprocess.write_volume

    def lose_one(path, *rest):
        write(path, *rest)
        if path.name == "brain_0005_0000.nii.gz":
            (path.parent / "brain_0003_0000.nii.gz").unlink(missing_ok=True)

    monkeypatch.setattr(preprocess, "write_volume", lose_one)
    with pytest.raises(
        InputError, match=r"images/brain_0003_0000.nii.gz: found no such file after preprocessing \(16 of 18 "
    ):
        preprocess_dataset(cohort, out, **OPTIONS | {"labels": [1]})

    def full(path, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preprocess, "write_volume", full)
    with pytest.raises(InputError, match=f"{out}: found no space left on device .* expected room for all of it"):
        preprocess_dataset(cohort, out, **OPTIONS)
    assert load_index(out) == first and sorted(p.name for p in tmp_path.iterdir()) == ["cohort", "out"]
    assert len(list((out / "images").iterdir())) == 6, "a failure leaves the older result alone"


def test_an_older_result_is_replaced_and_nothing_else(cohort, tmp_path):
    out = tmp_path / "out"
    preprocess_dataset(cohort, out, **OPTIONS)
    (out / "images/stale.nii.gz").touch()
    for name in (".out.4242", ".out.mine"):  # a run that was killed, and something of the user's
        (tmp_path / name).mkdir()
    index = preprocess_dataset(cohort, out, **OPTIONS | {"labels": [2], "max_subjects": 2, "workers": 1})
    assert not (out / "images/stale.nii.gz").exists() and index["labels"] == {"2": "core"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.mine", "cohort", "out"]
    damage("nan", cohort)
    with pytest.raises(InputError):
        preprocess_dataset(cohort, out, **OPTIONS)
    assert load_index(out) == index, "a failure leaves the older result alone"
    with pytest.raises(InputError, match="no preprocessed dataset, expected a folder free to write"):
        preprocess_dataset(cohort, cohort, **OPTIONS)


def test_labels_are_optional(cohort, tmp_path):
    for path in (cohort / "labelsTr").iterdir():
        path.unlink()
    preprocess_dataset(cohort, tmp_path / "out", **OPTIONS)
    data = Preprocessed(tmp_path / "out")
    assert data.labels(data.subjects("train")[0]) is None and data.labels(data.subjects("test")[0]).any()
