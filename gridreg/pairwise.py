"""Registration without training, called as every network is: each pair is handed to a process of its own (ANTs SyN)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from gridreg.grid import Shape
from gridreg.network import Registration
from gridreg.preprocess import fresh_processes
from gridreg.syn import syn


class SyN(nn.Module):
    """ANTs SyN; settings: the named arguments of ``syn``, without the masks.

    The process starts with the first pair, which takes seconds, and is kept for the others.
    """

    def __init__(self, **settings):
        super().__init__()
        self.settings, self.process = settings, None

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        """fixed, moving: (B, 1, W, H, D) in [0, 1], isotropic voxels. There is no grid: ``grid_size`` is not used."""
        if self.process is None:
            self.process = fresh_processes(1)
        pairs = [[side[0].cpu().numpy() for side in pair] for pair in zip(fixed, moving)]
        jobs = [self.process.submit(syn, *pair, **self.settings) for pair in pairs]
        displacement = torch.from_numpy(np.stack([job.result() for job in jobs]))
        return Registration(displacement.to(fixed.device))
