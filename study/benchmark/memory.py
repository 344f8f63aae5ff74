"""Memory in MB of 2^20 bytes: the peak of a piece of work in this process, and how much can still be had.

The peak is how far the resident set grows. Linux keeps it and forgets it on request. On other systems a thread reads the
resident set every millisecond, which can miss a shorter peak.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MB = 2**20
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = [  # files of a control group of either version: limit, use, and what of the use is cached files, in memory.stat
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]


class Growth:
    """``mb``: by how much the process grew at most; NaN until the block has ended."""

    mb = float("nan")


def settle_allocator() -> None:
    """Set glibc's thresholds to where its own adaptation ends: blocks from 32 MB on are mapped one by one.

    Left alone, they move with what was freed so far, and a method would profit from those measured before it.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # names and numbers of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 * MB)
        libc.mallopt(trim_threshold, 64 * MB)


def release() -> None:
    """Give freed memory back to the system, so that what is allocated next shows as growth."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> bool:
    """Have the kernel start the peak anew; False where it does not keep one, or not for us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        kernel_peak()
    except (OSError, StopIteration):
        return False
    return True


def kernel_peak() -> int:
    """Bytes of the largest resident set since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@contextmanager
def growth(sampled: bool = False) -> Iterator[Growth]:
    """``with growth() as grown: …``, then ``grown.mb``. ``sampled``: by the thread, also where the kernel knows."""
    grown = Growth()
    release()
    if not sampled and forget_peak():
        before = kernel_peak()
        yield grown
        peak = kernel_peak()
    else:
        process, done = psutil.Process(), threading.Event()
        before = peak = process.memory_info().rss

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, process.memory_info().rss)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield grown
        finally:
            done.set()
            thread.join()
        peak = max(peak, process.memory_info().rss)
    grown.mb = (peak - before) / MB


def control_groups() -> Iterator[Path]:
    """Folders of the control groups that this process is in, each with all those around it: any may have a limit."""
    yield CGROUP
    for line in OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = CGROUP / controllers / path.lstrip("/")
            yield from (group for group in (folder, *folder.parents) if group.is_relative_to(CGROUP / controllers))


def available_mb() -> float:
    """Memory that can still be had, in MB: the machine's, or less where a container or the job of a cluster has a limit."""
    free = psutil.virtual_memory().available
    for group in control_groups():
        for limit, use, cached in LIMITS:
            try:
                left = int((group / limit).read_text()) - int((group / use).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free = min(free, left + int(stat[cached]))  # cached files make room when asked to
            except (OSError, ValueError, KeyError):  # no such files, or "max": no limit
                pass
    return free / MB
