"""Lesson 2: the fields that three bases make of a few control points, in one, two and three dimensions.

All computations use ``gridreg.upsampling`` and ``gridreg.metrics``, as registration does.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from numpy import ndarray

from gridreg.explorer.slices import lines_through
from gridreg.metrics import folding_percent, jacobian_determinant, nondiffeomorphic_percent
from gridreg.upsampling import METHODS, basis, bounded, displacement_bound, upsample
from study.style import COLOURS, MAGNITUDE, NEUTRAL, SIGNED, styled

NAMES = {"trilinear": "linear", "bspline": "cubic B-spline", "deconv": "Gaussian (deconv)"}
SHAPE = (41, 41, 41)  # voxels, in two dimensions 41×41×3
PATTERNS = ("random", "one point", "squeeze", "diagonal squeeze", "checkerboard")


def profile(values: ndarray, n: int, method: str) -> ndarray:
    """(n,) displacement along one axis from control-point values (g,), same units."""
    return basis(n, len(values), method, dtype=torch.float64).numpy() @ values


def properties(g: int, n: int) -> pd.DataFrame:
    """Properties of each basis of g control points at n voxels, as largest errors over the voxels of one axis.

    Columns: a constant of 1; a line from 0 to g - 1; the value at a control point that alone is 1; the largest jump of
    the slope between neighbouring voxels, per control spacing, for that same control point.
    """
    rows = []
    for method in METHODS:
        single = np.zeros(g)
        single[g // 2] = 1
        bump = profile(single, n, method)
        slope = np.diff(bump) * (n - 1) / (g - 1)
        rows.append({
            "basis": NAMES[method],
            "constant: error": np.abs(profile(np.ones(g), n, method) - 1).max(),
            "line: error": np.abs(profile(np.arange(g, dtype=float), n, method) - np.linspace(0, g - 1, n)).max(),
            "value at its own control point": bump.max(),
            "control points that move a voxel": int((basis(n, g, method).numpy() > 1e-6).sum(1).max()),
            "largest jump of the slope": np.abs(np.diff(slope)).max(),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("basis")


@lru_cache(maxsize=64)
def pattern(name: str, grid: int, dimensions: int) -> ndarray:
    """(3, g, g, g) displacements of unit size, in control spacings; (3, g, g, 2) with none along z in two dimensions.

    "random" is uniform in [-1, 1]. "one point" moves the middle point along x. "squeeze" moves every point towards the
    middle along each axis. "diagonal squeeze" moves them towards the plane perpendicular to the diagonal, which is the
    worst case for the middle. "checkerboard" moves neighbours in opposite directions. ValueError on another name.
    """
    sizes = (grid, grid, grid if dimensions == 3 else 2)
    moved = np.zeros((3, *sizes))
    places = np.indices(sizes) - (np.array(sizes).reshape(3, 1, 1, 1) - 1) / 2
    if name == "random":
        plane = np.random.default_rng(4).uniform(-1, 1, (3, *sizes[:2], 1 if dimensions == 2 else grid))
        moved[:] = plane
    elif name == "one point":
        moved[(0, *(n // 2 for n in sizes[:2]), slice(None) if dimensions == 2 else grid // 2)] = 1
    elif name == "squeeze":
        moved[:] = -np.sign(places)
    elif name == "diagonal squeeze":
        moved[:] = -np.sign(places[:dimensions].sum(0).round(6))
    elif name == "checkerboard":
        moved[:] = (-1.0) ** np.indices(sizes)[:dimensions].sum(0)
    else:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; found {name!r}")
    moved[dimensions:] = 0
    return moved


@lru_cache(maxsize=256)
def field(name: str, grid: int, size: float, method: str, dimensions: int = 2, fold_free: bool = False) -> ndarray:
    """(3, W, H, D) displacement in voxels of a pattern whose control points move by ``size`` control spacings.

    In two dimensions the volume has three equal slices. With ``fold_free`` the control points are first mapped into the
    bound of ``upsampling.bounded``, as in the network.
    """
    moved = pattern(name, grid, dimensions)
    shape = SHAPE if dimensions == 3 else (*SHAPE[:2], 3)
    spacing = (SHAPE[0] - 1) / (grid - 1)
    control_points = torch.from_numpy(size * spacing * moved)[None]
    if fold_free:
        control_points = bounded(control_points, shape)
    return upsample(control_points, shape, method)[0].numpy()


def bound_in_spacings(grid: int) -> float:
    """The fold-free bound of a control point in the middle of a cube, along an axis, in control spacings."""
    return float(displacement_bound((grid,) * 3, SHAPE)[0].max()) * (grid - 1) / (SHAPE[0] - 1)


def folds(displacement: ndarray) -> dict[str, float]:
    """Least det J, % of voxels with det J ≤ 0 (central differences), % of the volume turned over (tetrahedra)."""
    determinant = jacobian_determinant(displacement)
    where = np.ones(determinant.shape, bool)
    return {
        "least det J": float(determinant.min()),
        "voxels folded (%)": folding_percent(determinant, where),
        "volume turned over (%)": nondiffeomorphic_percent(displacement, where),
    }


@lru_cache(maxsize=64)
def least_determinants(
    name: str, grid: int, sizes: tuple[float, ...], fold_free: bool, method: str
) -> tuple[float, ...]:
    """Least det J over all voxels of a cube for growing displacements."""
    return tuple(float(jacobian_determinant(field(name, grid, s, method, 3, fold_free)).min()) for s in sizes)


# ---- The pictures: bases along a line, warped lines with their Jacobian determinant, a warped cube, the bound ----


FINE = 401  # positions along a line
VALUES = np.random.default_rng(3).uniform(-1, 1, 30)  # displacements of the other control points, in control spacings
DETERMINANT = TwoSlopeNorm(1, vmin=-1, vmax=3)  # 1: volume kept; 0 and below: folded
HIGHLIGHT, QUIET = COLOURS["voxelmorph"], "#BBBBBB"
SIZES = tuple(np.linspace(0, 2, 21).round(2).tolist())  # control spacings


def line_figure(grid: int, point: int, size: float) -> Figure:
    """One dimension, one basis per column: the basis functions, the resulting displacement, and its slope.

    ``point`` counts from 1 and is moved by ``size`` control spacings; the other points keep their values.
    """
    point = min(point, grid)
    values = VALUES[:grid].copy() * 0.5
    values[point - 1] = size
    x, knots = np.linspace(0, grid - 1, FINE), np.arange(grid)
    label = f"Basis functions, displacement and slope of {grid} control points in three bases"
    with styled():
        figure = Figure(figsize=(10, 5.6), label=label)
        margins = dict(left=0.09, right=0.99, bottom=0.09, top=0.95, hspace=0.32, wspace=0.08)
        axes = figure.subplots(3, len(METHODS), sharex=True, sharey="row", gridspec_kw=margins)
        for (functions, displacement, slope), method in zip(axes.T, METHODS):
            functions.set_title(NAMES[method])
            for number in range(grid):
                chosen = number == point - 1
                weights = profile(np.eye(grid)[number], FINE, method)
                functions.plot(
                    x, weights, color=HIGHLIGHT if chosen else QUIET, zorder=2 + chosen, lw=1.8 if chosen else 0.9
                )
            u = profile(values, FINE, method)
            displacement.plot(x, u, color=NEUTRAL)
            displacement.plot(knots, values, "o", color=COLOURS["gridreg-adaptive"], ms=4)
            displacement.plot(point - 1, size, "o", color=HIGHLIGHT, ms=6)
            stretch = 1 + np.gradient(u, x)
            slope.plot(x, stretch, color=NEUTRAL)
            slope.axhline(0, color=HIGHLIGHT, lw=0.8, ls="--")
            slope.fill_between(x, np.minimum(stretch, 0), 0, color=HIGHLIGHT, alpha=0.4, lw=0)
            slope.set_xlabel("place (control spacings)")
            slope.set_title(f"least {stretch.min():.2f}" + (": folded" if stretch.min() <= 0 else ""))
        axes[0, 0].set_ylabel("basis function")
        axes[1, 0].set_ylabel("displacement u\n(control spacings)")
        axes[2, 0].set_ylabel("1 + du/dx\n(at or below 0 it folds)")
    return figure


def _warped_plane(ax: Axes, displacement: np.ndarray) -> None:
    """Warped lines of the middle plane on its Jacobian determinant; folded regions are outlined."""
    middle = displacement.shape[3] // 2
    determinant = jacobian_determinant(displacement)[:, :, middle]
    at = (np.indices(displacement.shape[1:]) + displacement)[:2, :, :, middle]
    ax.pcolormesh(*at, determinant, norm=DETERMINANT, cmap=SIGNED, shading="gouraud")
    ax.add_collection(LineCollection(lines_through(at, 2), colors="#222222", linewidths=0.5))
    if determinant.min() <= 0 < determinant.max():
        ax.contour(*at, determinant, levels=[0], colors=[HIGHLIGHT], linewidths=1.4)
    ax.set(xticks=[], yticks=[], xlim=(-6, SHAPE[0] + 5), ylim=(-6, SHAPE[1] + 5), aspect="equal")
    for spine in ax.spines.values():
        spine.set_visible(False)


def plane_figure(name: str, grid: int, size: float) -> Figure:
    """Two dimensions: warped lines and det J of a pattern of control-point displacements, one basis per panel."""
    fields = {method: field(name, grid, size, method) for method in METHODS}
    label = "; ".join(f"{NAMES[m]}: least det J {folds(u)['least det J']:.2f}" for m, u in fields.items())
    with styled():
        figure = Figure(figsize=(10.2, 4.1), layout="constrained", label=label)
        axes = figure.subplots(1, len(METHODS))
        for ax, (method, u) in zip(axes, fields.items()):
            _warped_plane(ax, u)
            found = folds(u)
            ax.set_title(f"{NAMES[method]}\nleast det J {found['least det J']:.2f}, "
                         f"folded: {found['voxels folded (%)']:.2f} % of voxels, "
                         f"{share(found['volume turned over (%)'])} of area", fontsize=7)  # fmt: skip
        _determinant_bar(figure, axes, "area")
        _place_caption(figure)
    return figure


def share(percent: float) -> str:
    """A percentage as text: ``0.2 %``. A small number above 0 is not printed as 0."""
    return f"{percent:.2g} %" if percent >= 0.001 else "less than 0.001 %" if percent else "0 %"


def _determinant_bar(figure: Figure, axes: np.ndarray, kept: str) -> None:
    bar = figure.colorbar(axes[-1].collections[0], ax=axes, shrink=0.75, extend="both", ticks=(-1, 0, 1, 2, 3))
    bar.set_label(f"det J (1: {kept} kept)")


def _place_caption(figure: Figure, what: str = "Lines of the fixed grid") -> None:
    figure.supxlabel(f"{what}, carried by x + u(x) and coloured by det J there. Orange: det J = 0.", fontsize=7,
                     color="#333333", x=0.01, ha="left")  # fmt: skip


def _lines(displacement: np.ndarray, step: int = 5) -> tuple[list[np.ndarray], list[float]]:
    """Warped lines (n, 3) on the three middle planes of a cube, and the mean displacement of each in voxels."""
    n, tracks, lengths = displacement.shape[1], [], []
    at, length = np.indices(displacement.shape[1:]) + displacement, np.linalg.norm(displacement, axis=0)
    for along in range(3):
        places, carried = np.moveaxis(at, 1 + along, -1), np.moveaxis(length, along, -1)
        for i in range(0, n, step):
            for cut in ((i, n // 2), (n // 2, i)):
                tracks.append(places[(slice(None), *cut)].T)
                lengths.append(float(carried[cut].mean()))
    return tracks, lengths


def cube_figure(name: str, grid: int, size: float) -> Figure:
    """Three dimensions: the three warped middle planes of a cube; colour is the mean displacement of a line."""
    spacing = (SHAPE[0] - 1) / (grid - 1)
    with styled():
        figure = Figure(
            figsize=(10.2, 4.2), layout="constrained", label=f"A cube warped by a {name} pattern, three bases"
        )
        for number, method in enumerate(METHODS, start=1):
            ax = figure.add_subplot(1, len(METHODS), number, projection="3d")
            u = field(name, grid, size, method, 3)
            tracks, lengths = _lines(u)
            lines = Line3DCollection(tracks, cmap=MAGNITUDE, linewidths=0.8)
            lines.set_array(np.array(lengths))
            lines.set_clim(0, size * spacing)
            ax.add_collection(lines)
            limits = (-3, SHAPE[0] + 2)
            ax.set(
                xlim=limits, ylim=limits, zlim=limits, xlabel="x (voxels)", ylabel="y", zlabel="z", box_aspect=(1, 1, 1)
            )
            found = folds(u)
            ax.set_title(f"{NAMES[method]}\nleast det J {found['least det J']:.2f}, "
                         f"{share(found['volume turned over (%)'])} of the volume turned over", fontsize=7)  # fmt: skip
        figure.colorbar(lines, ax=figure.axes, shrink=0.6, label="mean displacement of a line (voxels)")
    return figure


def bound_figure(name: str, grid: int, size: float) -> Figure:
    """B-spline in three dimensions without and with the bound: a warped plane, and the least det J as displacements grow."""
    free, pressed = (field(name, grid, size, "bspline", 3, fold_free) for fold_free in (False, True))
    bound = bound_in_spacings(grid)
    with styled():
        figure = Figure(figsize=(10.4, 4), layout="constrained", label="Folding with and without the bound")
        axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
        for ax, u, title in ((axes[0], free, "as it is"), (axes[1], pressed, "control points within the bound")):
            _warped_plane(ax, u)
            found = folds(u)
            ax.set_title(
                f"{title}\nleast det J {found['least det J']:.2f}, {share(found['volume turned over (%)'])} turned over"
            )
        for fold_free, colour, text in (
            (False, HIGHLIGHT, "as it is"),
            (True, COLOURS["gridreg-adaptive"], "within the bound"),
        ):
            axes[2].plot(SIZES, least_determinants(name, grid, SIZES, fold_free, "bspline"), color=colour, label=text)
        axes[2].axhline(0, color=NEUTRAL, lw=0.8, ls="--")
        axes[2].axvline(bound, color="#888888", lw=0.8, label=f"bound: {bound:.2f} spacings")
        axes[2].axvline(size, color="#888888", lw=0.8, ls=":", label="shown on the left")
        axes[2].set(xlabel="largest displacement asked for (control spacings)", ylabel="least det J", ylim=(-3, 1.1))
        axes[2].legend(loc="lower left", framealpha=0.9)
        _determinant_bar(figure, axes[:2], "volume")
        _place_caption(figure, "Lines of the middle plane of a cube, seen from above")
    return figure
