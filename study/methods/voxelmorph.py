"""VoxelMorph, the dense baseline (Balakrishnan et al., IEEE TMI 38, 2019): the network of the official package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridreg.network import Registration
from gridreg.spatial import Shape


class FullPrecision(nn.Module):
    """A layer in single precision even under autocast, because a displacement needs full precision."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


class VoxelMorph(nn.Module):
    """The official VoxelMorph network (package ``voxelmorph``), which predicts a dense displacement field.

    width, levels      features at each level, and number of levels
    integration_steps  number of squarings that integrate a predicted velocity; 0: the network predicts the displacement
                       itself. The GridReg paper must use 0, since it reports folds of VoxelMorph

    The defaults are those of the package. Images are zero-padded to a multiple of 2^levels, and the field is cropped to
    the image.
    """

    def __init__(self, width: int = 16, levels: int = 5, integration_steps: int = 5):
        super().__init__()
        from voxelmorph.nn.models import VxmPairwise  # imported here because the import takes seconds

        self.multiple = 2**levels
        self.network = VxmPairwise(
            ndim=3,
            source_channels=1,
            target_channels=1,
            nb_features=[width] * levels,
            integration_steps=integration_steps,
        )
        self.network.flow_layer = FullPrecision(self.network.flow_layer)

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        """fixed, moving (B, 1, W, H, D) in [0, 1]; ``grid_size`` is ignored."""
        shape = fixed.shape[2:]
        padding = [side for n in reversed(shape) for side in (0, -n % self.multiple)]
        flow = self.network(F.pad(moving, padding), F.pad(fixed, padding))
        return Registration(flow[:, :, : shape[0], : shape[1], : shape[2]].contiguous())
