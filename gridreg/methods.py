"""Every registration method under one name and one call: ``build(run)(fixed, moving, grid_size)``.

Methods that have no control points accept ``grid_size`` and do not use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridreg.errors import InputError
from gridreg.grid import Shape
from gridreg.network import GridReg, Registration


class Identity(nn.Module):
    """No registration: the state before it, "original" in Table 1."""

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        return Registration(torch.zeros_like(fixed).repeat(1, 3, 1, 1, 1))


class InFull(nn.Module):
    """A layer in single precision, whatever autocast says: a displacement needs all its digits."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


class VoxelMorph(nn.Module):
    """The official VoxelMorph network (package ``voxelmorph``), predicting a dense displacement field.

    width, levels      features at each level, and levels
    integration_steps  squarings of the velocity that it predicts; 0: it predicts the displacement itself, as in the paper,
                       which reports folds of it

    The defaults are the package's own. Images are zero-padded to the multiple of 2^levels that it needs, and the field
    is cropped back.
    """

    def __init__(self, width: int = 16, levels: int = 5, integration_steps: int = 5):
        super().__init__()
        from voxelmorph.nn.models import VxmPairwise  # here, not above: importing it takes seconds

        self.multiple = 2**levels
        self.network = VxmPairwise(
            ndim=3, source_channels=1, target_channels=1, nb_features=[width] * levels, integration_steps=integration_steps
        )
        self.network.flow_layer = InFull(self.network.flow_layer)

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        shape = fixed.shape[2:]
        padding = [side for n in reversed(shape) for side in (0, -n % self.multiple)]
        flow = self.network(F.pad(moving, padding), F.pad(fixed, padding))
        return Registration(flow[:, :, : shape[0], : shape[1], : shape[2]].contiguous())


def _given(run: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: run[name] for name in names if name in run}


def _syn(run: dict[str, Any]) -> nn.Module:
    from gridreg.pairwise import SyN  # the peers when they are used, not above: their packages take seconds to import

    return SyN(**_given(run, "iterations", "metric", "gradient_step", "flow_sigma", "total_sigma", "affine_stage",
                        "mask_margin"))  # fmt: skip


def _transmorph(run: dict[str, Any]) -> nn.Module:
    from gridreg.transmorph import TransMorph

    return TransMorph(**_given(run, "embed", "convolutions", "drop_path"))


def _keymorph(run: dict[str, Any]) -> nn.Module:
    from gridreg.keymorph import KeyMorph

    return KeyMorph(**_given(run, "keypoints", "layers", "width", "poolings", "align", "tps_lambda"))


def _gridreg(run: dict[str, Any]) -> nn.Module:
    names = ("base_channels", "num_layers", "bayesian", "upsampling", "projector", "fold_free")
    return GridReg(**_given(run, *names))


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "identity": lambda run: Identity(),
    "syn": _syn,
    "voxelmorph": lambda run: VoxelMorph(**_given(run, "width", "levels", "integration_steps")),
    "transmorph": _transmorph,
    "keymorph": _keymorph,
    "gridreg": _gridreg,
}


def build(run: dict[str, Any]) -> nn.Module:
    """The network of one run of ``params.yaml``. InputError on an unknown method."""
    if run["method"] not in BUILDERS:
        raise InputError(f"method is {run['method']!r}; expected one of {', '.join(BUILDERS)}")
    return BUILDERS[run["method"]](run)


def grid_sizes(run: dict[str, Any]) -> list[Shape | None]:
    """The grid sizes a run is trained for; [None] for a method without control points."""
    return [tuple(grid) for grid in run["grids"]] if "grids" in run else [None]


def grid_name(grid_size: Shape | None) -> str:
    """"10x10x10", or "" without a grid."""
    return "" if grid_size is None else "x".join(map(str, grid_size))


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
