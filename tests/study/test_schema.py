"""The schema of params.yaml: bad values get one sentence, left-out ones their default."""

from __future__ import annotations

import copy
import re
import shutil
import textwrap
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from small_params import block, edit, fresh

from gridreg.errors import InputError
from study.config.params import load, resolve, train_settings
from study.config.pipeline import write_in_use, write_settings
from study.config.profiles import switch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fresh(tmp_path)


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
    (
        "gridreg-8]\n  untrained: [identity]",
        "identity]\n  untrained: []",
        "'identity' of method identity; .* use.untrained",
    ),
    ("gridreg-8]\n  untrained: [identity]", "identity]\n  untrained: [identity]", "the run 'identity' twice"),
    (
        ", gridreg-8]\n  untrained: [identity]",
        "]\n  untrained: [gridreg-8]",
        "'gridreg-8' of method gridreg; .* use.trained",
    ),
    (
        "refined: []",
        "refined: [gridreg-10]",
        "use.refined names 'gridreg-10'; expected runs of use.trained that have control points",
    ),
    (
        "refined: []",
        "refined: [voxelmorph]",
        "use.refined names 'voxelmorph'; expected runs of use.trained that have control",
    ),
    ("method: voxelmorph", "method: voxelmorf", "unknown method 'voxelmorf'.*nearest: voxelmorph"),
    ("    method: voxelmorph\n", "", "voxelmorph has no method; expected method: and one of identity"),
    ("  pelvis:\n", "  ablation:\n", "datasets: 'ablation' is not a valid name; expected another"),
    ("    method: voxelmorph\n", "    of: gridrex\n", "runs.voxelmorph: unknown base 'gridrex'.*nearest: gridreg"),
    ("{of: gridreg}", "gridreg", "runs.gridreg-8 is 'gridreg'; expected method: .*, or of: and one of gridreg"),
    ("{of: gridreg}", "{of: gridreg, grid: [[5, 5, 5]]}", "runs.gridreg-8: unknown parameter 'grid'.*nearest: grids"),
    ("    method: gridreg\n", "", "base.gridreg has no method; expected method: and one of identity"),
    ("    method: gridreg\n", "    method: gridreg\n    grid: 3\n", "base.gridreg: unknown parameter 'grid'"),
    ("\n# A comment above train.", "\nunused:\n  oasis: {}\n", "unknown parameter 'unused'; expected one of profile"),
    ("\n# A comment above train.", "\nevaluate:\n", "evaluate is None; expected names with values"),
    (
        "\n# A comment above train.",
        "\nevaluate: {refine_step: 3}\n",
        "evaluate: unknown parameter .*nearest: refine_steps",
    ),
    ("    path: data/brain\n", "    path: $HOME/brain\n", "path is '.HOME/brain'; expected a path without environment"),
    (
        "    path: data/brain\n",
        "    path: ~nobody-here/brain\n",
        "brain: path is '~nobody-here/brain'; expected a path",
    ),
    ("    path: data/brain\n", "    path: ''\n", "datasets.brain: path is ''; expected a path"),
    ("labels: null", "labels: 1", "labels is 1; expected a list of label numbers of at least 1, or null"),
    ("labels: null", "affine_reference: ${REF}.nii", "affine_reference is .*; expected a path without environment"),
    ("    path: data/brain\n", "", "datasets.brain: path is missing; expected a path"),
    ("spacing_mm: 2.8", "spacing: 2.8", "unknown parameter 'spacing'.*nearest: spacing_mm"),
    ("spacing_mm: 2.8", "spacing_mm: 0", "spacing_mm is 0; expected a number above 0"),
    ("spacing_mm: 2.8", "spacing_mm: .nan", "spacing_mm is nan; expected a number above 0"),
    ("spacing_mm: 2.8", "spacing_mm: 2,8", "spacing_mm is '2,8'; expected a number"),
    ("shape: [32, 32, 26]", "shape: [32, 32]", r"shape is \[32, 32\]; expected three whole numbers"),
    (
        "shape: [32, 32, 26]",
        "shape: [16, 16, 16]",
        "shape is .*; expected three whole numbers of at least 2, the largest above 16",
    ),
    ("upsampling: trilinear", "num_layers: 3", "num_layers is 3; expected a whole number from 4 to 9"),
    ("gridreg-adaptive, gridreg-5", "gridreg-5", "use.trained lacks gridreg-adaptive; expected it there"),
    ("grids: [[5, 5, 5]]", "grids: [[5, 1, 5]]", "grids is .*expected a list of sizes, each three whole numbers"),
    ("grids: [[5, 5, 5]]", "grids: [5, 5, 5]", "grids is .*expected a list of sizes"),
    ("grids: [[5, 5, 5]]", "grids: [[5, 5, 99]]", r"the grid \[5, 5, 99\]; expected at most \[.*the shape of prostate"),
    ("upsampling: trilinear", "upsampling: cubic", "upsampling is 'cubic'; expected one of trilinear, bspline, deconv"),
    ("bayesian: false", "bayesian: 0", "bayesian is 0; expected true or false"),
    (
        "bayesian: false",
        "fold_free: true",
        "runs.gridreg-5: fold_free is true and upsampling trilinear; expected bspline",
    ),
    ("bayesian: false", "passes: 2", "runs.gridreg-5: passes is 2 and encoder pair; expected match"),
    ("bayesian: false", "encoder: both", "encoder is 'both'; expected one of pair, match"),
    ("batch: 4", "batch: 0", "batch is 0; expected a whole number of at least 1"),
    ("epochs: null", "epochs: 3", "expected a number for exactly one of them"),
    ("\ntrain:", "\ntrian:", "unknown parameter 'trian'.*nearest: train"),
    ("  gridreg-8:", "  gridreg/8:", "'gridreg/8' is not a valid name"),
    ("\nuse:", "\nuse: [", "line [0-9]+: .*expected YAML"),
    ("seed: 2026", "seed: 2026\nseed: 3", "line [0-9]+: .*duplicate key.*expected YAML"),
    ("profile: demo", "profile: demo\ndevices: 2", "unknown parameter 'devices'"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), BAD)
