"""How a figure of this paper looks: as the explorer does, and with a colour for every run."""

from __future__ import annotations

from gridreg.explorer.style import FIXED_COLOUR, IMAGE, MAGNITUDE, RC, SIGNED, styled

__all__ = [
    "COLOURS",
    "FIXED_COLOUR",
    "IMAGE",
    "MAGNITUDE",
    "NEUTRAL",
    "OTHERS",
    "RC",
    "SIGNED",
    "WARPED_COLOUR",
    "colour",
    "styled",
]

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


def colour(run: str) -> str:
    """The colour of a run, the same in every figure; a run without one of its own is dark grey."""
    return COLOURS.get(run, "#444444")
