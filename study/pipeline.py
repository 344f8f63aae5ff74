"""Run the changed stages of dvc.yaml in parallel (`make repro`). `dvc pull && dvc repro` runs them one by one.

    python -m study.pipeline                    runs every changed stage, two at a time
    python -m study.pipeline --jobs 8           runs eight at a time, which share the cores
    python -m study.pipeline --pull             runs nothing and only fetches data and results from the store
    python -m study.pipeline --from train       runs these stages and all that depend on them, changed or not

A stage starts when the stages that it needs have ended. With several GPUs, jobs take turns on them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from typing import Any, TypeVar

from gridreg.errors import InputError, exit_status
from study import ROOT
from study.config.files import read
from study.config.pipeline import write_in_use
from study.locks import locked

Result = TypeVar("Result")
FIRST = "settings"  # every other stage depends on its outputs
LOADED = ("dvc.commands.repro", "dvc.commands.status", "dvc.repo.reproduce", "dvc.stage.run", "dvc.stage.cache",
          "dvc.dvcfile", "dvc.output", "dvc.parsing", "dvc.dependency.param", "dvc.repo.index", "dvc.ignore",
          "dvc.cachemgr", "dvc.data_cloud", "dvc.scm", "dvc_data.hashfile.state", "networkx")  # fmt: skip


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- Which stages ---------------------------------------------------------------------------------------------------


class Schedule:
    """The stages to run, ordered so that each comes after the stages that it needs.

    needs  stage → the stages that it needs; those outside ``todo`` are up to date
    """

    def __init__(self, todo: Iterable[str], needs: dict[str, set[str]]):
        self.waiting = list(todo)
        self.needs = {name: needs.get(name, set()) & set(self.waiting) for name in self.waiting}
        self.ended: set[str] = set()

    def next(self) -> str | None:
        """The first stage whose needs have ended; None if there is none at present."""
        for name in self.waiting:
            if self.needs[name] <= self.ended:
                self.waiting.remove(name)
                return name
        return None


def with_all_that_need_them(changed: Iterable[str], needs: dict[str, set[str]]) -> list[str]:
    """The changed stages and every stage that needs one of them, in the order of ``needs``."""
    found = set(changed)
    while more := {name for name, needed in needs.items() if needed & found} - found:
        found |= more
    return [name for name in needs if name in found]


# ---- DVC ------------------------------------------------------------------------------------------------------------


def patiently(call: Callable[[], Result], seconds: float = 1.0) -> Result:
    """The result of a call that needs DVC's lock. While another process holds the lock, it waits and says so in one line."""
    from dvc.lock import LockError

    said = False
    while True:
        try:
            return call()
        except LockError:
            if not said:
                say(f"DVC is at work in {ROOT}: found its lock taken{_holder()}; waiting until it is free.")
            said = True
            time.sleep(seconds)


def _holder() -> str:
    """`` by process 123`` from DVC's lock file."""
    number = _lock_file()
    return f" by process {number}" if number else ""


def _lock_file() -> int | None:
    try:
        text = (ROOT / ".dvc" / "tmp" / "lock").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def say_what_is_waited_for() -> None:
    """Print a line if a process outside this run holds DVC's lock. Stages of this run wait for each other silently."""
    import zc.lockfile

    try:
        zc.lockfile.LockFile(str(ROOT / ".dvc" / "tmp" / "lock")).close()
    except zc.lockfile.LockError:
        number = _lock_file()
        try:
            ours = number is not None and os.getpgid(number) == os.getpgid(0)
        except OSError:
            ours = False
        if not ours:
            say(f"DVC is at work in {ROOT}: found its lock taken{_holder()}; waiting until it is free.")
    except OSError:
        pass  # no such folder: nobody has locked it yet


def open_repository() -> Any:
    """The DVC repository of this folder. InputError with a remedy if the folder is not a clone."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        return Repo(str(ROOT))
    except SCMError as error:
        raise InputError(
            f"{ROOT}: found no git repository, as in a ZIP download; expected a clone (git clone), or `git init` "
            "in this folder first"
        ) from error
    except DvcException as error:
        raise InputError(
            f"{ROOT}: DVC cannot open it ({_in_one_line(error)}); expected the folder as it was cloned"
        ) from error


def _in_one_line(error: BaseException) -> str:
    texts = []
    while error is not None:
        texts.append(" ".join(str(error).split()))
        error = error.__cause__
    return ": ".join(dict.fromkeys(text for text in texts if text))


def stages_of(repository: Any) -> dict[str, set[str]]:
    """Every stage of dvc.yaml in the order of the file, with the stages that it needs; without the frozen benchmark."""
    graph = repository.index.graph
    names = {
        stage: stage.addressing
        for stage in repository.index.stages
        if stage.is_data_source is False and not stage.frozen
    }
    return {
        name: {names[needed] for needed in graph.successors(stage) if needed in names} for stage, name in names.items()
    }


def missing_here(repository: Any, cohorts: Iterable[str]) -> list[str]:
    """The targets to pull: files (dvc.yaml or .dvc) with missing outputs. For an existing folder, only its missing cohorts.

    So files that a user has put into data/ remain, and the cohorts of the store are added.
    """
    targets: list[str] = []
    for stage in repository.index.stages:
        for out in stage.outs:
            folder = os.path.relpath(out.fs_path, ROOT)
            if not out.hash_info:
                continue  # never made
            if not os.path.lexists(out.fs_path):
                targets.append(os.path.relpath(stage.path, ROOT))
            elif stage.is_data_source:
                targets += [path for path in cohorts if path.startswith(f"{folder}/") and not (ROOT / path).exists()]
    return list(dict.fromkeys(targets))


def fetch(repository: Any, cohorts: Iterable[str]) -> None:
    """Pull the missing cohorts, checkpoints and results. InputError where this fails."""
    from dvc.exceptions import DvcException
    from dvc.ui import ui

    targets = missing_here(repository, cohorts)
    if targets:
        ui.enable()
        say(f"dvc pull {' '.join(targets)}")
        try:
            patiently(lambda: repository.pull(targets=targets, allow_missing=True))
        except DvcException as error:
            raise InputError(
                f"dvc pull {' '.join(targets)}: {_in_one_line(error)}; expected them to come from .dvc-store/ and "
                "nothing else in their place (move what is there elsewhere, it is never overwritten)"
            ) from error
    for folder in cohorts:
        if not (ROOT / folder).exists():
            raise InputError(f"{folder}: found no such folder, here or in .dvc-store/; expected a cohort in it")


def changed_stages(repository: Any) -> set[str]:
    return set(patiently(repository.status))


def run_stage(name: str, options: Iterable[str], environment: dict[str, str]) -> None:
    """Run `dvc repro --single-item NAME` as the work of a new process, which ends with DVC's exit status."""
    os.chdir(ROOT)
    os.environ.update(environment)
    from dvc.cli import main as dvc

    say_what_is_waited_for()
    sys.exit(dvc(["--wait-for-lock", "repro", "--single-item", *options, name]))


