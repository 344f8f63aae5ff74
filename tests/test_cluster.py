"""Trainings outside the pipeline: tasks of a job array, and one run on several devices; the pipeline adopts either."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_params import fresh
from small_training import ROOT, SETTINGS, run_training, same, weights_of

from study.cohorts.dataset import Preprocessed
from study.config import params
from study.config.ablation import named_arguments, trainings
from study.training import train as training

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "GRIDREG_ACCELERATOR": "cpu"}
ENVIRONMENT["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums depend on it, and so do weights


@pytest.fixture
def repository(folder, tmp_path) -> Path:
    """A params.yaml with a dataset that is preprocessed and two small runs."""
    path = fresh(tmp_path)
    values = params.load(path)
    values["datasets"] = {"blobs": values["datasets"]["brain"] | {"path": str(folder), "shape": [20, 24, 18]}}
    gridreg = {"method": "gridreg", "base_channels": 8, "num_layers": 4}
    values["runs"] = {"coarse": gridreg | {"grids": [[3, 3, 3]]}, "gridreg-adaptive": gridreg | {"grids": [[5, 5, 5]]}}
    values["use"] = {"datasets": ["blobs"], "trained": ["coarse", "gridreg-adaptive"], "untrained": []}
    values["train"] |= {"steps": 6, "validate_every": 3}
    values["base"] = {"gridreg": gridreg | {"grids": [[3, 3, 3]]}}
    runs = {"wide": {"of": "gridreg", "base_channels": 10}}
    values["ablation"] = {"dataset": "blobs", "steps": 4, "use": ["wide"], "runs": runs}
    path.write_text(yaml.safe_dump(values))
    shutil.copytree(folder, tmp_path / "results" / "preprocess" / "blobs")
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "study.training.train", *arguments]


def test_tasks_of_a_job_array_train_side_by_side_and_are_adopted(repository, monkeypatch):
    listed = subprocess.run(command("--list"), cwd=repository, env=ENVIRONMENT, capture_output=True, text=True)
    assert listed.stdout == "0 blobs coarse\n1 blobs gridreg-adaptive\n2 ablation wide\n", listed.stderr
    tasks = [subprocess.Popen(command("--number", n), cwd=repository, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
             for n in "012"]  # fmt: skip
    errors = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], errors
    monkeypatch.chdir(repository)
    values, data = params.load(), Preprocessed("results/preprocess/blobs")
    every = {run: named_arguments(values, place, run)[1] for place, run in trainings(values)}
    assert list(every) == ["coarse", "gridreg-adaptive", "wide"]
    for run, arguments in every.items():
        training.train(data, out=f"direct/{run}", scratch="elsewhere", **arguments)
    monkeypatch.setattr(training, "optimise", None)  # from here on nothing is trained
    for run, arguments in every.items():
        training.train(data, out=f"adopted/{run}", **arguments)
        assert same(weights_of(repository / "direct" / run), weights_of(repository / "adopted" / run))


@pytest.mark.parametrize(("arguments", "found"), [(["--number", "3"], "number 3"), (["blobs", "five"], "blobs five"),
                                                  ([], "nothing nothing"), (["--number", "-1"], "number -1")])  # fmt: skip
def test_a_training_that_is_not_there_is_refused_with_a_sentence(repository, arguments, found):
    done = subprocess.run(command(*arguments), cwd=repository, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and not (repository / ".scratch").exists()
    assert (
        done.stderr
        == f"error: params.yaml: no training is called {found}; expected one of python -m study.training.train --list\n"
    )


SEVERAL = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import small_training as t
t.run_training(Path({folder!r}), None, Path({scratch!r}))
"""


def test_two_processes_train_one_run_through_torchrun(folder, tmp_path):
    """Each draws other pairs, and both end with the same weights: those of the mean gradient."""
    script = tmp_path / "train.py"
    script.write_text(
        SEVERAL.format(tests=str(ROOT / "tests" / "support"), folder=str(folder), scratch=str(tmp_path / "scratch"))
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = ENVIRONMENT | {"GRIDREG_DEVICES": "2"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = run_training(folder, tmp_path / "adopted", tmp_path / "scratch")
    assert (result["devices"], result["batch"]) == (2, 2 * SETTINGS["batch"])
    settings = SETTINGS | {"batch": 2 * SETTINGS["batch"]}
    with pytest.MonkeyPatch.context() as patch:  # the same pairs in one process

        def draw(pairs, grids, batch, seed, step, rank, identical):
            halves = [real(pairs, grids, batch // 2, seed, step, rank, identical) for rank in (0, 1)]
            return halves[0][0] + halves[1][0], halves[0][1]

        real = training.draw
        patch.setattr(training, "draw", draw)
        run_training(folder, tmp_path / "alone", tmp_path / "elsewhere", settings=settings)
    alone, adopted = weights_of(tmp_path / "alone"), weights_of(tmp_path / "adopted")
    for name in alone:
        torch.testing.assert_close(adopted[name], alone[name], rtol=0.05, atol=2e-3)


def test_the_command_of_the_documentation_trains_one_run_on_two_devices(repository, monkeypatch):
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert "torchrun --nproc-per-node 4 -m study.training.train brain gridreg-adaptive" in page
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    torchrun += ["-m", "study.training.train", "blobs", "gridreg-adaptive"]
    done = subprocess.run(
        torchrun,
        cwd=repository,
        env=ENVIRONMENT | {"GRIDREG_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.chdir(repository)
    monkeypatch.setattr(training, "optimise", None)  # from here on nothing is trained
    arguments = named_arguments(params.load(), "blobs", "gridreg-adaptive")[1]
    assert training.train(Preprocessed("results/preprocess/blobs"), out="adopted", **arguments)["devices"] == 2
