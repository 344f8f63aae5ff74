"""One writer at a time, whole folders, and what is left of processes that were killed."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gridreg.errors import InputError
from study import locks
from study.locks import locked, whole_folder

HOLD = """
import sys, time
from study.locks import whole_folder
with whole_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "rest").write_text("rest")
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``out`` and has written half of it."""
    running = []

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_the_second_process_waits_and_says_for_whom(tmp_path, holder):
    first, said = holder(1.0), []
    with pytest.raises(
        InputError, match=f"out: found that process {first.pid} on {socket.gethostname()} writes it, expected"
    ):
        with locked(tmp_path / "out", wait=False):
            raise AssertionError
    with whole_folder(tmp_path / "out", say=said.append) as folder:
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["half", "rest"], "the first has finished, whole"
        (folder / "second").touch()
    assert first.wait() == 0 and len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'out'}: found that process {first.pid} on ") and "waiting" in said[0]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no lock and nothing temporary is left"


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    first = holder(600)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / ".out.lock").exists() and (tmp_path / f".out.{first.pid}" / "half").exists()
    with whole_folder(tmp_path / "out", wait=False) as folder:
        (folder / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_many_writers_never_meet(tmp_path):
    inside, most = 0, []

    def write(number: int) -> None:
        nonlocal inside
        with whole_folder(tmp_path / "out", say=lambda _: None) as folder:
            inside += 1
            most.append(inside)
            for i in range(3):
                (folder / f"{i}").write_text(str(number))
                time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=write, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    assert len({p.read_text() for p in (tmp_path / "out").iterdir()}) == 1 and len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_what_was_there(tmp_path):
    def incomplete(folder: Path) -> None:
        raise InputError(f"{folder.name}: found 1 file")

    with whole_folder(tmp_path / "out") as folder:
        (folder / "old").touch()
    for name in (".out.77", ".out.mine", ".out.2.5"):  # of a killed process, of the user, of a dataset "out.2"
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="found 1 file"):
        with whole_folder(tmp_path / "out", check=incomplete) as folder:
            (folder / "new").touch()
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(tmp_path / "out") as folder:
            raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.2.5", ".out.mine", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_that_names_the_folder(tmp_path, number):
    with pytest.raises(
        InputError, match=r"out: found .* \(\d+ MB free\), expected room for all of it; it was not written"
    ):
        with whole_folder(tmp_path / "deeper" / "out"):
            raise OSError(number, os.strerror(number))  # as the libraries raise it: without a name
    assert not list((tmp_path / "deeper").iterdir())
    with pytest.raises(PermissionError):
        with whole_folder(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "no", "file")


def test_a_lock_without_a_name_is_held_all_the_same(tmp_path):
    lock = locks.FileLock(tmp_path / ".out.lock")
    with lock, pytest.raises(InputError, match="found that another process writes it"):
        from_another_thread(lambda: locked(tmp_path / "out", wait=False).__enter__())


def from_another_thread(call) -> None:
    """Call in another thread: filelock refuses to wait for a lock that this very thread holds."""
    raised = []

    def run() -> None:
        try:
            call()
        except InputError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    raise raised[0]
