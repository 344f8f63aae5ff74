"""Gauss-Newton optimisation of one pair's control points: the grid is small enough for second-order steps.

With control points c (3 G numbers), a separable basis B (u = B c, three small matrix products) and the warped image
w(c) = moving∘(x + B c), the loss is that of ``refinement.unsupervised_loss``,

    E(c) = S(fixed, w(c)) + λ cᵀ K c,

with S the similarity and cᵀ K c the bending energy (paper, section 3.3). Every S here is a sum of squares, so near c

    S(c + δ) ≈ S(c) + Σ_x s(x) j(x)·(B δ)(x) + ½ Σ_x q(x) (j(x)·(B δ)(x))²,        j = (∇moving)(x + B c),

with a slope s = ∂S/∂w and a curvature q ≥ 0 at each voxel. The step δ solves the normal equations

    (Bᵀ q j jᵀ B + 2 λ K + μ D) δ = -(Bᵀ s j + 2 λ K c),       D the diagonal of Bᵀ q j jᵀ B.

B and K consist of one small matrix per axis, so the matrix on the left is never formed. Applying it to a vector takes a
time linear in the number of voxels. This is all that conjugate gradients need, preconditioned by the diagonal. A line
search accepts only a smaller E. The damping μ falls after a full step and rises after a shortened one.

Similarities
    mse     r = fixed - w:  s = -2 r / N,  q = 2 / N.
    ncc     The squared correlation ρ² of a window is the part of the variance that the best line explains there:
            1 - ρ² = min_ab mean (fixed - a w - b)² / var(fixed). This is a least-squares problem with one line per window.
            A voxel's s comes from the residuals of all windows that contain it; its q is 2 / N times the mean of
            ρ² / var(w) over these windows.
Each counts twice, as in ``losses.similarity_loss``: over all voxels, and over the values at the control points.

Coarse to fine
    A level smooths the images, takes fewer voxels, and moves a coarser grid d: c + P d. P gives the control points of the
    fine grid whose field comes closest to that of the coarse grid, again with one small matrix per axis. A level is the
    same problem with the basis B P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gridreg import losses
from gridreg.spatial import Shape, voxel_coordinates, warp
from gridreg.upsampling import apply_along_axes, basis

SIMILARITIES = ("mse", "ncc")  # the similarities that are sums of squares
DAMPING = 1e-2  # μ at the start
TOLERANCE = 0.1  # relative residual of the normal equations; they hold only near c, so more accuracy gains nothing
CG_STEPS = 25
HALVINGS = 5
CONVERGED = 1e-3  # relative decrease of the loss below which a level ends
LONGEST_STEP = 2.0  # voxels of the level, times 1 + smoothing: the expansion does not hold farther away
LEAST_SIZES = (8, 4)  # voxels and control points per axis that a level keeps

Matrices = list[Tensor]  # one per axis
Slopes = tuple[Tensor, Tensor]  # s and q


@dataclass(frozen=True)
class Level:
    """One level of the coarse-to-fine scheme.

    iterations  at most so many Gauss-Newton steps
    smoothing   σ in voxels of the Gaussian that smooths both images
    shrink      factor by which the number of voxels per axis is divided; the lattice keeps the corners of the image
    coarsen     the same factor for the number of control points per axis
    """

    iterations: int
    smoothing: float = 0.0
    shrink: float = 1.0
    coarsen: float = 1.0


FROM_NETWORK = (Level(4, smoothing=1.0, coarsen=2), Level(4))  # chosen on validation pairs of the simulated cohorts
FROM_IDENTITY = (Level(6, 2.0, 4, 4), Level(6, 1.0, 2, 2), Level(8))  # also on affinely aligned pairs of real brains


# ---- Similarities: each returns S and a function that gives slope and curvature at each voxel ----


def _transposed(matrices: Matrices) -> Matrices:
    return [matrix.T for matrix in matrices]


def _to_voxels(values: Tensor, lattice: Matrices | None) -> Tensor:
    """Aᵀ values, where A reads an image at the control points.

    For curvatures this is the diagonal matrix of the row sums of Aᵀ q A. It is never smaller than Aᵀ q A, so the step is
    a cautious one.
    """
    return values if lattice is None else apply_along_axes(values, _transposed(lattice))


def _mse(fixed: Tensor, warped: Tensor, lattice: Matrices | None) -> tuple[float, Callable[[], Slopes]]:
    """``losses.mse_loss`` over voxels, and at the control points if there is a lattice."""
    residual = fixed - warped
    levels = [(residual, None)] + ([(apply_along_axes(residual, lattice), lattice)] if lattice else [])

    def slopes() -> Slopes:
        slope = sum(_to_voxels(-2 / r.numel() * r, read) for r, read in levels)
        return slope, sum(_to_voxels(torch.full_like(r, 2 / r.numel()), read) for r, read in levels)

    return sum(float(r.square().mean()) for r, _ in levels), slopes


def _ncc(fixed: Tensor, warped: Tensor, lattice: Matrices | None) -> tuple[float, Callable[[], Slopes]]:
    """1 + ``losses.ncc_loss`` over voxels, and 1 + ``losses.global_ncc_loss`` at the control points if there is a lattice."""
    local, gain = local_lines(fixed, warped)
    lines = [local]
    if lattice:  # one window holds all control points
        f, w = (apply_along_axes(v, lattice) for v in (local.f, local.w))

        def mean(v: Tensor) -> Tensor:
            return v.mean((2, 3, 4), keepdim=True).expand_as(v)

        lines.append(_LineFits(f, w, mean, mean, 1e-12))

    def slopes() -> Slopes:
        slope, curvature = (sum(parts) for parts in zip(*(
            [_to_voxels(part, read) for part in line.slopes()] for line, read in zip(lines, (None, lattice))
        )))  # fmt: skip
        return gain * slope, gain**2 * curvature

    return sum(1 - float(line.explained.mean()) for line in lines), slopes


def local_lines(fixed: Tensor, warped: Tensor) -> tuple[_LineFits, Tensor]:
    """The line fits behind ``losses.ncc_loss`` of two (1, 1, W, H, D) images, and the gain that standardises ``warped``."""
    gain = (warped - warped.mean()).square().mean().add(1e-12).rsqrt()
    f, w = losses._standardised(fixed), (warped - warped.mean()) * gain
    windows = [losses._window_means(n, 5, w.device, w.dtype) for n in w.shape[2:]]
    back = _transposed(windows)
    return _LineFits(
        f, w, lambda v: apply_along_axes(v, windows), lambda v: apply_along_axes(v, back), losses.FLAT_VARIANCE
    ), gain


class _LineFits:
    """The least-squares line f ≈ a w + b in the window around every voxel; ``explained`` is its ρ².

    f, w   (1, 1, W, H, D) standardised fixed and warped image
    means  function that gives the mean of each window; ``back`` is its transpose
    flat   added to the variances, so that flat windows count little
    """

    def __init__(self, f: Tensor, w: Tensor, means, back, flat: float):
        self.f, self.w, self.back = f, w, back
        self.mean_f, self.mean_w, ff, ww, fw = means(torch.cat([f, w, f * f, w * w, f * w], 1)).split(1, 1)
        self.var_f = (ff - self.mean_f.square()).clamp(min=0) + flat
        self.var_w = (ww - self.mean_w.square()).clamp(min=0) + flat
        self.covariance = fw - self.mean_f * self.mean_w
        self.explained = self.covariance.square() / (self.var_f * self.var_w)

    def residual(self) -> Tensor:
        """Residual of the line in the window around each voxel, in standard deviations of the fixed image there."""
        a = self.covariance / self.var_w
        return (self.f - self.mean_f - a * (self.w - self.mean_w)) * self.var_f.rsqrt()

    def slopes(self) -> Slopes:
        a = self.covariance / self.var_w
        b = self.mean_f - a * self.mean_w
        one, two, three = self.back(torch.cat([a, a * a, a * b], 1) / self.var_f).split(1, 1)
        each = 2 / a.numel()
        return -each * (one * self.f - two * self.w - three), each * two


# ---- One level ----


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor must also be usable in training
def _image_matrix(n: int, m: int, smoothing: float, device: torch.device) -> Tensor:
    """(m, n) smooths the n voxels of an axis (the border voxel repeats) and reads m points from the first to the last."""
    rows = torch.eye(n, dtype=torch.float64)
    if smoothing:
        offsets = torch.arange(-int(4 * smoothing + 0.5), int(4 * smoothing + 0.5) + 1)
        weights = torch.exp(-offsets.double().square() / (2 * smoothing**2))
        neighbours = (torch.arange(n)[:, None] + offsets).clamp(0, n - 1)
        rows = torch.zeros_like(rows).scatter_add(1, neighbours, (weights / weights.sum()).expand(n, -1))
    return (basis(m, n, "trilinear", dtype=torch.float64) @ rows).to(device, torch.float32)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _prolongation(n: int, g: int, coarse: int, method: str, device: torch.device) -> Tensor:
    """(g, coarse) P: for each coarse control point, the g fine ones whose field at n voxels comes closest to its field."""
    fine, wanted = (basis(n, k, method, dtype=torch.float64) for k in (g, coarse))
    return torch.linalg.lstsq(fine, wanted).solution.to(device, torch.float32)


def bending_grams(shape: Shape, grid_size: Shape, upsampling: str, device) -> list[tuple[int, Matrices]]:
    """K as a sum of Kronecker products: for each second derivative (multiplicity, one (g, g) float64 matrix per axis)."""
    return [
        (times, [losses._gram(n, g, order, upsampling, device) for n, g, order in zip(shape, grid_size, orders)])
        for times, orders in losses._second_derivatives()
    ]


@dataclass
class Point:
    """Control points, the loss E there, and the quantities from which E is expanded."""

    control_points: Tensor  # (1, 3, gw, gh, gd) voxels
    loss: float
    displacement: Tensor  # (1, 3, w, h, d) in voxels of the level
    warped: Tensor  # (1, 1, w, h, d)
    slopes: Callable[[], Slopes]
    bending: Tensor  # 2 λ K c


@dataclass
class NormalEquations:
    """``apply`` multiplies by the matrix on the left, whose diagonal is ``diagonal``; ``right`` is minus the gradient."""

    j: Tensor  # (1, 3, w, h, d) derivative of the warped image, per voxel of the fixed grid
    curvature: Tensor  # (1, 1, w, h, d) q
    right: Tensor  # (1, 3, gw, gh, gd)
    diagonal: Tensor
    apply: Callable[[Tensor], Tensor]


class Objective:
    """The loss E on one level.

    fixed, moving  (1, 1, W, H, D) float32; control points are in voxels of this grid
    at_grid        whether the similarity also counts at the control points, as in training
    """

    def __init__(
        self, fixed: Tensor, moving: Tensor, grid_size: Shape, similarity: str, bending_weight: float, upsampling: str,
        level: Level = Level(0), at_grid: bool = True,
    ):  # fmt: skip
        shape, device = tuple(fixed.shape[2:]), fixed.device
        voxels, points = (
            tuple(max(min(n, least), round(n / by)) for n in size)
            for size, by, least in zip((shape, grid_size), (level.shrink, level.coarsen), LEAST_SIZES)
        )
        read = [_image_matrix(n, m, level.smoothing, device) for n, m in zip(shape, voxels)]
        self.fixed, self.moving = (apply_along_axes(image, read) for image in (fixed, moving))
        scale = [(m - 1) / (n - 1) for m, n in zip(voxels, shape)]
        self.scale = torch.tensor(scale, device=device).view(3, 1, 1, 1)  # voxels of the level per voxel
        self.basis = [basis(m, g, upsampling, device) for m, g in zip(voxels, grid_size)]
        self.refined = None  # P
        if points != tuple(grid_size):
            self.refined = [_prolongation(n, g, k, upsampling, device) for n, g, k in zip(shape, grid_size, points)]
        self.moves = [b @ p for b, p in zip(self.basis, self.refined)] if self.refined else self.basis
        self.lattice = [basis(g, m, "trilinear", device) for g, m in zip(grid_size, voxels)] if at_grid else None
        self.similarity = {"mse": _mse, "ncc": _ncc}[similarity]
        weights = 2 * bending_weight * torch.tensor([2 / (n - 1) for n in shape], dtype=torch.float64).square()
        self.weights = weights.to(device).view(3, 1, 1, 1)  # 2 λ; K counts normalised units, control points voxels
        self.grams = bending_grams(shape, grid_size, upsampling, device)
        project = self.refined or [torch.eye(g, device=device) for g in grid_size]
        self.moves_grams = [
            (times, [(p.double().T @ m @ p.double()).float() for p, m in zip(project, grams)])
            for times, grams in self.grams
        ]

    def _bending(self, control_points: Tensor, grams: list[tuple[int, Matrices]]) -> Tensor:
        applied = sum(times * apply_along_axes(control_points, matrices) for times, matrices in grams)
        return applied * self.weights.to(applied.dtype)

    def at(self, control_points: Tensor) -> Point:
        """E at control points (1, 3, gw, gh, gd) in voxels."""
        displacement = apply_along_axes(control_points, self.basis) * self.scale
        warped = warp(self.moving, displacement)
        dissimilarity, slopes = self.similarity(self.fixed, warped, self.lattice)
        # in float64: a shift that all control points share cancels, and in float32 its rounding error would remain
        bending = self._bending(control_points.double(), self.grams)
        loss = dissimilarity + float((control_points.double() * bending).sum()) / 2
        return Point(control_points, loss, displacement, warped, slopes, bending.float())

    def _derivative(self, displacement: Tensor) -> Tensor:
        """(1, 3, w, h, d) derivative of the linearly interpolated moving image at x + u(x).

        Along an axis it is the difference of the two voxels between which the point lies, and 0 outside the image.
        """
        place, parts = voxel_coordinates(displacement.shape[2:], displacement.device), []
        for axis in range(3):
            last = displacement.shape[2 + axis] - 1
            difference = self.moving.diff(dim=2 + axis, append=self.moving.narrow(2 + axis, last, 1))
            at = place[axis] + displacement[:, axis]
            below = displacement.clone()
            below[:, axis] = at.clamp(0, last - 1).floor() - place[axis]
            parts.append(warp(difference, below) * ((at > 0) & (at < last)))
        return torch.cat(parts, 1)

    def normal_equations(self, point: Point, damping: float = 0.0) -> NormalEquations:
        """The expansion of E around a point, for the control points of the level."""
        slope, curvature = point.slopes()
        j = self._derivative(point.displacement) * self.scale
        weighted, down = curvature * j, _transposed(self.moves)
        bending = apply_along_axes(point.bending, _transposed(self.refined)) if self.refined else point.bending
        data = apply_along_axes(weighted * j, [matrix.square() for matrix in down])
        stiff = sum(
            times * torch.einsum("i,j,k->ijk", *map(torch.diagonal, matrices)) for times, matrices in self.moves_grams
        )
        damped = damping * data

        def apply(step: Tensor) -> Tensor:
            along = (j * apply_along_axes(step, self.moves)).sum(1, keepdim=True)
            return apply_along_axes(weighted * along, down) + self._bending(step, self.moves_grams) + damped * step

        right = -(apply_along_axes(slope * j, down) + bending)
        diagonal = data + damped + stiff * self.weights.float()
        return NormalEquations(j, curvature, right, diagonal + 1e-6 * diagonal.mean(), apply)


# ---- Solver ----


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, steps: int = CG_STEPS,
    tolerance: float = TOLERANCE, free: Tensor | float = 1.0,
) -> Tensor:  # fmt: skip
    """x (B, C, ...) with apply(x) = right, by conjugate gradients preconditioned with the diagonal.

    Stops after ``steps``, or when the residual of every case is below ``tolerance`` times that of x = 0. Where ``free`` is
    0, x stays 0.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))

    x, residual = torch.zeros_like(right), right * free
    towards = scaled = residual / diagonal
    size = dot(residual, scaled)
    goal = tolerance**2 * size
    for _ in range(steps):
        if not (size > goal).any():
            break
        applied = apply(towards) * free
        length = size / dot(towards, applied).clamp(min=torch.finfo(size.dtype).tiny)
        x, residual = x + length * towards, residual - length * applied
        scaled = residual / diagonal
        before, size = size, dot(residual, scaled)
        towards = scaled + size / before.clamp(min=torch.finfo(size.dtype).tiny) * towards
    return x


