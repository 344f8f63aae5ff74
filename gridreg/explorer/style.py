"""Colours, fonts and colour maps that figures and explorer share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import matplotlib as mpl

MAGNITUDE = "viridis"  # ≥ 0: displacement length, uncertainty, error
SIGNED = "RdBu_r"  # around 0: displacement component, log det J
IMAGE = "gray"

FIXED_COLOUR = "#E69F00"  # contour of the fixed mask
WARPED_COLOUR = "#56B4E9"  # contour of the warped (or moving) mask
NEUTRAL = "#000000"  # what is no single method
OTHERS = ("#222222", "#882255", "#999933")  # series that are no methods: no method has these colours

COLOURS = {
    "identity": "#7F7F7F",
    "ants-syn": "#CC79A7",
    "voxelmorph": "#D55E00",
    "transmorph": "#E69F00",
    "keymorph": "#009E73",
    "gridreg-5": "#8CCBF2",
    "gridreg-8": "#6BB9EA",
    "gridreg-10": "#4AA6DF",
    "gridreg-15": "#2B92D0",
    "gridreg-adaptive": "#0065AB",
    "gridreg-adaptive-refined": "#003F6B",
    "gridreg-bayesian": "#2B3A8C",
}
_UNKNOWN = "#444444"

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


def colour(run: str) -> str:
    """The colour of a run, the same in every figure; any other run is dark grey."""
    return COLOURS.get(run, _UNKNOWN)
