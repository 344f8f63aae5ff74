"""What printed slices have beside those of the explorer: contours, a deformed grid alone, and what the letters mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from gridreg.explorer.slices import frame, grid_lines, slice_of

AXIAL_LETTERS = "R, L, A, P: the patient's right, left, front, back."
ALL_LETTERS = "R, L, A, P, S, I: the patient's right, left, front, back, head, foot."


def show_contour(
    ax: Axes,
    labels: np.ndarray | None,
    view: str,
    index: int,
    colour: str,
    groups: Sequence[Sequence[int]] | None = None,
) -> None:
    """Outline of labels (W, H, D) on a slice: of all labels together, or one line per group of label values."""
    if labels is None:
        return
    plane = slice_of(labels, view, index)
    for mask in [plane > 0] if groups is None else [np.isin(plane, group) for group in groups]:
        if mask.any() and not mask.all():
            ax.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=0.8)


def show_deformed_grid(
    ax: Axes, displacement: np.ndarray, view: str, index: int, spacing_mm: Sequence[float], lines: int = 16
) -> None:
    """Lines of the fixed grid carried to the moving image by x + u(x), projected on the slice.

    ``displacement`` (3, W, H, D) in voxels; about ``lines`` lines along the longer axis.
    """
    tracks = grid_lines(displacement, view, index, lines)
    ax.add_collection(LineCollection(tracks, colors="#222222", linewidths=0.5))
    frame(ax, displacement.shape[1:], view, spacing_mm)
