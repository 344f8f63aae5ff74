"""Lesson 1, the sums: how many control points? Registration in two dimensions, where the true deformation is known.

Two dimensions, so that eight grid sizes and three draws are solved while a slider moves. The bases are those of
``interpolation``, the bending energy is that of ``losses`` in voxels, the images go from moving to fixed as in ``grid``.

With P u the least-squares fit of the truth u on a grid, and û what registration found on that grid,

    mean |û - u|² = mean |û - P u|² + mean |P u - u|²      (estimation + approximation)

exactly: û - P u lies in the span of the grid, P u - u stands at right angles to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from scipy.linalg import eigh
from scipy.ndimage import gaussian_filter, map_coordinates

from gridreg.interpolation import basis

SIZE = 40  # voxels along each axis of the fixed image
SMOOTH, ROUGH = 1.3, 0.5  # voxels of the smooth motion at wavelengths of 45 to 90 and of 16 to 30 voxels
MARGIN = 6  # more of them around the moving image, so that nothing is looked up outside
GRIDS = (3, 4, 5, 6, 8, 12, 20, SIZE)  # the last has a control point at every voxel: a dense field
DRAWS = 3  # of deformation and noise, over which errors are averaged
BLURS = (2, 2, 1, 1, 0, 0, 0, 0)  # of both images in voxels, one Gauss-Newton step each: coarse to fine
SOLVER_STEPS, SOLVER_RESIDUAL = 40, 1e-5  # of conjugate gradients within a step
LONGEST_STEP = 1.0  # voxels: beyond it the linearised image means nothing
DAMPING = 1e-6  # of the displacement itself, where neither image nor smoothness says anything


@dataclass(frozen=True)
class World:
    """What is registered, and how.

    noise       standard deviation in both images, whose tissues differ by 0.2 to 0.6
    texture     standard deviation of the pattern inside the tissue; 0 is homogeneous
    fine        voxels of motion with a wavelength of 5 to 7 voxels, besides the smooth motion that is always there
    smoothness  weight of the bending energy
    method      basis of ``interpolation``
    """

    noise: float = 0.05
    texture: float = 0.02
    fine: float = 0.0
    smoothness: float = 0.003
    method: str = "trilinear"


HOMOGENEOUS = World()
TEXTURED = World(noise=0.01, texture=0.15, fine=0.5)  # the same regularisation


@dataclass(frozen=True)
class Outcome:
    """On one grid: true displacements, their best fits and the estimates, each (draws, 2, n, n) in voxels."""

    truth: ndarray
    fit: ndarray
    estimate: ndarray

    @property
    def approximation(self) -> float:
        """Mean squared error of the best the grid could do, voxels²."""
        return float(np.square(self.fit - self.truth).sum(1).mean())

    @property
    def estimation(self) -> float:
        """Mean squared distance from there to what was found, voxels²."""
        return float(np.square(self.estimate - self.fit).sum(1).mean())

    @property
    def total(self) -> float:
        """Mean squared error of what was found, voxels²."""
        return float(np.square(self.estimate - self.truth).sum(1).mean())


def _coordinates(margin: int = 0) -> ndarray:
    axis = np.arange(-margin, SIZE + margin, dtype=float)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"))


def _waves(rng: np.random.Generator, shortest: float, longest: float, number: int) -> Callable[[ndarray], ndarray]:
    """A random sum of plane waves of variance about 1, as a function of points (2, …); wavelengths in voxels."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, number))
    waves = 2 * np.pi / rng.uniform(shortest, longest, number) * np.stack([np.cos(angle), np.sin(angle)])
    return lambda points: np.sqrt(2 / number) * np.cos(np.tensordot(points, waves, (0, 0)) + phase).sum(-1)


@lru_cache
def true_displacement(fine: float) -> ndarray:
    """(draws, 2, n, n) voxels: a smooth random motion, and ``fine`` of short wavelength; both per component."""
    rng, x = np.random.default_rng(0), _coordinates()
    scales = ((SMOOTH, 45, 90, 8), (ROUGH, 16, 30, 12), (fine, 5, 7, 16))  # size, wavelengths, number of waves
    waves = [[[size * _waves(rng, *kind)(x) for _ in range(2)] for _ in range(DRAWS)] for size, *kind in scales]
    return np.sum(waves, axis=0)


def tissue(points: ndarray, texture: float) -> ndarray:
    """Intensity at points (2, …) in voxels of a sketch of the male pelvis: flat organs with edges, and a texture."""
    x, y = points - (SIZE - 1) / 2
    organs = (  # intensity, distance beyond the edge in voxels
        (0.35, np.hypot(x / 1.05, y / 0.9) - 13),  # gland
        (-0.2, np.hypot(x / 1.2, (y - 3) / 0.8) - 6.5),  # its transition zone
        (-0.3, np.hypot(x - 2, y + 19) - 7),  # rectum
        (0.45, np.hypot(x / 1.5, y - 20) - 6),  # bladder
        (-0.25, np.hypot(x + 19, y + 4) - 5),  # muscles
        (-0.25, np.hypot(x - 19, y - 2) - 5),
    )
    flat = 0.3 + sum(step / (1 + np.exp(2 * beyond)) for step, beyond in organs)
    return flat + texture * _waves(np.random.default_rng(1), 4, 10, 60)(points)


