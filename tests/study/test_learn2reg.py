"""Cohorts in Learn2Reg layout: every variant of dataset.json, and every one that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gridreg.errors import InputError
from study.cohorts.files import id_of
from study.cohorts.learn2reg import limit, read_cohort


def write(folder: Path, info: dict, name: str = "dataset.json", files: tuple[str, ...] = ()) -> Path:
    (folder / name).write_text(json.dumps(info))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def images(folder: str, numbers: range, stem: str = "brain") -> list[str]:
    return [f"./{folder}/{stem}_{n:04d}_0000.nii.gz" for n in numbers]


def pair(fixed: str, moving: str) -> dict:
    return {"fixed": fixed, "moving": moving}


def cohort_info(**changes) -> dict:
    train, test = images("imagesTr", range(6)), images("imagesTs", range(6, 9))
    return {
        "name": "Brains",
        "labels": {"0": "background", "1": "left", "2": "right"},
        "training": [{"image": i, "label": i.replace("images", "labels")} for i in train],
        "test": [{"image": i} for i in test],
        "registration_val": [pair(train[4], train[5])],
        "registration_test": [pair(test[0], test[1]), pair(test[2], test[0])],
    } | changes


def test_splits_and_implied_training_pairs(tmp_path):
    cohort = read_cohort(write(tmp_path, cohort_info()))
    assert cohort.name == "Brains" and not cohort.simulated and cohort.notes == ()
    assert cohort.label_names == {1: "left", 2: "right"}
    splits = {i: s.split for i, s in cohort.subjects.items()}
    assert [i for i, s in splits.items() if s == "train"] == [f"brain_{n:04d}_0000" for n in range(4)]
    assert splits["brain_0005_0000"] == "val" and splits["brain_0006_0000"] == "test"
    assert cohort.pairs["val"] == [("brain_0004_0000", "brain_0005_0000")]
    assert cohort.pairs["test"][1] == ("brain_0008_0000", "brain_0006_0000")
    assert len(set(cohort.pairs["train"])) == 4 * 3
    assert {f for f, _ in cohort.pairs["train"][:4]} == {i for i, s in splits.items() if s == "train"}, "balanced"


def test_neighbouring_folders_and_plain_paths(tmp_path):
    info = cohort_info(training=images("imagesTr", range(6)), simulated=True)
    write(
        tmp_path,
        info,
        files=(
            "labelsTr/brain_0001_0000.nii.gz",
            "landmarksTs/brain_0006_0000.csv",
            "truthTs/brain_0006_0000.nii.gz",
            "masksTs/brain_0007_0000.nii.gz",
        ),
    )
    cohort = read_cohort(tmp_path)
    assert cohort.simulated
    assert cohort.subjects["brain_0001_0000"].label == tmp_path / "labelsTr/brain_0001_0000.nii.gz"
    assert cohort.subjects["brain_0002_0000"].label is None
    test = cohort.subjects["brain_0006_0000"]
    assert test.landmarks == tmp_path / "landmarksTs/brain_0006_0000.csv"
    assert test.truth == tmp_path / "truthTs/brain_0006_0000.nii.gz"
    assert cohort.subjects["brain_0007_0000"].label.parent.name == "masksTs"


def test_mask_stands_in_for_label_and_keypoints_are_ignored(tmp_path):
    entries = [
        {"image": i, "mask": i.replace("images", "masks"), "keypoints": i.replace("images", "points")}
        for i in images("imagesTr", range(6))
    ]
    subject = read_cohort(write(tmp_path, cohort_info(training=entries))).subjects["brain_0000_0000"]
    assert subject.label.parent.name == "masksTr" and subject.landmarks is None


def test_lumir_json_loads_unchanged(tmp_path):
    """LUMIR: 'validation' holds pairs of files in imagesVal that no list names; there is no test set."""
    val = images("imagesVal", range(3454, 3458), "LUMIRMRI")
    info = {
        "name": "LUMIR",
        "release": "1.0",
        "description": "...",
        "modality": {"0": "MRI"},
        "numTraining": 20,
        "numTest": 0,
        "training": [{"image": i} for i in images("imagesTr", range(20), "LUMIRMRI")],
        "validation": [pair(b, a) for a, b in zip(val, val[1:])],
    }
    cohort = read_cohort(write(tmp_path, info, "LUMIR_dataset.json", tuple(val)))
    assert cohort.pairs["test"][0] == ("LUMIRMRI_3455_0000", "LUMIRMRI_3454_0000") and len(cohort.pairs["test"]) == 3
    assert cohort.pairs["val"] == [("LUMIRMRI_0019_0000", "LUMIRMRI_0018_0000")], "384 / 3384 of 20, the last ones"
    assert not {m for p in cohort.pairs["train"] for m in p} & set(cohort.pairs["val"][0])
    assert "validation pairs are the test set" in cohort.notes[0] and "last 2 of 20" in cohort.notes[1]
    assert read_cohort(tmp_path / "LUMIR_dataset.json") == cohort


def test_longitudinal_pairs_keep_patients_together(tmp_path):
    visit = [[f"./imagesTr/prostate_{p:04d}_{v:04d}.nii.gz" for v in range(2)] for p in range(5)]
    listed = [{"image": i} for v in visit for i in v]
    info = {
        "name": "P",
        "pairings": "paired",
        "training": listed,
        "test": 0,
        "training_paired_images": [pair(*v) for v in visit],
        "registration_val": [pair(*visit[3])],
        "registration_test": [pair(*visit[4])],
    }
    cohort = read_cohort(write(tmp_path, info))
    assert cohort.subjects["prostate_0003_0001"].patient == "prostate_0003"
    assert cohort.pairs["train"] == [(f"prostate_{p:04d}_0000", f"prostate_{p:04d}_0001") for p in range(3)]
    del info["training_paired_images"]
    implied = read_cohort(write(tmp_path, info)).pairs["train"]
    assert len(implied) == 6 and all(f.rsplit("_", 1)[0] == m.rsplit("_", 1)[0] for f, m in implied)
    info["registration_test"] = [pair(visit[4][0], visit[3][0])]
    info["registration_val"] = [pair(*visit[2])]
    cohort = read_cohort(write(tmp_path, info))
    assert "prostate_0003_0001" not in cohort.subjects and "2 training scan(s)" in cohort.notes[0], "no leak by visit"


def test_test_subjects_without_pairs_are_paired_in_order(tmp_path):
    info = cohort_info(test=images("imagesTs", range(6, 9)))
    del info["registration_test"]
    assert read_cohort(write(tmp_path, info)).pairs["test"] == [
        ("brain_0007_0000", "brain_0006_0000"),
        ("brain_0008_0000", "brain_0007_0000"),
    ]


def test_limit_keeps_whole_pairs(tmp_path):
    cohort = limit(read_cohort(write(tmp_path, cohort_info())), {"train": 3, "test": 2}, {"train": 4})
    assert len(cohort.pairs["train"]) == 4 and len({m for p in cohort.pairs["train"] for m in p}) == 3
    assert cohort.pairs["test"] == [("brain_0006_0000", "brain_0007_0000")]
    assert "brain_0008_0000" not in cohort.subjects and len(cohort.subjects) == 3 + 2 + 2
    assert {split: len(pairs) for split, pairs in limit(cohort, 3, 1).pairs.items()} == dict(train=1, val=1, test=1)
    for bad, message in (
        (dict(max_subjects={"train": 1}), "no train pair"),
        (dict(max_pairs={"dev": 3}), "'dev'"),
        (dict(max_pairs={"test": 0}), "positive"),
    ):
        with pytest.raises(InputError, match=message):
            limit(cohort, **bad)


@pytest.mark.parametrize(("path", "subject"), [
    ("./imagesTr/brain_0001_0000.nii.gz", "brain_0001_0000"), ("a/subject_0007.nii", "subject_0007"), ("x_0001.csv", "x_0001"),
    ("B.1.NII.GZ", "B.1"), ("x.mrk.json", "x"), ("x.fcsv", "x"),
])  # fmt: skip
def test_ids(path, subject):
    assert id_of(path) == subject


def test_one_number_in_a_name_is_the_patients_and_an_entry_may_name_its_patient(tmp_path):
    names = [f"./imagesTr/OAS1_{n:04d}.nii.gz" for n in range(8)]
    info = cohort_info(
        training=names, test=[], registration_val=[pair(*names[4:6])], registration_test=[pair(*names[6:8])]
    )
    cohort = read_cohort(write(tmp_path, info))
    assert len({s.patient for s in cohort.subjects.values()}) == 8 and len(set(cohort.pairs["train"])) == 4 * 3
    info["training"] = [{"image": name, "patient": "p0" if n in (0, 4) else f"p{n}"} for n, name in enumerate(names)]
    cohort = read_cohort(write(tmp_path, info))
    assert "OAS1_0000" not in cohort.subjects and "1 training scan(s) of validation or test patients" in cohort.notes[0]


TRAIN = images("imagesTr", range(6))


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"training": []}, "no subject under 'training'", "a list of images"),
        ({"training": [{"label": "x.nii.gz"}]}, "the train entry", "'image'"),
        ({"test": [], "registration_test": [], "registration_val": []}, "no subject or pair under 'test'", "one pair"),
        ({"registration_val": [{"fixed": TRAIN[4]}]}, "without 'moving'", "both 'fixed' and 'moving'"),
        ({"registration_test": [pair("./imagesTs/nobody_0001.nii.gz", TRAIN[0])]}, "nobody_0001", "an existing file"),
        ({"registration_val": [pair(TRAIN[4], TRAIN[4])]}, "as fixed and moving", "two volumes"),
        ({"test": ["./imagesTs/brain_0000_0000.nii.gz"]}, "both as", "unique file names"),
        (
            {
                "training": TRAIN[:1],
                "registration_val": [pair(*images("imagesTs", range(6, 8)))],
                "registration_test": [pair(*images("imagesTs", range(7, 9)))],
            },
            "no validation pairs and 1",
            "at least 4",
        ),
        ({"training": [{"image": i} for i in TRAIN[3:]]}, "1 training subject", "two"),
    ],
)
def test_refused(tmp_path, changes, found, expected):
    with pytest.raises(InputError) as error:
        read_cohort(write(tmp_path, cohort_info(**changes)))
    assert "dataset.json" in str(error.value) and found in str(error.value), str(error.value)
    assert expected in str(error.value).split("expected", 1)[1]


def test_refused_folders(tmp_path):
    with pytest.raises(InputError, match="nowhere: found no such folder, expected a cohort"):
        read_cohort(tmp_path / "nowhere")
    with pytest.raises(InputError, match="found none, expected dataset.json"):
        read_cohort(tmp_path)
    (tmp_path / "a_dataset.json").write_text("{")
    with pytest.raises(InputError, match="found text that is not JSON"):
        read_cohort(tmp_path)
    (tmp_path / "a_dataset.json").write_text("[]")
    with pytest.raises(InputError, match="found a JSON list, expected an object"):
        read_cohort(tmp_path)
    (tmp_path / "b_dataset.json").write_text("{}")
    with pytest.raises(InputError, match="found a_dataset.json, b_dataset.json, expected"):
        read_cohort(tmp_path)


@pytest.mark.parametrize(("image", "label"), [
    ("brain_{:03d}_0000.nii.gz", "brain_{:03d}.nii"), ("brain_{:03d}_0000.nii.gz", "brain_{:03d}.nii.gz"),
    ("brain_{:03d}.nii.gz", "brain_{:03d}_0000.nii.gz"), ("brain_{:03d}.nii", "brain_{:03d}.nii.gz"),
    ("brain_{:03d}.nii.gz", "brain_{:03d}.NII.GZ"),
])  # fmt: skip
@pytest.mark.parametrize("folder", ["labelsTr", "masksTr"])
def test_labels_under_another_ending_or_without_the_modality(tmp_path, image, label, folder):
    listed = [f"./imagesTr/{image.format(i)}" for i in range(8)]
    write(tmp_path, {"numTraining": 100, "training": [{"image": i} for i in listed],
                     "registration_test": [pair(listed[0], listed[1])]},
          files=(*listed, *(f"{folder}/{label.format(i)}" for i in range(8))))  # fmt: skip
    cohort = read_cohort(tmp_path)
    assert all(s.label == tmp_path / folder / label.format(int(n.split("_")[1])) for n, s in cohort.subjects.items())
    assert cohort.found[1] == "8 images: 8 with labels, 0 with landmarks, 0 with a true deformation"
    assert cohort.notes[0] == "numTraining says 100, 8 are listed" and not any(
        "labels" in note for note in cohort.notes
    )


def test_the_file_with_the_images_own_name_comes_first(tmp_path):
    listed = images("imagesTr", range(6))
    stem = "labelsTr/brain_0001"
    write(tmp_path, cohort_info(training=listed), files=(f"{stem}.nii.gz", f"{stem}_0000.nii", f"{stem}_0000.nii.gz"))
    assert read_cohort(tmp_path).subjects["brain_0001_0000"].label == tmp_path / f"{stem}_0000.nii.gz"


def test_what_fits_no_image_is_counted_and_named(tmp_path):
    listed, tested = images("imagesTr", range(6)), images("imagesTs", range(6, 9))
    write(tmp_path, cohort_info(training=listed, numTest=7, numRegistration_val=1), files=(
        *listed, *tested, "imagesTr/brain_0099_0000.nii.gz", "imagesTr/.hidden.nii.gz", "imagesTr/read_me.txt",
        *(f"labelsTr/brain_{i:04d}_seg.nii.gz" for i in range(5)), "labelsTr/brain_0005_0000.nii.gz",
        *(f"labelsTs/brain_{i:04d}.nrrd" for i in range(6, 9)),
        "landmarksTs/brain_0006.csv", "landmarksTs/brain_0007_0000.mrk.json", "landmarksTs/brain_eight.fcsv",
    ))  # fmt: skip
    cohort = read_cohort(tmp_path)
    assert cohort.found[1] == "9 images: 1 with labels, 2 with landmarks, 0 with a true deformation"
    assert cohort.notes == (
        "numTest says 7, 3 are listed",
        "imagesTr: 1 of 7 files are not listed (brain_0099_0000.nii.gz)",
        "imagesTr: 5 of 6 listed images have no label map (brain_0000_0000.nii.gz, brain_0001_0000.nii.gz, brain_0002_0000.nii.gz, …)",
        "labelsTr: 5 of 6 files belong to no listed image (brain_0000_seg.nii.gz, brain_0001_seg.nii.gz, brain_0002_seg.nii.gz, …)",
        "imagesTs: 3 of 3 listed images have no label map (brain_0006_0000.nii.gz, brain_0007_0000.nii.gz, brain_0008_0000.nii.gz)",
        "labelsTs: 3 of 3 files belong to no listed image (brain_0006.nrrd, brain_0007.nrrd, brain_0008.nrrd)",
        "landmarksTs: 1 of 3 files belong to no listed image (brain_eight.fcsv)",
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_dataset_json_of_any_editor(tmp_path, encoding):
    info = cohort_info(name="Schädel", licence="© Müller")
    (tmp_path / "dataset.json").write_bytes(json.dumps(info, ensure_ascii=False).encode(encoding))
    assert read_cohort(tmp_path).name == "Schädel"
