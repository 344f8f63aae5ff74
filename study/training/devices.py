"""How a training uses the machine: devices, nodes and precision, from environment variables."""

from __future__ import annotations

import os
import sys

from gridreg.devices import device
from gridreg.errors import InputError


def number_of(variable: str) -> int:
    """The number in an environment variable, 1 where it is not set. InputError on anything else."""
    value = os.environ.get(variable, "1")
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{variable} is {value!r}, expected a whole number of at least 1")
    return int(value)


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
