"""The similarity of training: equation (2) by hand, what learns from it, and that refinement has the same."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from gridreg import losses
from gridreg.network import Registration
from gridreg.refinement import unsupervised_loss
from gridreg.upsampling import upsample
from study.training.objective import UNCERTAINTY_WEIGHT, similarity_loss

SHAPE, GRID, SAMPLES = (6, 7, 8), (2, 3, 2), 2
NETWORK = SimpleNamespace(upsampling="trilinear")


@pytest.fixture
def example() -> tuple[torch.Tensor, ...]:
    """fixed, moving (1, 1, W, H, D), mean and sigma (1, 3, gw, gh, gd) in voxels; double precision."""
    generator = torch.Generator().manual_seed(0)
    fixed, moving = torch.rand(2, 1, 1, *SHAPE, dtype=torch.float64, generator=generator)
    mean, sigma = torch.rand(2, 1, 3, *GRID, dtype=torch.float64, generator=generator)
    return fixed, moving, mean.requires_grad_(), (0.3 + sigma).requires_grad_()


def loss_of(fixed, moving, mean, sigma, similarity="mse") -> torch.Tensor:
    torch.manual_seed(1)  # the same samples
    registration = Registration(upsample(mean, SHAPE), mean, sigma)
    return similarity_loss(NETWORK, registration, fixed, moving, similarity, SAMPLES)


def weights() -> np.ndarray:
    """(W, H, D, gw, gh, gd) of trilinear interpolation, from its definition."""
    axes = [np.maximum(0, 1 - np.abs(np.linspace(0, g - 1, n)[:, None] - np.arange(g))) for n, g in zip(SHAPE, GRID)]
    return np.einsum("xi,yj,zk->xyzijk", *axes)


def warped(moving: np.ndarray, control: np.ndarray) -> np.ndarray:
    field = np.einsum("xyzijk,aijk->axyz", weights(), control)
    return ndimage.map_coordinates(moving, np.indices(SHAPE) + field, order=1, mode="nearest")


def test_equation_2_by_hand(example):
    fixed, moving, mean, sigma = (tensor.detach().numpy()[0].squeeze() for tensor in example)
    lattice = np.meshgrid(*(np.linspace(0, n - 1, g) for n, g in zip(SHAPE, GRID)), indexing="ij")
    widest = (losses.LARGEST_SIGMA * np.array(SHAPE)).reshape(3, 1, 1, 1)
    slope = sum(g**2 for g in np.gradient(fixed))
    energy = ndimage.uniform_filter(slope, 5, mode="constant") / ndimage.uniform_filter(
        np.ones(SHAPE), 5, mode="constant"
    )
    dense_variance = np.einsum("xyzijk,aijk->axyz", weights() ** 2, sigma**2)

    def at_grid(volume):
        return ndimage.map_coordinates(volume, lattice, order=1)

    def equation(fixed, sample, energy, variance):
        squared = ((fixed - sample) ** 2 + losses.RESIDUAL_NOISE**2) / (energy + losses.RESIDUAL_NOISE**2 / widest**2)
        return (squared / variance + losses.LAMBDA_0 * np.log(variance)).mean()

    of_mean = warped(moving, mean)
    plain = ((fixed - of_mean) ** 2).mean() + ((at_grid(fixed) - at_grid(of_mean)) ** 2).mean()
    torch.manual_seed(1)
    of_samples = []
    for _ in range(SAMPLES):
        sample = warped(moving, mean + sigma * torch.randn(1, 3, *GRID)[0].double().numpy())
        of_samples.append(equation(fixed, sample, energy, dense_variance))
        of_samples[-1] += equation(*map(at_grid, (fixed, sample, energy)), sigma**2)
    expected = plain + UNCERTAINTY_WEIGHT * ((fixed - of_mean) ** 2).mean() * np.mean(of_samples)
    assert abs(np.mean(of_samples)) > 0.1
    assert loss_of(*example).item() == pytest.approx(expected, rel=1e-6)


def test_samples_teach_sigma_and_leave_the_mean_alone(example):
    fixed, moving, mean, sigma = example
    (alone,) = torch.autograd.grad(loss_of(fixed, moving, mean, None), mean)
    beside, of_sigma = torch.autograd.grad(loss_of(*example), (mean, sigma))
    torch.testing.assert_close(beside, alone)
    assert (of_sigma != 0).any() and (alone != 0).any()


@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
def test_refinement_has_the_similarity_of_training(example, similarity):
    fixed, moving, mean, _ = example
    trained = loss_of(fixed, moving, mean, None, similarity)
    torch.testing.assert_close(unsupervised_loss(mean, fixed, moving, similarity, 0.0, "trilinear"), trained)
    dense = similarity_loss(NETWORK, Registration(upsample(mean, SHAPE)), fixed, moving, similarity, SAMPLES)
    assert dense.item() != pytest.approx(trained.item())  # a method without control points has the image level alone
