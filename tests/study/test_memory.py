"""Peak memory of blocks of known size."""

from __future__ import annotations

import platform
import time

import numpy as np
import pytest

from study.benchmark import memory


@pytest.mark.parametrize("sampled", [False, True])
def test_memory_of_known_size(sampled):
    with memory.growth(sampled) as grown:
        block = np.ones(200 * memory.MB, np.uint8)
        time.sleep(0.02)
        del block
    assert grown.mb == pytest.approx(200, abs=20)
    with memory.growth(sampled) as grown:
        pass
    assert grown.mb < 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep freed memory in their own ways")
def test_memory_that_the_allocator_kept_counts_as_growth():
    memory.settle_allocator()
    held = [bytes(1000) for _ in range(100_000)]
    del held
    with memory.growth() as grown:
        held = [bytes(1000) for _ in range(100_000)]
        del held
    assert grown.mb == pytest.approx(100, abs=25)


def test_memory_where_the_kernel_keeps_no_peak(monkeypatch):
    monkeypatch.setattr(memory, "forget_peak", lambda: False)
    with memory.growth() as grown:
        block = np.ones(100 * memory.MB, np.uint8)
        time.sleep(0.02)
        del block
    assert grown.mb == pytest.approx(100, abs=20)


def test_a_container_may_have_less(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory.available_mb()
    assert whole > 0
    (tmp_path / "memory.max").write_text(f"{5 * memory.MB}\n")
    (tmp_path / "memory.current").write_text(f"{4 * memory.MB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {2 * memory.MB}\n")
    assert memory.available_mb() == 3
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_mb() > 3


@pytest.mark.parametrize(("line", "folder", "names", "cached"), [
    ("0::/slurm/job_7/step_0", "slurm/job_7", ("memory.max", "memory.current"), "inactive_file"),
    ("4:memory:/slurm/job_7/step_0", "memory/slurm/job_7", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
])  # fmt: skip
def test_a_job_of_a_cluster_may_have_less(tmp_path, monkeypatch, line, folder, names, cached):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text(f"5:devices:/elsewhere\n{line}\n")
    assert memory.available_mb() > 5
    (tmp_path / folder).mkdir(parents=True)
    for name, mb in zip(names, (9, 6)):
        (tmp_path / folder / name).write_text(f"{mb * memory.MB}\n")
    (tmp_path / folder / "memory.stat").write_text(f"{cached} {2 * memory.MB}\n")
    assert memory.available_mb() == 5
