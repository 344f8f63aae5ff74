"""params.yaml: the profiles fit it, switching keeps what is the user's, bad values get one sentence."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridreg import params as params_module
from gridreg.errors import InputError
from gridreg.params import leaves, load, profile_names, read, round_trip, train_settings, update, validate

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("demo", "paper", "smoke")
OWN = """\
  oasis:  # ours
    path: {path}
    shape: [32, 38, 32]
    spacing_mm: 5
"""

# The tests of behaviour have a file and profiles of their own, so that tuning the real ones cannot break them.
STOCK = """\
# A comment at the top.
profile: demo
seed: 2026

use:
  datasets: [prostate, pelvis, brain]
  skipped: []
  trained: [voxelmorph, gridreg-5, gridreg-8]
  untrained: [identity]

datasets:
  # a comment in between
  prostate:
    path: data/prostate
    shape: [32, 32, 26]
    spacing_mm: 2.8
  pelvis:
    path: data/pelvis
    shape: [32, 32, 26]
    spacing_mm: 4.0
  brain:
    path: data/brain
    shape: [40, 48, 40]
    spacing_mm: 4.0
    labels: null

train:
  steps: 600
  epochs: null
  batch: 4
  learning_rate: 0.002
  validate_every: 100

runs:
  identity:
    method: identity
  voxelmorph:
    method: voxelmorph
  gridreg-5:
    method: gridreg
    grids: [[5, 5, 5]]  # control points
    upsampling: trilinear
    bayesian: false
  gridreg-8:
    method: gridreg
    grids: [[8, 8, 8]]
"""
OVERLAY = """\
datasets:
  prostate: {{path: {where}/prostate, shape: {shape}, spacing_mm: {spacing}}}
  pelvis: {{path: {where}/pelvis, shape: {shape}}}
  brain: {{path: {where}/brain, labels: {labels}}}
train: {{steps: {steps}, epochs: {epochs}, batch: 4, learning_rate: {rate}}}
runs:
  gridreg-8: {{grids: {grids}}}
