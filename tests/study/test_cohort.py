"""The simulated cohorts: layout, exact truth, no folds, reproducible bytes, and how far apart subjects are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from gridreg.errors import InputError
from gridreg.scans.landmarks import read_points
from gridreg.scans.volumes import read_field_mm
from study.cohorts.learn2reg import read_cohort
from study.cohorts.simulate import cohort, scanner
from study.cohorts.simulate import deformation as diffeo
from study.cohorts.simulate.brain import NAMES
from study.cohorts.simulate.plan import PROFILES, pairs, planned_scans, simulate_scan, with_few_patients

EMBEDDED = Path(__file__).parents[2] / "data"
SMALL = {
    "prostate": replace(
        PROFILES["demo"]["prostate"],
        counts=(1, 1, 1),
        template=2.8,
        in_plane=(4.0, 4.0),
        slices=(4.0, 4.0),
        visits={"train": {2: 1}, "val": {2: 1}, "test": {3: 1}},
    ),
    "pelvis": replace(PROFILES["demo"]["pelvis"], counts=(2, 2, 2), template=3.0, field_of_view=(110, 110, 90)),
    "brain": replace(PROFILES["demo"]["brain"], counts=(2, 2, 2), in_plane=(6.0, 6.0), slices=(6.0, 6.0)),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cohorts")
    for plan in SMALL.values():
        cohort.write_cohort(plan, out, progress=False)
    return out


def stored(path: Path) -> diffeo.Deformation:
    """A truth file read back as a deformation."""
    field, affine = read_field_mm(path)
    lattice = diffeo.Lattice(tuple(affine[:3, 3]), affine[0, 0], field.shape[1:])
    return diffeo.Deformation(lattice, np.rint(field / diffeo.STEP_MM).astype(np.int16))


def world(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Voxel indices (3, N) → RAS mm (3, N)."""
    return affine[:3, :3] @ index + affine[:3, 3:]


def labels_at(image: nibabel.Nifti1Image, points: np.ndarray) -> np.ndarray:
    """The label at RAS points (3, N); 0 outside."""
    return map_coordinates(np.asarray(image.dataobj), world(np.linalg.inv(image.affine), points), order=0)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    values = [v for v in np.unique(a) if v]
    return float(np.mean([2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in values]))


def before(fixed: nibabel.Nifti1Image, moving: nibabel.Nifti1Image) -> tuple[float, float]:
    """Dice and distance of the centroids (mm) of the masks of a pair, before registration."""
    everywhere = world(fixed.affine, np.indices(fixed.shape).reshape(3, -1))
    centroids = [world(i.affine, np.argwhere(np.asarray(i.dataobj) == 1).T).mean(axis=1) for i in (fixed, moving)]
    overlap = dice(np.asarray(fixed.dataobj).ravel(), labels_at(moving, everywhere))
    return overlap, float(np.linalg.norm(centroids[0] - centroids[1]))


# --- deformations -----------------------------------------------------------------------------------------------------


def random_field(seed: int = 0, size: float = 4.0) -> diffeo.Deformation:
    lattice = diffeo.covering(np.array([[-50, 50], [-40, 40], [-30, 30]]), 8.0)
    pose = diffeo.rigid([3, -2, 4], [2, 1, -3], np.zeros(3))
    return diffeo.deformation(lattice, lambda p: size * diffeo.smooth_noise(np.random.default_rng(seed), p, 40.0), pose)


def test_zero_velocity_is_the_identity():
    field = random_field(size=0.0)
    still = diffeo.deformation(field.lattice, np.zeros_like, np.eye(4))
    assert not still.steps.any()
    assert diffeo.smallest_jacobian(still) == 1


def test_shift_is_subtracted_in_pull_back():
    lattice = random_field().lattice
    shifted = diffeo.deformation(lattice, np.zeros_like, diffeo.rigid([0, 0, 0], [2, -3, 5], np.zeros(3)))
    np.testing.assert_allclose(shifted(np.array([[10.0], [0], [0]]))[:, 0], [8, 3, -5])


