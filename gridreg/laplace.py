"""Uncertainty of a registered pair's displacement: the Laplace approximation at the optimum of its control points.

The loss E(c) of ``gauss_newton`` is taken as a negative log likelihood plus a prior: p(c) ∝ exp(-E(c) / τ). The part of E
at the control points is left out, because every voxel is one observation. Near the optimum this is a Gaussian,

    c ~ N(ĉ, τ H⁻¹),       H = Bᵀ q j jᵀ B + 2 λ K + ridge,       τ = T · 2 s² / N_eff,

with H the matrix of the Gauss-Newton step, s² the mean squared residual, and N_eff the effective number of independent
residuals. Neighbouring residuals are correlated: with correlation ρ_a between neighbours along axis a, N voxels count as
N / Π (1 + ρ_a) / (1 - ρ_a). The temperature T corrects for everything that this model leaves out. It is 1 by default, and
``fit_temperature`` fits it on validation pairs. The ridge is a prior: without image information σ is
``losses.LARGEST_SIGMA``.

A displacement is linear in c, so its covariance at any point and between any two points follows. An edge in the image
determines motion across the edge but not along it. The principal axes of the covariance differ in length there.

With at most ``EXACT_UNKNOWNS`` unknowns, H is formed and factored (Cholesky). With more, samples are drawn: if cov(b) = H,
then x = H⁻¹ b has the covariance H⁻¹ (Papandreou & Yuille, "Gaussian sampling by local perturbations", NeurIPS 2010).
Conjugate gradients solve for x. Moments are then those of the samples, with a relative error of about
1 / √(2 · samples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gridreg import calibration, losses
from gridreg.gauss_newton import NormalEquations, Objective, conjugate_gradients, local_lines
from gridreg.network import Registration
from gridreg.refinement import default_bending_weight
from gridreg.spatial import Shape, check_volume
from gridreg.upsampling import apply_along_axes, basis, upsample

EXACT_UNKNOWNS = 3000  # twice as many take eight times as long
SAMPLE_TOLERANCE = 1e-2  # relative residual of the equations behind a sample
SAMPLE_CG_STEPS = 200  # conjugate-gradient steps for a sample
VOXELS_AT_ONCE = 2**22  # of the samples that are drawn together


@dataclass(frozen=True)
class Posterior:
    """A Gaussian over the control points of one pair. Points are in voxels of the fixed grid, results in mm.

    mean        (3, gw, gh, gd) control points in voxels
    shape       (W, H, D) of the image
    spacing_mm  (3,) voxel size along each axis
    upsampling  "trilinear", "bspline" or "deconv"
    precision   (3G, 3G) float64 Cholesky factor of the precision matrix; None if the posterior was sampled
    draws       (S, 3, gw, gh, gd) deviations from the mean in voxels; None if the posterior is exact
    """

    mean: Tensor
    shape: Shape
    spacing_mm: Tensor
    upsampling: str
    precision: Tensor | None = field(default=None, repr=False)
    draws: Tensor | None = field(default=None, repr=False)

    def tempered(self, temperature: float) -> Posterior:
        """The same posterior with every variance multiplied by ``temperature``. ValueError unless it is above 0."""
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        root = math.sqrt(temperature)
        if self.draws is not None:
            return replace(self, draws=self.draws * root)
        return replace(self, precision=self.precision / root)

    def sample(self, number: int, seed: int = 0) -> Tensor:
        """(number, 3, gw, gh, gd) control points in voxels; ``upsample`` makes correlated displacement fields of them.

        ValueError if the posterior was sampled and holds fewer samples than ``number``.
        """
        if self.draws is not None:
            if number > len(self.draws):
                raise ValueError(f"the posterior holds {len(self.draws)} samples, found a request for {number}")
            order = torch.randperm(len(self.draws), generator=torch.Generator().manual_seed(seed))[:number]
            return self.mean + self.draws[order.to(self.draws.device)]
        noise = torch.randn(
            len(self.precision), number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        moved = torch.linalg.solve_triangular(self.precision.T, noise.to(self.precision.device), upper=True)
        return self.mean + moved.T.reshape(number, *self.mean.shape).to(self.mean.dtype)

    def covariance_mm2(self) -> Tensor:
        """(3, 3, W, H, D) covariance of the displacement at every voxel, mm²."""
        spacing = self.spacing_mm.to(self.mean)
        if self.draws is not None:
            found = torch.zeros(3, 3, *self.shape, device=self.mean.device)
            for draw in self.draws.split(1):  # one dense field in memory at a time
                moved = upsample(draw, self.shape, self.upsampling)[0]
                found += moved[:, None] * moved[None] / len(self.draws)
        else:
            size = self.mean.shape[1:]
            pairs = [
                _pairwise_products(basis(n, g, self.upsampling, self.mean.device)) for n, g in zip(self.shape, size)
            ]
            blocks = self._covariance.view(3, *size, 3, *size).permute(0, 4, 1, 5, 2, 6, 3, 7)
            blocks = blocks.reshape(3, 3, *(g * g for g in size)).float()
            found = apply_along_axes(blocks, pairs)
        return found * (spacing[:, None] * spacing).view(3, 3, 1, 1, 1)

    def sigma_mm(self) -> Tensor:
        """(3, W, H, D) standard deviation of the displacement along each array axis, mm."""
        return self.covariance_mm2().diagonal().movedim(-1, 0).clamp(min=0).sqrt()

    def principal_mm(self) -> tuple[Tensor, Tensor]:
        """(sigmas, directions): standard deviations (3, W, H, D) in mm, the largest first, and principal axes (3, 3, W, H, D).

        ``directions[i]`` is the unit vector, in array axes, along which the standard deviation is ``sigmas[i]``.
        """
        values, vectors = torch.linalg.eigh(self.covariance_mm2().movedim((0, 1), (-2, -1)))
        sigmas = values.flip(-1).clamp(min=0).sqrt().movedim(-1, 0)
        return sigmas, vectors.flip(-1).movedim((-1, -2), (0, 1))

    def covariance_between_mm2(self, first: Tensor, second: Tensor) -> Tensor:
        """(N, 3, 3) covariance in mm² between the displacements at N points and at N other points, (N, 3) in voxels each.

        Element [n, a, b] is cov(u_a(first[n]), u_b(second[n])). ValueError on other shapes.
        """
        if first.shape != second.shape or first.dim() != 2 or first.shape[1] != 3:
            raise ValueError(f"points must have shape (N, 3) twice, found {tuple(first.shape)}, {tuple(second.shape)}")
        left, right = (self._weights(points) for points in (first, second))
        if self.draws is not None:
            draws = self.draws.double().flatten(2)
            found = torch.einsum("san,sbn->nab", draws @ left.T, draws @ right.T) / len(draws)
        else:
            blocks = self._covariance.view(3, left.shape[1], 3, left.shape[1])
            found = torch.einsum("ng,agbh,nh->nab", left, blocks, right)
        return found * self.spacing_mm[:, None].to(found) * self.spacing_mm.to(found)

    @property
    def _covariance(self) -> Tensor:
        """(3G, 3G) float64 covariance of the control points in squared voxels."""
        return torch.cholesky_inverse(self.precision)

    def _weights(self, points: Tensor) -> Tensor:
        """(N, G) weights of the control points at ``points``; between voxels a field is interpolated linearly."""
        rows = []
        for axis, (n, g) in enumerate(zip(self.shape, self.mean.shape[1:])):
            weights = basis(n, g, self.upsampling, self.mean.device, torch.float64)
            place = points[:, axis].to(weights).clamp(0, n - 1)
            below = place.long().clamp(max=n - 2)
            rows.append(torch.lerp(weights[below], weights[below + 1], (place - below)[:, None]))
        return torch.einsum("ni,nj,nk->nijk", *rows).flatten(1)


def _pairwise_products(matrix: Tensor) -> Tensor:
    """(n, g²) products of every two columns (basis functions) of a matrix (n, g)."""
    return (matrix[:, :, None] * matrix[:, None]).flatten(1)


def effective_number(residual: Tensor) -> float:
    """Number of independent values in a residual (1, 1, W, H, D): N / Π (1 + ρ) / (1 - ρ) over the axes.

    ρ is the correlation of neighbours along an axis, as in a first-order autoregressive process.
    """
    variance, number = float(residual.var()), residual.numel()
    for axis in (2, 3, 4):
        alike = 1 - float(residual.diff(dim=axis).square().mean()) / (2 * variance) if variance > 0 else 0.0
        alike = min(max(alike, 0.0), 0.99)
        number *= (1 - alike) / (1 + alike)
    return max(number, 1.0)


def fit_temperature(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """T for which the errors of validation pairs are most likely: mean error² / σ² over all components of all pairs.

    pairs   (error, sigma) of each pair, (3, N) in mm, with sigma of a posterior at temperature 1

    ValueError without pairs, and as in ``calibration``.
    """
    if not pairs:
        raise ValueError("found no pairs, expected at least one to fit the temperature on")
    error, sigma = (np.concatenate([np.reshape(pair[side], (3, -1)) for pair in pairs], 1) for side in (0, 1))
    return calibration.scale(error, sigma) ** 2


@torch.no_grad()
def posterior(
    registration: Registration,
    fixed: Tensor,
    moving: Tensor,
    *,
    spacing_mm: float | Sequence[float] = 1.0,
    similarity: str = "mse",
    bending_weight: float | None = None,
    upsampling: str = "trilinear",
    temperature: float = 1.0,
    samples: int = 64,
    seed: int = 0,
) -> Posterior:
    """The posterior of one registered pair. Its control points should be optimised first (``refine``).

    fixed, moving   (1, 1, W, H, D) in [0, 1]
    spacing_mm      voxel size: one number, or one for each axis
    similarity, bending_weight, upsampling   as in ``refine``; "mse" or "ncc"
    temperature     from ``fit_temperature``
    samples         number of samples, drawn where there are more than ``EXACT_UNKNOWNS`` unknowns
    seed            of the samples

    ValueError without control points, for more than one pair, on another similarity, or on shapes that do not fit.
    """
    if registration.control_points is None or len(registration.control_points) != 1:
        raise ValueError("posterior needs the control points of one pair, a batch of one")
    if similarity not in ("mse", "ncc"):
        raise ValueError(f"similarity must be mse or ncc, found {similarity!r}")
    check_volume(fixed, 1, "fixed")
    if fixed.shape != moving.shape or len(fixed) != 1:
        raise ValueError(
            f"fixed is {tuple(fixed.shape)} and moving {tuple(moving.shape)}, expected one pair of the same shape"
        )
    shape, c = tuple(fixed.shape[2:]), registration.control_points.detach().float()
    weight = default_bending_weight(shape) if bending_weight is None else bending_weight
    fixed, moving = fixed.float(), moving.float()
    objective = Objective(fixed, moving, tuple(c.shape[2:]), similarity, weight, upsampling, at_grid=False)
    point = objective.at(c)
    normal = objective.normal_equations(point)
    tau = _noise_scale(similarity, fixed, point.warped, normal)
    widest = losses.LARGEST_SIGMA * (torch.tensor(shape, device=c.device) - 1).view(3, 1, 1, 1)
    ridge = tau / widest.square()
    spacing = torch.as_tensor(spacing_mm, dtype=torch.float64).expand(3)
    common = {"mean": c[0], "shape": shape, "spacing_mm": spacing, "upsampling": upsampling}
    if c.numel() <= EXACT_UNKNOWNS:
        matrix = _matrix(objective, normal) + torch.diag(ridge.expand_as(c[0]).flatten().double())
        return Posterior(**common, precision=torch.linalg.cholesky(matrix / tau)).tempered(temperature)
    draws = _draw(objective, normal, ridge, samples, seed) * math.sqrt(tau)
    return Posterior(**common, draws=draws).tempered(temperature)


def _noise_scale(similarity: str, fixed: Tensor, warped: Tensor, normal: NormalEquations) -> float:
    """τ at temperature 1: 2 s² / N_eff. Each residual is weighted by its influence on the control points."""
    residual = fixed - warped
    if similarity == "ncc":
        residual = local_lines(fixed, warped)[0].residual()
    pull = normal.curvature * normal.j.square().sum(1, keepdim=True)
    squared = float((pull * residual.square()).sum() / pull.sum().clamp(min=1e-30))
    return 2 * max(squared, losses.RESIDUAL_NOISE**2) / effective_number(residual)


def _matrix(objective: Objective, normal: NormalEquations) -> Tensor:
    """(3G, 3G) float64 Bᵀ q j jᵀ B + 2 λ K. A block takes three small matrix products with products of basis functions."""
    size = [matrix.shape[1] for matrix in objective.basis]
    pairs = [_pairwise_products(matrix.double()).T for matrix in objective.basis]
    j, q = normal.j[0].double(), normal.curvature[0, 0].double()
    blocks = [[apply_along_axes(q * j[min(a, b)] * j[max(a, b)], pairs) for b in range(3)] for a in range(3)]
    blocks = torch.stack([torch.stack(row) for row in blocks])
    blocks = blocks.view(3, 3, size[0], size[0], size[1], size[1], size[2], size[2]).permute(0, 2, 4, 6, 1, 3, 5, 7)
    number = math.prod(size)
    matrix = blocks.reshape(3 * number, 3 * number)
    stiff = sum(times * torch.kron(torch.kron(x, y), z) for times, (x, y, z) in objective.grams)
    for axis, weight in enumerate(objective.weights.flatten().tolist()):
        part = slice(axis * number, (axis + 1) * number)
        matrix[part, part] += weight * stiff
    return matrix


def _draw(objective: Objective, normal: NormalEquations, ridge: Tensor, samples: int, seed: int) -> Tensor:
    """(samples, 3, gw, gh, gd) from N(0, H⁻¹): x solves H x = Bᵀ √q j ε + √(2 λ) K^½ ε + √ridge ε, ε standard normal."""
    generator = torch.Generator().manual_seed(seed)
    size, device = normal.right.shape[1:], normal.right.device
    down = [matrix.T for matrix in objective.basis]
    roots = [(times, [_root(matrix) for matrix in matrices]) for times, matrices in objective.grams]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def draw(number: int) -> Tensor:
        pulled = noise(number, 1, *normal.j.shape[2:])
        right = apply_along_axes(normal.curvature.sqrt() * normal.j * pulled, down) + ridge.sqrt() * noise(
            number, *size
        )
        for times, matrices in roots:
            right = right + (times * objective.weights.float()).sqrt() * apply_along_axes(
                noise(number, *size), matrices
            )
        return conjugate_gradients(
            lambda x: normal.apply(x) + ridge * x, right, normal.diagonal + ridge, SAMPLE_CG_STEPS, SAMPLE_TOLERANCE
        )

    together = max(1, VOXELS_AT_ONCE // normal.curvature.numel())
    return torch.cat([draw(min(together, samples - first)) for first in range(0, samples, together)])


def _root(gram: Tensor) -> Tensor:
    """R with R Rᵀ = gram, float32."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()).float()
