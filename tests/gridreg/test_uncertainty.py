"""The Bayesian head: its spread answers to the image, and what it costs the mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gridreg.network import GridReg
from gridreg.spatial import warp
from gridreg.upsampling import upsample, upsample_sigma
from study.training.objective import similarity_loss

SHAPE = (24, 24, 20)


def smooth(generator: torch.Generator, batch: int, channels: int, nodes: int) -> torch.Tensor:
    coarse = torch.rand(batch, channels, nodes, nodes, nodes, generator=generator)
    return F.interpolate(coarse, SHAPE, mode="trilinear", align_corners=True)


def half_textured(generator: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that differ by a smooth deformation: texture at low x, one grey value at high x, noise everywhere."""
    edge = torch.sigmoid(torch.linspace(8, -8, SHAPE[0])).view(1, 1, -1, 1, 1)
    moving = 0.5 + 1.5 * (smooth(generator, batch, 1, 7) - 0.5) * edge
    fixed = warp(moving, 3 * (smooth(generator, batch, 3, 3) - 0.5))
    noise = 0.01 * torch.randn(2, batch, 1, *SHAPE, generator=generator)
    return fixed + noise[0], moving + noise[1]


@pytest.fixture(scope="module")
def trained() -> GridReg:
    torch.manual_seed(0)
    network, generator = GridReg(base_channels=8, num_layers=4, bayesian=True), torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(80):
        fixed, moving = half_textured(generator, 2)
        loss = similarity_loss(network, network(fixed, moving, 6), fixed, moving, "mse", 1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


@torch.no_grad()
def test_sigma_is_larger_where_there_is_no_texture(trained):
    generator = torch.Generator().manual_seed(2)
    fixed, moving = half_textured(generator, 4)
    sigma = upsample_sigma(trained(fixed, moving, 6).sigma, SHAPE)
    textured, flat = sigma[:, :, :9].mean(), sigma[:, :, 15:].mean()
    assert flat > 1.7 * textured


@torch.no_grad()
def test_the_image_decides_not_the_place(trained):
    """The flat half is textured too: σ falls there."""
    generator = torch.Generator().manual_seed(3)
    fixed, moving = half_textured(generator, 4)
    flat = trained(fixed, moving, 6).sigma[:, :, 4:].mean()
    both = [image + image.flip(2) - 0.5 for image in (fixed, moving)]
    assert trained(*both, 6).sigma[:, :, 4:].mean() < 0.8 * flat


def test_the_warp_is_of_the_mean_alone(trained):
    fixed, moving = half_textured(torch.Generator().manual_seed(4), 1)
    first, second = trained(fixed, moving, 5), trained(fixed, moving, 5)
    torch.testing.assert_close(first.displacement, upsample(first.control_points, SHAPE))
    assert torch.equal(first.displacement, second.displacement)
    assert (first.sigma > 0).all() and torch.isfinite(first.sigma).all()
