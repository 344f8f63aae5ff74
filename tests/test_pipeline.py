"""dvc.yaml, its notebooks and what runs them: they fit together, stages start in order, and the whole of it runs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import small_stages
import yaml
import zc.lockfile

from gridreg.errors import InputError
from study import ROOT, pipeline
from study.notebooks import NAMES, code_of

NOTEBOOKS = sorted((ROOT / "notebooks" / "pipeline").glob("*.ipynb"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
OF_NOTEBOOKS = [name for name in STAGES if name != "settings"]
LONG = ("preprocess", "train", "evaluate", "evaluate_refined", "evaluate_untrained", "ablate")
DRAWING = ("tables", "figures", "false_correspondence", "approximation", "uncertainty", "report")


# ---- dvc.yaml and the notebooks -------------------------------------------------------------------------------------


def body(name: str) -> dict:
    """The cmd, deps, … of a stage, also where it stands under foreach's do."""
    return STAGES[name].get("do", STAGES[name])


def notebook_of(name: str) -> Path:
    return ROOT / re.search(r"papermill (\S+)", body(name)["cmd"]).group(1)


def outputs(name: str) -> list[str]:
    """What a stage writes, metrics among it."""
    listed = [*body(name).get("outs", []), *body(name).get("metrics", [])]
    return [path if isinstance(path, str) else next(iter(path)) for path in listed]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_has_no_outputs(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)  # DVC hashes the bytes of the file
    assert [cell for cell in code if "parameters" in cell.metadata.get("tags", [])] == code[:1]


@pytest.mark.parametrize("name", OF_NOTEBOOKS)
def test_every_parameter_given_is_one_the_notebook_has(name):
    cell = next(c for c in nbformat.read(notebook_of(name), 4).cells if "parameters" in c.metadata.get("tags", []))
    known = {target.id for node in ast.parse(cell.source).body for target in node.targets}
    given = set(re.findall(r"-p (\w+) ", body(name)["cmd"]))
    assert given <= known, f"{name}: papermill would only warn of {given - known}"
    assert "-k python3" in body(name)["cmd"]


@pytest.mark.parametrize("name", LONG)
def test_what_takes_hours_depends_on_what_the_code_computes_and_not_on_its_text(name):
    paths = [*body(name)["deps"], *(path for each in body(name).get("params", []) for path in each)]
    assert not [path for path in paths if path.endswith((".ipynb", ".py")) and not path.startswith("results/")]
    assert not [path for path in paths if path.startswith(("gridreg", "study", "params.yaml"))]
    assert f"results/fingerprints/notebooks/{notebook_of(name).stem}.py" in paths
    assert any(path.startswith("results/fingerprints/train/") for path in paths) == (name in ("train", "ablate"))
    assert any(path.startswith("results/fingerprints/evaluate/") for path in paths) == (
        name not in ("preprocess", "train")
    )
    assert ("fingerprints.yaml" in paths) == (name == "preprocess")


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_drawn_in_seconds_is_drawn_again_after_an_edit_of_its_notebook_or_of_the_drawing(name):
    assert str(notebook_of(name).relative_to(ROOT)) in body(name)["deps"]
    assert {"study/reporting", "study/reporting/figures"} & set(body(name)["deps"])
    assert all(out == {path: {"cache": False}} for out in body(name)["outs"] for path in out)


@pytest.mark.parametrize("name", STAGES)
def test_nothing_executed_is_an_input_or_an_output_and_outputs_are_listed_once(name):
    assert not [path for path in (*body(name)["deps"], *outputs(name)) if path.startswith("executed/")]
    others = [path for other in STAGES if other != name for path in outputs(other)]
    runs = "results/evaluate/${item.dataset}/${item.run}"  # of two stages, whose runs are others
    assert not {path for path in outputs(name) if path in others and not path.startswith(runs)}
    assert len(outputs(name)) == len(set(outputs(name)))


def test_what_is_needed_to_start_comes_with_the_clone():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for needed in ("executed/.gitkeep", ".dvc/config", "data.dvc", "params.yaml", "in_use.yaml", "fingerprints.yaml"):
        assert needed in tracked, f"{needed} must come with the clone"


# ---- A notebook's code ----------------------------------------------------------------------------------------------


