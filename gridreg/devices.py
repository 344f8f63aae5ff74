"""The device that computes. It is chosen by environment variables, never by params.yaml.

GRIDREG_ACCELERATOR             cpu or cuda; by default a GPU if there is one
GRIDREG_DEVICES, GRIDREG_NODES  numbers of devices and nodes for a training
GRIDREG_PRECISION               precision of a training: 32-true, bf16-mixed, …
GRIDREG_WORKERS                 number of processes that preprocess scans
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from gridreg.errors import InputError


def device() -> torch.device:
    """The device named in GRIDREG_ACCELERATOR, else a GPU if there is one, else the CPU. InputError on another name."""
    name = os.environ.get("GRIDREG_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"GRIDREG_ACCELERATOR is {name!r}, expected cpu or cuda")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """ "cpu" or "cuda (NVIDIA …)"."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def to_tensor(arrays: list[np.ndarray], device: torch.device) -> Tensor:
    """Volumes (W, H, D) → (B, 1, W, H, D) float32."""
    return torch.from_numpy(np.stack(arrays)).float()[:, None].to(device)
