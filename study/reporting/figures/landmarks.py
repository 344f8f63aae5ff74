"""Figures 3 and 4 of the paper: the landmarks of one test pair, each in a slice of its own through both images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from gridreg.errors import InputError
from gridreg.explorer.slices import ALL_LETTERS, VIEWS, show_contour, show_slice
from gridreg.explorer.style import FIXED_COLOUR, WARPED_COLOUR, styled
from study.reporting.figures.grids import missing_figure
from study.reporting.figures.style import add_caption, save_figure


def landmark_figure(
    path: Path | str,
    images: Mapping[str, np.ndarray],
    landmarks: Mapping[str, Mapping[str, np.ndarray]],
    labels: Mapping[str, np.ndarray | None],
    spacing_mm: float,
    title: str,
    caption: str,
    view: str = "axial",
) -> Figure:
    """A column for every landmark that both images have, fixed above moving. InputError without any. Writes ``<path>.png`` and ``<path>.pdf``.

    images     {"fixed", "moving"} → (W, H, D) in [0, 1]
    landmarks  {"fixed", "moving"} → {name: position in voxels, (3,)}
    labels     {"fixed", "moving"} → (W, H, D), outlined; or None

    Under every moving panel stands how far the landmark is, in mm, from where it is in the fixed image.
    """
    names = [name for name in landmarks["fixed"] if name in landmarks["moving"]]
    if not names:
        raise InputError(f"{path}: no landmark is in both images, expected at least one")
    cut, across, up, _ = VIEWS[view]
    shape = images["fixed"].shape
    width, ratio = 1.3, shape[up] / shape[across]
    with styled():
        figure, axes = plt.subplots(
            2,
            len(names),
            figsize=(width * len(names) + 0.3, 2 * width * ratio + 1.1),
            squeeze=False,
            layout="constrained",
        )
        for row, (side, colour) in zip(axes, (("fixed", FIXED_COLOUR), ("moving", WARPED_COLOUR))):
            row[0].set_ylabel(side.capitalize())
            for ax, name in zip(row, names):
                point = np.asarray(landmarks[side][name], float)
                index = int(np.clip(round(point[cut]), 0, shape[cut] - 1))
                show_slice(ax, images[side], view, index, [spacing_mm] * 3, letters=name == names[0])
                show_contour(ax, labels[side], view, index, colour)
                ax.plot(point[across], point[up], "+", ms=9, mew=1.4, color="#F0E442")
                if side == "fixed":
                    ax.set_title(textwrap.fill(name, 16, break_long_words=False), fontsize=6.5)
                else:
                    distance = spacing_mm * np.linalg.norm(point - landmarks["fixed"][name])
                    ax.set_xlabel(f"{distance:.1f} mm away", fontsize=7)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        add_caption(figure, caption)
        save_figure(figure, path)
    return figure


def pair_with_most_landmarks(data, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """The first of the (fixed, moving) ``pairs`` of a ``Preprocessed`` dataset with the most landmarks in both images."""
    return max(
        pairs, key=lambda pair: len((data.landmarks(pair[0]) or {}).keys() & (data.landmarks(pair[1]) or {}).keys())
    )


def dataset_landmarks(path: Path | str, data, view: str = "axial") -> Figure:
    """``landmark_figure`` of a test pair of a ``Preprocessed`` dataset, with a title and a caption that say what it is."""
    pair = dict(zip(("fixed", "moving"), pair_with_most_landmarks(data, data.pairs("test"))))
    if not all(data.landmarks(subject) for subject in pair.values()):
        return missing_figure(path, f"No test pair of {data.index['name']} has landmarks: nothing to show.")
    simulated = "simulated " if data.index["simulated"] else ""
    title = f"Landmarks of a {simulated}test pair: {data.index['name']}"
    outlined = len(data.index["labels"]) == 1  # the outlines of many would hide what lies below
    caption = (
        f"{view.capitalize()} slice through each landmark (yellow cross) of {pair['fixed']} (fixed) and {pair['moving']} "
        f"(moving){', simulated, not patients' if simulated else ''}. {'Outlines: masks. ' if outlined else ''}{ALL_LETTERS}"
    )
    images = {side: data.image(subject) for side, subject in pair.items()}
    landmarks = {side: data.landmarks(subject) or {} for side, subject in pair.items()}
    labels = {side: data.labels(subject) if outlined else None for side, subject in pair.items()}
    return landmark_figure(path, images, landmarks, labels, data.spacing, title, caption, view)