# ---- Side by side ---------------------------------------------------------------------------------------------------


def environments(jobs: int, gpus: int, cores: int) -> list[dict[str, str]]:
    """Environment variables of each job: its number of threads, and its GPU if there are several."""
    share = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    return [share | ({"CUDA_VISIBLE_DEVICES": str(job % gpus)} if gpus > 1 else {}) for job in range(jobs)]


def run(
    schedule: Schedule,
    slots: list[dict[str, str]],
    options: Iterable[str] = (),
    target: Callable[..., None] = run_stage,
) -> str | None:
    """Run the stages of the schedule, as many at a time as there are slots. Returns the name of one that failed, or None.

    After a failure no further stage starts; running stages are completed.
    """
    context = multiprocessing.get_context("forkserver")  # children start with DVC loaded, which saves a second each
    context.set_forkserver_preload(list(LOADED))
    running: dict[Any, tuple[str, dict[str, str], Any]] = {}
    free, failed = list(slots), None
    while True:
        while free and failed is None and (name := schedule.next()) is not None:
            slot = free.pop(0)
            process = context.Process(target=target, args=(name, options, slot))
            process.start()
            running[process.sentinel] = name, slot, process
        if not running:
            return failed
        for sentinel in wait(list(running)):
            name, slot, process = running.pop(sentinel)
            process.join()
            free.append(slot)
            schedule.ended.add(name)
            if process.exitcode != 0:
                failed = failed or name


def number_of_gpus() -> int:
    """Number of GPUs of this machine; 1 if there is none or if CUDA_VISIBLE_DEVICES already selects one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") or shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(listed.stdout.splitlines())


def chosen(repository: Any, needs: dict[str, set[str]], start: str | None) -> list[str]:
    """The stages to run, in order: the changed ones, or those of the name or kind ``start`` (``train``), with all dependants."""
    if start is None:
        return with_all_that_need_them(changed_stages(repository) & set(needs), needs)
    stages = [name for name in needs if start in (name, name.split("@")[0])]
    if not stages:
        kinds = dict.fromkeys(name.split("@")[0] for name in needs)
        raise InputError(f"dvc.yaml: no stage is called {start}; expected one of {', '.join(kinds)}")
    return with_all_that_need_them(stages, needs)


def reproduce(slots: list[dict[str, str]], start: str | None = None, pull_alone: bool = False) -> None:
    """Bring everything up to date, or only pull from the store. InputError where the data or a stage fails."""
    for line in write_in_use(ROOT / "params.yaml"):
        say(line)
    with locked(ROOT / ".scratch" / "repro", say=say):
        fetch(open_repository(), list(read(ROOT / "in_use.yaml")["in_use"]["cohorts"].values()))
        if pull_alone:
            return
        failed = run(Schedule([FIRST], {}), slots)
        if failed is None:
            repository = open_repository()
            needs = stages_of(repository)
            todo = chosen(repository, needs, start)
            say(f"{len(todo)} of {len(needs)} stages to bring up to date, {len(slots)} at a time")
            failed = run(Schedule(todo, needs), slots, [] if start is None else ["--force", "--no-run-cache"])
    if failed is not None:
        raise InputError(
            f"stage {failed}: failed, for the reason above (its notebook in executed/ has the traceback); "
            "the stages that need it were not run"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, help="number of stages at a time (default: 2, or more with more GPUs)")
    parser.add_argument("--gpus", type=int, help="number of GPUs to use (default: all)")
    parser.add_argument(
        "--from", dest="start", metavar="STAGE", help="run this stage and all that depend on it, changed or not"
    )
    parser.add_argument("--pull", action="store_true", help="only fetch missing files from the store")
    options = parser.parse_args()
    gpus = number_of_gpus() if options.gpus is None else options.gpus
    jobs = max(2, gpus) if options.jobs is None else options.jobs
    if jobs < 1:
        parser.error("--jobs: expected a number of at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        return exit_status(lambda: reproduce(environments(jobs, gpus, cores), options.start, options.pull))
    except KeyboardInterrupt:
        say("interrupted; finished stages are kept, and a training resumes where it stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
