"""params.yaml: the profiles fit it, switching keeps what is the user's, writing is safe."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_params import block, edit, fresh

from gridreg.errors import InputError
from study.config import files
from study.config.files import read
from study.config.params import load, profile_names
from study.config.profiles import get, leaves, main, round_trip, switch

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("demo", "paper", "smoke")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fresh(tmp_path)


# ---- Profiles -----------------------------------------------------------------------------------------------------


def test_the_profiles_are_smoke_demo_and_paper():
    assert tuple(profile_names(ROOT / "params.yaml")) == PROFILES


def test_every_profile_has_the_same_names():
    names = {p: {at for at, _ in leaves(read(ROOT / "profiles" / f"{p}.yaml", round_trip()))} for p in PROFILES}
    assert names["demo"] == names["smoke"] == names["paper"]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A copy of the repository's own params.yaml and profiles, with empty folders for the profile paper."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for name in ("prostate", "pelvis", "brain"):
        (tmp_path / "cohorts" / "paper" / name).mkdir(parents=True)
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_resolves_to_a_valid_file_with_its_values(real, profile):
    switch(real, profile)
    resolved = read(real)
    assert load(real)["use"]["skipped"] == load(real)["use"]["left_out"] == {}
    if read(ROOT / "params.yaml", round_trip())["profile"] == profile:
        return  # already there, perhaps with edits
    for at, value in leaves(read(ROOT / "profiles" / f"{profile}.yaml", round_trip())):
        assert get(resolved, at) == value, at


def test_the_committed_file_is_the_demo_profile_and_survives_a_round_trip(real):
    diff = ["git", "diff", "--quiet", "HEAD", "--", "params.yaml"]
    if subprocess.run(diff, cwd=ROOT, capture_output=True).returncode == 1:
        pytest.skip("params.yaml is edited here")
    before = real.read_bytes()
    stock = read(real, round_trip())
    assert stock["profile"] == "demo"
    for at, value in leaves(read(real.parent / "profiles" / "demo.yaml", round_trip())):
        assert get(stock, at) == value, at
    for profile in ("smoke", "paper", "demo"):
        switch(real, profile)
    assert real.read_bytes() == before and not list(real.parent.glob("params.*.yaml"))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(PROFILES), max_size=4))
def test_any_way_through_the_profiles_back_to_demo_ends_at_the_same_bytes(tmp_path_factory, way):
    path = fresh(tmp_path_factory.mktemp("way"))
    before = path.read_bytes()
    for profile in [*way, "demo"]:
        switch(path, profile)
    assert path.read_bytes() == before


def test_the_current_profile_touches_nothing_not_even_edits_or_odd_formatting(path):
    edit(path, "learning_rate: ", "learning_rate:     ")
    edit(path, "seed: 2026", "seed:   7   # mine")
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    assert switch(path, "demo") == [f"{path}: is in profile demo already; nothing is written"]
    assert path.read_bytes() == before and path.stat().st_mtime_ns == changed


def test_edited_values_are_kept_once_and_never_overwritten(path):
    for number in (1, 2, 3):
        edit(path, "batch: 4", "batch: 3")
        before = path.read_bytes()
        lines = switch(path, "smoke")
        kept = path.with_name("params.demo.yaml" if number == 1 else f"params.demo.{number}.yaml")
        assert kept.read_bytes() == before
        assert sum(kept.name in line for line in lines) == 1
        switch(path, "demo")
        assert load(path)["train"]["batch"] == 4


def test_what_no_profile_names_survives_a_switch(path):
    edit(path, "seed: 2026", "seed: 7  # lucky")
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [brain, oasis]")
    edit(path, "\n# A comment above train", "  oasis:  # ours\n" + block("data/oasis") + "\n# A comment above train")
    lines = switch(path, "smoke")
    assert not any("kept" in line for line in lines)
    assert "seed: 7  # lucky" in path.read_text() and "oasis:  # ours" in path.read_text()
    assert read(path)["use"]["datasets"] == ["brain", "oasis"]
    assert load(path)["datasets"]["oasis"]["shape"] == [32, 38, 32]


def test_a_dataset_taken_out_stays_out(path):
    text = path.read_text()
    start, end = text.index("  pelvis:\n"), text.index("\n  brain:")
    path.write_text((text[:start] + text[end:]).replace("prostate, pelvis, brain", "prostate, brain"))
    lines = switch(path, "smoke")
    assert "pelvis" not in load(path)["datasets"]
    assert not any("kept" in line for line in lines)


def test_values_by_dataset_go_with_the_datasets(path):
    for profile in (path.parent / "profiles").iterdir():
        profile.write_text(profile.read_text() + "runs:\n  voxelmorph: {learning_rate: {prostate: 0.1, pelvis: 0.2}}\n")
    text = path.read_text()
    start, end = text.index("  pelvis:\n"), text.index("\n  brain:")
    path.write_text((text[:start] + text[end:]).replace("prostate, pelvis, brain", "prostate, brain"))
    edit(path, "method: voxelmorph\n", "method: voxelmorph\n    learning_rate: {brain: 0.3}\n")
    switch(path, "smoke")
    assert load(path)["runs"]["voxelmorph"]["learning_rate"] == {"brain": 0.3, "prostate": 0.1}


def test_what_is_run_stays_as_the_user_chose_it(path):
    for name, runs in (("demo", "gridreg-5, gridreg-8"), ("smoke", "gridreg-8"), ("paper", "gridreg-5, gridreg-8")):
        profile = path.parent / "profiles" / f"{name}.yaml"
        profile.write_text(profile.read_text() + f"use: {{trained: [voxelmorph, gridreg-adaptive, {runs}]}}\n")
    stock = path.read_bytes()
    assert switch(path, "smoke") == [f"{path}: rewritten with the values of profile smoke"]
    assert load(path)["use"]["trained"] == ["voxelmorph", "gridreg-adaptive", "gridreg-8"]
    path.write_bytes(stock)
    edit(path, "  voxelmorph:\n    method: voxelmorph\n", "")
    edit(path, "trained: [voxelmorph, gridreg-adaptive, gridreg-5, gridreg-8]", "trained: [gridreg-adaptive]  # mine")
    before = path.read_bytes()
    for profile in ("smoke", "paper", "demo"):
        rewritten = f"{path}: rewritten with the values of profile {profile}"
        assert switch(path, profile) == [rewritten, f"{path}: use.trained stays as you have it"]
        assert load(path)["use"]["trained"] == ["gridreg-adaptive"]
    assert path.read_bytes() == before and not list(path.parent.glob("params.*.yaml"))


def test_what_was_deleted_is_not_run_again(real):
    before = real.read_text()
    start, end = before.index("  pelvis:\n"), before.index("  brain:\n")
    real.write_text(before[:start] + before[end:])
    edit(real, "datasets: [prostate, pelvis, brain]", "datasets: [prostate, brain]")
    edit(real, "keymorph, gridreg-5, ", "keymorph, ")
    edit(real, "  gridreg-5: {of: gridreg, grids: [[5, 5, 5]]}\n", "")
    for line in ("learning_rate: {prostate: 0.003, ", "affine_stage: {", "mask_margin: {prostate: 6"):
        value = {"learning_rate": "pelvis: 0.001, ", "affine_stage": "pelvis: false", "mask_margin": ", pelvis: 6"}
        edit(real, line + value[line.split(":")[0]], line)
    mine = real.read_bytes()
    for profile in ("smoke", "paper", "demo"):
        assert switch(real, profile) == [f"{real}: rewritten with the values of profile {profile}"]
        assert load(real)["use"]["datasets"] == ["prostate", "brain"]
        assert "gridreg-5" not in load(real)["use"]["trained"]
    assert real.read_bytes() == mine


def test_a_profile_that_does_not_fit_is_refused_and_nothing_is_written(path):
    edit(path, "grids: [[5, 5, 5]]", "grids: [[5, 5, 23]]")  # fits 26 slices, but not the 20 of smoke
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=r"profile smoke does not fit your values.*gridreg-5 has the grid \[5, 5, 23\]"
    ):
        switch(path, "smoke")
    assert path.read_bytes() == before and not list(path.parent.glob("params.*.yaml"))


# ---- The command and the file ----------------------------------------------------------------------------------------


def test_the_command_ends_with_one_line_and_a_status_not_with_a_traceback(path, monkeypatch, capsys):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("sys.argv", ["study.config.profiles", "papre"])
    assert main() == 1
    expected = "error: PROFILE: unknown profile 'papre'; expected one of demo, paper, smoke (nearest: paper)\n"
    assert capsys.readouterr() == ("", expected)


def test_the_command_switches_and_says_so(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.config.profiles", "smoke", "--file", str(path)])
    assert main() == 0
    assert capsys.readouterr() == ("", f"{path}: rewritten with the values of profile smoke\n")
    assert load(path)["train"]["steps"] == 4


def test_a_file_that_cannot_be_written_is_one_line(path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files.os, "replace", full)
    monkeypatch.setattr("sys.argv", ["study.config.profiles", "smoke", "--file", str(path)])
    assert main() == 1
    assert (
        capsys.readouterr().err
        == f"error: {path}: No space left on device; expected space and permission to read and write it\n"
    )


def test_an_interrupted_write_leaves_the_old_file_whole(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        switch(path, "smoke")
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["cohorts", "params.yaml", "profiles"]