def write_notebook(path: Path, *cells: str, text: str = "# Title") -> Path:
    made = [nbformat.v4.new_markdown_cell(text), *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


CELL = 'from study.training.train import train\n\nresult = train(data, note="# no comment", steps=3)  # a comment\n'


@pytest.mark.parametrize(
    "edited",
    [
        CELL.replace("a comment", "another"),
        CELL.replace("study.training.train", "study.train"),
        CELL.replace("import train\n", "import (\n    train,\n)\n"),
        f"# first\n\n{CELL}\n\n",
    ],
)
def test_a_comment_or_a_moved_import_leaves_the_code_as_it_is(tmp_path, edited):
    before = code_of(write_notebook(tmp_path / "a.ipynb", "steps = 2", CELL))
    assert before == 'steps = 2\nresult = train(data, note="# no comment", steps=3)\n'
    assert code_of(write_notebook(tmp_path / "b.ipynb", "steps = 2", edited, text="# Another title")) == before


def test_another_call_changes_the_code(tmp_path):
    before = code_of(write_notebook(tmp_path / "a.ipynb", CELL))
    assert code_of(write_notebook(tmp_path / "b.ipynb", CELL.replace("steps=3", "steps=4"))) != before


def test_a_file_that_is_no_notebook_is_refused_with_its_name(tmp_path):
    (tmp_path / "a.ipynb").write_text("{}")
    with pytest.raises(InputError, match=r"a\.ipynb: .*; expected a notebook of plain Python"):
        code_of(tmp_path / "a.ipynb")


def test_every_long_notebook_has_its_code_written():
    assert {notebook_of(name).stem for name in LONG} == set(NAMES)


# ---- The order of the stages ----------------------------------------------------------------------------------------

NEEDS = {"prepare": set(), "train-a": {"prepare"}, "train-b": {"prepare"}, "evaluate-a": {"train-a"},
         "table": {"evaluate-a", "train-b"}, "alone": set()}  # fmt: skip


def test_what_changed_runs_and_all_that_needs_it():
    assert pipeline.with_all_that_need_them(["train-a"], NEEDS) == ["train-a", "evaluate-a", "table"]
    assert pipeline.with_all_that_need_them(["alone"], NEEDS) == ["alone"]
    assert pipeline.with_all_that_need_them([], NEEDS) == []


def test_a_stage_is_next_when_what_it_needs_has_ended():
    schedule = pipeline.Schedule(["train-a", "evaluate-a", "table"], NEEDS)  # prepare is up to date
    assert schedule.next() == "train-a" and schedule.next() is None
    schedule.ended.add("train-a")
    assert schedule.next() == "evaluate-a" and schedule.next() is None


def run_notes(tmp_path, monkeypatch, todo, needs, slots=2) -> tuple[str | None, dict[str, tuple[float, float]]]:
    environments = [{"SLOT": str(n), "NOTES": str(tmp_path)} for n in range(slots)]
    monkeypatch.setattr(pipeline, "LOADED", ())
    failed = pipeline.run(pipeline.Schedule(todo, needs), environments, (), small_stages.note)
    times = {}
    for name in todo:
        if (tmp_path / f"{name}.end").exists():
            times[name] = tuple(float((tmp_path / f"{name}.{mark}").read_text()) for mark in ("start", "end"))
    return failed, times


def test_stages_run_side_by_side_and_after_what_they_need(tmp_path, monkeypatch):
    failed, times = run_notes(tmp_path, monkeypatch, list(NEEDS), NEEDS)
    assert failed is None and set(times) == set(NEEDS)
    for name, needed in NEEDS.items():
        assert all(times[other][1] <= times[name][0] for other in needed)
    most = max(sum(start <= moment < end for start, end in times.values()) for moment, _ in times.values())
    assert most == 2
    assert {(tmp_path / f"{name}.slot").read_text() for name in NEEDS} == {"0", "1"}


def test_after_a_failure_nothing_starts_and_what_runs_comes_to_its_end(tmp_path, monkeypatch):
    needs = {"bad": set(), "good": set(), "of-bad": {"bad"}, "of-good": {"good"}}
    failed, times = run_notes(tmp_path, monkeypatch, list(needs), needs)
    assert failed == "bad" and {"bad", "good"} <= set(times) and "of-bad" not in times


def test_jobs_share_the_cores_and_have_a_gpu_each():
    assert pipeline.environments(3, 0, 8) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert pipeline.environments(4, 1, 2) == [{"OMP_NUM_THREADS": "1"}] * 4
    gpus = [slot["CUDA_VISIBLE_DEVICES"] for slot in pipeline.environments(5, 2, 8)]
    assert gpus == ["0", "1", "0", "1", "0"]


# ---- With DVC: a small repository -----------------------------------------------------------------------------------

SMALL = """\
stages:
  settings:
    cmd: cat params.yaml > /dev/null && echo made > settings.txt
    deps: [params.yaml]
    outs: [settings.txt]
  first:
    cmd: echo first >> ran.txt && cat data/prostate/a.txt > first.txt
    deps: [settings.txt, data/prostate]
    outs: [first.txt]
  second:
    cmd: echo second >> ran.txt && test ! -e bad && cp first.txt second.txt
    deps: [first.txt]
    outs: [second.txt]
"""


def dvc(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True
    )


ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONPATH")}
ENVIRONMENT |= {"DVC_NO_ANALYTICS": "1"}


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True, capture_output=True
    )


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """A clone as it arrives: the code, three stages, and a store with the three cohorts, of one file each."""
    folder = tmp_path_factory.mktemp("clone") / "clone"
    for name in ("gridreg", "study", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", ".dvcignore", ".dvc/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.yaml").write_text(SMALL)
    (folder / ".gitignore").write_text("/data\n/*.txt\n__pycache__/\n.scratch/\n")
    for name in ("prostate", "pelvis", "brain"):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "a.txt").write_text(name)
    git(folder, "init", "--quiet")
    dvc(folder, "add", "data")
    dvc(folder, "push", "data.dvc")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "clone")
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / ".dvc" / "cache")
    shutil.rmtree(folder / ".dvc" / "tmp", ignore_errors=True)
    return folder


