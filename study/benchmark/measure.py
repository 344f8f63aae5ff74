"""Seconds, memory, parameters and multiply-adds of every method, measured in one process.

All methods get the same images, threads and allocator settings. A row that cannot be measured gives the reason.
    register    network and warp, images on the device, batch 1
    variant     the same for a run whose network is not the default of its method, in published size, at one image size
    train       one step as in ``training.train``: images to the device, forward, MSE and bending losses, backward, Adam
    bending     the bending energy and its gradient alone, from the dense field and from its control points
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gridreg import losses
from gridreg.devices import describe_device, device, to_tensor
from gridreg.errors import InputError
from gridreg.network import GridReg
from gridreg.spatial import Shape, warp
from gridreg.upsampling import upsample
from study.benchmark.cost import PARTS, bandwidth, cost, parts, state_mb, timed, with_memory
from study.benchmark.memory import MB, available_mb, settle_allocator
from study.benchmark.published import cost_grid, published
from study.config.schema import UNTRAINED
from study.methods.table import build, grid_name, parameter_count
from study.training.objective import loss_terms

COLUMNS = ["run", "method", "grid", "shape", "task", "batch", "seconds", "seconds_min", "repeats", *PARTS, "memory_mb",
           "peak_mb", "parameters", "multiply_adds", "device", "threads", "note"]  # fmt: skip
GRIDS = [(5, 5, 5), (8, 8, 8), (10, 10, 10), (15, 15, 15)]
RUNS = {"syn": "ants-syn"}  # methods with another name in the tables
SEPARATE_PROCESS = {"ants-syn": "in a separate process, on one thread; its memory is not measured"}
BENDING = {"bending-dense": lambda control_points, shape: losses.bending_energy(upsample(control_points, shape)),
           "bending-grid": losses.grid_bending_energy}  # fmt: skip
FIRST_SHAPE = (32, 32, 32)  # of the first call of each method: the smallest image that all methods take
SEPARATE_LIMIT = 5.0  # times ``limit_seconds`` for a method in a separate process, which is called only once
SLOW_FRACTION = 8.0  # a call longer than ``limit_seconds`` / SLOW_FRACTION is measured once
USABLE_MEMORY = 0.8  # fraction of the available memory that a row may use


@dataclass(frozen=True)
class Job:
    """One row to measure."""

    method: str
    task: str
    grid: Shape | None
    shape: Shape
    batch: int
    run: str = ""  # the name of a variant; other rows are named by method and grid

    @property
    def voxels(self) -> int:
        return math.prod(self.shape) * self.batch

    def row(self, **values: Any) -> dict[str, Any]:
        grid = "" if self.grid is None else f"-{self.grid[0] if len(set(self.grid)) == 1 else grid_name(self.grid)}"
        name = self.run or RUNS.get(self.method, self.method) + grid
        names = {"run": name, "method": self.method, "grid": grid_name(self.grid)}
        return names | {"shape": grid_name(self.shape), "task": self.task, "batch": self.batch} | values


def untrained_settings(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first run of each untrained method, by method, with the settings that are the same for every dataset."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs.values():
        if run["method"] in UNTRAINED:
            found.setdefault(run["method"], {name: value for name, value in run.items() if not isinstance(value, dict)})
    return found


def image_pair(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """fixed, moving (W, H, D) in [0, 1]: smooth noise, and the same noise deformed by some voxels, so that SyN iterates."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 1, *(max(n // 6, 2) for n in shape)), generator=generator)
    fixed = upsample(coarse, shape)
    shift = torch.randn((1, 3, 4, 4, 4), generator=generator) * 0.06 * min(shape)
    moving = warp(fixed, upsample(shift, shape, "deconv"))
    return fixed[0, 0].numpy(), moving[0, 0].numpy()


def on_device(shape: Shape, where: torch.device) -> list[Tensor]:
    """The image pair as (1, 1, W, H, D)."""
    return [to_tensor([image], where) for image in image_pair(shape)]


