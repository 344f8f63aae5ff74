"""TransMorph, the dense baseline with a transformer (Chen et al., Medical Image Analysis 82, 2022).

There is no package of TransMorph. MONAI's Swin transformer in the published configuration encodes the image pair. The
convolutional decoder of that paper is written here; it turns four feature maps into a dense displacement field.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer
from torch import Tensor, nn

from gridreg.network import Registration
from gridreg.spatial import Shape, voxel_coordinates

DEPTHS, HEADS = (2, 2, 4, 2), (4, 4, 8, 8)  # of the four stages: transformer blocks, and heads in each block
PATCH = 4  # voxels along one edge of a token
WINDOW = (5, 6, 7)  # tokens along each axis of an attention window
HEAD_CHANNELS = 16  # at full resolution, before the displacement
MIN_VOXELS = 20  # per axis, by padding: at 16 the coarsest skip would be one voxel, over which no norm is defined


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
def relative_positions(window: Shape, device: torch.device) -> Tensor:
    """(n, n) rows of the position-bias table of ``WINDOW`` for the pairs of the n tokens in ``window``."""
    at = voxel_coordinates(window, dtype=torch.long).flatten(1)
    apart = at[:, :, None] - at[:, None, :]
    row = torch.zeros_like(apart[0])
    for axis, size in zip(apart, WINDOW):
        row = row * (2 * size - 1) + axis + size - 1
    return row.to(device)


class ConvBlock(nn.Sequential):
    """Conv3d 3×3×3 → InstanceNorm → LeakyReLU, ``number`` times; without bias, as the norm would cancel it."""

    def __init__(self, channels_in: int, channels_out: int, number: int = 1):
        layers: list[nn.Module] = []
        for _ in range(number):
            layers += [nn.Conv3d(channels_in, channels_out, 3, padding=1, bias=False)]
            layers += [nn.InstanceNorm3d(channels_out), nn.LeakyReLU()]
            channels_in = channels_out
        super().__init__(*layers)


class Up(nn.Module):
    """Upsample by 2, crop to the size of the skip connection, concatenate both and convolve."""

    def __init__(self, channels_in: int, skipped: int, channels_out: int, convolutions: int):
        super().__init__()
        self.block = ConvBlock(channels_in + skipped, channels_out, convolutions)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        w, h, d = skip.shape[2:]
        return self.block(torch.cat([x[:, :, :w, :h, :d], skip], dim=1))


class Encoder(nn.Module):
    """Four Swin stages: feature maps of embed·(1, 2, 4, 8) channels at 1/4, 1/8, 1/16 and 1/32 of the resolution.

    It differs from MONAI's ``forward`` in three points, where it follows the published TransMorph. A stage returns its
    features from before the merging of patches. The norm of these features is learned. Patches are merged between stages
    only.
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
            if hasattr(module, "relative_position_index"):  # set for every image size: no part of a checkpoint
                module.register_buffer("relative_position_index", module.relative_position_index, persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, features = self.swin.patch_embed(x), []
        stages = [self.swin.layers1, self.swin.layers2, self.swin.layers3, self.swin.layers4]
        for level, (stage,) in enumerate(stages):
            # MONAI shrinks windows to small images, and would then read wrong rows of the bias table
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
    convolutions  per decoder level: 2 as published (46 771 251 parameters), or 1, which gives the 41 476 659 parameters
                  of the GridReg paper (Table 1)
    drop_path     largest probability that training skips a transformer block (published: 0.3)

    Images are zero-padded to the next multiple of the patch size, and the field is cropped to the image. ValueError on
    another ``embed``.
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
        nn.init.normal_(self.head.weight, std=1e-5)  # start near the identity
        nn.init.zeros_(self.head.bias)

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        """fixed, moving (B, 1, W, H, D) in [0, 1]; ``grid_size`` is ignored."""
        shape = fixed.shape[2:]
        padding = [side for n in reversed(shape) for side in (0, max(n + -n % PATCH, MIN_VOXELS) - n)]
        x = F.pad(torch.cat([moving, fixed], dim=1), padding)
        *skips, y = self.encoder(x)
        skips = [*reversed(skips), self.half_skip(F.avg_pool3d(x, 2)), self.full_skip(x)]
        for up, skip in zip(self.decoder, skips):
            y = up(y, skip)
        with torch.autocast(y.device.type, enabled=False):  # a displacement needs full precision
            displacement = self.head(y.float())
        return Registration(displacement[:, :, : shape[0], : shape[1], : shape[2]].contiguous())
