"""Lesson 2, the pictures: bases along a line, warped lines with their Jacobian determinant, a warped cube, the bound."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from gridreg.interpolation import METHODS
from gridreg.lesson_basis import NAMES, SHAPE, bound_in_spacings, field, folds, least_determinants, profile
from gridreg.metrics import jacobian_determinant
from gridreg.panels import lines_through
from gridreg.style import COLOURS, MAGNITUDE, NEUTRAL, SIGNED, styled

FINE = 401  # places along a line
VALUES = np.random.default_rng(3).uniform(-1, 1, 30)  # displacements of the other control points, in control spacings
DETERMINANT = TwoSlopeNorm(1, vmin=-1, vmax=3)  # 1 keeps its volume, 0 and below is folded
HIGHLIGHT, QUIET = COLOURS["voxelmorph"], "#BBBBBB"
SIZES = tuple(np.linspace(0, 2, 21).round(2).tolist())  # control spacings


def line_figure(grid: int, point: int, size: float) -> Figure:
    """One dimension, a basis a column: the basis functions, the displacement they add up to, and its slope.

    ``point`` counts from 1 and is moved by ``size`` control spacings; the others stay where they are.
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
                functions.plot(x, weights, color=HIGHLIGHT if chosen else QUIET, zorder=2 + chosen, lw=1.8 if chosen else 0.9)
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
    """Warped lines of the middle plane on its Jacobian determinant; what has folded is outlined."""
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
    """Two dimensions: warped lines and det J of a pattern of control-point displacements, a basis a panel."""
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
    """``0.2 %``; what is not nothing is not printed as such."""
    return f"{percent:.2g} %" if percent >= 0.001 else "less than 0.001 %" if percent else "0 %"


def _determinant_bar(figure: Figure, axes: np.ndarray, kept: str) -> None:
    bar = figure.colorbar(axes[-1].collections[0], ax=axes, shrink=0.75, extend="both", ticks=(-1, 0, 1, 2, 3))
    bar.set_label(f"det J (1: {kept} kept)")


def _place_caption(figure: Figure, what: str = "Lines of the fixed grid") -> None:
    figure.supxlabel(f"{what}, carried by x + u(x) and coloured by det J there. Orange: det J = 0.", fontsize=7,
                     color="#333333", x=0.01, ha="left")  # fmt: skip


def _lines(displacement: np.ndarray, step: int = 5) -> tuple[list[np.ndarray], list[float]]:
    """Warped lines (n, 3) on the three middle planes of a cube, and how far each is carried on average, in voxels."""
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
    """Three dimensions: the three middle planes of a cube, warped, coloured by how far each line is carried."""
    spacing = (SHAPE[0] - 1) / (grid - 1)
    with styled():
        figure = Figure(figsize=(10.2, 4.2), layout="constrained", label=f"A cube warped by a {name} pattern, three bases")
        for number, method in enumerate(METHODS, start=1):
            ax = figure.add_subplot(1, len(METHODS), number, projection="3d")
            u = field(name, grid, size, method, 3)
            tracks, lengths = _lines(u)
            lines = Line3DCollection(tracks, cmap=MAGNITUDE, linewidths=0.8)
            lines.set_array(np.array(lengths))
            lines.set_clim(0, size * spacing)
            ax.add_collection(lines)
            limits = (-3, SHAPE[0] + 2)
            ax.set(xlim=limits, ylim=limits, zlim=limits, xlabel="x (voxels)", ylabel="y", zlabel="z", box_aspect=(1, 1, 1))
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
            ax.set_title(f"{title}\nleast det J {found['least det J']:.2f}, {share(found['volume turned over (%)'])} turned over")
        for fold_free, colour, text in ((False, HIGHLIGHT, "as it is"), (True, COLOURS["gridreg-adaptive"], "within the bound")):
            axes[2].plot(SIZES, least_determinants(name, grid, SIZES, fold_free, "bspline"), color=colour, label=text)
        axes[2].axhline(0, color=NEUTRAL, lw=0.8, ls="--")
        axes[2].axvline(bound, color="#888888", lw=0.8, label=f"bound: {bound:.2f} spacings")
        axes[2].axvline(size, color="#888888", lw=0.8, ls=":", label="shown on the left")
        axes[2].set(xlabel="largest displacement asked for (control spacings)", ylabel="least det J", ylim=(-3, 1.1))
        axes[2].legend(loc="lower left", framealpha=0.9)
        _determinant_bar(figure, axes[:2], "volume")
        _place_caption(figure, "Lines of the middle plane of a cube, seen from above")
    return figure
