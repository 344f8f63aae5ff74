"""What training minimises: similarity, Dice and bending losses of one batch (paper, section 3.3)."""

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

SHARE = (
    0.02  # on the pelvis, the Dice on validation is 0.79 without σ, 0.77 with this share, 0.74 with 0.1 and 0.72 with 1
)


def similarity_loss(
    network: nn.Module,
    registration: Registration,
    fixed: Tensor,
    moving: Tensor,
    similarity: str,
    samples: int,
) -> Tensor:
    """Similarity at image level, and at the control points where there are any (paper, section 3.3): a scalar.

    For a Bayesian registration the uncertainty-weighted loss (equation 2) is added. It draws ``samples`` displacements
    on the grid, T = μ + σ ε, and teaches σ alone: μ learns from the loss it would have without σ. Were it to learn
    from the samples, a σ beyond the size of the texture would hide the image from it, and then have every reason to
    grow. The loss has the weight of a small ``SHARE`` of one mean squared residual: to Adam the scale of what the head
    for σ alone learns from does not matter, but the features, which both heads share, are then shaped by μ.
    """
    warped = warp(moving, registration.displacement)
    mean, sigma = registration.control_points, registration.sigma
    grid, shape = None if mean is None else tuple(mean.shape[2:]), tuple(fixed.shape[2:])
    total = losses.similarity(similarity, fixed, warped, grid)
    if sigma is None:
        return total
    told, widest = losses.information(fixed), losses.WIDEST * torch.tensor(shape, device=mean.device).view(3, 1, 1, 1)
    dense_variance = upsample_sigma(sigma, shape, network.upsampling).square()
    weight = SHARE * losses.mse(fixed, warped).detach() / samples
    for _ in range(samples):
        noise = torch.randn(mean.shape).to(mean.device)  # drawn on the CPU: the same on every device
        sample = warp(moving, upsample(mean.detach() + sigma * noise, shape, network.upsampling))
        at_grid = [losses.at_control_points(volume, grid) for volume in (fixed, sample, told)]
        total = total + weight * losses.uncertainty(fixed, sample, told, dense_variance, widest)
        total = total + weight * losses.uncertainty(*at_grid, sigma.square(), widest)
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
    """Similarity, Dice and bending losses of one batch (paper, section 3.3), each a scalar."""
    fixed, moving = (to_tensor([data.image(pair[side]) for pair in pairs], device) for side in (0, 1))
    registration: Registration = network(fixed, moving, grid)
    terms = {"similarity": similarity_loss(network, registration, fixed, moving, similarity, samples)}
    if grid is None:
        terms["bending"] = losses.bending_energy(registration.displacement)
    else:
        terms["bending"] = losses.grid_bending_energy(registration.control_points, data.shape, network.upsampling)
    if dice:
        maps = [
            torch.from_numpy(np.stack([data.labels(p[side]) for p in pairs]))[:, None].to(device) for side in (0, 1)
        ]
        values = sorted(int(value) for value in data.index["labels"])
        terms["dice_loss"] = losses.label_dice(*maps, registration.displacement, values)
    return terms
