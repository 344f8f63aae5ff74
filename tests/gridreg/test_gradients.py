"""Gradients of the whole: the training loss of every variant of the network against finite differences, in double."""

from __future__ import annotations

import pytest
import torch

from gridreg import losses
from gridreg.network import GridReg
from gridreg.refinement import unsupervised_loss
from study.training.objective import similarity_loss

SHAPE, GRID = (18, 17, 20), (4, 3, 5)
VARIANTS = [
    {},
    {"upsampling": "bspline"},
    {"upsampling": "deconv"},
    {"upsampling": "bspline", "fold_free": True},
    {"bayesian": True},
    {"projector": False},
    {"base_channels": 8, "num_layers": 4},
    {"base_channels": 32},
    {"num_layers": 9},
    {"encoder": "match"},
    {"encoder": "match", "passes": 2, "bayesian": True},
]


def smooth_pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 1, 1, 6, 6, 6, dtype=torch.float64, generator=generator)
    return tuple(torch.nn.functional.interpolate(c, SHAPE, mode="trilinear", align_corners=True) for c in coarse)


def check(loss, parameters, step: float = 1e-8, rtol: float = 1e-4) -> None:
    """The gradient along random directions is the central difference of the loss."""
    gradients = torch.autograd.grad(loss(), parameters)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # forth, back beyond the start, and to the start again
                for p, d in zip(parameters, directions):
                    p += sign * step * d
                values.append(float(loss()))
        found = (values[0] - values[1]) / (2 * step)
        expected = float(sum((g * d).sum() for g, d in zip(gradients, directions)))
        assert found == pytest.approx(expected, rel=rtol, abs=1e-8)
        assert abs(expected) > 1e-6


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_of_every_variant(variant):
    torch.manual_seed(0)
    network, (fixed, moving) = GridReg(**variant).double(), smooth_pair()
    torch.nn.init.normal_(network.mean.weight, std=0.05)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)  # the same Monte-Carlo samples
        registration = network(fixed, moving, GRID)
        bending = losses.grid_bending_energy(registration.control_points, SHAPE, network.upsampling)
        similarity = similarity_loss(network, registration, fixed, moving, "mse", samples=2)
        return similarity + 100 * bending

    # With a Bayesian head the mean is held fixed inside equation (2), so its own weights alone are compared.
    bayesian = variant.get("bayesian")
    check(loss, list(network.log_variance.parameters() if bayesian else network.parameters()))


@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
@pytest.mark.parametrize("upsampling", ["trilinear", "bspline", "deconv"])
def test_the_loss_of_the_control_points(similarity, upsampling):
    fixed, moving = smooth_pair()
    generator = torch.Generator().manual_seed(2)
    control_points = torch.randn((1, 3, *GRID), dtype=torch.float64, generator=generator).requires_grad_()

    def loss() -> torch.Tensor:
        return unsupervised_loss(control_points, fixed, moving, similarity, 10.0, upsampling)

    check(loss, [control_points], step=1e-7)
