"""ANTs SyN with the interface of a network. Each pair is registered in another process.

That process imports only ``syn``, a separate module without PyTorch, and so starts in half the time.
"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from gridreg.network import Registration
from gridreg.scans.prepare import fresh_processes
from gridreg.spatial import Shape
from study.methods.syn import syn


class SyN(nn.Module):
    """ANTs SyN. ``settings`` are the named arguments of ``syn`` except the masks.

    mask_margin  the metric of the deformable stage is evaluated on the labels of both images and up to this many voxels
                 around them; None: everywhere

    The process starts with the first pair, which takes seconds, and is kept for the others.
    """

    def __init__(self, mask_margin: int | None = None, **settings):
        super().__init__()
        self.mask_margin, self.settings, self.process = mask_margin, settings, None

    def forward(
        self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None, labels: list[np.ndarray] | None = None
    ) -> Registration:
        """fixed, moving (B, 1, W, H, D) in [0, 1] with isotropic voxels; ``grid_size`` is ignored.

        labels  label maps of the fixed and the moving image, (W, H, D) each, for ``mask_margin``; B must then be 1
        """
        if self.process is None:
            self.process = fresh_processes(1)
        pairs = [[side[0].cpu().numpy() for side in pair] for pair in zip(fixed, moving)]
        masks = {}
        if self.mask_margin is not None and labels is not None:
            near = [(distance_transform_edt(each == 0) <= self.mask_margin).astype(np.float32) for each in labels]
            masks = dict(zip(("fixed_mask", "moving_mask"), near))
        jobs = [self.process.submit(syn, *pair, **self.settings, **masks) for pair in pairs]
        try:
            displacement = torch.from_numpy(np.stack([job.result() for job in jobs]))
        except BrokenProcessPool:  # interrupted, or killed for lack of memory
            self.process = None  # the next pair starts another
            raise
        return Registration(displacement.to(fixed.device))
