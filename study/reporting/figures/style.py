"""How a figure reaches the disk: no wider than a printed page, panels lettered, the caption beside it as text.

Colours and type are those of ``study.style``. A caption is not drawn: ``<path>.txt`` holds it, and the report
shows it under the figure. Its first sentence is a title.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.style import styled

PAGE = 7.1  # inches: the widest figure, so that 8-point type is 8-point type in print
SMALL = 7  # points: the smallest type for words and numbers


def letter(number: int) -> str:
    """``(a)`` for 0, ``(b)`` for 1, …"""
    return f"({string.ascii_lowercase[number]})"


def letter_panels(axes: Iterable[Axes], start: int = 0) -> None:
    """Write (a), (b), … beside the upper left corner of every panel, from the ``start``-th letter on."""
    for number, ax in enumerate(axes, start):
        ax.text(-0.02, 1.03, letter(number), transform=ax.transAxes, ha="right", va="bottom", fontweight="bold")


def origin(simulated: bool, cohorts: str = "cohorts") -> str:
    """The sentence with which every caption of simulated data goes on after its title; "" for real scans."""
    return f"Simulated {cohorts}, not patients." if simulated else ""


def save_figure(figure: Figure, path: Path | str, *caption: str) -> list[Path]:
    """Write ``<path>.png``, ``<path>.pdf`` and ``<path>.txt``, each in one move; returns the paths.

    caption  its sentences, those that are "" left out

    No file holds a date, so equal figures are equal files.
    """
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
    final = stem.with_name(f"{stem.name}.txt")
    temporary = stem.with_name(f".{stem.name}.tmp.txt")
    temporary.write_text(" ".join(" ".join(caption).split()) + "\n", encoding="utf-8")
    os.replace(temporary, final)
    return [*written, final]


def missing_figure(path: Path | str, sentence: str) -> Figure:
    """A page that says why a figure is missing. Writes ``<path>.png``, ``.pdf`` and ``.txt``."""
    with styled():
        figure = plt.figure(figsize=(6, 1.2))
        figure.text(0.5, 0.5, sentence, ha="center", va="center")
    save_figure(figure, path, sentence)
    return figure
