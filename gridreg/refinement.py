"""Instance refinement: a few dozen steps of optimisation of one pair's predicted control points c:

    min over c of  L_sim(fixed, moving(x + c↑(x))) + λ L_bend(c)

An option after any network that has control points, without labels: the losses are the unsupervised ones of training
(paper, section 3.3). The network is not needed, and its weights are not touched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gridreg import gauss_newton, losses
from gridreg.network import Registration
from gridreg.spatial import Shape, check_volume, warp
from gridreg.upsampling import displacement_bound, upsample

LEARNING_RATE = 0.005  # in image widths: 0.16 of 32 voxels, 0.64 of 128
FIELD_TOLERANCE = 1e-3  # of the largest control point; a field that differs by more has another upsampling
BOUND_TOLERANCE = 1e-5  # of the bound of fold_free, which keeps a hundredth in reserve
SOLVERS = ("adam", "gauss-newton")


def default_bending_weight(shape: Shape) -> float:
    """The paper's best, 2·10⁵, is for 128×128×102 voxels; on voxels s times as large it is divided by s⁴."""
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
    """Control points (1, 3, gw, gh, gd) of the least loss seen on the way, the start included."""
    size = torch.tensor(fixed.shape[2:], device=start.device, dtype=start.dtype).view(3, 1, 1, 1)
    moved = torch.zeros_like(start, requires_grad=True)  # in image widths: one learning rate for images of any size
    optimiser = torch.optim.Adam([moved], lr=learning_rate)
    best, least = start, math.inf
    for step in range(steps + 1):
        control_points = start + moved * size
        loss = unsupervised_loss(control_points, fixed, moving, **terms)
        if loss.item() < least:  # a loss that is no number is never less
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
    """The registration with its control points optimised for this pair; its loss is never above what it was.

    fixed, moving   (B, 1, W, H, D) in [0, 1]; each case is refined on its own
    steps           of Adam, the learning rate falling linearly to zero; the best control points seen are kept. Of
                    Gauss-Newton the most on each of its levels
    learning_rate   of Adam, in image widths a step
    similarity      one of ``losses.SIMILARITIES``, as in training
    bending_weight  None: the paper's, scaled to the image (``default_bending_weight``)
    upsampling      the network's
    fold_free       the network's; control points are kept within ``upsampling.displacement_bound``
    solver          "adam", or "gauss-newton" for the similarities of ``gauss_newton.SIMILARITIES``: less time, same loss

    Works inside ``torch.inference_mode`` and ``no_grad`` too. What is given stays as it is; ``sigma`` is passed on.
    ValueError without control points, or those of another upsampling or outside the bound of ``fold_free``; on a
    negative number of steps, shapes that do not fit, or unknown names.
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
            f"the displacement is not the control points' by upsampling {upsampling!r}; expected the network's"
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
        # clones: what was made in inference mode cannot take part in a gradient
        start, fixed, moving = (t.detach().clone() for t in (registration.control_points, fixed, moving))
        weight = default_bending_weight(shape) if bending_weight is None else bending_weight
        terms = {"similarity": similarity, "bending_weight": weight, "upsampling": upsampling}
        cases = zip(start.split(1), fixed.split(1), moving.split(1))
        if solver == "gauss-newton":
            best = torch.cat([gauss_newton.solve(*case, bound=bound, steps=steps, **terms) for case in cases])
        else:
            best = torch.cat([_refine_case(*case, steps, learning_rate, bound, **terms) for case in cases])
        return Registration(upsample(best, shape, upsampling), best, registration.sigma)
