"""Datasets in use and not: skipped aloud, set aside, and back to where they stood."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import pytest
from small_params import block, edit, fresh

from gridreg.errors import InputError
from study.config.params import load, update


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fresh(tmp_path)


DATASETS = ("prostate", "pelvis", "brain")


def texts(path: Path) -> dict[str, str]:
    """The lines of every block, whichever section it stands in."""
    lines, found, name = path.read_text().splitlines(), {}, None
    for line in lines:
        if line.strip().strip(":").split(":")[0] in (*DATASETS, "oasis") and line.startswith("  ") and line[2] != " ":
            name = line.strip().split(":")[0]
            found[name] = line
        elif name and line.startswith("    "):
            found[name] += "\n" + line
        else:
            name = None
    return found


def own(path: Path, folder: Path) -> None:
    """A dataset of the user's between the others."""
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [prostate, oasis, brain, pelvis]  # my order")
    edit(path, "  pelvis:\n", "  # mine\n  oasis:  # ours\n" + block(folder) + "  pelvis:\n")


def test_a_missing_dataset_is_skipped_aloud_and_comes_back_to_its_place(path):
    folder = path.parent / "elsewhere"
    own(path, folder)
    before, blocks = path.read_bytes(), texts(path)
    for number in range(2):  # said every time, written once
        assert update(path) == [f"dataset oasis: skipped, folder {folder} not found (named in {path})"]
        params = load(path)
        assert params["use"]["datasets"] == ["prostate", "brain", "pelvis"] and params["use"]["skipped"] == ["oasis"]
        assert list(params["datasets"]) == list(DATASETS) and list(params["unused"]) == ["oasis"]
        assert number == 0 or path.read_bytes() == after
        after = path.read_bytes()
    assert texts(path) == blocks and b"  # mine\n  oasis:  # ours\n" in after and b"  # my order\n" in after
    folder.mkdir()
    assert update(path) == [f"dataset oasis: back in use, {folder} found"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("gone", [some for n in (1, 2) for some in combinations(DATASETS, n)])
def test_whichever_is_missing_the_comments_stay_and_all_come_back_to_the_same_bytes(path, gone):
    before = path.read_bytes()
    for name in gone:
        (path.parent / "cohorts" / "paper" / name).rmdir()
    update(path, "paper")
    params, text = load(path), path.read_text()
    assert list(params["datasets"]) == [n for n in DATASETS if n not in gone] and set(params["unused"]) == set(gone)
    assert "\n\n# A comment above train.\ntrain:\n" in text and text.count("#") == before.count(b"#") + 1
    for name in reversed(gone):  # the last one first
        (path.parent / "cohorts" / "paper" / name).mkdir()
        assert update(path)[0] == f"dataset {name}: back in use, cohorts/paper/{name} found"
    assert update(path) == []
    update(path, "demo")
    assert path.read_bytes() == before


def test_a_profile_with_missing_folders_and_back_to_demo(path):
    before = path.read_bytes()
    shutil.rmtree(path.parent / "cohorts" / "paper" / "prostate")
    update(path, "paper")
    assert load(path)["unused"]["prostate"]["shape"] == [128, 128, 102]
    lines = update(path, "smoke")
    assert lines == [f"{path}: now in profile smoke", "dataset prostate: back in use, data/prostate found"]
    update(path, "demo")
    assert path.read_bytes() == before


def test_a_dataset_not_named_is_set_aside_and_back_where_it_is_named_again(path):
    before = path.read_bytes()
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [brain]")
    assert update(path) == [
        f"dataset {name}: not named in use.datasets, set aside under unused" for name in DATASETS[:2]
    ]
    params, after = load(path), path.read_bytes()
    assert list(params["datasets"]) == ["brain"] and list(params["unused"]) == ["prostate", "pelvis"]
    assert params["use"]["datasets"] == ["brain"] and params["use"]["skipped"] == params["use"]["order"] == []
    assert update(path) == [] and path.read_bytes() == after
    edit(path, "datasets: [brain]", "datasets: [prostate, pelvis, brain]")
    assert update(path) == []
    assert path.read_bytes() == before


def test_a_profile_reaches_the_datasets_set_aside_and_tells_edits_there(path):
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [pelvis]")
    update(path)
    before = path.read_bytes()
    assert update(path, "smoke") == [f"{path}: now in profile smoke"]
    unused = load(path)["unused"]
    assert unused["prostate"]["spacing_mm"] == 3.75 and unused["brain"]["labels"] == [1]
    assert list(load(path)["datasets"]) == ["pelvis"]
    update(path, "demo")
    assert path.read_bytes() == before
    edit(path, "spacing_mm: 2.8", "spacing_mm: 2.9")
    assert any("params.demo.yaml" in line for line in update(path, "smoke"))


def test_odd_formatting_survives_when_only_blocks_move(path):
    edit(path, "seed: 2026", "seed:      2026   # mine")
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets:   [ prostate,pelvis ]")
    update(path)
    text = path.read_text()
    assert "seed:      2026   # mine" in text and "datasets:   [ prostate,pelvis ]" in text


def test_a_section_of_the_users_own_stays_where_it_is(path):
    path.write_text(path.read_text() + "\nunused:  # mine\n  # far away\n  oasis:\n" + block("data/oasis").rstrip("\n"))
    before = path.read_bytes()
    assert update(path) == [] and path.read_bytes() == before
    edit(path, "brain]", "oasis]")
    update(path)
    params, text = load(path), path.read_text()
    assert list(params["datasets"]) == ["prostate", "pelvis", "oasis"] and list(params["unused"]) == ["brain"]
    assert text.index("unused:  # mine\n") > text.index("runs:") and "  # far away\n  oasis:\n" in text


def test_an_empty_section_is_no_obstacle(path):
    edit(path, "\n# A comment above train.", "\nunused: {}\n\n# A comment above train.")
    assert update(path) == []
    edit(path, ", brain]", "]")
    update(path)
    assert list(load(path)["unused"]) == ["brain"] and path.read_text().count("unused:") == 1


def test_the_order_of_the_user_counts_while_one_is_skipped(path):
    folder = path.parent / "elsewhere"
    own(path, folder)
    update(path)
    edit(path, "[prostate, brain, pelvis]", "[pelvis, brain]")
    folder.mkdir()
    update(path)
    assert load(path)["use"]["datasets"] == ["oasis", "pelvis", "brain"]  # once again before those it stood before
    assert list(load(path)["unused"]) == ["prostate"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("datasets:\n  # a comment", "datasets: &all\n  # a comment"),
        ("    path: data/pelvis\n", "    path: &where data/pelvis\n    title: *where\n"),
    ],
)
def test_anchors_inside_what_moves_as_a_whole_are_no_obstacle(path, old, new):
    edit(path, old, new)
    edit(path, "[prostate, pelvis, brain]", "[prostate, brain]")
    update(path)
    assert load(path)["unused"]["pelvis"]["path"] == "data/pelvis"


