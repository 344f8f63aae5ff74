"""params.yaml: the profiles fit it, switching keeps what is the user's, writing is safe."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_params import block, edit, fresh

from study.config import params as params_module
from study.config.params import leaves, load, main, profile_names, read, round_trip, update

ROOT = Path(__file__).resolve().parent.parent
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
    update(real, profile)
    resolved = load(real)
    assert not {"prostate", "pelvis", "brain"} & set(resolved["use"]["skipped"])
    if read(ROOT / "params.yaml", round_trip())["profile"] == profile:
        return  # already there, perhaps with edits
    for at, value in leaves(read(ROOT / "profiles" / f"{profile}.yaml", round_trip())):
        assert params_module.get(resolved, params_module.place(resolved, at)) == value, at


def test_the_committed_file_is_the_demo_profile_and_survives_a_round_trip(real):
    diff = ["git", "diff", "--quiet", "HEAD", "--", "params.yaml"]
    if subprocess.run(diff, cwd=ROOT, capture_output=True).returncode == 1:
        pytest.skip("params.yaml is edited here")
    before = real.read_bytes()
    stock = read(real, round_trip())
    assert stock["profile"] == "demo"
    for at, value in leaves(read(real.parent / "profiles" / "demo.yaml", round_trip())):
        assert params_module.get(stock, at) == value, at
    for profile in ("smoke", "paper", "demo"):
        update(real, profile)
    assert real.read_bytes() == before and not list(real.parent.glob("params.*.yaml"))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(PROFILES), max_size=4))
def test_any_way_through_the_profiles_back_to_demo_ends_at_the_same_bytes(tmp_path_factory, way):
    path = fresh(tmp_path_factory.mktemp("way"))
    before = path.read_bytes()
    for profile in [*way, "demo"]:
        update(path, profile)
    assert path.read_bytes() == before


def test_the_current_profile_touches_nothing_not_even_edits_or_odd_formatting(path):
    edit(path, "learning_rate: ", "learning_rate:     ")
    edit(path, "seed: 2026", "seed:   7   # mine")
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    assert update(path, "demo") == []
    assert path.read_bytes() == before and path.stat().st_mtime_ns == changed


def test_edited_values_are_kept_once_and_never_overwritten(path):
    for number in (1, 2, 3):
        edit(path, "batch: 4", "batch: 3")
        before = path.read_bytes()
        lines = update(path, "smoke")
        kept = path.with_name("params.demo.yaml" if number == 1 else f"params.demo.{number}.yaml")
        assert kept.read_bytes() == before
        assert sum(kept.name in line for line in lines) == 1
        update(path, "demo")
        assert load(path)["train"]["batch"] == 4


def test_what_no_profile_names_survives_a_switch(path):
    edit(path, "seed: 2026", "seed: 7  # lucky")
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [brain, oasis]")
    edit(path, "\n# A comment above train", "  oasis:  # ours\n" + block("data/oasis") + "\n# A comment above train")
    lines = update(path, "smoke")
    assert not any("kept" in line for line in lines)
    assert "seed: 7  # lucky" in path.read_text() and "oasis:  # ours" in path.read_text()
    assert load(path)["use"]["datasets"] == ["brain", "oasis"]
    assert load(path)["datasets"]["oasis"]["shape"] == [32, 38, 32]


def test_a_dataset_taken_out_stays_out(path):
    text = path.read_text()
    start, end = text.index("  pelvis:\n"), text.index("\n  brain:")
    path.write_text((text[:start] + text[end:]).replace("prostate, pelvis, brain", "prostate, brain"))
    lines = update(path, "smoke")
    assert "pelvis" not in load(path)["datasets"]
    assert not any("kept" in line for line in lines)


# ---- The command and the file ----------------------------------------------------------------------------------------


def test_the_command_ends_with_one_line_and_a_status_not_with_a_traceback(path, monkeypatch, capsys):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("sys.argv", ["study.config.params", "--profile", "papre", "--check"])
    assert main() == 1
    expected = "error: PROFILE: unknown profile 'papre'; expected one of demo, paper, smoke (nearest: paper)\n"
    assert capsys.readouterr() == ("", expected)


def test_the_command_switches_and_says_so(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.config.params", "--profile", "smoke", "--file", str(path)])
    assert main() == 0
    assert capsys.readouterr() == ("", f"{path}: now in profile smoke\n")
    assert load(path)["train"]["steps"] == 4


def test_a_file_that_cannot_be_written_is_one_line(path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(params_module.os, "replace", full)
    monkeypatch.setattr("sys.argv", ["study.config.params", "--profile", "smoke", "--file", str(path)])
    assert main() == 1
    assert (
        capsys.readouterr().err == f"error: {path}: No space left on device; expected to be able to read and write it\n"
    )


def test_an_interrupted_write_leaves_the_old_file_whole(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(params_module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(path, "smoke")
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["cohorts", "params.yaml", "profiles"]