def registration(network: nn.Module, shape: Shape, grid: Shape | None, where: torch.device) -> Callable[[], None]:
    """A call that registers one pair and warps the moving image."""
    network.eval()
    fixed, moving = on_device(shape, where)

    @torch.inference_mode()
    def call() -> None:
        warp(moving, network(fixed, moving, grid).displacement)

    return call


def training_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    shape: Shape,
    batch: int,
    grid: Shape | None,
    where: torch.device,
) -> Callable[[], None]:
    """A call that makes one step of training on ``batch`` pairs."""
    network.train()
    images = dict(zip(("fixed", "moving"), image_pair(shape)))
    data, pairs = SimpleNamespace(image=images.__getitem__, shape=shape), [("fixed", "moving")] * batch

    def call() -> None:
        terms = loss_terms(network, data, pairs, grid, where, similarity="mse", dice=False)
        optimiser.zero_grad()
        (terms["similarity"] + terms["bending"]).backward()
        optimiser.step()

    return call


def floor_row(shape: Shape, speed: float) -> dict[str, Any]:
    """The lower bound of every registration's cost: read both images, write the warped one, and hold it."""
    size = 4 * math.prod(shape)
    note = f"at a memory bandwidth of {speed / 1e9:.1f} GB/s"
    values = {"seconds": 3 * size / speed, "memory_mb": size / MB, "note": note}
    return Job("floor", "register", None, shape, 1).row(**values)


def bending_row(form: str, grid: Shape, shape: Shape, where: torch.device) -> dict[str, Any]:
    """Cost of the bending energy and its gradient for ``grid`` control points, in one of the forms of ``BENDING``."""
    control_points = torch.randn((1, 3, *grid), device=where, requires_grad=True)

    def call() -> None:
        torch.autograd.grad(BENDING[form](control_points, shape), control_points)

    result, multiply_adds = cost(call, where)
    return Job(form, "bending", grid, shape, 1).row(run=form, multiply_adds=multiply_adds, **vars(result))


def refusal(pace: tuple[float, float], job: Job, limit_seconds: float, where: torch.device) -> str:
    """Reason not to measure a row, from the seconds and MB per voxel of the last similar row; "" if there is none."""
    seconds, mb = (value * job.voxels for value in pace)
    if seconds > limit_seconds:
        return f"left out: about {seconds:.0f} s expected, the limit is {limit_seconds:g} s"
    if where.type == "cpu" and mb > USABLE_MEMORY * available_mb():
        return f"left out: about {mb / 1024:.1f} GB expected, {available_mb() / 1024:.1f} GB are free"
    return ""