def _descend(objective: Objective, start: Tensor, level: Level, bound: Tensor | None) -> Point:
    """Gauss-Newton iterations on one level; each decreases the loss."""
    point, damping = objective.at(start), DAMPING
    farthest = LONGEST_STEP * (1 + level.smoothing) / float(objective.scale.min())
    for _ in range(level.iterations):
        normal, free = objective.normal_equations(point, damping), 1.0
        if bound is not None and not objective.refined:  # a control point at its bound does not move outwards
            free = (point.control_points * normal.right.sign() < bound).float()
        step = conjugate_gradients(normal.apply, normal.right, normal.diagonal, free=free)
        if objective.refined:
            step = apply_along_axes(step, objective.refined)
        step = step * min(1.0, farthest / max(float(step.abs().max()), 1e-12))
        for halving in range(HALVINGS):
            there = point.control_points + 0.5**halving * step
            reached = objective.at(there if bound is None else there.clamp(-bound, bound))
            if reached.loss < point.loss:  # false where the loss is NaN
                break
        else:
            return point
        damping = damping / 3 if halving == 0 else damping * 2
        settled = point.loss - reached.loss < CONVERGED * abs(point.loss)
        point = reached
        if settled:
            break
    return point


@torch.no_grad()
def solve(
    start: Tensor,
    fixed: Tensor,
    moving: Tensor,
    *,
    bending_weight: float,
    similarity: str = "mse",
    upsampling: str = "trilinear",
    levels: Sequence[Level] = FROM_NETWORK,
    steps: int | None = None,
    bound: Tensor | None = None,
    at_grid: bool = True,
) -> Tensor:
    """Optimised control points (1, 3, gw, gh, gd) in voxels; their loss is never greater than that of ``start``.

    start           (1, 3, gw, gh, gd) control points in voxels; zeros where no network has predicted any
    fixed, moving   (1, 1, W, H, D) in [0, 1]
    bending_weight  λ
    similarity      "mse" or "ncc"
    upsampling      "trilinear", "bspline" or "deconv", as for the network
    levels          coarse to fine; the last one minimises the loss itself, so it neither smooths, shrinks nor coarsens
    steps           largest number of iterations on each level; None: the levels' own numbers
    bound           (3, gw, gh, gd) largest |control point|, from ``upsampling.displacement_bound``; None: none
    at_grid         whether the similarity also counts at the control points, as in training

    ValueError on another similarity, or a last level that does not minimise the loss itself.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"Gauss-Newton needs similarity {' or '.join(SIMILARITIES)}, found {similarity!r}")
    if not levels or levels[-1] != Level(levels[-1].iterations):
        raise ValueError(f"the last level must be Level(iterations), found {levels[-1] if levels else 'none'}")
    if steps is not None:
        levels = [replace(level, iterations=min(level.iterations, steps)) for level in levels]
    terms = (fixed, moving, tuple(start.shape[2:]), similarity, bending_weight, upsampling)
    control_points = start
    for level in levels[:-1]:
        control_points = _descend(Objective(*terms, level, at_grid), control_points, level, bound).control_points
    objective, last = Objective(*terms, at_grid=at_grid), levels[-1]
    if not objective.at(control_points).loss <= objective.at(start).loss:  # the coarse levels ended at a worse place
        control_points = start
    return _descend(objective, control_points, last, bound).control_points