def test_inverse_and_grid_agree_with_the_field():
    field = random_field()
    x, y, z = np.linspace(-20, 30, 5), np.linspace(15, -25, 4), np.linspace(-11, 8, 6)
    points = np.stack(np.meshgrid(x, y, z, indexing="ij"))
    np.testing.assert_allclose(field.on_grid(x, y, z), field(points), atol=1e-9)
    there = field(points.reshape(3, -1))
    np.testing.assert_allclose(field.inverse(there), points.reshape(3, -1), atol=0.01)


def test_swelling_enlarges():
    centre = np.zeros(3)
    lattice = diffeo.covering(np.array([[-40, 40]] * 3), 4.0)
    field = diffeo.deformation(lattice, lambda p: 0.2 * diffeo.swelling(p, centre, 20.0), np.eye(4))
    assert field(np.array([[6.0], [0], [0]]))[0, 0] == pytest.approx(6 * np.exp(-0.2), rel=0.02)


def test_jacobian_bound_is_below_every_sampled_determinant():
    field = random_field(3)
    points = np.random.default_rng(0).uniform(-25, 25, (3, 2000))
    h = 1e-4
    columns = [(field(points + h * e) - field(points - h * e)) / (2 * h) for e in np.eye(3)[:, :, None]]
    sampled = np.linalg.det(np.stack(columns, axis=-1).transpose(1, 0, 2))
    assert 0 < diffeo.smallest_jacobian(field) <= sampled.min() + 1e-6


def test_folding_field_is_refused():
    with pytest.raises(ArithmeticError, match="Jacobian"):
        random_field(size=400.0)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SRP"])
def test_sampling_respects_the_stored_orientation(orientation):
    """A ramp along each world axis comes out as the voxel's own world coordinate, however the axes are stored."""
    target = scanner.grid((5, 6, 7), (3.0, 2.0, 4.0), (1.0, 2.0, 3.0), orientation)
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = -30
    ramps = np.indices((61, 61, 61), dtype=np.float32) - 30
    lattice = diffeo.covering(target.corners(), 10.0, 5.0)
    still = diffeo.deformation(lattice, np.zeros_like, np.eye(4))
    seen = scanner.sample([(r, 1) for r in ramps], affine, still, target)
    index = np.indices(target.shape).reshape(3, -1)
    np.testing.assert_allclose(np.reshape(seen, (3, -1)), world(target.affine, index), atol=1e-4)


# --- written cohorts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", SMALL)
def test_layout(written, dataset):
    folder = written / dataset
    info = json.loads((folder / "dataset.json").read_text())
    assert info["simulated"] is True and info["description"].startswith("SIMULATED")
    assert len(info["training"]) == info["numTraining"] and len(info["test"]) == info["numTest"]
    read = read_cohort(folder)
    assert read.simulated and read.name == dataset
    assert {s.id for s in read.subjects.values()} == {c.id for c in planned_scans(SMALL[dataset])}
    for subject in read.subjects.values():
        image, label = nibabel.load(subject.image), nibabel.load(subject.label)
        for file in (image, label, nibabel.load(subject.truth)):
            assert b"SIMULATED" in file.header["descrip"].item()
        assert image.shape == label.shape and np.array_equal(image.affine, label.affine)
        assert 0 <= image.get_fdata().min() < image.get_fdata().max() <= 255
        assert set(np.unique(label.dataobj)) - {0} <= {int(k) for k in info["labels"]}
        assert (subject.landmarks is not None) == (dataset != "pelvis" and subject.split != "train")


@pytest.mark.parametrize("dataset", SMALL)
def test_truth_file_is_the_deformation_that_made_the_image(written, dataset):
    plan = SMALL[dataset]
    case = planned_scans(plan)[-1]
    truth = written / dataset / "truthTs" / f"{case.id}.nii.gz"
    subject, field = simulate_scan(plan, case), stored(truth)
    np.testing.assert_array_equal(field.steps, subject.deformation.steps)
    assert diffeo.smallest_jacobian(field) > 0
    raw = nibabel.load(truth)
    assert raw.shape[3:] == (1, 3) and raw.header.get_intent()[0] == "vector"
    assert raw.header.get_data_dtype() == np.int16 and raw.dataobj.slope == diffeo.STEP_MM


