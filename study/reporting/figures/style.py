"""How every figure looks: type, colours, colour maps, and how a figure reaches the disk.

Colours of methods are fixed, from the Okabe–Ito set that stays distinct under colour blindness; GridReg is dark blue,
its separately trained grids lighter the coarser they are. Magnitudes are drawn with a perceptually uniform sequential
map, signed quantities with a diverging one.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from gridreg.explorer.style import styled


def add_caption(figure: Figure, text: str) -> None:
    """A small line under the figure, wrapped to its width (a constrained layout makes room for it)."""
    characters = int(figure.get_size_inches()[0] * 19)
    figure.supxlabel(textwrap.fill(text, characters), fontsize=7, color="#333333", x=0.01, ha="left")


def save_figure(figure: Figure, path: Path | str) -> list[Path]:
    """Write ``<path>.png`` and ``<path>.pdf``, each in one move and without a date, so equal figures are equal files."""
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}}.items():
        final = stem.with_name(f"{stem.name}.{suffix}")
        temporary = stem.with_name(f".{stem.name}.tmp.{suffix}")
        with styled():
            if figure.get_layout_engine() is not None:
                figure.draw_without_rendering()  # settle the layout once, the same for both files
                figure.set_layout_engine("none")
            figure.savefig(temporary, metadata=metadata)
        os.replace(temporary, final)
        written.append(final)
    plt.close(figure)  # a notebook shows the returned figure by displaying it, not by leaving it open
    return written
