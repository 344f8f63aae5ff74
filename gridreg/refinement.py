"""Instance refinement: a few dozen optimisation steps for the predicted control points c of one pair:

    min over c of  L_sim(fixed, moving(x + c↑(x))) + λ L_bend(c)

Refinement is optional after any network with control points. It needs no labels: its losses are the unsupervised losses
of training (paper, section 3.3). It does not use the network or change its weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gridreg import gauss_newton, losses
from gridreg.network import Registration
from gridreg.spatial import Shape, check_volume, warp
from gridreg.upsampling import displacement_bound, upsample

LEARNING_RATE = 0.005  # in image widths per step: 0.16 voxels of 32, 0.64 voxels of 128
FIELD_TOLERANCE = 1e-3  # of the largest control point; a field that differs by more has another upsampling
BOUND_TOLERANCE = 1e-5  # relative to the bound of fold_free, which has a reserve of 1 %
SOLVERS = ("adam", "gauss-newton")


def default_bending_weight(shape: Shape) -> float:
    """The paper's best weight, 2·10⁵ for 128×128×102 voxels, scaled to ``shape``: divided by s⁴ for voxels s times as large."""
    return 2e5 * (math.prod(shape) / (128 * 128 * 102)) ** (4 / 3)


def unsupervised_loss(
    control_points: Tensor, fixed: Tensor, moving: Tensor, similarity: str, bending_weight: float, upsampling: str
) -> Tensor:
    """Similarity at image level and at the control points, and bending energy, as in training: a scalar."""
    shape, grid_size = tuple(fixed.shape[2:]), tuple(control_points.shape[2:])
    warped = warp(moving, upsample(control_points, shape, upsampling))
    bending = losses.grid_bending_energy(control_points, shape, upsampling)
    return losses.similarity_loss(similarity, fixed, warped, grid_size) + bending_weight * bending


def _refine_case(
    start: Tensor, fixed: Tensor, moving: Tensor, steps: int, learning_rate: float, bound: Tensor | None, **terms
) -> Tensor:
    """Control points (1, 3, gw, gh, gd) with the smallest loss of all steps, including the start."""
    size = torch.tensor(fixed.shape[2:], device=start.device, dtype=start.dtype).view(3, 1, 1, 1)
    moved = torch.zeros_like(start, requires_grad=True)  # in image widths: one learning rate for all image sizes
    optimiser = torch.optim.Adam([moved], lr=learning_rate)
    best, least = start, math.inf
    for step in range(steps + 1):
        control_points = start + moved * size
        loss = unsupervised_loss(control_points, fixed, moving, **terms)
        if loss.item() < least:  # false where the loss is NaN
            best, least = control_points.detach(), loss.item()
        if step < steps:
            optimiser.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if bound is not None:
                with torch.no_grad():
                    moved.clamp_((-bound - start) / size, (bound - start) / size)
    return best


def refine(
    registration: Registration,
    fixed: Tensor,
    moving: Tensor,
    *,
    steps: int = 30,
    learning_rate: float = LEARNING_RATE,
    similarity: str = "mse",
    bending_weight: float | None = None,
    upsampling: str = "trilinear",
    fold_free: bool = False,
    solver: str = "adam",
) -> Registration:
    """Optimise the control points of a registration for its pair. The loss never increases.

    fixed, moving   (B, 1, W, H, D) in [0, 1]; each case is refined separately
    steps           number of Adam steps, during which the learning rate falls linearly to zero; the control points with
                    the smallest loss are kept. For Gauss-Newton: largest number of steps on each level
    learning_rate   of Adam, in image widths per step
    similarity      one of ``losses.SIMILARITIES``, as in training
    bending_weight  None: the paper's, scaled to the image (``default_bending_weight``)
    upsampling      the network's
    fold_free       the network's; if True, control points stay within ``upsampling.displacement_bound``
    solver          "adam", or "gauss-newton" for the similarities of ``gauss_newton.SIMILARITIES``: faster, same loss

    It works inside ``torch.inference_mode`` and ``no_grad`` too. The arguments are not changed; the result has the same
    ``sigma``. ValueError if there are no control points, if the field was made by another upsampling, if control points
    lie outside the bound of ``fold_free``, on a negative number of steps, on shapes that do not fit, and on unknown names.
    """
    if registration.control_points is None:
        raise ValueError("the registration has no control points to refine; expected one of a method with a grid")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, found {steps}")
    if similarity not in losses.SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(losses.SIMILARITIES)}; found {similarity!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be {' or '.join(SOLVERS)}, found {solver!r}")
    if solver == "gauss-newton" and similarity not in gauss_newton.SIMILARITIES:
        raise ValueError(f"Gauss-Newton needs similarity mse or ncc, found {similarity!r}; Adam takes every one")
    if fold_free and upsampling != "bspline":
        raise ValueError(f"fold_free needs upsampling 'bspline', found {upsampling!r}")
    check_volume(fixed, 1, "fixed")
    check_volume(moving, 1, "moving")
    expected = (fixed.shape[0], 3, *fixed.shape[2:])
    if moving.shape != fixed.shape or tuple(registration.displacement.shape) != expected:
        found = f"moving {tuple(moving.shape)} and the displacement {tuple(registration.displacement.shape)}"
        raise ValueError(f"fixed is {tuple(fixed.shape)}, {found}; they must agree")
    shape, start = tuple(fixed.shape[2:]), registration.control_points
    tolerance = FIELD_TOLERANCE * float(start.detach().abs().max())
    if not torch.allclose(registration.displacement, upsample(start, shape, upsampling), rtol=0, atol=tolerance):
        raise ValueError(
            f"the displacement does not follow from the control points by upsampling {upsampling!r}; expected the network's"
        )
    bound = None
    if fold_free:
        bound = displacement_bound(tuple(start.shape[2:]), shape, start.device, start.dtype)
        if not (start.abs() <= bound * (1 + BOUND_TOLERANCE)).all():
            raise ValueError(
                "the control points lie outside the bound of fold_free; expected those of a fold-free network"
            )
    if steps == 0:
        return registration
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(fixed.device.type, enabled=False):
        # clones, as tensors of inference mode cannot take part in a gradient
        start, fixed, moving = (t.detach().clone() for t in (registration.control_points, fixed, moving))
        weight = default_bending_weight(shape) if bending_weight is None else bending_weight
        terms = {"similarity": similarity, "bending_weight": weight, "upsampling": upsampling}
        cases = zip(start.split(1), fixed.split(1), moving.split(1))
        if solver == "gauss-newton":
            best = torch.cat([gauss_newton.solve(*case, bound=bound, steps=steps, **terms) for case in cases])
        else:
            best = torch.cat([_refine_case(*case, steps, learning_rate, bound, **terms) for case in cases])
        return Registration(upsample(best, shape, upsampling), best, registration.sigma)
