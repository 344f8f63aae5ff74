"""Memory in MB of 2^20 bytes: the peak of a piece of work in this process, and the memory still available.

The peak is the growth of the resident set. Linux records it and resets it on request. On other systems a thread reads the
resident set every millisecond, and can miss a shorter peak.
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
LIMITS = [  # for control groups of version 2 and 1: files of limit and use, and the entry of memory.stat for cached files
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]


class Growth:
    """``mb`` is the largest growth of the process in the block; NaN until the block has ended."""

    mb = float("nan")


def settle_allocator() -> None:
    """Fix glibc's thresholds at the values to which they adapt: blocks of 32 MB and more are mapped one by one.

    Otherwise they depend on the memory freed so far, and a method would benefit from those measured before it.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # names and numbers from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 * MB)
        libc.mallopt(trim_threshold, 64 * MB)


def release() -> None:
    """Return freed memory to the system, so that the next allocation shows as growth."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> bool:
    """Reset the kernel's record of the peak; False where there is none or it is not accessible."""
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
    """``with growth() as grown: …``, then ``grown.mb``. ``sampled`` uses the thread even where the kernel has a record."""
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
    """Folders of this process's control groups and of all groups that contain them; any of them may have a limit."""
    yield CGROUP
    for line in OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = CGROUP / controllers / path.lstrip("/")
            yield from (group for group in (folder, *folder.parents) if group.is_relative_to(CGROUP / controllers))


def available_mb() -> float:
    """Available memory in MB: that of the machine, or less where a container or a cluster job has a limit."""
    free = psutil.virtual_memory().available
    for group in control_groups():
        for limit, use, cached in LIMITS:
            try:
                left = int((group / limit).read_text()) - int((group / use).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free = min(free, left + int(stat[cached]))  # the memory of cached files can be reclaimed
            except (OSError, ValueError, KeyError):  # no such files, or "max": no limit
                pass
    return free / MB
