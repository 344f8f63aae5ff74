"""Gain of each fast path of ``gridreg.fast``: seconds with the plain function and with the fast one.

    python -m study.benchmark.fast_paths --out fast_paths.csv
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m study.benchmark.fast_paths --out fast_paths_avx2.csv

The tasks are a registration of 128×128×102 voxels, a training step of two pairs of 32×32×26 voxels, and a refinement step
at 64×64×51 voxels. Each has 10×10×10 control points. Both functions take turns in one process, and the smallest of several
times counts, so that other work on the machine affects both in the same way.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from gridreg import fast, losses
from gridreg.network import GridReg
from gridreg.refinement import refine
from gridreg.spatial import Shape, warp

GRID = (10, 10, 10)
REGISTERED, TRAINED, REFINED = (128, 128, 102), (32, 32, 26), (64, 64, 51)


def registration(shape: Shape = REGISTERED) -> Callable[[], None]:
    """A call that registers one pair and warps its moving image."""
    network, (fixed, moving) = GridReg().eval(), torch.rand(2, 1, 1, *shape)

    @torch.inference_mode()
    def call() -> None:
        warp(moving, network(fixed, moving, GRID).displacement)

    return call


def training_step(shape: Shape = TRAINED, batch: int = 2) -> Callable[[], None]:
    """A call that makes one step of training without labels."""
    network, (fixed, moving) = GridReg(), torch.rand(2, batch, 1, *shape)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-6)

    def call() -> None:
        registered = network(fixed, moving, GRID)
        loss = losses.similarity_loss("mse", fixed, warp(moving, registered.displacement), GRID)
        loss = loss + losses.grid_bending_energy(registered.control_points, shape)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return call


def refinement_step(shape: Shape = REFINED) -> Callable[[], None]:
    """A call that makes one step of refinement by Adam."""
    network, (fixed, moving) = GridReg().eval(), torch.rand(2, 1, 1, *shape)
    with torch.no_grad():
        start = network(fixed, moving, GRID)

    def call() -> None:
        refine(start, fixed, moving, steps=1)

    return call


WORK = {  # name in the table → the task, and the fast paths that it uses
    "registration": (registration, ("warp", "attention")),
    "training step": (training_step, ("attention",)),
    "refinement step": (refinement_step, ("slices",)),
}


def compare(call: Callable[[], None], path: str, repeats: int) -> tuple[float, float]:
    """Smallest time in seconds of the call with the plain function, and with the fast one."""
    least = {(): float("inf"), (path,): float("inf")}
    for repeat in range(repeats + 1):
        for plain in least:
            with fast.without(*plain):
                began = time.perf_counter()
                call()
                seconds = time.perf_counter() - began
            if repeat:  # the first call fills the caches
                least[plain] = min(least[plain], seconds)
    return least[(path,)], least[()]


def measure(repeats: int = 10) -> pd.DataFrame:
    """One row per path and task: path, work, plain_s, fast_s, gain (fraction of plain_s), threads, instructions."""
    torch.manual_seed(0)
    rows = []
    for work, (build, paths) in WORK.items():
        call = build()
        for path in paths:
            plain, quick = compare(call, path, repeats)
            rows.append({"path": path, "work": work, "plain_s": plain, "fast_s": quick, "gain": 1 - quick / plain})
    frame = pd.DataFrame(rows)
    frame["threads"], frame["instructions"] = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return frame


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.benchmark.fast_paths", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, help="number of PyTorch's threads (default: PyTorch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    frame = measure(options.repeats)
    print(frame.to_string(index=False, float_format="{:.4f}".format))
    if options.out:
        frame.to_csv(options.out, index=False, float_format="%.4f")
    return 0


if __name__ == "__main__":
    sys.exit(main())
