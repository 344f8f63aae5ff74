"""Lesson 1: how many control points? Registration in two dimensions with a known true deformation.

In two dimensions, eight grid sizes and three draws are solved while a slider moves. The bases are those of
``gridreg.upsampling``, the bending energy is that of ``gridreg.losses`` in voxels, and images are warped from moving to
fixed as in ``gridreg.spatial``.

With P u the least-squares fit of the truth u on a grid, and û what registration found on that grid,

    mean |û - u|² = mean |û - P u|² + mean |P u - u|²      (estimation + approximation)

exactly, because û - P u lies in the span of the grid and P u - u is orthogonal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.linalg import eigh
from scipy.ndimage import gaussian_filter, map_coordinates

from gridreg.explorer.slices import lines_through
from gridreg.upsampling import basis
from study.style import COLOURS, IMAGE, MAGNITUDE, NEUTRAL, styled

SIZE = 40  # voxels along each axis of the fixed image
SMOOTH, ROUGH = 1.3, 0.5  # voxels of the smooth motion at wavelengths of 45 to 90 and of 16 to 30 voxels
MARGIN = 6  # voxels added around the moving image, so that no sample lies outside
GRIDS = (3, 4, 5, 6, 8, 12, 20, SIZE)  # the last has a control point at every voxel: a dense field
DRAWS = 3  # of deformation and noise, over which errors are averaged
BLURS = (2, 2, 1, 1, 0, 0, 0, 0)  # of both images in voxels, one Gauss-Newton step each: coarse to fine
SOLVER_STEPS, SOLVER_RESIDUAL = 40, 1e-5  # of conjugate gradients within a step
LONGEST_STEP = 1.0  # voxels; the linearisation of the image does not hold farther away
DAMPING = 1e-6  # of the displacement, where neither image nor smoothness determines it


@dataclass(frozen=True)
class World:
    """Settings of a simulated registration.

    noise       standard deviation in both images, whose tissues differ by 0.2 to 0.6
    texture     standard deviation of the pattern inside the tissue; 0 is homogeneous
    fine        voxels of motion with a wavelength of 5 to 7 voxels, besides the smooth motion that is always there
    smoothness  weight of the bending energy
    method      basis of ``gridreg.upsampling``
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
        """Mean squared error of the best field of the grid, voxels²."""
        return float(np.square(self.fit - self.truth).sum(1).mean())

    @property
    def estimation(self) -> float:
        """Mean squared distance between the best field and the estimate, voxels²."""
        return float(np.square(self.estimate - self.fit).sum(1).mean())

    @property
    def total(self) -> float:
        """Mean squared error of the estimate, voxels²."""
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
    """The least-squares fit of a displacement (…, n, n) by control points, which is the best field of the grid."""
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
    """Register the images of a world on a grid, and compare with the truth. Results are cached."""
    truth = true_displacement(world.fine)
    estimate = register(*images(world), grid, world.smoothness, world.method)
    return Outcome(truth, best_fit(truth, grid, world.method), estimate)


def best_grid(world: World) -> int:
    """The grid size with the least total error, which the known truth gives."""
    return min(GRIDS, key=lambda grid: outcome(world, grid).total)


# ---- The pictures: approximation and estimation error over the grid size, and where they arise ----


LONGEST = 2.5  # voxels of error at the end of the colour map
HIGHEST = 1.6  # voxels² on the axis of the curves, the same for every world whose errors are not larger
APPROXIMATION, ESTIMATION = COLOURS["gridreg-adaptive"], COLOURS["gridreg-5"]
SIMULATED = "Simulated images in two dimensions; errors are means over three deformations and draws of noise."


def _grid_name(grid: int) -> str:
    return f"{grid}×{grid}" + (" (every voxel)" if grid == SIZE else "")


def draw_curves(ax: Axes, world: World, chosen: int | None = None) -> None:
    """Approximation and estimation error of a world over the grid size, stacked: the line on top is their sum."""
    outcomes = [outcome(world, grid) for grid in GRIDS]
    parts = [[getattr(o, name) for o in outcomes] for name in ("approximation", "estimation")]
    ax.stackplot(GRIDS, parts, colors=(APPROXIMATION, ESTIMATION), labels=("approximation error", "estimation error"))
    ax.plot(GRIDS, [o.total for o in outcomes], color=NEUTRAL, marker="o", ms=3, label="total error, their sum")
    best = best_grid(world)
    ax.plot(best, outcome(world, best).total, "o", ms=10, mfc="none", mec=NEUTRAL, ls="", label="least total error")
    if chosen:
        ax.axvline(chosen, color=COLOURS["voxelmorph"], lw=1)
    highest = max(HIGHEST, 1.05 * max(o.total for o in outcomes))
    ax.set(xscale="log", xlim=(GRIDS[0], GRIDS[-1]), ylim=(0, highest), xlabel="control points per axis")
    ax.set_ylabel("mean squared error (voxels²)")
    ax.set_xticks(GRIDS, [str(g) for g in GRIDS])
    ax.minorticks_off()


def _bare(ax: Axes, title: str) -> None:
    ax.set(xticks=[], yticks=[], xlim=(-0.5, SIZE - 0.5), ylim=(-0.5, SIZE - 0.5), aspect="equal")
    ax.set_title(title)
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_warped_lines(ax: Axes, displacement: np.ndarray, colour: str, step: int = 3) -> None:
    """Lines of the fixed grid carried along by a displacement (2, n, n) in voxels."""
    tracks = lines_through(np.indices(displacement.shape[1:]) + displacement, step)
    ax.add_collection(LineCollection(tracks, colors=colour, linewidths=0.6))


