"""TransMorph, the transformer among the dense baselines (Chen et al., Medical Image Analysis 82, 2022).

There is no package of it: MONAI's Swin transformer in the published configuration encodes the image pair, and the
convolutional decoder of that paper, written here, turns its four feature maps into a dense displacement field.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer
from torch import Tensor, nn

from gridreg.network import Registration
from gridreg.spatial import Shape, voxel_coordinates

DEPTHS, HEADS = (2, 2, 4, 2), (4, 4, 8, 8)  # transformer blocks, and heads in each, of the four stages
PATCH = 4  # voxels along one edge of a token
WINDOW = (5, 6, 7)  # tokens attended to together
HEAD_CHANNELS = 16  # at full resolution, before the displacement
SMALLEST = 20  # voxels per axis: at 16 the coarsest skip would be a single voxel, and no norm can be taken over one


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve a training too
def relative_positions(window: Shape, device: torch.device) -> Tensor:
    """(n, n) rows of the position-bias table between the n tokens of ``window``; the table is that of ``WINDOW``."""
    at = voxel_coordinates(window, dtype=torch.long).flatten(1)
    apart = at[:, :, None] - at[:, None, :]
    row = torch.zeros_like(apart[0])
    for axis, size in zip(apart, WINDOW):
        row = row * (2 * size - 1) + axis + size - 1
    return row.to(device)


class ConvBlock(nn.Sequential):
    """Conv3d 3×3×3 → InstanceNorm → LeakyReLU, ``number`` times. No bias: the norm would cancel it."""

    def __init__(self, channels_in: int, channels_out: int, number: int = 1):
        layers: list[nn.Module] = []
        for _ in range(number):
            layers += [nn.Conv3d(channels_in, channels_out, 3, padding=1, bias=False)]
            layers += [nn.InstanceNorm3d(channels_out), nn.LeakyReLU()]
            channels_in = channels_out
        super().__init__(*layers)


class Up(nn.Module):
    """Twice the resolution, cropped to that of the skip connection, joined with it and convolved."""

    def __init__(self, channels_in: int, skipped: int, channels_out: int, convolutions: int):
        super().__init__()
        self.block = ConvBlock(channels_in + skipped, channels_out, convolutions)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        w, h, d = skip.shape[2:]
        return self.block(torch.cat([x[:, :, :w, :h, :d], skip], dim=1))


class Encoder(nn.Module):
    """Four Swin stages: feature maps of embed·(1, 2, 4, 8) channels at 1/4, 1/8, 1/16 and 1/32 of the resolution.

    Three things are not as MONAI's own ``forward`` has them, but as TransMorph was published: a stage hands out what
    it computed before merging patches, the norm of that is learned, and patches are merged between stages only.
    """

    def __init__(self, embed: int, drop_path: float):
        super().__init__()
        self.swin = SwinTransformer(
            in_chans=2, embed_dim=embed, window_size=WINDOW, patch_size=(PATCH,) * 3, depths=DEPTHS, num_heads=HEADS,
            qkv_bias=False, patch_norm=True, drop_path_rate=drop_path, downsample=None,
        )  # fmt: skip
        self.channels = [embed * 2**stage for stage in range(4)]
        self.merge = nn.ModuleList(PatchMergingV2(channels) for channels in self.channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
        for module in self.swin.modules():
            if hasattr(module, "relative_position_index"):  # set anew at every size, so no part of a checkpoint
                module.register_buffer("relative_position_index", module.relative_position_index, persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, features = self.swin.patch_embed(x), []
        stages = [self.swin.layers1, self.swin.layers2, self.swin.layers3, self.swin.layers4]
        for level, (stage,) in enumerate(stages):
            # MONAI shrinks windows to images smaller than they are, and would then read wrong rows of the bias table
            window = tuple(min(n, size) for n, size in zip(x.shape[2:], WINDOW))
            for block in stage.blocks:
                block.attn.relative_position_index = relative_positions(window, x.device)
            tokens = stage(x.contiguous()).movedim(1, -1)
            features.append(self.norms[level](tokens).movedim(-1, 1))
            if level < len(self.merge):
                x = self.merge[level](tokens).movedim(-1, 1)
        return features


class TransMorph(nn.Module):
    """A dense displacement field, in voxels, from a transformer encoder and a convolutional decoder.

    embed         channels of the first stage; a multiple of 4 (published: 96)
    convolutions  in each decoder level: 2 as published, 46 771 251 parameters; 1 gives the 41 476 659 that the
                  GridReg paper compares with (Table 1)
    drop_path     largest chance that a transformer block is skipped in training (published: 0.3)

    Images are zero-padded to the next multiple of the patch size, and the field is cropped back.
    """

    def __init__(self, embed: int = 96, convolutions: int = 1, drop_path: float = 0.3):
        super().__init__()
        if embed % HEADS[0]:
            raise ValueError(f"embed must be a multiple of {HEADS[0]}, found {embed}")
        self.encoder = Encoder(embed, drop_path)
        self.half_skip, self.full_skip = ConvBlock(2, embed // 2), ConvBlock(2, HEAD_CHANNELS)
        skipped = [*self.encoder.channels[2::-1], embed // 2, HEAD_CHANNELS]  # from 1/16 to full resolution
        widths = [self.encoder.channels[-1], *skipped]
        self.decoder = nn.ModuleList(Up(below, skip, skip, convolutions) for below, skip in zip(widths, skipped))
        self.head = nn.Conv3d(HEAD_CHANNELS, 3, 3, padding=1)
        nn.init.normal_(self.head.weight, std=1e-5)  # starts near the identity
        nn.init.zeros_(self.head.bias)

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        """fixed, moving: (B, 1, W, H, D) in [0, 1]. There are no control points: ``grid_size`` is not used."""
        shape = fixed.shape[2:]
        padding = [side for n in reversed(shape) for side in (0, max(n + -n % PATCH, SMALLEST) - n)]
        x = F.pad(torch.cat([moving, fixed], dim=1), padding)
        *skips, y = self.encoder(x)
        skips = [*reversed(skips), self.half_skip(F.avg_pool3d(x, 2)), self.full_skip(x)]
        for up, skip in zip(self.decoder, skips):
            y = up(y, skip)
        with torch.autocast(y.device.type, enabled=False):  # a displacement needs all its digits
            displacement = self.head(y.float())
        return Registration(displacement[:, :, : shape[0], : shape[1], : shape[2]].contiguous())
