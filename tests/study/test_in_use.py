"""What DVC reads of params.yaml: the cohorts that are found, what is run on them, and the settings of each run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from small_params import block, edit, fresh

from gridreg.errors import InputError
from study.config import ablation
from study.config.files import read
from study.config.params import load, training_arguments
from study.config.pipeline import in_use, main, settings, write_in_use, write_settings
from study.config.profiles import switch

ROOT = Path(__file__).parents[2]
DATASETS = ("prostate", "pelvis", "brain")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fresh(tmp_path)


def own(path: Path, folder: Path | str) -> None:
    """A dataset of the user's between the others."""
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [prostate, oasis, brain, pelvis]  # my order")
    edit(path, "  pelvis:\n", "  # mine\n  oasis:  # ours\n" + block(folder) + "  pelvis:\n")


def written(path: Path) -> dict:
    return read(path.with_name("in_use.yaml"))["in_use"]


ABLATION = """
ablation:
  dataset: {dataset}
  steps: 7
  use: [default, tenfold]
  runs:
    default: {{of: gridreg}}
    tenfold: {{of: gridreg, bending: 10.0}}
"""


# ---- in_use.yaml --------------------------------------------------------------------------------------------------


def test_a_missing_dataset_is_skipped_aloud_and_comes_back_to_its_place(path):
    folder = path.parent / "elsewhere"
    own(path, folder)
    before = path.read_bytes()
    for _ in range(2):
        assert write_in_use(path) == [f"dataset oasis: skipped, its folder {folder} was not found (named in {path})"]
        assert written(path)["datasets"] == ["prostate", "brain", "pelvis"]
        assert written(path)["cohorts"] == {name: f"data/{name}" for name in ("prostate", "brain", "pelvis")}
        params = load(path)
        assert params["use"]["datasets"] == ["prostate", "brain", "pelvis"]
        assert params["use"]["skipped"] == {"oasis": f"its folder {folder} was not found"}
        assert params["datasets"]["oasis"]["path"] == str(folder)
    folder.mkdir()
    assert write_in_use(path) == [] and written(path)["datasets"] == ["prostate", "oasis", "brain", "pelvis"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("gone", [some for n in (1, 2) for some in combinations(DATASETS, n)])
def test_whichever_is_missing_the_others_are_used_and_the_file_of_the_user_stays(path, gone):
    switch(path, "paper")
    before = path.read_bytes()
    for name in gone:
        (path.parent / "cohorts" / "paper" / name).rmdir()
    assert [line.split(":")[0] for line in write_in_use(path)] == [f"dataset {n}" for n in DATASETS if n in gone]
    assert written(path)["datasets"] == [n for n in DATASETS if n not in gone] and path.read_bytes() == before


def test_a_run_is_not_left_out_for_a_dataset_that_is_skipped(path):
    own(path, "nowhere")
    edit(path, "    path: nowhere\n", "    path: nowhere\n    max_pairs: 3\n")
    edit(path, "bayesian: false", "bayesian: true")
    text = path.read_text()
    at = text.index("similarity: mse", text.index("path: nowhere"))
    path.write_text(text[:at] + "similarity: ncc" + text[at + len("similarity: mse") :])
    assert [line.split(":")[0] for line in write_in_use(path)] == ["dataset oasis"]
    assert "gridreg-5" in written(path)["trained"]
    (path.parent / "nowhere").mkdir()
    assert [line.split(":")[0] for line in write_in_use(path)] == ["gridreg-5"]


def test_a_dataset_not_named_is_not_used_and_keeps_its_block(path):
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: [brain]")
    assert write_in_use(path) == []
    assert written(path)["cohorts"] == {"brain": "data/brain"} and list(load(path)["datasets"]) == list(DATASETS)


def test_the_bundled_cohorts_count_as_there_and_others_under_data_do_not(path):
    assert not (path.parent / "data").exists() and write_in_use(path) == []
    own(path, "data/oasis")
    assert "data/oasis was not found" in write_in_use(path)[0]
    (path.parent / "data" / "oasis").mkdir(parents=True)
    assert write_in_use(path) == []


def test_no_dataset_at_all_is_refused_and_nothing_is_written(path):
    shutil.rmtree(path.parent / "cohorts")
    switch(path, "paper")
    before = path.read_bytes()
    with pytest.raises(InputError, match="no folder of any dataset.*cohorts/paper/prostate.*make cohort"):
        write_in_use(path)
    assert path.read_bytes() == before and not path.with_name("in_use.yaml").exists()


def test_the_file_is_written_only_when_it_changes(path):
    write_in_use(path)
    file = path.with_name("in_use.yaml")
    before = file.stat().st_mtime_ns
    write_in_use(path)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(("dataset", "reason"), [("oasis", "was skipped"), ("pelvis", "is not in use")])
def test_without_their_dataset_the_ablations_are_left_out_aloud(path, dataset, reason):
    own(path, "nowhere")
    edit(path, "oasis, brain, pelvis]", "oasis, brain]")
    path.write_text(path.read_text() + ABLATION.format(dataset=dataset))
    assert write_in_use(path)[-1] == f"the ablations: left out, their dataset {dataset} {reason}"
    assert written(path)["ablations"] == [] and written(path)["ablation_dataset"] == "prostate"
    assert not [run for place, run in ablation.trainings(load(path)) if place == "ablation"]


def test_the_ablations_of_a_dataset_in_use_are_listed(path):
    path.write_text(path.read_text() + ABLATION.format(dataset="pelvis"))
    write_in_use(path)
    assert written(path)["ablations"] == ["default", "tenfold"] and written(path)["ablation_dataset"] == "pelvis"


def test_a_node_without_the_scans_still_knows_the_cohorts_in_use(path):
    folder = path.parent / "elsewhere"
    own(path, folder)
    folder.mkdir()
    write_in_use(path)
    folder.rmdir()
    assert "oasis" in load(path)["use"]["datasets"] and "oasis" not in load(path, recall=False)["use"]["datasets"]
    edit(path, str(folder), str(path.parent / "another"))
    assert "oasis" in load(path)["use"]["skipped"]


def test_a_name_that_yaml_takes_for_something_else_stays_a_name(path):
    edit(path, "datasets: [prostate, pelvis, brain]", "datasets: ['no', '12']")
    edit(path, "  pelvis:\n", "  'no':\n" + block("data/brain") + "  '12':\n" + block("data/pelvis") + "  pelvis:\n")
    write_in_use(path)
    assert written(path)["cohorts"] == {"no": "data/brain", "12": "data/pelvis"}


def test_the_committed_file_is_that_of_the_committed_parameters(tmp_path):
    names = ("params.yaml", "in_use.yaml")
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *names], cwd=ROOT, capture_output=True).returncode == 1:
        pytest.skip("params.yaml is edited here")
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    write_in_use(shutil.copy(ROOT / "params.yaml", tmp_path))
    assert (tmp_path / "in_use.yaml").read_bytes() == (ROOT / "in_use.yaml").read_bytes()


