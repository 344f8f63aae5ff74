"""The schema of params.yaml: bad values get one sentence, left-out ones their default."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from small_params import block, edit, fresh

from gridreg.errors import InputError
from study.config.params import load, train_settings, update, validate


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
    ("\n# A comment above train.", "\nunused:", "unused is None; expected names with values"),
    (
        "\n# A comment above train.",
        "\nunused:\n  brain:\n" + block("x"),
        "'brain' stands under datasets and under unused",
    ),
    ("[prostate, pelvis, brain]\n  skipped: []", "[brain]\n  skipped: [brain]", "names the dataset 'brain' twice"),
    (
        "[prostate, pelvis, brain]\n  skipped: []",
        "[brain]\n  skipped: [brian]",
        "unknown dataset 'brian'.*nearest: brain",
    ),
    ("    path: data/brain\n", "", "datasets.brain: path is missing; expected a text"),
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


# ---- Reading ------------------------------------------------------------------------------------------------------


def test_load_fills_in_what_was_left_out(path):
    edit(path, "  skipped: []\n", "")
    params = load(path)
    assert params["datasets"]["brain"]["title"] == "brain"
    assert params["use"]["skipped"] == [] and params["runs"]["gridreg-8"]["base_channels"] == 16


@pytest.mark.parametrize(("name", "value"), [("affine_reference", "null"), ("labels", "null"), ("budget", "1.0"),
                                             ("similarity", "mse"), ("max_subjects", "null"), ("max_pairs", "null")])  # fmt: skip
def test_what_a_dataset_leaves_out_is_written_for_dvc_to_read(path, name, value):
    whole = load(path)
    edit(path, f"    {name}: {value}\n", "")
    assert load(path) == whole
    assert f"dataset prostate has the default for {name}" in " ".join(update(path))
    assert f"{name}: {value}" in path.read_text().split("pelvis:")[0].split("datasets:")[-1]
    assert load(path) == whole and not update(path)


def test_what_use_leaves_out_is_written_for_dvc_to_read(path):
    whole = load(path)
    edit(path, "  refined: []\n", "")
    assert load(path) == whole
    assert "use has the default for refined" in " ".join(update(path))
    assert "  refined: []\n" in path.read_text() and load(path) == whole and not update(path)


def test_the_cohort_of_the_readme_is_taken_as_it_stands(path):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    added = YAML(typ="safe").load(re.search(r"Your own cohort.*?```yaml\n(.*?)```", readme, re.S)[1])
    values = YAML(typ="safe").load(path.read_text())
    for section in added:
        values.setdefault(section, {"dataset": "prostate"}).update(added[section])
    values["datasets"]["mine"]["path"] = str(path.parent)
    with path.open("w") as file:
        YAML().dump(values, file)
    update(path)
    found = load(path)
    assert (
        found["datasets"]["mine"]["budget"] == 1.0
        and found["use"]["datasets"] == ["mine"]
        and found["ablation"]["use"] == []
    )


def test_a_weight_of_the_bending_energy_has_no_default(path):
    edit(path, "    bending_weight: 200000.0\n", "")
    with pytest.raises(InputError, match="datasets.prostate: bending_weight is missing; expected a number"):
        load(path)


def test_a_set_aside_dataset_is_checked_and_filled_in_too(path):
    edit(path, "\n# A comment above train", "\nunused:\n  oasis:\n" + block("data/oasis") + "\n# A comment above train")
    assert load(path)["unused"]["oasis"]["title"] == "oasis"
    edit(path, "    shape: [32, 38, 32]\n", "")
    with pytest.raises(InputError, match="unused.oasis: shape is missing; expected three whole numbers"):
        load(path)


def test_small_numbers_may_be_written_as_powers_of_ten(path):
    edit(path, "learning_rate: 0.002", "learning_rate: 1e-4")
    assert load(path)["train"]["learning_rate"] == 1e-4


def test_a_run_has_its_own_training_values_before_those_of_train():
    shared = {"steps": 10, "batch": 4, "learning_rate": 1e-3, "validate_every": 1, "beta2": 0.98, "bending": 1.0}
    params = {"runs": {"a": {"batch": 2}, "b": {"epochs": 5}}, "train": shared}
    assert train_settings(params, "a") == shared | {"epochs": None, "batch": 2}
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
        InputError, match="bending is .* expected a number of at least 0, or a mapping from datasets to such"
    ):
        load(path)


def test_a_bayesian_run_needs_mse_on_every_dataset_in_use(path):
    edit(path, "bayesian: false", "bayesian: true")
    load(path)
    edit(path, "similarity: mse", "similarity: mi")
    with pytest.raises(InputError, match="runs.gridreg-5 is bayesian and prostate has similarity mi; expected mse"):
        load(path)
    edit(path, "[prostate, pelvis, brain]", "[pelvis, brain]")
    load(path)


def test_validate_leaves_its_argument_alone(path):
    params = load(path)
    before = copy.deepcopy(params)
    validate(params)
    assert params == before