@pytest.mark.parametrize(("dataset", "least"), [("prostate", 0.88), ("pelvis", 0.85), ("brain", 0.70)])
def test_true_correspondence_aligns_labels_and_landmarks(written, dataset, least):
    folder, plan = written / dataset, SMALL[dataset]
    for fixed, moving in pairs(plan, planned_scans(plan), "test")[:2]:
        a, b = (nibabel.load(folder / "labelsTs" / f"{i}.nii.gz") for i in (fixed, moving))
        phi_a, phi_b = (stored(folder / "truthTs" / f"{i}.nii.gz") for i in (fixed, moving))
        inside = np.argwhere(np.asarray(a.dataobj) > 0)
        box = [slice(low, high + 1) for low, high in zip(inside.min(axis=0), inside.max(axis=0))]
        index = np.mgrid[box]
        x = world(a.affine, index.reshape(3, -1).astype(float))
        y = phi_b.inverse(phi_a(x))
        mine = np.asarray(a.dataobj)[tuple(box)].ravel()
        assert dice(mine, labels_at(b, y)) > max(least, dice(mine, labels_at(b, x)))
        # the composed map does not fold either
        steps = [np.diff(y.reshape(index.shape), axis=1 + k) for k in range(3)]
        columns = [s[:, : index.shape[1] - 1, : index.shape[2] - 1, : index.shape[3] - 1] for s in steps]
        determinants = np.linalg.det(np.stack(columns, axis=-1).transpose(1, 2, 3, 0, 4))
        assert (determinants / np.linalg.det(a.affine[:3, :3])).min() > 0
        if dataset != "pelvis":
            points = [read_points(folder / "landmarksTs" / f"{i}.csv") for i in (fixed, moving)]
            assert points[0][0].keys() == points[1][0].keys() and len(points[0][0]) == (7 if dataset == "brain" else 5)
            for name, point in points[0][0].items():
                gap = phi_a(point[:, None]) - phi_b(points[1][0][name][:, None])
                assert np.linalg.norm(gap) < 0.1


def test_same_seed_same_bytes_another_seed_others(written, tmp_path):
    plan = SMALL["pelvis"]
    cohort.write_cohort(plan, tmp_path / "again", progress=False)
    cohort.write_cohort(replace(plan, seed=1, test_seed=2), tmp_path / "other", progress=False)
    hashes = [
        {p.relative_to(root): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.nii.gz")}
        for root in (written / "pelvis", tmp_path / "again" / "pelvis", tmp_path / "other" / "pelvis")
    ]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0].values()) & set(hashes[2].values())


def test_test_subjects_have_a_seed_of_their_own(written, tmp_path):
    cohort.write_cohort(replace(SMALL["prostate"], test_seed=5), tmp_path, progress=False)
    for path in (written / "prostate").rglob("*.nii.gz"):
        same = (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes()
        assert same == path.parent.name.endswith("Tr"), path.name


def test_pelvis_scanners_differ(written):
    images = [nibabel.load(p) for p in (written / "pelvis").glob("images*/*.nii.gz")]
    assert len({i.header.get_zooms() for i in images}) == len(images)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dataset", SMALL)
def test_patients_are_in_one_split_only(profile, dataset):
    plan = PROFILES[profile][dataset]
    todo = planned_scans(plan)
    split_of: dict[int, str] = {}
    for case in todo:
        assert split_of.setdefault(case.patient, case.split) == case.split
    assert tuple(list(split_of.values()).count(s) for s in ("train", "val", "test")) == plan.counts
    by_id = {c.id: c for c in todo}
    for split in ("train", "val", "test"):
        listed = pairs(plan, todo, split)
        assert len(set(listed)) == len(listed) and (listed or split == "train")
        assert all(a != b and by_id[a].split == by_id[b].split == split for a, b in listed)
        if dataset == "prostate":
            assert all(by_id[a].patient == by_id[b].patient for a, b in listed)


def test_paper_counts():
    """Section 4 of the paper: visits of the patients, and pairs held out."""
    plan = PROFILES["paper"]["prostate"]
    todo = planned_scans(plan)
    visits = np.bincount(np.bincount([c.patient for c in todo])[1:])
    assert visits[2:].tolist() == [60, 8, 18] and len(todo) == 216
    assert [len(pairs(plan, todo, s)) for s in ("val", "test")] == [32, 38]
    pelvis = PROFILES["paper"]["pelvis"]
    assert [len(pairs(pelvis, planned_scans(pelvis), s)) for s in ("val", "test")] == [58, 59]


@pytest.mark.parametrize("dataset", PROFILES["paper"])
@pytest.mark.parametrize("patients", [2, 3, 1000])
def test_few_patients_make_pairs_in_every_split(dataset, patients):
    plan = with_few_patients(PROFILES["paper"][dataset], patients)
    todo = planned_scans(plan)
    counted = [len({c.patient for c in todo if c.split == split}) for split in ("train", "val", "test")]
    assert counted == [min(count, patients) for count in PROFILES["paper"][dataset].counts]
    assert all(pairs(plan, todo, split) for split in ("val", "test"))
    assert replace(plan, counts=(), visits={}) == replace(PROFILES["paper"][dataset], counts=(), visits={})


# --- command line -----------------------------------------------------------------------------------------------------


def test_foreign_folder_is_refused(tmp_path, capsys):
    (tmp_path / "brain").mkdir()
    (tmp_path / "brain" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        cohort.write_cohort(SMALL["brain"], tmp_path, progress=False)
    assert cohort.main(["--out", str(tmp_path), "--only", "brain"]) == 1
    assert "precious" not in capsys.readouterr().out and (tmp_path / "brain" / "precious.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["brain"]


def test_one_patient_is_no_pair(tmp_path, capsys):
    assert cohort.main(["--out", str(tmp_path), "--patients", "1"]) == 1 and not any(tmp_path.iterdir())
    assert "--patients is 1, expected at least 2" in capsys.readouterr().err


def test_earlier_cohort_is_replaced(tmp_path):
    folder = tmp_path / "pelvis"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"generator": cohort.GENERATOR}))
    (folder / "left_over.nii.gz").write_bytes(b"")
    cohort.write_cohort(replace(SMALL["pelvis"], counts=(1, 0, 1)), tmp_path, progress=False)
    assert not (folder / "left_over.nii.gz").exists() and (folder / "imagesTr" / "pelvis_0001_0000.nii.gz").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["pelvis"]


