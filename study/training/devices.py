"""Devices, nodes and precision of a training, from environment variables."""

from __future__ import annotations

import os
import sys

from gridreg.devices import device
from gridreg.errors import InputError


def number_of(variable: str) -> int:
    """The number in an environment variable; 1 if it is not set. InputError unless it is a whole number of at least 1."""
    value = os.environ.get(variable, "1")
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{variable} is {value!r}, expected a whole number of at least 1")
    return int(value)


def launch():
    """A ``lightning_fabric.Fabric`` with accelerator, devices, nodes and precision from the environment.

    InputError if a notebook is to use several devices, because it cannot start processes for them.
    """
    from lightning_fabric import Fabric  # imported here because the import takes as long as that of PyTorch

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