@lru_cache(maxsize=4)
def images(world: World) -> tuple[ndarray, ndarray]:
    """Fixed (draws, n, n) and moving images with a margin (draws, n + 2m, n + 2m); fixed(x) = moving(x + u(x)) + noise."""
    rng, x = np.random.default_rng(2), _coordinates()
    fixed = np.stack([tissue(x + u, world.texture) for u in true_displacement(world.fine)])
    moving = np.stack([tissue(_coordinates(MARGIN), world.texture)] * DRAWS)
    return tuple(image + world.noise * rng.standard_normal(image.shape) for image in (fixed, moving))


def _basis(grid: int, method: str) -> ndarray:
    return basis(SIZE, grid, method, dtype=torch.float64).numpy()


def best_fit(displacement: ndarray, grid: int, method: str) -> ndarray:
    """The least-squares fit of a displacement (…, n, n) by control points: what this grid could do at best."""
    matrix = _basis(grid, method)
    onto = matrix @ np.linalg.pinv(matrix)
    return onto @ displacement @ onto.T


def _grams(grid: int, method: str) -> ndarray:
    """(3, g, g): mean products of the basis and of its first and second differences along one axis."""
    b = _basis(grid, method)
    return np.stack([d.T @ d / len(d) for d in (np.diff(b, order, axis=0) for order in range(3))])


def register(fixed: ndarray, moving: ndarray, grid: int, smoothness: float, method: str) -> ndarray:
    """Displacements (draws, 2, n, n) in voxels that make moving(x + u(x)) like fixed(x): Gauss-Newton, coarse to fine.

    Minimises mean (moving(x + u) - fixed)² + smoothness · bending energy over g×g control points of two components.
    """
    b, gram = _basis(grid, method), _grams(grid, method)
    rates, modes = eigh(gram[1], gram[0])  # of the grid along one axis, the smoothest first
    stiffness = smoothness * np.add.outer(rates, rates) ** 2  # of a product of two modes, nearly
    left = smoothness * np.hstack([gram[2], 2 * gram[1], gram[0]])
    points = np.zeros((len(fixed), 2, grid, grid))

    def bending(c: ndarray) -> ndarray:
        return left @ (c[..., None, :, :] @ gram).reshape(*c.shape[:-2], 3 * grid, grid)

    for blur in BLURS:
        goal, image = (gaussian_filter(side, (0, blur, blur)) for side in (fixed, moving))
        stack = np.stack([image, *np.gradient(image, axis=(1, 2))], axis=1)
        places = _coordinates() + MARGIN + b @ points @ b.T
        read = [[map_coordinates(c, x, order=1) for c in channels] for channels, x in zip(stack, places)]
        warped, slopes = np.split(np.array(read), [1], axis=1)  # (draws, 1, n, n), (draws, 2, n, n)
        seen = np.square(slopes).mean((2, 3), keepdims=True) + DAMPING

        def curvature(c: ndarray, slopes: ndarray = slopes) -> ndarray:
            moved = b @ c @ b.T
            return b.T @ (slopes * (slopes * moved).sum(1, keepdims=True) + DAMPING * moved) @ b / SIZE**2 + bending(c)

        def nearly_solved(r: ndarray, seen: ndarray = seen) -> ndarray:  # as if every voxel had the same slopes
            return modes @ ((modes.T @ r @ modes) / (seen + stiffness)) @ modes.T

        downhill = -(b.T @ (slopes * (warped - goal[:, None])) @ b / SIZE**2 + bending(points))
        step = conjugate_gradients(curvature, downhill, nearly_solved)
        longest = np.abs(b @ step @ b.T).max((1, 2, 3), keepdims=True)
        points = points + step * np.minimum(1, LONGEST_STEP / np.maximum(longest, 1e-12))
    return b @ points @ b.T


Linear = Callable[[ndarray], ndarray]


def conjugate_gradients(matrix: Linear, right: ndarray, nearly_solved: Linear) -> ndarray:
    """Solve matrix(x) = right for every draw (draws, 2, g, g) at once; both maps symmetric, positive definite.

    SciPy's solver takes one vector at a time; a batch costs hardly more than one.
    """
    x, residual = np.zeros_like(right), right
    direction = guess = nearly_solved(residual)
    product = first = (residual * guess).sum((1, 2, 3), keepdims=True)
    for _ in range(SOLVER_STEPS):
        image = matrix(direction)
        length = product / np.maximum((direction * image).sum((1, 2, 3), keepdims=True), 1e-300)
        x, residual = x + length * direction, residual - length * image
        guess = nearly_solved(residual)
        before, product = product, (residual * guess).sum((1, 2, 3), keepdims=True)
        if (product <= SOLVER_RESIDUAL * first).all():
            break
        direction = guess + product / np.maximum(before, 1e-300) * direction
    return x


@lru_cache(maxsize=2048)
def outcome(world: World, grid: int) -> Outcome:
    """Register the images of a world on a grid, and compare with the truth. Kept, so a slider moved back is free."""
    truth = true_displacement(world.fine)
    estimate = register(*images(world), grid, world.smoothness, world.method)
    return Outcome(truth, best_fit(truth, grid, world.method), estimate)


def best_grid(world: World) -> int:
    """The grid size of the least total error: known here because the truth is."""
    return min(GRIDS, key=lambda grid: outcome(world, grid).total)