"""


def fresh(folder: Path) -> Path:
    """A small params.yaml in profile demo, three profiles, and the folders of the profile paper."""
    (folder / "profiles").mkdir()
    for profile, values in {
        "demo": dict(where="data", shape=[32, 32, 26], spacing=2.8, labels="null", steps=600, epochs="null", rate=0.002, grids=[[8, 8, 8]]),
        "smoke": dict(where="data", shape=[24, 24, 20], spacing=3.75, labels=[1], steps=4, epochs="null", rate=0.002, grids=[[8, 8, 8]]),
        "paper": dict(where="cohorts/paper", shape=[128, 128, 102], spacing=0.7, labels=[1, 2], steps="null", epochs=300, rate=0.0001,
                      grids=[[8, 8, 8], [15, 15, 15]]),
    }.items():
        (folder / "profiles" / f"{profile}.yaml").write_text(OVERLAY.format(**values))
    for name in ("prostate", "pelvis", "brain"):
        (folder / "cohorts" / "paper" / name).mkdir(parents=True)
    path = folder / "params.yaml"
    path.write_text(STOCK)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fresh(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- Profiles -----------------------------------------------------------------------------------------------------


def test_the_profiles_are_smoke_demo_and_paper():
    assert tuple(profile_names(ROOT / "params.yaml")) == PROFILES


def test_every_profile_has_the_same_names():
    names = {profile: {at for at, _ in leaves(read(ROOT / "profiles" / f"{profile}.yaml", round_trip()))} for profile in PROFILES}
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
    for skipped in load(real)["use"]["skipped"]:
        assert skipped not in ("prostate", "pelvis", "brain")
    if read(ROOT / "params.yaml", round_trip())["profile"] == profile:
        return  # already there, perhaps with edits
    for at, value in leaves(read(ROOT / "profiles" / f"{profile}.yaml", round_trip())):
        assert params_module.get(load(real), at) == value, at


def test_the_committed_file_is_the_demo_profile_and_survives_a_round_trip(real):
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"], cwd=ROOT, capture_output=True).returncode == 1:
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
    edit(path, "\ntrain:", OWN.format(path="data/oasis") + "\ntrain:")
    lines = update(path, "smoke")
    assert not any("kept" in line for line in lines)
    assert "seed: 7  # lucky" in path.read_text() and "oasis:  # ours" in path.read_text()
    assert load(path)["use"]["datasets"] == ["brain", "oasis"]
    assert load(path)["datasets"]["oasis"]["shape"] == [32, 38, 32]


def test_a_dataset_taken_out_stays_out(path):
    text = path.read_text()
    start, end = text.index("  pelvis:\n"), text.index("  brain:\n")
    path.write_text((text[:start] + text[end:]).replace("prostate, pelvis, brain", "prostate, brain"))
    lines = update(path, "smoke")
    assert "pelvis" not in load(path)["datasets"]
    assert not any("kept" in line for line in lines)


# ---- Datasets that are not there ----------------------------------------------------------------------------------


def test_a_missing_dataset_is_skipped_aloud_and_comes_back_to_its_place(path):
    folder = path.parent / "elsewhere"
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [prostate, oasis, brain]")
    edit(path, "  brain:\n", OWN.format(path=folder) + "  brain:\n")
    before = path.read_bytes()
    for _ in range(2):  # said every time, written once
        assert update(path) == [f"dataset oasis: skipped, folder {folder} not found (named in {path})"]
        use = load(path)["use"]
        assert use["datasets"] == ["prostate", "brain"] and use["skipped"] == ["oasis"]
        after = path.read_bytes()
    assert path.read_bytes() == after
    folder.mkdir()
    assert update(path) == [f"dataset oasis: back in use, {folder} found"]
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


# ---- Refusals -----------------------------------------------------------------------------------------------------

BAD = [
    ("profile: demo", "profile: dmeo", "unknown profile 'dmeo'; expected one of demo, paper, smoke .nearest: demo"),
    ("seed: 2026", "sead: 2026", "unknown parameter 'sead'.*nearest: seed"),
    ("seed: 2026", "seed: -1", "seed is -1; expected a whole number of at least 0"),
    ("seed: 2026", "seed: true", "seed is True; expected a whole number"),
    ("[prostate, pelvis, brain]", "[prostat, pelvis]", "unknown dataset 'prostat'.*nearest: prostate"),
    ("[prostate, pelvis, brain]", "[brain, brain]", "names the dataset 'brain' twice"),
    ("[prostate, pelvis, brain]", "[]", "use.datasets is empty; expected at least one"),
    ("[prostate, pelvis, brain]", "brain", "datasets is 'brain'; expected a list of names"),
    ("untrained: [identity]", "untrained: [voxelmorph-2]", "unknown run 'voxelmorph-2'.*nearest: voxelmorph"),
    ("untrained: [identity]", "untrained: [identity, gridreg-fast]", "unknown run"),
    ("gridreg-8]\n  untrained: [identity]", "identity]\n  untrained: []", "'identity' of method identity; expected it in use.untrained"),
    ("gridreg-8]\n  untrained: [identity]", "identity]\n  untrained: [identity]", "names the run 'identity' twice"),
    (", gridreg-8]\n  untrained: [identity]", "]\n  untrained: [gridreg-8]", "'gridreg-8' of method gridreg; expected it in use.trained"),
    ("method: voxelmorph", "method: voxelmorf", "unknown method 'voxelmorf'.*nearest: voxelmorph"),
    ("    method: voxelmorph\n", "", "voxelmorph has no method; expected method: and one of identity"),
    ("    path: data/brain\n", "", "datasets.brain: path is missing; expected a text"),
    ("spacing_mm: 2.8", "spacing: 2.8", "unknown parameter 'spacing'.*nearest: spacing_mm"),
    ("spacing_mm: 2.8", "spacing_mm: 0", "spacing_mm is 0; expected a number above 0"),
    ("spacing_mm: 2.8", "spacing_mm: .nan", "spacing_mm is nan; expected a number above 0"),
    ("spacing_mm: 2.8", "spacing_mm: 2,8", "spacing_mm is '2,8'; expected a number"),
    ("shape: [32, 32, 26]", "shape: [32, 32]", r"shape is \[32, 32\]; expected three whole numbers"),
    ("grids: [[5, 5, 5]]", "grids: [[5, 1, 5]]", "grids is .*expected a list of sizes, each three whole numbers of at least 2"),
    ("grids: [[5, 5, 5]]", "grids: [5, 5, 5]", "grids is .*expected a list of sizes"),
    ("grids: [[5, 5, 5]]", "grids: [[5, 5, 99]]", r"the grid \[5, 5, 99\]; expected at most \[.*the shape of prostate"),
    ("upsampling: trilinear", "upsampling: cubic", "upsampling is 'cubic'; expected one of trilinear, bspline, deconv"),
    ("bayesian: false", "bayesian: 0", "bayesian is 0; expected true or false"),
    ("batch: 4", "batch: 0", "batch is 0; expected a whole number of at least 1"),
    ("epochs: null", "epochs: 3", "expected a number for exactly one of them"),
    ("\ntrain:", "\ntrian:", "unknown parameter 'trian'.*nearest: train"),
    ("  gridreg-8:", "  gridreg/8:", "'gridreg/8' is no usable name"),
    ("\nuse:", "\nuse: [", "line [0-9]+: .*expected YAML"),
    ("seed: 2026", "seed: 2026\nseed: 3", "line [0-9]+: .*duplicate key.*expected YAML"),
    ("profile: demo", "profile: demo\ndevices: 2", "unknown parameter 'devices'"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), BAD)
def test_bad_values_get_one_sentence_and_the_file_stays(path, old, new, sentence):
    edit(path, old, new)
    before = path.read_bytes()
    with pytest.raises(InputError, match=sentence) as caught:
        update(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=sentence):
        load(path)


@pytest.mark.parametrize("content", ["", "[1, 2]", "just text", "use: 3", "datasets:\n", "\x00"])
def test_a_file_that_is_something_else_is_refused(path, content):
    path.write_text(content)
    with pytest.raises(InputError, match="expected"):
        update(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "params.yaml")


def test_the_command_ends_with_one_line_and_a_status_not_with_a_traceback(path):
    command = [sys.executable, "-m", "gridreg.params", "--profile", "papre", "--check"]
    done = subprocess.run(command, cwd=path.parent, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: PROFILE: unknown profile 'papre'; expected one of demo, paper, smoke (nearest: paper)\n"


def test_an_interrupted_write_leaves_the_old_file_whole(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(params_module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(path, "smoke")
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["cohorts", "params.yaml", "profiles"]


# ---- Reading ------------------------------------------------------------------------------------------------------


def test_load_fills_in_what_was_left_out(path):
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [oasis]")
    edit(path, "\ntrain:", OWN.format(path="data/oasis") + "\ntrain:")
    oasis = load(path)["datasets"]["oasis"]
    assert oasis["title"] == "oasis" and oasis["labels"] is None and oasis["bending_weight"] == 200000.0
    assert load(path)["runs"]["gridreg-8"]["base_channels"] == 16


def test_small_numbers_may_be_written_as_powers_of_ten(path):
    edit(path, "learning_rate: 0.002", "learning_rate: 1e-4")
    assert load(path)["train"]["learning_rate"] == 1e-4


def test_a_run_has_its_own_training_values_before_those_of_train():
    params = {"runs": {"a": {"batch": 2}, "b": {"epochs": 5}}, "train": {"steps": 10, "batch": 4, "learning_rate": 1e-3, "validate_every": 1}}
    assert train_settings(params, "a") == {"steps": 10, "epochs": None, "batch": 2, "learning_rate": 1e-3, "validate_every": 1}
    assert train_settings(params, "b")["steps"] is None and train_settings(params, "b")["epochs"] == 5


def test_validate_leaves_its_argument_alone(path):
    params = load(path)
    before = copy.deepcopy(params)
    validate(params)
    assert params == before
