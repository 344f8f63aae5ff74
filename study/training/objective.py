"""The training objective: similarity, Dice and bending losses of one batch (paper, section 3.3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from gridreg import losses
from gridreg.devices import to_tensor
from gridreg.network import Registration
from gridreg.spatial import Shape, warp
from gridreg.upsampling import upsample, upsample_sigma
from study.cohorts.dataset import Preprocessed

# Weight of the uncertainty loss, relative to the mean squared residual. Validation Dice on the pelvis: 0.79 without σ, 0.77
# with this weight, 0.74 with 0.1, 0.72 with 1.
UNCERTAINTY_WEIGHT = 0.02


def similarity_loss(
    network: nn.Module,
    registration: Registration,
    fixed: Tensor,
    moving: Tensor,
    similarity: str,
    samples: int,
) -> Tensor:
    """Similarity at image level, and at the control points where there are any (paper, section 3.3): a scalar.

    fixed, moving (B, 1, W, H, D) in [0, 1]; similarity one of ``losses.SIMILARITIES``.

    For a Bayesian registration the uncertainty-weighted loss (equation 2) is added, as the mean over ``samples``
    displacements T = μ + σ ε drawn on the grid. It trains σ alone, and the loss of μ is the same as without σ. If μ were
    trained on the samples, a σ larger than the texture would hide the image from μ, and σ would keep growing. The weight
    is ``UNCERTAINTY_WEIGHT`` times the mean squared residual. Adam makes the head for σ independent of this weight, but
    both heads share features, and a small weight lets μ determine these.
    """
    warped = warp(moving, registration.displacement)
    mean, sigma = registration.control_points, registration.sigma
    grid, shape = None if mean is None else tuple(mean.shape[2:]), tuple(fixed.shape[2:])
    total = losses.similarity_loss(similarity, fixed, warped, grid)
    if sigma is None:
        return total
    energy = losses.gradient_energy(fixed)
    largest_sigma = losses.LARGEST_SIGMA * torch.tensor(shape, device=mean.device).view(3, 1, 1, 1)
    dense_variance = upsample_sigma(sigma, shape, network.upsampling).square()
    weight = UNCERTAINTY_WEIGHT * losses.mse_loss(fixed, warped).detach() / samples
    for _ in range(samples):
        noise = torch.randn(mean.shape).to(mean.device)  # drawn on the CPU: the same on every device
        sample = warp(moving, upsample(mean.detach() + sigma * noise, shape, network.upsampling))
        at_grid = [losses.at_control_points(volume, grid) for volume in (fixed, sample, energy)]
        total = total + weight * losses.uncertainty_loss(fixed, sample, energy, dense_variance, largest_sigma)
        total = total + weight * losses.uncertainty_loss(*at_grid, sigma.square(), largest_sigma)
    return total


def loss_terms(
    network: nn.Module,
    data: Preprocessed,
    pairs: list,
    grid: Shape | None,
    device: torch.device,
    *,
    similarity: str,
    dice: bool,
    samples: int = 1,
) -> dict[str, Tensor]:
    """Similarity, bending and Dice losses of one batch (paper, section 3.3), each a scalar, by name.

    pairs    the batch: (fixed id, moving id) of each pair
    grid     control points along each axis; None for a method without control points
    dice     whether to compute the Dice loss
    samples  number of displacements that the uncertainty loss draws
    """
    fixed, moving = (to_tensor([data.image(pair[side]) for pair in pairs], device) for side in (0, 1))
    registration: Registration = network(fixed, moving, grid)
    terms = {"similarity": similarity_loss(network, registration, fixed, moving, similarity, samples)}
    if grid is None:
        terms["bending"] = losses.bending_energy(registration.displacement)
    else:
        terms["bending"] = losses.grid_bending_energy(registration.control_points, data.shape, network.upsampling)
    if dice:
        stacks = (np.stack([data.labels(pair[side]) for pair in pairs]) for side in (0, 1))
        maps = [torch.from_numpy(stack)[:, None].to(device) for stack in stacks]
        values = sorted(int(value) for value in data.index["labels"])
        terms["dice_loss"] = losses.label_dice_loss(*maps, registration.displacement, values)
    return terms