def test_bad_values_get_one_sentence_and_nothing_is_written(path, old, new, sentence):
    edit(path, old, new)
    before = path.read_bytes()
    for refuse in (load, write_in_use, lambda path: switch(path, "smoke")):
        with pytest.raises(InputError, match=sentence) as caught:
            refuse(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["cohorts", "params.yaml", "profiles"]


@pytest.mark.parametrize("content", ["", "[1, 2]", "just text", "use: 3", "datasets:\n", "\x00", "1: 2"])
def test_a_file_that_is_something_else_is_refused(path, content):
    path.write_text(content)
    for refuse in (load, write_in_use, lambda path: switch(path, "smoke")):
        with pytest.raises(InputError, match="expected"):
            refuse(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "params.yaml")


# ---- Reading ------------------------------------------------------------------------------------------------------


def test_load_fills_in_what_was_left_out(path):
    edit(path, "  refined: []\n", "")
    params = load(path)
    assert params["datasets"]["brain"]["title"] == "brain" and params["datasets"]["brain"]["budget"] == 1
    assert params["use"]["refined"] == [] and params["use"]["skipped"] == {} and params["ablation"]["use"] == []
    assert params["train"]["beta2"] == 0.999 and params["evaluate"]["refine_steps"] == 40


@pytest.mark.parametrize(("name", "value"), [("labels", "null"), ("similarity", "mse")])
def test_a_default_may_be_left_out(path, name, value):
    whole = load(path)
    edit(path, f"    {name}: {value}\n", "")
    assert load(path) == whole


def test_a_byte_order_mark_is_no_obstacle(path):
    whole = load(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path) == whole


def test_a_run_is_its_base_and_what_differs(path):
    edit(path, "  gridreg-8: {of: gridreg}", "  gridreg-8: {of: gridreg, num_layers: 4, batch: 3}")
    runs = load(path)["runs"]
    assert runs["gridreg-8"] == {
        "method": "gridreg", "grids": [[8, 8, 8]], "base_channels": 16, "num_layers": 4, "upsampling": "trilinear",
        "projector": True, "fold_free": False, "encoder": "pair", "passes": 1, "bayesian": False, "samples": 1,
        "batch": 3,
    }  # fmt: skip
    assert runs["gridreg-adaptive"]["grids"] == [[8, 8, 8], [10, 10, 10]] and runs["voxelmorph"]["width"] == 16


@pytest.mark.parametrize("profile", ["demo", "smoke", "paper"])
def test_the_cohort_of_the_documentation_is_taken_as_it_stands_in_every_profile(tmp_path, profile):
    """Its block alone, in the params.yaml that comes with the clone: nothing else needs an edit."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/own-cohort.md")]
    block = re.search(r"```yaml\n(.*?)```", "".join(pages), re.S)[1]
    added = YAML(typ="safe").load(textwrap.dedent(block))
    values = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    for section in added:
        values[section].update(added[section])
    values["datasets"]["mine"]["path"] = str(tmp_path)
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        YAML().dump(values, file)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    mine = load(path)["datasets"]["mine"]
    switch(path, profile)
    lines, found = write_in_use(path), load(path)
    assert found["datasets"]["mine"] == mine and found["use"]["datasets"] == ["mine"] and found["profile"] == profile
    assert "gridreg-bayesian" not in found["use"]["trained"] and "gridreg-adaptive" in found["use"]["trained"]
    assert [line.split(":")[0] for line in lines] == ["gridreg-bayesian", "the ablations"]


def test_a_user_may_delete_the_bundled_cohorts_and_edit_nothing_for_experts(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    start, end = text.index("\n  prostate:\n"), text.index("\n\n", text.index("\n  brain:\n"))
    text = text[:start] + "\n  mine:\n" + block(tmp_path) + text[end:]
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("datasets: [prostate, pelvis, brain]", "datasets: [mine]"))
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for profile in ("demo", "smoke", "paper"):
        switch(path, profile)
        assert write_in_use(path) == ["the ablations: left out, their dataset prostate is not in use"]
        assert list(load(path)["datasets"]) == load(path)["use"]["datasets"] == ["mine"]
        write_settings(path)


def test_a_weight_of_the_bending_energy_has_no_default(path):
    edit(path, "    bending_weight: 200000.0\n", "")
    with pytest.raises(InputError, match="datasets.prostate: bending_weight is missing; expected a number"):
        load(path)


def test_a_dataset_that_is_not_in_use_is_checked_and_filled_in_too(path):
    edit(path, "\n# A comment above train", "  oasis:\n" + block("data/oasis") + "\n# A comment above train")
    assert load(path)["datasets"]["oasis"]["title"] == "oasis"
    edit(path, "    shape: [32, 38, 32]\n", "")
    with pytest.raises(InputError, match="datasets.oasis: shape is missing; expected three whole numbers"):
        load(path)


def test_a_home_is_expanded_and_other_paths_stay_as_they_are(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    edit(path, "path: data/brain\n", "path: ~/brain\n    affine_reference: ~/atlas.nii.gz\n")
    edit(path, "path: data/pelvis", "path: ../pelvis~/x")
    blocks = load(path)["datasets"]
    assert (
        blocks["brain"]["path"] == "/home/me/brain" and blocks["brain"]["affine_reference"] == "/home/me/atlas.nii.gz"
    )
    assert blocks["pelvis"]["path"] == "../pelvis~/x" and blocks["prostate"]["affine_reference"] is None


def test_small_numbers_may_be_written_as_powers_of_ten(path):
    edit(path, "learning_rate: 0.002", "learning_rate: 1e-4")
    assert load(path)["train"]["learning_rate"] == 1e-4


def test_a_run_has_its_own_training_values_before_those_of_train():
    shared = {"steps": 10, "batch": 4, "learning_rate": 1e-3, "validate_every": 1, "beta2": 0.98, "bending": 1.0}
    params = {"runs": {"a": {"batch": 2}, "b": {"epochs": 5}}, "train": shared}
    assert train_settings(params, "a") == shared | {"epochs": None, "batch": 2, "clip": None, "identical": None}
    assert train_settings(params, "b")["steps"] is None and train_settings(params, "b")["epochs"] == 5


def test_a_run_may_have_a_value_for_each_dataset(path):
    edit(
        path,
        "    method: voxelmorph\n",
        "    method: voxelmorph\n    bending: {brain: 4, pelvis: 0.5}\n    learning_rate: {brain: 0.1}\n",
    )
    params = load(path)
    found = {name: train_settings(params, "voxelmorph", name) for name in ("prostate", "pelvis", "brain")}
    assert [values["bending"] for values in found.values()] == [1.0, 0.5, 4]
    assert [values["learning_rate"] for values in found.values()] == [0.002, 0.002, 0.1]
    edit(path, "{brain: 4,", "{brian: 4,")
    with pytest.raises(InputError, match=r"runs.voxelmorph.bending: unknown dataset 'brian'; .* \(nearest: brain\)"):
        load(path)
    edit(path, "{brian: 4,", "{brain: -4,")
    with pytest.raises(
        InputError, match="bending is .* expected a number of at least 0, or a mapping from datasets to such values"
    ):
        load(path)


def test_a_bayesian_run_needs_mse_on_every_dataset_in_use(path):
    edit(path, "bayesian: false", "bayesian: true")
    edit(path, "refined: []", "refined: [gridreg-5, gridreg-8]")
    assert "gridreg-5" in load(path)["use"]["trained"] and load(path)["use"]["left_out"] == {}
    edit(path, "similarity: mse", "similarity: mi")
    use, reason = (
        load(path)["use"],
        "it is bayesian and prostate has similarity mi; expected mse, of which its loss is made",
    )
    assert use["left_out"] == {"gridreg-5": reason} and write_in_use(path) == [f"gridreg-5: left out, {reason}"]
    assert use["trained"] == ["voxelmorph", "gridreg-adaptive", "gridreg-8"] and use["refined"] == ["gridreg-8"]
    edit(path, "{of: gridreg, grids: [[8, 8, 8], [10", "{of: gridreg, bayesian: true, grids: [[8, 8, 8], [10")
    with pytest.raises(InputError, match="runs.gridreg-adaptive does not fit: it is bayesian and prostate has"):
        load(path)
    edit(path, "[prostate, pelvis, brain]", "[pelvis, brain]")
    assert "gridreg-5" in load(path)["use"]["trained"]


def test_resolving_leaves_its_argument_alone_and_a_second_time_changes_nothing(path):
    values = YAML(typ="safe", pure=True).load(path.read_text())
    before = copy.deepcopy(values)
    once = resolve(values, path)
    assert values == before
    again = {name: dict(section) if isinstance(section, dict) else section for name, section in once.items()}
    for name in ("skipped", "left_out"):
        del again["use"][name]
    del again["ablation"]["base"]
    assert resolve(again, path)["runs"] == once["runs"]
