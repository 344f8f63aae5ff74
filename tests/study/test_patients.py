"""Whose a scan is: names of public cohorts and of labs, several visits, many sites, and what an entry states."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from gridreg.errors import InputError
from study.cohorts.learn2reg import read_cohort
from study.cohorts.patients import patients_of


def visits(pattern: str, patients: range = range(1, 9), numbers: tuple[int, ...] = (1, 2)) -> list[tuple[str, str]]:
    """(name, its patient) of every visit."""
    return [(pattern.format(p, v), str(p)) for p, v in product(patients, numbers)]


def same_groups(names: list[str], patients: list[str]) -> bool:
    """Whether the inferred patients divide the names as they should be divided."""
    inferred, _ = patients_of(names)
    return len({(inferred[name], patient) for name, patient in zip(names, patients)}) == len(set(patients)) == len(
        set(inferred.values())
    )  # fmt: skip


@pytest.mark.parametrize("pattern", [
    "brain_{:04d}_{:04d}",  # Learn2Reg, ours
    "brain_{:04d}_{:04d}_0000",  # and with its first modality
    "case_{:04d}_{}",
    "p{:02d}_{:02d}",
    "pat{:03d}_visit{:03d}",
    "sub-{:03d}_ses-{:02d}_T1w",
    "sub-{:03d}_ses-{:02d}_acq-mprage_run-1_T1w",
    "siteA_sub-{:02d}_run-{}",
    "{:03d}_{}",
    "{:03d}-{:02d}",
    "x{:02d}_{:02d}",
    "prostate_{}_{:02d}",
    "mouse{}_{:02d}",
    "TCGA-AB-{:04d}_{}",
    "OAS2_{:04d}_MR{}",
    "002_S_{:04d}_m{:02d}",
    "{:03d}_2019030{}",
    "{:03d}_2019-03-0{}_T2",
    "{:04d}_t{}_T2",
    "{:03d}v{}",
    "{:04d}_{}_brain",
    "{:02d}_T{}w",
    "subject{:02d}-tp{}",
    "P{}.{}",
    "Patient {} {}",
    "site1_{:04d}_{:02d}",
])  # fmt: skip
def test_visits_of_one_patient_belong_together(pattern):
    names, patients = zip(*visits(pattern))
    assert same_groups(list(names), list(patients))
    once = [name for i, name in enumerate(names) if i % 2 == 0 or i > 10]  # some patients have one visit only
    assert same_groups(once, [p for i, p in enumerate(patients) if i % 2 == 0 or i > 10])


@pytest.mark.parametrize("ends", [("pre", "post"), ("baseline", "followup"), ("Fixed", "Moving"), ("iBHCT", "eBHCT"),
                                  ("left", "right"), ("T1", "T2"), ("a", "b")])  # fmt: skip
def test_words_at_the_end_tell_scans_apart(ends):
    assert same_groups(
        [f"lung_{i:03d}_{end}" for i in range(8) for end in ends], [str(i) for i in range(8) for _ in ends]
    )


@pytest.mark.parametrize("first", ["visit{1}_{0:03d}", "2019030{1}_{0:04d}", "2019030{1}_p{0:02d}", "T{1}_{0:03d}", "v{1}-{0:03d}",
                                   "ses-{1}_sub-{0:02d}"])  # fmt: skip
def test_the_visit_may_stand_first(first):
    assert same_groups([first.format(p, v) for p in range(8) for v in (1, 2)], [str(p) for p in range(8) for _ in "12"])


@pytest.mark.parametrize("names", [
    [f"site1_{i:04d}" for i in range(30)],
    [f"site{s}_{i:04d}" for s in (1, 2, 3) for i in range(10)],  # numbered anew at every site
    [f"site{1 + i // 4}_{i:04d}" for i in range(30)],  # numbered through
    [f"{s}_{i:04d}" for s in (1, 2, 3) for i in range(10)],
    [f"{1 + i // 4}_{i:04d}" for i in range(32)],
    [f"{s:02d}_{i:02d}" for s in (1, 2) for i in range(15)],
    [f"site{s}_T1_{i:04d}" for s in (1, 2) for i in range(15)],
    [f"case_1_{i:04d}" for i in range(30)],
    [f"OAS1_{i:04d}" for i in range(30)],
    [f"OAS1_{i:04d}_MR1" for i in range(30)],
    [f"LUMIRMRI_{i:04d}_0000" for i in range(30)],
    [f"MALF_{i}_0000" for i in range(1001, 1017)],
    [f"IXI{i:03d}-Guys-{800 + 3 * i:04d}-T1" for i in range(30)],
    [f"T1_{i:04d}" for i in range(30)],
    [f"brain_{i}" for i in range(30)],
    [f"brain_scan_{i:04d}" for i in range(30)],
    [f"{organ}_{i}" for organ in ("brain", "liver", "lung") for i in range(9)],
    ["a_0001_0000", "a_0002_0000"],
    ["only_0001"],
], ids=lambda names: names[0])  # fmt: skip
def test_people_are_not_taken_for_visits(names):
    assert same_groups(names, names)


def test_many_visits_of_few_and_mixed_names():
    assert same_groups(*map(list, zip(*visits("prostate_{:04d}_{:04d}", range(3), (0, 1, 2, 3)))))
    assert same_groups(*map(list, zip(*visits("p{:02d}_{:02d}", range(3), tuple(range(30))))))
    contrasts = [(f"{i:03d}_{v:02d}_{'T1' if i % 2 else 'FLAIR'}", str(i)) for i in range(9) for v in (1, 2)]
    assert same_groups(*map(list, zip(*contrasts)))
    names = [f"brain_{i:04d}" for i in range(10)] + [f"brain_{i:04d}_1" for i in range(5)]  # the first without a number
    assert same_groups(names, [str(i % 10) for i in range(15)])
    assert same_groups(
        [f"{n}_{v}" for n in ("Anna", "Ben", "Cleo", "Dan") for v in (1, 2)], [n for n in "abcd" for _ in "12"]
    )


def test_sentences_name_counts_rule_and_an_example():
    _, (sentence,) = patients_of([name for name, _ in visits("p{:02d}_{:02d}")])
    assert sentence == ("8 patients inferred from the names of 16 scans by the number after a word for a patient "
                        "(p01_01 and p01_02 are patient p01)")  # fmt: skip
    _, (sentence,) = patients_of([f"site1_{i:04d}" for i in range(30)])
    assert sentence.startswith("30 patients inferred from the names of 30 scans, one scan each (site1_0000 is")
    patients, sentences = patients_of(
        ["x_1", "x_2", "p7_1", "p7_2", "p8_1"], {"x_1": "Ann", "x_2": "Ben", "p7_1": "Cem"}
    )
    assert patients == {"x_1": "Ann", "x_2": "Ben", "p7_1": "Cem", "p7_2": "Cem", "p8_1": "p8"}, "p7_2 follows p7_1"
    assert sentences[0] == "3 patients stated in dataset.json for 4 scans (p7_1 and p7_2 are patient Cem)"


@pytest.mark.parametrize("pattern", ["brain_{:04d}_{:04d}", "case_{:04d}_{}", "p{:02d}_{:02d}", "pat{:03d}_visit{:03d}",
                                     "sub-{:03d}_ses-{:02d}_T1w"])  # fmt: skip
def test_first_visits_of_tested_patients_do_not_train(tmp_path, pattern):
    """Eight patients, two of whom are tested at their second visit."""
    names = [[pattern.format(patient, visit) for visit in (0, 1)] for patient in range(8)]
    training = [name for two in names[:6] for name in two] + [names[6][0], names[7][0]]
    info = {
        "training": [f"./imagesTr/{n}.nii.gz" for n in training],
        "test": [f"./imagesTs/{two[1]}.nii.gz" for two in names[6:]],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    cohort = read_cohort(tmp_path)
    assert cohort.found[0].startswith("8 patients inferred from the names of 16 scans")
    assert not {names[6][0], names[7][0]} & cohort.subjects.keys()
    assert {s.patient for s in cohort.subjects.values() if s.split == "test"}.isdisjoint(
        s.patient for s in cohort.subjects.values() if s.split != "test"
    )
    assert any("2 training scan(s) of validation or test patients are left out" in note for note in cohort.notes)


def entries(*scans: tuple[str, object]) -> list[dict]:
    return [{"image": f"./imagesTr/{name}.nii.gz", "patient": patient} for name, patient in scans]


def cohort_of(folder: Path, **info: list) -> object:
    (folder / "dataset.json").write_text(json.dumps(info))
    return read_cohort(folder)


def test_a_stated_patient_wins_and_a_split_that_contradicts_it_is_refused(tmp_path):
    train = [(f"a_{i:04d}", i) for i in range(8)]
    test = [("b_0001", "x"), ("b_0002", "y")]
    cohort = cohort_of(tmp_path, training=entries(*train), test=entries(*test))
    assert cohort.subjects["a_0000"].patient == "0" and cohort.found[0].startswith(
        "10 patients stated in dataset.json for 10"
    )
    for contradicting in (dict(training=entries(*train, ("a_0009", "x")), test=entries(*test)),
                          dict(training=entries(*train, ("b_0001", "x"), ("b_0003", "x")), test=[],
                               registration_test=[{"fixed": "b_0001", "moving": "a_0007"}])):  # fmt: skip
        with pytest.raises(
            InputError, match=r"found patient 'x' in training \(\w+\) and in test \(b_0001\), expected each patient"
        ):
            cohort_of(tmp_path, **contradicting)
    val = [{"fixed": "a_0000", "moving": "a_0009"}]
    with pytest.raises(InputError, match="found patient 'x' in validation"):
        cohort_of(tmp_path, training=entries(*train, ("a_0009", "x")), test=entries(*test), registration_val=val)
    for wrong in (True, 1.5, ["x"]):
        with pytest.raises(
            InputError, match="found the patient .* of a_0009.nii.gz, expected a name or a whole number"
        ):
            cohort_of(tmp_path, training=entries(*train, ("a_0009", wrong)), test=entries(*test))


def test_who_is_tested_neither_trains_nor_validates(tmp_path):
    scans = [f"p{i}_{v}" for i in range(8) for v in (1, 2)]
    info = dict(training=[f"imagesTr/{name}.nii.gz" for name in scans],
                registration_val=[{"fixed": "p0_1", "moving": "p1_1"}, {"fixed": "p2_1", "moving": "p3_1"}],
                registration_test=[{"fixed": "p0_2", "moving": "p4_1"}])  # fmt: skip
    cohort = cohort_of(tmp_path, **info)
    assert (
        cohort.pairs["val"] == [("p2_1", "p3_1")]
        and "1 validation pair(s) of test patients are left out" in cohort.notes
    )
    assert {s.patient for s in cohort.subjects.values() if s.split == "train"} == {"p5", "p6", "p7"}
    twice = dict(training=info["training"], test=["imagesTr/p0_1.nii.gz", "imagesTr/p1_1.nii.gz"])
    assert cohort_of(tmp_path, **twice).subjects["p0_1"].split == "test", "listed twice: never trained on"
