"""Slices of a volume as radiologists see them, with letters and the lines of a deformed grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke

from gridreg.errors import InputError
from gridreg.explorer.style import IMAGE

# name → (axis cut, axis across, axis up, letters at left, right, top, bottom); the axis across runs leftwards in all
VIEWS = {"axial": (2, 0, 1, "RLAP"), "coronal": (1, 0, 2, "RLSI"), "sagittal": (0, 1, 2, "APSI")}
_PLACES = ((0.04, 0.5, "left", "center"), (0.96, 0.5, "right", "center"), (0.5, 0.96, "center", "top"),
           (0.5, 0.04, "center", "bottom"))  # fmt: skip
_OUTLINE = [withStroke(linewidth=1.4, foreground="black")]  # white letters stay readable on bright tissue


def central_voxel(labels: np.ndarray | None, shape: Sequence[int]) -> tuple[int, int, int]:
    """Centroid of the mask (labels > 0), rounded to a voxel; the centre of the volume where there is none."""
    if labels is None or not (labels > 0).any():
        return tuple(int(n) // 2 for n in shape)
    return tuple(int(round(float(axis.mean()))) for axis in np.nonzero(labels > 0))


def slice_of(volume: np.ndarray, view: str, index: int) -> np.ndarray:
    """(W, H, D) → slice of a view, (axis up, axis across); drawing it mirrors the axis across."""
    if view not in VIEWS:
        raise InputError(f"view {view!r} is unknown, expected one of {', '.join(VIEWS)}")
    return np.take(volume, index, axis=VIEWS[view][0]).T  # across comes before up in every view


def show_slice(
    ax: Axes,
    volume: np.ndarray,
    view: str,
    index: int,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    limits: tuple[float, float] = (0.0, 1.0),
    letters: bool = True,
    cmap: str = IMAGE,
) -> AxesImage:
    """Draw one slice of ``volume`` (W, H, D) in voxel coordinates, with the aspect of its voxels and orientation letters."""
    plane = slice_of(volume, view, index)
    drawn = ax.imshow(plane, origin="lower", vmin=limits[0], vmax=limits[1], interpolation="nearest", cmap=cmap)
    frame(ax, volume.shape, view, spacing_mm)
    for letter, (x, y, ha, va) in zip(VIEWS[view][3], _PLACES if letters else ()):
        ax.text(x, y, letter, transform=ax.transAxes, ha=ha, va=va, fontsize=6, color="white", path_effects=_OUTLINE)
    return drawn


def frame(ax: Axes, shape: Sequence[int], view: str, spacing_mm: Sequence[float]) -> None:
    """Limits of a whole slice, mirrored across, without ticks."""
    _, across, up, _ = VIEWS[view]
    ax.set(xlim=(shape[across] - 0.5, -0.5), ylim=(-0.5, shape[up] - 0.5), xticks=[], yticks=[])
    ax.set_aspect(spacing_mm[up] / spacing_mm[across])
    ax.spines[:].set_visible(False)


def grid_lines(displacement: np.ndarray, view: str, index: int, lines: int = 16) -> list[np.ndarray]:
    """Lines of the fixed grid carried by x + u(x), projected on a slice: each (N, 2), voxels across and up."""
    u, v = (slice_of(displacement[axis], view, index) for axis in VIEWS[view][1:3])  # (rows, columns)
    rows, columns = np.indices(u.shape)
    return lines_through(np.stack([columns + u, rows + v]), max(1, round(max(u.shape) / lines)))


def lines_through(points: np.ndarray, step: int) -> list[np.ndarray]:
    """Every ``step``-th line of a mesh of points (2, n, m) in voxels, along either axis: each (N, 2)."""
    return [*np.moveaxis(points[:, ::step], 0, -1), *np.moveaxis(points[:, :, ::step], 0, -1).swapaxes(0, 1)]
