"""Figures 3 and 4 of the paper: the landmarks of one test pair, a slice through each in both images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from gridreg.errors import InputError
from gridreg.explorer.slices import VIEWS, show_slice
from study.reporting.figures.slices import ALL_LETTERS, show_contour
from study.reporting.figures.style import PAGE, SMALL, letter, missing_figure, origin, save_figure
from study.style import FIXED_COLOUR, WARPED_COLOUR, styled


def landmark_figure(
    path: Path | str,
    images: Mapping[str, np.ndarray],
    landmarks: Mapping[str, Mapping[str, np.ndarray]],
    labels: Mapping[str, np.ndarray | None],
    spacing_mm: float,
    title: str,
    caption: Sequence[str],
    view: str = "axial",
) -> Figure:
    """A column for every landmark that both images have, fixed above moving.

    Writes ``<path>.png``, ``.pdf`` and ``.txt``. InputError where no landmark is in both images.

    images     {"fixed", "moving"} → (W, H, D) in [0, 1]
    landmarks  {"fixed", "moving"} → {name: position in voxels, (3,)}
    labels     {"fixed", "moving"} → (W, H, D), outlined; or None

    caption    its sentences

    The number under a moving panel is the distance in mm between the landmark in the two images.
    """
    names = [name for name in landmarks["fixed"] if name in landmarks["moving"]]
    if not names:
        raise InputError(f"{path}: no landmark is in both images, expected at least one")
    cut, across, up, _ = VIEWS[view]
    shape = images["fixed"].shape
    width, ratio = min(1.3, (PAGE - 0.3) / len(names)), shape[up] / shape[across]
    with styled():
        figure, axes = plt.subplots(
            2,
            len(names),
            figsize=(width * len(names) + 0.3, 2 * width * ratio + 0.9),
            squeeze=False,
            layout="constrained",
        )
        for number, (row, (side, colour)) in enumerate(zip(axes, (("fixed", FIXED_COLOUR), ("moving", WARPED_COLOUR)))):
            row[0].set_ylabel(f"{letter(number)} {side.capitalize()}")
            for ax, name in zip(row, names):
                point = np.asarray(landmarks[side][name], float)
                index = int(np.clip(round(point[cut]), 0, shape[cut] - 1))
                show_slice(ax, images[side], view, index, [spacing_mm] * 3, letters=name == names[0])
                show_contour(ax, labels[side], view, index, colour)
                ax.plot(point[across], point[up], "+", ms=9, mew=1.4, color="#F0E442")
                if side == "fixed":
                    ax.set_title(textwrap.fill(name, int(11 * width), break_long_words=False), fontsize=SMALL)
                else:
                    distance = spacing_mm * np.linalg.norm(point - landmarks["fixed"][name])
                    ax.set_xlabel(f"{distance:.1f} mm", fontsize=SMALL)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    save_figure(figure, path, *caption)
    return figure


def pair_with_most_landmarks(data, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """The (fixed, moving) of ``pairs`` of a ``Preprocessed`` dataset with the most landmarks in both; of several, the first."""
    return max(
        pairs, key=lambda pair: len((data.landmarks(pair[0]) or {}).keys() & (data.landmarks(pair[1]) or {}).keys())
    )


def dataset_landmarks(path: Path | str, data, view: str = "axial") -> Figure:
    """``landmark_figure`` of a test pair of a ``Preprocessed`` dataset, with its title and caption."""
    pair = dict(zip(("fixed", "moving"), pair_with_most_landmarks(data, data.pairs("test"))))
    name, simulated = data.index["name"], bool(data.index["simulated"])
    if not all(data.landmarks(subject) for subject in pair.values()):
        return missing_figure(path, f"No test pair of {name} has landmarks, so there is nothing to show.")
    title = f"Landmarks of a {'simulated ' if simulated else ''}test pair: {name}"
    outlined = len(data.index["labels"]) == 1  # the outlines of many would hide what lies below
    caption = (
        f"{title}.",
        origin(simulated, "cohort"),
        f"{view.capitalize()} slices through each landmark (yellow cross). (a) Fixed image, {pair['fixed']}. (b) Moving image, "
        f"{pair['moving']}; the number below is the distance to the landmark in the fixed image.",
        "Outlines: masks." if outlined else "",
        ALL_LETTERS,
    )
    images = {side: data.image(subject) for side, subject in pair.items()}
    landmarks = {side: data.landmarks(subject) or {} for side, subject in pair.items()}
    labels = {side: data.labels(subject) if outlined else None for side, subject in pair.items()}
    return landmark_figure(path, images, landmarks, labels, data.spacing, title, caption, view)