def freedom_figure(grid: int, world: World = HOMOGENEOUS, **changes: float | str) -> Figure:
    """The errors over the grid size beside the images and the errors, voxel by voxel, on one grid (the first draw).

    ``changes`` replace fields of the world: noise, texture, fine, smoothness, method.
    """
    world = replace(world, **changes)
    here = outcome(world, grid)
    fixed, moving = (stack[0] for stack in images(world))
    errors = {"approximation error": here.fit - here.truth, "estimation error": here.estimate - here.fit,
              "total error": here.estimate - here.truth}  # fmt: skip
    best = best_grid(world)
    label = (f"With {_grid_name(grid)} control points: approximation {here.approximation:.2f}, estimation "
             f"{here.estimation:.2f}, total {here.total:.2f} voxels²; least total with {_grid_name(best)}.")  # fmt: skip
    with styled():
        figure = Figure(figsize=(10.4, 4.9), label=label)
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
        ax = left.add_axes((0.15, 0.2, 0.82, 0.66))
        draw_curves(ax, world, grid)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.19), ncols=2, columnspacing=1, handlelength=2.2)
        axes = right.subplots(
            2, 3, gridspec_kw=dict(left=0.02, right=0.88, bottom=0.09, top=0.9, wspace=0.06, hspace=0.2)
        )
        inner = slice(MARGIN, -MARGIN)
        for panel, image, title in ((axes[0, 0], fixed, "fixed"), (axes[0, 1], moving[inner, inner], "moving")):
            panel.imshow(image.T, origin="lower", vmin=0, vmax=1, cmap=IMAGE)
            _bare(panel, title)
        axes[0, 2].imshow(np.zeros((SIZE, SIZE)), cmap="Greys", vmin=0, vmax=1, origin="lower")
        draw_warped_lines(axes[0, 2], here.truth[0], "#AAAAAA")
        draw_warped_lines(axes[0, 2], here.estimate[0], COLOURS["gridreg-adaptive"])
        _bare(axes[0, 2], "deformation\n(true: grey, found: blue)")
        for panel, (title, error) in zip(axes[1], errors.items()):
            length = np.linalg.norm(error[0], axis=0)
            shown = panel.imshow(length.T, origin="lower", vmin=0, vmax=LONGEST, cmap=MAGNITUDE)
            if grid < SIZE / 2:
                at = np.linspace(0, SIZE - 1, grid)
                panel.plot(*(axis.ravel() for axis in np.meshgrid(at, at)), ".", ms=2, color="white", clip_on=False)
            _bare(panel, f"{title}\n(root mean square {np.sqrt(np.square(length).mean()):.2f})")
        bar = right.colorbar(shown, cax=right.add_axes((0.9, 0.09, 0.017, 0.33)), extend="max")
        bar.set_label("voxels")
        figure.text(0.01, 0.02, f"{_grid_name(grid)} control points, {2 * grid**2} numbers to estimate (orange line). " + SIMULATED,
                    fontsize=7, color="#333333")  # fmt: skip
    return figure


def worlds_figure(worlds: Mapping[str, World]) -> Figure:
    """The errors over the grid size for several worlds side by side, their fixed image above."""
    with styled():
        figure = Figure(figsize=(4.2 * len(worlds), 5.4), layout="constrained", label="Errors over the grid size")
        axes = figure.subplots(2, len(worlds), height_ratios=(1, 1.7), squeeze=False)
        for (above, below), (title, world) in zip(axes.T, worlds.items()):
            above.imshow(images(world)[0][0].T, origin="lower", vmin=0, vmax=1, cmap=IMAGE)
            _bare(above, title)
            draw_curves(below, world)
            below.set_title(f"least total error with {_grid_name(best_grid(world))}")
        axes[1, 0].legend(loc="upper right")
        figure.supxlabel(SIMULATED, fontsize=7, color="#333333", x=0.01, ha="left")
    return figure


def valley_figure(worlds: Mapping[str, World], smoothness: Sequence[float]) -> Figure:
    """Total error over grid size and regularisation; the least of every column is marked, that of all has a ring."""
    tables = [np.array([[outcome(replace(w, smoothness=s), g).total for g in GRIDS] for s in smoothness])
              for w in worlds.values()]  # fmt: skip
    scale = LogNorm(min(table.min() for table in tables), max(table.max() for table in tables))
    with styled():
        figure = Figure(
            figsize=(4.6 * len(worlds), 3.6), layout="constrained", label="Total error by grid and smoothness"
        )
        axes = figure.subplots(1, len(worlds), squeeze=False)[0]
        for ax, title, table in zip(axes, worlds, tables):
            shown = ax.imshow(table, origin="lower", norm=scale, cmap=MAGNITUDE, aspect="auto")
            for (row, column), value in np.ndenumerate(table):
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6,
                        color="white" if scale(value) < 0.6 else "black")  # fmt: skip
            ax.plot(range(len(GRIDS)), table.argmin(0), "s", ms=19, mfc="none", mec="white", mew=0.9)
            row, column = np.unravel_index(table.argmin(), table.shape)
            ax.plot(column, row, "s", ms=24, mfc="none", mec=COLOURS["voxelmorph"], mew=1.6)
            ax.set_xticks(range(len(GRIDS)), [str(g) for g in GRIDS])
            ax.set_yticks(range(len(smoothness)), [f"{s:g}" for s in smoothness])
            ax.set(title=title, xlabel="control points per axis")
        axes[0].set_ylabel("weight of the bending energy")
        bar = figure.colorbar(
            shown, ax=axes, label="mean squared error (voxels²)", ticks=(0.1, 0.2, 0.5, 1, 2, 5), format="%g"
        )
        bar.ax.minorticks_off()
        figure.supxlabel("White: the best weight for each grid; orange: the best of all. " + SIMULATED,
                         fontsize=7, color="#333333", x=0.01, ha="left")  # fmt: skip
    return figure