@pytest.fixture
def fresh(clone, tmp_path) -> Path:
    return shutil.copytree(clone, tmp_path / "clone")


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "study.pipeline", *arguments],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # as from another terminal
    )  # fmt: skip


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def ran(folder: Path) -> list[str]:
    return (folder / "ran.txt").read_text().split() if (folder / "ran.txt").exists() else []


def test_a_fresh_clone_runs_whole_then_only_what_changed_or_what_is_asked_for(fresh):
    status, _, err = finished(start(fresh))
    assert status == 0, err
    assert ran(fresh) == ["first", "second"] and (fresh / "second.txt").read_text() == "prostate"
    status, _, err = finished(start(fresh))
    assert status == 0 and "0 of 3 stages" in err and ran(fresh) == ["first", "second"]
    status, _, err = finished(start(fresh, "--from", "second"))
    assert status == 0 and ran(fresh) == ["first", "second", "second"], err
    status, _, err = finished(start(fresh, "--from", "third"))
    assert status == 1 and "no stage is called third; expected one of settings, first, second" in err
    assert (fresh / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_a_stage_that_fails_is_named_and_what_needs_it_waits_for_the_next_run(fresh):
    (fresh / "bad").touch()
    status, _, err = finished(start(fresh))
    assert status == 1 and "error: stage second: failed" in err and not (fresh / "second.txt").exists()
    (fresh / "bad").unlink()
    assert finished(start(fresh))[0] == 0 and ran(fresh) == ["first", "second", "second"]


def test_dvc_s_lock_is_waited_for_with_a_line_that_says_so(fresh):
    assert finished(start(fresh, "--pull"))[0] == 0
    lock = zc.lockfile.LockFile(str(fresh / ".dvc" / "tmp" / "lock"))
    process = start(fresh)
    for line in process.stderr:
        if "waiting until it is free" in line:
            break
    else:
        pytest.fail("no line says what is waited for")
    time.sleep(1)
    assert process.poll() is None and not ran(fresh)
    lock.close()
    assert finished(process)[0] == 0 and ran(fresh) == ["first", "second"]


def test_two_at_once_take_turns(fresh):
    both = [start(fresh), start(fresh)]
    answers = [finished(process) for process in both]
    assert [status for status, *_ in answers] == [0, 0], answers
    assert ran(fresh) == ["first", "second"]


def test_a_folder_without_git_is_refused_with_what_to_do(fresh):
    shutil.rmtree(fresh / ".git")
    status, _, err = finished(start(fresh))
    assert status == 1 and "Traceback" not in err
    assert "found no git repository, as in a ZIP download; expected a clone (git clone), or `git init`" in err
    git(fresh, "init", "--quiet")
    assert finished(start(fresh))[0] == 0 and ran(fresh) == ["first", "second"]


def test_a_cohort_put_into_data_before_the_first_run_stays_and_the_others_come(fresh):
    (fresh / "data" / "own").mkdir(parents=True)
    (fresh / "data" / "own" / "dataset.json").write_text("{}")
    status, _, err = finished(start(fresh))
    assert status == 0, err
    assert sorted(path.name for path in (fresh / "data").iterdir()) == ["brain", "own", "pelvis", "prostate"]
    assert (fresh / "data" / "own" / "dataset.json").read_text() == "{}"


def test_a_store_that_lacks_the_data_is_named(fresh):
    shutil.rmtree(fresh / ".dvc-store")
    status, _, err = finished(start(fresh))
    assert status == 1 and "Traceback" not in err and not ran(fresh)
    assert "error: " in err and ".dvc-store/" in err.splitlines()[-1] and "data" in err.splitlines()[-1]


# ---- The whole of it ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_pipeline_runs_in_the_smoke_profile_and_leaves_the_tree_alone():
    def state() -> str:
        return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout

    before = state()
    command = ["make", "smoke", f"VENV={os.environ.get('VENV', sys.prefix)}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    listed = done.stdout.split("tables and figures, after")[-1]
    print("tables and figures, after" + listed)
    for name in [*(f"table{n}.{suffix}" for n in range(1, 5) for suffix in ("csv", "md", "tex")),
                 *(f"figure{n}.{suffix}" for n in range(1, 9) for suffix in ("pdf", "png", "txt")), "report.html"]:  # fmt: skip
        assert name in listed
    assert state() == before