def reason(error: Exception) -> str:
    """The reason of a method's failure in one line."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in line
    return "out of memory" if memory else line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"


def method_rows(run: dict[str, Any], jobs: Sequence[Job], limit_seconds: float, where: torch.device) -> Iterator[dict]:
    """One row per job of a network, in the given order. Jobs of one task and grid must be adjacent, small ones first."""
    method = run["method"]
    try:
        network = build(published(run)).to(where)
    except Exception as error:  # the note of the rows says why a method cannot be built
        yield from (job.row(note=reason(error)) for job in jobs)
        return
    size, separate = parameter_count(network), SEPARATE_PROCESS.get(RUNS.get(method, method))
    longest = limit_seconds * (SEPARATE_LIMIT if separate else 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-6) if size else None

    def call(job: Job) -> Callable[[], None]:
        if job.task != "train":
            return registration(network, job.shape, job.grid, where)
        return training_step(network, optimiser, job.shape, job.batch, job.grid, where)

    for (task, grid), group in groupby(jobs, key=lambda job: (job.task, job.grid)):
        pace = None
        for job in group:
            row = job.row(parameters=size)
            if task == "train" and optimiser is None:
                yield row | {"note": "nothing to train"}
                continue
            try:
                if pace is None:
                    small = Job(method, task, grid, FIRST_SHAPE, 1)
                    timed(call(small), where)
                    seconds, mb, _ = with_memory(call(small), where)
                    pace = seconds / small.voxels, mb / small.voxels
                why = refusal(pace, job, longest, where)
                if why:
                    yield row | {"note": why}
                    continue
                if separate:  # its memory cannot be measured from this process
                    seconds = timed(call(job), where)
                    pace = seconds / job.voxels, 0.0
                    iterations = ", ".join(map(str, published(run)["iterations"]))
                    yield row | {
                        "seconds": seconds,
                        "seconds_min": seconds,
                        "repeats": 1,
                        "note": f"{iterations} iterations, {separate}",
                    }
                    continue
                result, row["multiply_adds"] = cost(call(job), where, limit_seconds / SLOW_FRACTION)
                pace = result.seconds / job.voxels, result.memory_mb / job.voxels
                row |= vars(result)
                row["memory_mb"] += state_mb(optimiser) if task == "train" else 0
                if task != "train" and isinstance(network, GridReg):
                    row |= parts(network, on_device(job.shape, where), grid, where, result.repeats)
            except Exception as error:
                row["note"] = reason(error)
            yield row


def measure(
    methods: Iterable[str],
    shapes: Iterable[Sequence[int]],
    batches: Sequence[int] = (),
    grids: Sequence[Sequence[int]] = GRIDS,
    limit_seconds: float = 60.0,
    variants: Mapping[str, dict[str, Any]] | None = None,
    settings: Mapping[str, dict[str, Any]] | None = None,
) -> pd.DataFrame:
    """One row per method, grid, shape, task and batch, with ``COLUMNS``, after the lower bound (floor) of every shape.

    methods        names as in ``methods.table.build``, in their published size
    shapes         voxels of the images
    batches        pairs in a training step; empty: training is not measured
    grids          control points of GridReg
    limit_seconds  calls with a longer expected time are left out (for SyN: ``SEPARATE_LIMIT`` times as long)
    variants       runs by name, measured in published size at the middle one of ``shapes`` (of two the smaller)
    settings       runs by method, measured instead of the method's defaults (``untrained_settings``)

    memory_mb is the memory besides weights and images: the growth of the process on a CPU, and the growth of allocated
    memory on a GPU. For training it includes the gradients and Adam's state.
    """
    where, speed = device(), bandwidth(device())
    settle_allocator()
    gc.freeze()  # memory measurements collect garbage, which would take a second with the objects of all imports
    torch.manual_seed(0)
    shapes = sorted((tuple(shape) for shape in shapes), key=math.prod)
    tasks = [("register", [1]), *([("train", sorted(batches))] if batches else [])]
    jobs = [
        Job(method, task, grid, shape, batch)
        for method in methods
        for task, sizes in tasks
        for grid in ([tuple(grid) for grid in grids] if method == "gridreg" else [None])
        for shape in shapes
        for batch in sizes
    ]
    middle = shapes[(len(shapes) - 1) // 2]
    work = []
    for method, group in groupby(jobs, key=lambda job: job.method):
        run, own = (settings or {}).get(method, {"method": method}), list(group)
        work.append((run, [job for job in own if job.task == "register"]))
        work += [(varied, [Job(method, "variant", cost_grid(varied), middle, 1, name)])
                 for name, varied in (variants or {}).items() if varied["method"] == method]  # fmt: skip
        work.append((run, [job for job in own if job.task == "train"]))  # last, as its leftovers would count as memory
    work = [(run, group) for run, group in work if group]
    rows = [floor_row(shape, speed) for shape in shapes]
    with tqdm(total=sum(len(group) for _, group in work), unit="row", mininterval=2) as progress:
        for run, group in work:
            progress.set_description(group[0].run or run["method"])
            for row in method_rows(run, group, limit_seconds, where):
                rows.append(row)
                progress.update()
            if where.type == "cuda":
                torch.cuda.empty_cache()
    grid = tuple(grids[len(grids) // 2])
    rows += [bending_row(form, grid, shape, where) for shape in shapes for form in BENDING if batches]
    gc.unfreeze()
    frame = pd.DataFrame(rows).reindex(columns=COLUMNS)
    frame["device"], frame["threads"] = describe_device(where), torch.get_num_threads()
    return frame.fillna({"note": ""})
