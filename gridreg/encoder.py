"""One layer of convolution, of which every encoder of GridReg is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EncoderLayer(nn.Module):
    """Conv3d 3×3×3 → InstanceNorm (as groups of one channel: that is faster) → bias, which it would cancel before → ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.group_norm(self.conv(x), len(self.bias), torch.ones_like(self.bias), self.bias), inplace=True)
