"""Colours, fonts and colour maps of the explorer, which figures share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import matplotlib as mpl

MAGNITUDE = "viridis"  # ≥ 0: displacement length, uncertainty, error
SIGNED = "RdBu_r"  # around 0: displacement component, log det J
IMAGE = "gray"

FIXED_COLOUR = "#E69F00"  # what belongs to the fixed image
GRID_COLOUR = "#009E73"  # lines of a deformed grid

RC = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "image.cmap": IMAGE,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType: text stays text
    "ps.fonttype": 42,
    "svg.fonttype": "none",
}


def styled() -> AbstractContextManager:
    """``with styled():`` — everything drawn inside looks like a figure of this repository."""
    return mpl.rc_context(RC)
