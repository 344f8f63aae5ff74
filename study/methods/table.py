"""All registration methods by name, with one interface: ``build(run)(fixed, moving, grid_size)``.

Methods without control points accept ``grid_size`` and ignore it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gridreg.checkpoint import build as build_gridreg
from gridreg.errors import InputError
from gridreg.network import Registration
from gridreg.spatial import Shape
from study.methods.voxelmorph import VoxelMorph


class Identity(nn.Module):
    """No registration: a displacement of zero, "original" in Table 1."""

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        return Registration(torch.zeros_like(fixed).repeat(1, 3, 1, 1, 1))


def _settings(run: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of the named settings that the run has."""
    return {name: run[name] for name in names if name in run}


def _syn(run: dict[str, Any]) -> nn.Module:
    from study.methods.pairwise import SyN

    return SyN(**_settings(run, "iterations", "metric", "gradient_step", "flow_sigma", "total_sigma", "affine_stage",
                        "mask_margin"))  # fmt: skip


def _transmorph(run: dict[str, Any]) -> nn.Module:
    from study.methods.transmorph import TransMorph

    return TransMorph(**_settings(run, "embed", "convolutions", "drop_path"))


def _keymorph(run: dict[str, Any]) -> nn.Module:
    from study.methods.keymorph import KeyMorph

    return KeyMorph(**_settings(run, "keypoints", "layers", "width", "poolings", "align", "tps_lambda"))


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "identity": lambda run: Identity(),
    "syn": _syn,
    "voxelmorph": lambda run: VoxelMorph(**_settings(run, "width", "levels", "integration_steps")),
    "transmorph": _transmorph,
    "keymorph": _keymorph,
    "gridreg": build_gridreg,
}


def build(run: dict[str, Any]) -> nn.Module:
    """The network of a run of ``params.yaml``. InputError on an unknown method."""
    if run["method"] not in BUILDERS:
        raise InputError(f"method is {run['method']!r}; expected one of {', '.join(BUILDERS)}")
    return BUILDERS[run["method"]](run)


def grid_sizes(run: dict[str, Any]) -> list[Shape | None]:
    """The grid sizes a run is trained for; [None] for a method without control points."""
    return [tuple(grid) for grid in run["grids"]] if "grids" in run else [None]


def grid_name(grid_size: Shape | None) -> str:
    """ "10x10x10", or "" without a grid."""
    return "" if grid_size is None else "x".join(map(str, grid_size))


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