@pytest.mark.parametrize("shape", ["braces", "anchors"])
def test_blocks_that_cannot_be_moved_are_refused_and_the_file_stays(path, shape):
    if shape == "anchors":
        edit(path, "    shape: [32, 32, 26]\n", "    shape: &shape [32, 32, 26]\n")
        edit(path, "    shape: [40, 48, 40]\n", "    shape: *shape\n")
        edit(path, "[prostate, pelvis, brain]", "[pelvis, brain]")
    else:
        text = path.read_text()
        start, end = text.index("datasets:\n  #"), text.index("\n# A comment above train")
        values = (
            "shape: [19, 19, 19], spacing_mm: 1, affine_reference: null, labels: null, "
            "budget: 1, similarity: mse, dice_weight: 1, bending_weight: 1"
        )
        blocks = ", ".join(
            f"{n}: {{path: data/{n}, {values}, max_subjects: null, max_pairs: null}}" for n in ("a", "b")
        )
        path.write_text(
            (text[:start] + f"datasets: {{{blocks}}}\n" + text[end:]).replace("[prostate, pelvis, brain]", "[a]")
        )
    before = path.read_bytes()
    with pytest.raises(
        InputError, match="cannot be moved between datasets and unused; expected every dataset on lines"
    ):
        update(path)
    assert path.read_bytes() == before


def test_a_dataset_under_data_counts_as_there(path):
    assert not (path.parent / "data").exists()
    assert update(path) == []


def test_no_dataset_at_all_is_refused_and_the_file_stays(path):
    shutil.rmtree(path.parent / "cohorts")
    before = path.read_bytes()
    with pytest.raises(InputError, match="no folder of any dataset.*cohorts/paper/prostate.*make cohort"):
        update(path, "paper")
    assert path.read_bytes() == before and not list(path.parent.glob("params.*.yaml"))
