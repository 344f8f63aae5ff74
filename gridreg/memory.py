"""Peak memory of a piece of work in this process: how far its resident set grows, in MB of 2^20 bytes.

Linux keeps the peak itself and forgets it on request. Where it does not, a thread reads the resident set every
millisecond, which can miss a peak shorter than that.
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
CGROUP = Path("/sys/fs/cgroup")


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


def available_mb() -> float:
    """Memory that can still be had: the machine's, or less where a container has a limit of its own."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # cached files make room when asked to
    except (OSError, ValueError, KeyError):  # no such files, or "max": no limit
        pass
    return free / MB
