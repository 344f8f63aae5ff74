"""A result folder has one writer at a time and appears whole or not at all.

The lock is that of ``filelock``. The kernel releases it when its process ends for any reason, so a dead process never
blocks the next one. On a file system without such locks, filelock uses a marker file with the same content.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from gridreg.errors import InputError

POLL_SECONDS = 0.5
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def locked(target: Path | str, *, wait: bool = True, say: Callable[[str], None] = print) -> Iterator[None]:
    """Be the only process, on any host that sees the folder, that writes ``target``.

    The lock is the file ``.NAME.lock`` beside ``target`` and is removed at the end. Where another process holds it,
    ``say`` receives one sentence that names the process and its host, then this one waits for it. With ``wait=False``
    it raises InputError with that sentence.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.parent / f".{target.name}.lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = f"{target}: found that {_holder(file)} writes it"
        if not wait:
            raise InputError(f"{holder}, expected no other process at work on it.") from None
        say(f"{holder}; waiting until it has finished.")
        lock.acquire(poll_interval=POLL_SECONDS)
    native = not isinstance(lock, SoftFileLock)  # otherwise filelock writes and removes the marker file
    try:
        if native:
            file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        if native:
            file.unlink(missing_ok=True)  # before the release: a process that has opened it notices and tries again
        lock.release()


@contextmanager
def whole_folder(
    out: Path | str,
    *,
    wait: bool = True,
    say: Callable[[str], None] = print,
    check: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``out`` when the block ends without an error.

    The folder lies beside ``out``. ``check`` may raise an error before the folder is renamed. After an error ``out`` is
    unchanged. ``wait`` and ``say`` are as for ``locked``. InputError where the disk is full.
    """
    out = Path(out)
    with locked(out, wait=wait, say=say):
        leftover = re.compile(rf"\.{re.escape(out.name)}\.\d+(\.old)?")
        for left in out.parent.iterdir():
            if leftover.fullmatch(left.name):  # left by a killed process, as no other process holds the lock
                shutil.rmtree(left, ignore_errors=True)
        temporary = out.parent / f".{out.name}.{os.getpid()}"
        try:
            temporary.mkdir()
            yield temporary
            if check is not None:
                check(temporary)
            _replace(temporary, out)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise InputError(disk_full(out, error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def disk_full(out: Path | str, error: OSError) -> str:
    """The message for a file or folder that did not fit on the disk."""
    free = shutil.disk_usage(next(folder for folder in Path(out).absolute().parents if folder.is_dir())).free
    return f"{out}: found {error.strerror.lower()} ({free / 2**20:.0f} MB free), expected room for all of it; it was not written."


def _holder(file: Path) -> str:
    try:
        process, host = file.read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):  # between taking the lock and writing its name, or just finished
        return "another process"
    return f"process {process} on {host}"


def _replace(temporary: Path, out: Path) -> None:
    """Replace an older folder by the finished one."""
    old = temporary.with_name(temporary.name + ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)