# --- the embedded cohort ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "overlap", "distance"), [("prostate", (0.65, 0.75), (6, 9)), ("pelvis", (0.45, 0.65), (8, 11))]
)
def test_embedded_masks_before_registration(dataset, overlap, distance):
    if not (EMBEDDED / dataset / "dataset.json").is_file():
        pytest.skip("data/ is not pulled")
    read = read_cohort(EMBEDDED / dataset)
    found = [
        before(*(nibabel.load(read.subjects[i].label) for i in pair))
        for split in ("val", "test")
        for pair in read.pairs[split]
    ]
    mean = np.mean(found, axis=0)
    assert overlap[0] < mean[0] < overlap[1]
    assert distance[0] < mean[1] < distance[1]


def test_the_delivered_scan_is_made_again(tmp_path):
    """Header and voxels as delivered; compression and the last bit of a float may differ between machines."""
    if not (EMBEDDED / "brain" / "dataset.json").is_file():
        pytest.skip("data/ is not pulled")
    plan = PROFILES["demo"]["brain"]
    planned = planned_scans(plan)[-1]
    cohort.write_scan(plan, tmp_path, planned)
    for kind in ("images", "labels", "truth"):
        delivered, made = (
            nibabel.load(f / f"{kind}Ts" / f"{planned.id}.nii.gz") for f in (EMBEDDED / "brain", tmp_path)
        )
        assert made.header.binaryblock == delivered.header.binaryblock
        assert (np.asarray(made.dataobj) != np.asarray(delivered.dataobj)).mean() < 1e-3
    info = json.loads((EMBEDDED / "brain" / "dataset.json").read_text())
    assert cohort._dataset(plan, planned_scans(plan), NAMES) == info


def test_embedded_brain_before_registration():
    if not (EMBEDDED / "brain" / "dataset.json").is_file():
        pytest.skip("data/ is not pulled")
    read = read_cohort(EMBEDDED / "brain")
    found = []
    for fixed, moving in read.pairs["test"]:
        label = nibabel.load(read.subjects[fixed].label)
        x = world(label.affine, np.argwhere(np.asarray(label.dataobj) > 0)[::50].T.astype(float))
        y = stored(read.subjects[moving].truth).inverse(stored(read.subjects[fixed].truth)(x))
        found.append(np.linalg.norm(y - x, axis=0).mean())
    assert 5 < np.mean(found) < 8
