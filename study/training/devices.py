"""How a training uses the machine: devices, nodes and precision from environment variables, and the allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from gridreg.devices import device
from gridreg.errors import InputError


def number_of(variable: str) -> int:
    """The number in an environment variable, 1 where it is not set. InputError on anything else."""
    value = os.environ.get(variable, "1")
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{variable} is {value!r}, expected a whole number of at least 1")
    return int(value)


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
        raise InputError(
            f"GRIDREG_DEVICES is {several} in a notebook, expected 1 there; train with torchrun --nproc-per-node "
            f"{several} -m study.training.train …, and `make repro` takes the result over"
        )
    fabric = Fabric(
        accelerator=device().type,
        devices=several,
        num_nodes=number_of("GRIDREG_NODES"),
        precision=os.environ.get("GRIDREG_PRECISION", "32-true"),
    )
    fabric.launch()
    return fabric