# ---- results/settings.json ----------------------------------------------------------------------------------------


def keys(path: Path) -> dict[str, str]:
    """Every key that a stage depends on, with its value as text."""
    write_in_use(path)
    write_settings(path)
    found = json.loads((path.parent / "results" / "settings.json").read_text())
    stages = {"preprocess": 1, "train": 2, "refine": 2, "untrained": 2}
    out = {}
    for stage, depth in stages.items():
        for place, values in found[stage].items():
            each = (
                {f"{stage}.{place}": values} if depth == 1 else {f"{stage}.{place}.{n}": v for n, v in values.items()}
            )
            out |= {name: json.dumps(value, sort_keys=True) for name, value in each.items()}
    return out


def changed(path: Path, change: Callable[[], None]) -> set[str]:
    before = keys(path)
    change()
    after = keys(path)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def of(stage: str, *runs: str, datasets: tuple[str, ...] = DATASETS) -> set[str]:
    return {f"{stage}.{dataset}.{run}" for dataset in datasets for run in runs}


RUNS = ("voxelmorph", "gridreg-adaptive", "gridreg-5", "gridreg-8")
CHANGES = [
    ("a run", "    upsampling: trilinear", "    upsampling: bspline", of("train", "gridreg-5")),
    ("a base", "grids: [[8, 8, 8]]", "grids: [[9, 9, 9]]", of("train", "gridreg-8")),  # the other has its own grids
    ("a base, unseen", "    grids: [[8, 8, 8]]", "    grids: [[8, 8, 8]]\n    samples: 1", set()),
    ("what one run has itself", "batch: 4", "batch: 5", of("train", *RUNS[1:])),
    ("a value for one dataset", "{pelvis: 0.1}", "{pelvis: 0.2}", of("train", "voxelmorph", datasets=("pelvis",))),
    ("the seed", "seed: 2026", "seed: 1", of("train", *RUNS)),
    ("a title", "  prostate:\n", "  prostate:\n    title: Gland\n", set()),
    ("the budget of a dataset", "  prostate:\n", "  prostate:\n    budget: 2\n", of("train", *RUNS, datasets=DATASETS[:1])),
    ("a weight", "bending_weight: 200000.0", "bending_weight: 1.0",
     of("train", *RUNS, datasets=DATASETS[:1]) | {"refine.prostate.gridreg-5"}),
    ("preprocessing", "    spacing_mm: 2.8", "    spacing_mm: 2.9", {"preprocess.prostate"}),
    ("refinement", "\nbase:", "\nevaluate: {refine_steps: 3}\n\nbase:", of("refine", "gridreg-5")),
    ("a comment", "seed: 2026", "seed: 2026  # lucky", set()),
    ("a default, written out", "  gridreg-8: {of: gridreg}", "  gridreg-8: {of: gridreg, num_layers: 5}", set()),
    ("a number, written otherwise", "learning_rate: 0.002", "learning_rate: 2e-3", set()),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "stages"), [each[1:] for each in CHANGES], ids=[each[0] for each in CHANGES])
