"""The ablations of params.yaml: bases and differences, one sentence for what is wrong, and which run is which."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from small_params import edit, fresh

from gridreg.errors import InputError
from study.config import ablation, params
from study.config.profiles import switch
from study.reporting import tables
from study.reporting.paper_numbers import TABLE3

ROOT = Path(__file__).parents[2]
SECTION = {
    "dataset": "prostate", "steps": 7, "use": ["default", "again", "layers-4", "tenfold"],
    "runs": {"default": {"of": "gridreg"}, "again": {"of": "gridreg", "seed": 9}, "layers-4": {"of": "gridreg", "num_layers": 4},
             "tenfold": {"of": "gridreg", "bending": 10.0}, "unused": {"of": "keymorph"}},
}  # fmt: skip
BASE = {"gridreg": {"method": "gridreg", "grids": [[10, 10, 10]]}, "keymorph": {"method": "keymorph", "width": 4}}


@pytest.fixture
def path(tmp_path) -> Path:
    file = fresh(tmp_path)
    values = yaml.safe_load(file.read_text()) | {"ablation": deepcopy(SECTION)}
    values["base"]["gridreg"] |= BASE["gridreg"]
    values["base"]["keymorph"] = BASE["keymorph"]
    values["runs"] |= {name: {"method": "gridreg", "grids": [[8, 8, 8]]} for name in ("gridreg-8", "gridreg-adaptive")}
    file.write_text(yaml.safe_dump(values))
    return file


def change(path: Path, at: str, value) -> None:
    values = yaml.safe_load(path.read_text())
    *names, last = at.split("/")
    owner = values if names[:1] == ["base"] else values["ablation"]
    for name in names:
        owner = owner[name]
    owner[last] = value
    path.write_text(yaml.safe_dump(values))


def test_a_run_is_its_base_and_what_differs(path):
    values = params.load(path)
    runs = ablation.ablations(values)
    assert list(runs) == SECTION["use"]
    assert runs["layers-4"]["num_layers"] == 4 and runs["default"]["num_layers"] == 5 and runs["default"]["steps"] == 7
    dataset, arguments = ablation.named_arguments(values, "ablation", "tenfold")
    assert dataset == "prostate" and arguments["settings"]["bending"] == 10 and arguments["settings"]["steps"] == 7
    assert ablation.named_arguments(values, "ablation", "again")[1]["seed"] == 9
    assert ablation.trainings(values)[-1] == ("ablation", "tenfold") and ("brain", "gridreg-8") in ablation.trainings(
        values
    )


def test_a_run_is_found_by_what_it_is_not_by_its_name(path):
    values = params.load(path)
    assert (
        ablation.find(values, "gridreg") == "default" and ablation.find(values, "gridreg", num_layers=4) == "layers-4"
    )
    assert ablation.find(values, "gridreg", num_layers=9) is None and ablation.find(values, "nothing") is None
    assert ablation.seeds(values) == ["default", "again"]
    assert tables.bending_runs(values) == {1.0: "default", 10.0: "tenfold"}


@pytest.mark.parametrize(("at", "value", "sentence"), [
    ("use", ["layers-5"], "ablation.use: unknown run 'layers-5'.*nearest: layers-4"),
    ("dataset", "lung", "ablation: unknown dataset 'lung'; expected one of brain, pelvis, prostate"),
    ("runs/default", {"of": "grid"}, "ablation.runs.default .*expected of: and one of gridreg, keymorph"),
    ("runs/default", {"of": "gridreg", "num_layer": 4}, "ablation.runs.default: unknown parameter 'num_layer'"),
    ("runs/layers-4", {"of": "gridreg", "num_layers": 3}, "num_layers is 3; expected a whole number from 4 to 9"),
    ("base/gridreg", {"method": "identity"}, "ablation.runs.again has method identity; expected a base whose method is trained"),
    ("steps", 0, "ablation: steps is 0; expected a whole number of at least 1"),
    ("more", 1, "ablation: unknown parameter 'more'"),
    ("runs/default", "gridreg", "ablation.runs.default is 'gridreg'; expected of: and one of gridreg, keymorph"),
    ("runs/again", {"of": "gridreg", "seed": -1}, "ablation.runs.again: seed is -1; expected a whole number of at least 0"),
    ("runs/again", {"of": "gridreg", "sead": 1}, "ablation.runs.again: unknown parameter 'sead'.*nearest: seed"),
    ("runs/default", {"of": "gridreg", "fold_free": True}, "runs.default: fold_free is true and upsampling trilinear; .*bspline"),
    ("base/gridreg/fold_free", True, "ablation.runs.again: fold_free is true"),
    ("runs/default", {"of": "gridreg", "grids": [[5, 5, 5], [5, 5, 27]]},
     r"ablation.runs.default has the grid \[5, 5, 27\]; expected at most \[32, 32, 26\], the shape of prostate"),
    ("runs/default", {"of": "gridreg", "bending": {"prostat": 2}}, "ablation.runs.default.bending: unknown dataset 'prostat'"),
    ("runs/default", {"of": "gridreg", "steps": 5}, "ablation.runs.default has steps; expected .* ablation.steps"),
    ("runs/unused", {"of": "keymorph", "epochs": 5}, "ablation.runs.unused has epochs"),
    ("base/gridreg/epochs", 3, "ablation.runs.again has epochs; expected them for all runs alike"),
])  # fmt: skip
def test_what_is_wrong_is_met_with_a_sentence(path, at, value, sentence):
    change(path, at, value)
    with pytest.raises(InputError, match=sentence):
        params.load(path)


def test_a_bayesian_run_needs_a_dataset_with_mse(path):
    change(path, "runs/default", {"of": "gridreg", "bayesian": True})
    assert ablation.ablations(params.load(path))["default"]["bayesian"]
    edit(path, "similarity: mse", "similarity: ncc")  # of the first dataset in the file
    values = yaml.safe_load(path.read_text())
    changed = next(name for name, block in values["datasets"].items() if block["similarity"] == "ncc")
    change(path, "dataset", changed)
    values = params.load(path)
    reason = f"it is bayesian and {changed} has similarity ncc; expected mse, of which its loss is made"
    assert values["use"]["left_out"] == {"ablation default": reason}
    assert list(ablation.ablations(values)) == values["ablation"]["use"] == ["again", "layers-4", "tenfold"]
    change(path, "use", ["layers-4"])  # what is not in use may be of any kind
    assert params.load(path)["use"]["left_out"] == {}


def test_without_steps_of_their_own_ablations_have_those_of_train(path):
    change(path, "steps", None)
    assert ablation.named_arguments(params.load(path), "ablation", "default")[1]["settings"]["steps"] == 600
    values = yaml.safe_load(path.read_text())
    values["train"]["steps"] = None
    for run in values["runs"].values():
        run |= {} if run["method"] == "identity" else {"steps": 3}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match="ablation.runs.again: steps and epochs are None and None"):
        params.load(path)


def test_none_at_all_is_fine(path):
    change(path, "use", [])
    change(path, "dataset", "lung")
    values = params.load(path)
    assert ablation.ablations(values) == {} and ablation.seeds(values) == []
    assert set(tables.configurations(values).values()) == {None}
    values = yaml.safe_load(path.read_text())
    del values["ablation"]
    path.write_text(yaml.safe_dump(values))
    assert ablation.trainings(params.load(path))[-1][0] == "brain"


@pytest.mark.parametrize("profile", ["demo", "paper"])
def test_every_row_of_the_papers_tables_has_its_run(tmp_path, profile):
    copy = tmp_path / "params.yaml"
    copy.write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    for name in ("prostate", "pelvis", "brain"):
        (tmp_path / "cohorts" / "paper" / name).mkdir(parents=True)
    switch(copy, profile)
    values = params.load(copy)
    assert None not in tables.configurations(values).values() and len(tables.configurations(values)) == len(TABLE3)
    for method in ("keymorph", "gridreg"):
        assert None not in tables.layer_runs(values, method).values()
    assert len(tables.bending_runs(values)) >= 5 and len(ablation.seeds(values)) == 3


def test_the_job_array_of_the_documentation_has_a_task_for_every_training():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    last = len(ablation.trainings(params.load(ROOT / "params.yaml"))) - 1
    assert f"--array=0-{last} " in "".join(page.read_text(encoding="utf-8") for page in pages)
