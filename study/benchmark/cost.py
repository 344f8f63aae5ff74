"""Seconds, memory and multiply-adds of one call, on a CPU or a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from gridreg.network import GridReg
from gridreg.spatial import Shape, warp
from study.benchmark.memory import MB, growth

PARTS = ["encoder_s", "decoder_s", "upsampling_s", "warp_s"]
REPEAT_SECONDS, REPEATS = 1.0, (3, 20)  # repeats fill the seconds, within these bounds
MEMORY_REPEATS = 5  # calls whose memory is measured; blocks, and with them the peak, differ between calls

# PyTorch counts the operations of attention on GPUs, but not those on CPUs.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass
class Cost:
    """Median and smallest time of a call, extra MB at its peak and, on a GPU, all MB at its peak (else NaN)."""

    seconds: float
    seconds_min: float
    repeats: int
    memory_mb: float
    peak_mb: float


def synchronise(where: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def timed(call: Callable[[], None], where: torch.device) -> float:
    """Seconds of one call."""
    synchronise(where)
    began = time.perf_counter()
    call()
    synchronise(where)
    return time.perf_counter() - began


def with_memory(call: Callable[[], None], where: torch.device) -> tuple[float, float, float]:
    """Seconds, extra MB and, on a GPU, all MB in use at the peak of one call."""
    if where.type != "cuda":
        with growth() as grown:
            seconds = timed(call, where)
        return seconds, grown.mb, math.nan
    torch.cuda.reset_peak_memory_stats(where)
    before = torch.cuda.memory_allocated(where)
    seconds = timed(call, where)
    peak = torch.cuda.max_memory_allocated(where)
    return seconds, (peak - before) / MB, peak / MB


def count(call: Callable[[], None]) -> int:
    """Multiply-adds of one call. Convolutions, matrix products and attention are counted, other operations are not."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        call()
    return counter.get_total_flops() // 2


def cost(call: Callable[[], None], where: torch.device, slow: float = math.inf) -> tuple[Cost, int]:
    """Cost and multiply-adds. The first call counts operations and warms up. A ``slow`` call (s) is measured only once.

    Memory is the median of several calls.
    """
    counted: list[int] = []
    first = timed(lambda: counted.append(count(call)), where)
    seconds, *memory = with_memory(call, where)
    if max(first, seconds) >= slow:
        return Cost(seconds, seconds, 1, *memory), counted[0]
    repeats = min(max(round(REPEAT_SECONDS / seconds), REPEATS[0]), REPEATS[1])
    times = [timed(call, where) for _ in range(repeats)]
    memory = np.median(
        [memory, *(with_memory(call, where)[1:] for _ in range(min(repeats, MEMORY_REPEATS) - 1))], axis=0
    ).tolist()
    return Cost(float(np.median(times)), min(times), repeats, *memory), counted[0]


@torch.inference_mode()
def parts(
    network: GridReg, images: Sequence[Tensor], grid: Shape, where: torch.device, repeats: int
) -> dict[str, float]:
    """Median seconds of the four parts (``PARTS``) of a registration by GridReg; images: fixed, moving (1, 1, W, H, D)."""
    moments: list[float] = []

    def mark(*_: Any) -> None:
        synchronise(where)
        moments.append(time.perf_counter())

    # after the head for the mean, only a scaling precedes the upsampling
    hooks = [module.register_forward_hook(mark) for module in (network.encoder[-1], network.mean)]
    rows = []
    for _ in range(repeats):
        moments.clear()
        mark()
        registered = network(*images, grid)
        mark()
        warp(images[1], registered.displacement)
        mark()
        rows.append(np.diff(moments))
        del registered  # else the next call would need new memory
    for hook in hooks:
        hook.remove()
    return dict(zip(PARTS, np.median(rows, axis=0).tolist()))


def state_mb(optimiser: torch.optim.Optimizer) -> float:
    """MB of the gradients and of the optimiser's state, which a training always holds."""
    kept = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    kept += [t for state in optimiser.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(tensor.nbytes for tensor in kept) / MB


def bandwidth(where: torch.device) -> float:
    """Bytes per second that are read or written by a copy too large for any cache; the best of five."""
    source = torch.ones(2**26, device=where)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), where) for _ in range(5))
