"""Where the work is done: devices, precision and memory, all from the environment, never from params.yaml.

GRIDREG_ACCELERATOR (cpu, cuda), GRIDREG_DEVICES and GRIDREG_NODES (numbers), GRIDREG_PRECISION (32-true, bf16-mixed, …);
GRIDREG_WORKERS, processes that preprocess.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

import numpy as np
import torch
from torch import Tensor

from gridreg.errors import InputError


def device() -> torch.device:
    """The device named in GRIDREG_ACCELERATOR, else a GPU where there is one. InputError on another name."""
    name = os.environ.get("GRIDREG_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"GRIDREG_ACCELERATOR is {name!r}, expected cpu or cuda")
    return torch.device(name)


def number_of(variable: str) -> int:
    """The number in an environment variable, 1 where it is not set. InputError on anything else."""
    value = os.environ.get(variable, "1")
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{variable} is {value!r}, expected a whole number of at least 1")
    return int(value)


def describe_device(device: torch.device) -> str:
    """"cpu" or "cuda (NVIDIA …)"."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def keep_memory() -> None:
    """Tell glibc to keep the memory that a step frees: the next step wants the same again, a quarter faster."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def launch():
    """A ``lightning_fabric.Fabric`` set up from the environment: accelerator, devices, nodes, precision.

    InputError in a notebook that is to use several devices: it has no processes for them.
    """
    from lightning_fabric import Fabric  # here, not above: it takes as long to import as PyTorch itself

    several = number_of("GRIDREG_DEVICES")
    if several > 1 and hasattr(sys, "ps1"):
        raise InputError(f"GRIDREG_DEVICES is {several} in a notebook, expected 1 there; train with torchrun --nproc-per-node "
                         f"{several} -m gridreg.train …, and `make repro` takes the result over")
    fabric = Fabric(
        accelerator=device().type,
        devices=several,
        num_nodes=number_of("GRIDREG_NODES"),
        precision=os.environ.get("GRIDREG_PRECISION", "32-true"),
    )
    fabric.launch()
    return fabric


def to_tensor(arrays: list[np.ndarray], device: torch.device) -> Tensor:
    """Volumes (W, H, D) → (B, 1, W, H, D) float32."""
    return torch.from_numpy(np.stack(arrays)).float()[:, None].to(device)