def test_a_change_reaches_just_the_stages_that_depend_on_it(path, old, new, stages):
    edit(path, "refined: []", "refined: [gridreg-5]")
    edit(path, "    method: voxelmorph\n", "    method: voxelmorph\n    batch: 2\n    learning_rate: {pelvis: 0.1}\n")
    assert changed(path, lambda: edit(path, old, new)) == stages


def test_the_settings_are_those_that_a_training_is_given(path):
    path.write_text(path.read_text() + ABLATION.format(dataset="pelvis"))
    params = load(path)
    found = settings(params)
    assert found["train"]["brain"]["gridreg-8"] == training_arguments(params, "brain", "gridreg-8")
    dataset, arguments = ablation.named_arguments(params, "ablation", "tenfold")
    assert found["train"]["ablation"]["tenfold"] == arguments | {"dataset": dataset} and dataset == "pelvis"
    assert arguments["settings"]["bending"] == 10 and arguments["settings"]["steps"] == 7
    assert found["untrained"]["brain"]["identity"] == {"method": "identity"}
    for name in ("profile", "seed", "use", "runs", "ablation", "evaluate", "datasets"):
        assert found[name] == params[name]


def test_an_ablation_depends_on_its_own_difference_alone(path):
    path.write_text(path.read_text() + ABLATION.format(dataset="pelvis"))
    assert changed(path, lambda: edit(path, "bending: 10.0", "bending: 20.0")) == {"train.ablation.tenfold"}
    assert changed(path, lambda: edit(path, "steps: 7", "steps: 8")) == of(
        "train", "default", "tenfold", datasets=("ablation",)
    )


def test_the_stage_refuses_lists_that_are_not_those_of_the_parameters(path, capsys, monkeypatch):
    keys(path)
    before = (path.parent / "results" / "settings.json").read_bytes()
    edit(path, "[prostate, pelvis, brain]", "[pelvis, brain]")
    monkeypatch.setattr("sys.argv", ["study.config.pipeline", "--settings", "--file", str(path)])
    assert main() == 1
    error = capsys.readouterr().err
    assert "in_use.yaml" in error and "python -m study.config.pipeline" in error and error.count("\n") == 1
    assert (path.parent / "results" / "settings.json").read_bytes() == before
    monkeypatch.setattr("sys.argv", ["study.config.pipeline", "--file", str(path)])
    assert main() == 0 and written(path) == in_use(load(path))
    write_settings(path)
