"""Figures made of image slices: registration results (paper Figures 5 and 6) and the contact sheet of a cohort.

Volumes are (W, H, D), canonical RAS: axis 0 points to the patient's right side … 2 to the head. Axial and coronal slices
are shown as radiologists do, the patient's right on the left of the panel; letters on the panels say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke

from gridreg.errors import InputError
from gridreg.results import METRICS, run_label
from gridreg.style import FIXED_COLOUR, IMAGE, WARPED_COLOUR, add_caption, save_figure, styled

# name → (axis cut, axis across, axis up, letters at left, right, top, bottom); the axis across runs leftwards in all
VIEWS = {
    "axial": (2, 0, 1, "RLAP"),
    "coronal": (1, 0, 2, "RLSI"),
    "sagittal": (0, 1, 2, "APSI"),
}
AXIAL_LETTERS = "R, L, A, P: the patient's right, left, front, back."
ALL_LETTERS = "R, L, A, P, S, I: the patient's right, left, front, back, head, foot."
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
    _frame(ax, volume.shape, view, spacing_mm)
    if letters:
        for name, (x, y) in zip(VIEWS[view][3], [(0.04, 0.5), (0.96, 0.5), (0.5, 0.96), (0.5, 0.04)]):
            ha = "left" if x < 0.1 else "right" if x > 0.9 else "center"
            va = "bottom" if y < 0.1 else "top" if y > 0.9 else "center"
            ax.text(x, y, name, transform=ax.transAxes, ha=ha, va=va, fontsize=6, color="white", path_effects=_OUTLINE)
    return drawn


def _frame(ax: Axes, shape: Sequence[int], view: str, spacing_mm: Sequence[float]) -> None:
    """Limits of a whole slice, mirrored across, without ticks."""
    _, across, up, _ = VIEWS[view]
    ax.set(xlim=(shape[across] - 0.5, -0.5), ylim=(-0.5, shape[up] - 0.5), xticks=[], yticks=[])
    ax.set_aspect(spacing_mm[up] / spacing_mm[across])
    for spine in ax.spines.values():
        spine.set_visible(False)


def show_contour(
    ax: Axes, labels: np.ndarray | None, view: str, index: int, colour: str, groups: Sequence[Sequence[int]] | None = None
) -> None:
    """Outline of labels (W, H, D) on a slice: of all labels together, or one line per group of label values."""
    if labels is None:
        return
    plane = slice_of(labels, view, index)
    for mask in [plane > 0] if groups is None else [np.isin(plane, group) for group in groups]:
        if mask.any() and not mask.all():
            ax.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=0.8)


def grid_lines(displacement: np.ndarray, view: str, index: int, lines: int = 16) -> list[np.ndarray]:
    """Lines of the fixed grid carried by x + u(x), projected on a slice: each (N, 2), voxels across and up."""
    u, v = (slice_of(displacement[axis], view, index) for axis in VIEWS[view][1:3])  # across and up, each (rows, columns)
    rows, columns = np.mgrid[: u.shape[0], : u.shape[1]].astype(float)
    return lines_through(np.stack([columns + u, rows + v]), max(1, round(max(u.shape) / lines)))


def lines_through(points: np.ndarray, step: int) -> list[np.ndarray]:
    """Every ``step``-th line of a mesh of points (2, n, m) in voxels, along either axis: each (N, 2)."""
    return [*np.moveaxis(points[:, ::step], 0, -1), *np.moveaxis(points[:, :, ::step], 0, -1).swapaxes(0, 1)]


def show_deformed_grid(
    ax: Axes, displacement: np.ndarray, view: str, index: int, spacing_mm: Sequence[float], lines: int = 16
) -> None:
    """Lines of the fixed grid carried to the moving image by x + u(x), projected on the slice.

    ``displacement`` (3, W, H, D) in voxels; about ``lines`` lines along the longer axis.
    """
    tracks = grid_lines(displacement, view, index, lines)
    ax.add_collection(LineCollection(tracks, colors="#222222", linewidths=0.5))
    _frame(ax, displacement.shape[1:], view, spacing_mm)


def _score_text(scores: Mapping[str, float] | None) -> str:
    """``Dice 0.88`` above ``TRE 2.1 mm``; what is unknown is left out."""
    scores = scores or {}
    parts = []
    if np.isfinite(scores.get("dice", np.nan)):
        parts.append(f"Dice {scores['dice']:.2f}")
    for name, short in (("tre_mm", "TRE"), ("landmark_mm", "landmarks"), ("mask_mm", "centroid")):
        if np.isfinite(scores.get(name, np.nan)):
            parts.append(f"{short} {scores[name]:.1f} {METRICS[name].unit}")
            break
    return "\n".join(parts)


def registration_figure(
    path: Path | str,
    cases: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    spacing_mm: Sequence[float],
    title: str,
    caption: str,
    view: str = "axial",
    groups: Sequence[Sequence[int]] | None = None,
    deformed_grid: bool = True,
) -> Figure:
    """Figures 5 and 6: per case a row of fixed, moving and every method's warped moving image (and a row of grids).

    Every case holds ``fixed`` (W, H, D) in [0, 1], ``moving`` likewise, and ``methods``: run → (warped (W, H, D),
    warped_labels (W, H, D) or None, displacement (3, W, H, D) voxels or None); optionally ``fixed_labels``,
    ``moving_labels``, ``name``, ``pair`` (fixed, moving) and ``scores``: run → {"dice", "tre_mm" …}, "identity" standing
    under the moving image. The slice goes through the centroid of the fixed labels. ``groups`` of label values get a
    contour each, else all labels together. Writes ``<path>.png`` and ``<path>.pdf``.
    """
    if not cases:
        raise InputError(f"{path}: no case to show, expected at least one test pair")
    for case in cases:
        for run in methods:
            if run not in case["methods"]:
                raise InputError(f"{path}: case {case.get('name', '')} has no result of {run}, expected every method")
    has_grids = deformed_grid and any(case["methods"][run][2] is not None for case in cases for run in methods)
    per_case = 2 if has_grids else 1
    cut, across, up = VIEWS[view][:3]
    shape = np.shape(cases[0]["fixed"])
    ratio = shape[up] * spacing_mm[up] / (shape[across] * spacing_mm[across])
    width = 1.18
    n_rows, n_columns = per_case * len(cases), 2 + len(methods)
    size = (width * n_columns + 0.3, len(cases) * (per_case * width * ratio + 0.28) + 0.8)
    with styled():
        figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.015, h_pad=0.025, wspace=0.01, hspace=0.01)
        for number, case in enumerate(cases):
            row = axes[per_case * number]
            index = central_voxel(case.get("fixed_labels"), shape)[cut]
            scores = case.get("scores", {})
            columns = [("fixed", case["fixed"], None, ""), ("moving", case["moving"], case.get("moving_labels"), "identity")]
            columns += [(run, *case["methods"][run][:2], run) for run in methods]
            for ax, (name, volume, warped_labels, scored) in zip(row, columns):
                if np.shape(volume) != np.shape(case["fixed"]):
                    found, wanted = np.shape(volume), np.shape(case["fixed"])
                    raise InputError(f"{path}: {name} image of shape {found}, expected {wanted} as the fixed one")
                show_slice(ax, volume, view, index, spacing_mm, letters=name == "fixed")
                show_contour(ax, case.get("fixed_labels"), view, index, FIXED_COLOUR, groups)
                show_contour(ax, warped_labels, view, index, WARPED_COLOUR, groups)
                ax.set_xlabel(_score_text(scores.get(scored)), fontsize=6.5, labelpad=2)
                if number == 0:
                    ax.set_title(_head(name), fontsize=8)
            row[0].set_ylabel(case.get("name", f"case {number + 1}"), fontsize=7)
            if has_grids:
                fields = [case["methods"][run][2] for run in methods]
                _grid_row(axes[per_case * number + 1], fields, view, index, spacing_mm)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        add_caption(figure, caption)
        save_figure(figure, path)
    return figure


def _head(name: str) -> str:
    """Column head, broken where two lines fit a narrow panel better."""
    return {"fixed": "Fixed", "moving": "Moving"}.get(name) or run_label(name).replace(" (", "\n(")


def _grid_row(
    row: Sequence[Axes], fields: Sequence[np.ndarray | None], view: str, index: int, spacing_mm: Sequence[float]
) -> None:
    for ax in row:
        ax.set_axis_off()
    for ax, displacement in zip(row[2:], fields):
        if displacement is not None:
            show_deformed_grid(ax, displacement, view, index, spacing_mm)
    row[1].text(0.98, 0.5, "deformed\ngrid", transform=row[1].transAxes, ha="right", va="center", fontsize=7)


def cohort_registrations(
    path: Path | str, what: str, cases: Sequence[Mapping[str, Any]], methods: Sequence[str], spacing_mm: Sequence[float],
    simulated: bool = True, deformed_grid: bool = True, note: str = "", groups: Sequence[Sequence[int]] | None = None,
) -> Figure:  # fmt: skip
    """``registration_figure`` of a cohort, say "prostate", with a title and a caption that say what is seen."""
    title = f"{what[:1].upper()}{what[1:]} registration" + (" (simulated)" if simulated else "")
    caption = _caption(what, simulated, cases, deformed_grid, note)
    return registration_figure(path, cases, methods, spacing_mm, title, caption, "axial", groups, deformed_grid)


def figure5(path: Path | str, cases: Sequence[Mapping[str, Any]], *arguments: Any, **more: Any) -> Figure:
    """Figure 5, prostate, up to four cases; arguments as in ``cohort_registrations``."""
    return cohort_registrations(path, "prostate", cases[:4], *arguments, **more)


def figure6(path: Path | str, cases: Sequence[Mapping[str, Any]], *arguments: Any, **more: Any) -> Figure:
    """Figure 6, brain, up to two cases; arguments as in ``cohort_registrations``."""
    return cohort_registrations(path, "brain", cases[:2], *arguments, **more)


def _caption(what: str, simulated: bool, cases: Sequence[Mapping[str, Any]], deformed_grid: bool, note: str) -> str:
    """What is seen; masks, grids and scores are explained only where there are any."""
    fixed = any(case.get("fixed_labels") is not None for case in cases)
    results = [result for case in cases for result in case["methods"].values()]
    shown = any(case.get("moving_labels") is not None for case in cases)
    shown |= any(labels is not None for _, labels, _ in results)
    scores = [score for case in cases for score in case.get("scores", {}).values()]
    where = "centroid of the fixed mask" if fixed else "centre of the fixed image"
    parts = [f"Simulated {what} cohort, not patients."] if simulated else []
    masks = ["orange: fixed mask"] * fixed + ["blue: mask of the image shown"] * shown
    parts += [f"Axial slice through the {where}" + (f"; {', '.join(masks)}." if masks else "."), AXIAL_LETTERS]
    if deformed_grid and any(field is not None for _, _, field in results):
        parts += ["Deformed grid: lines of the fixed image, carried to the moving image by the displacement found, in the slice."]
    if any(np.isfinite(score.get("tre_mm", np.nan)) for score in scores):
        inside = "over the fixed mask" if fixed else "over the image"
        parts += [f"TRE: distance between the displacement found and the true one, mean {inside}, all slices."]
    pairs = ["{} and {}".format(*case["pair"]) for case in cases if "pair" in case]
    parts += [f"Rows (fixed and moving image): {'; '.join(pairs)}."] * bool(pairs)
    return " ".join(part for part in [*parts, note] if part)


def cohort_picture(
    path: Path | str,
    cases: Sequence[Mapping[str, Any]],
    title: str = "Simulated cohort",
    caption: str = "",
    groups: Sequence[Sequence[int]] | None = None,
) -> Figure:
    """Contact sheet: three orthogonal views through the mask centroid per subject, with the mask outline.

    Every case holds ``image`` (W, H, D) in [0, 1], ``name``, ``spacing_mm`` (3 numbers) and optionally ``labels`` (W, H, D).
    ``cohort_caption`` makes a caption. Writes ``<path>.png`` and ``<path>.pdf``.
    """
    if not cases:
        raise InputError(f"{path}: no subject to show, expected at least one")
    extents = [np.shape(cases[0]["image"])[axis] * cases[0]["spacing_mm"][axis] for axis in range(3)]
    height = 1.72 * max(extents[up] / extents[across] for _, across, up, _ in VIEWS.values())
    with styled():
        figure, axes = plt.subplots(
            len(cases), 3, figsize=(5.4, height * len(cases) + 0.7), squeeze=False, layout="constrained"
        )
        for view, ax in zip(VIEWS, axes[0]):
            ax.set_title(view.capitalize())
        for row, case in zip(axes, cases):
            centre = central_voxel(case.get("labels"), np.shape(case["image"]))
            for ax, view in zip(row, VIEWS):
                index = centre[VIEWS[view][0]]
                show_slice(ax, case["image"], view, index, case["spacing_mm"])
                show_contour(ax, case.get("labels"), view, index, FIXED_COLOUR, groups)
            row[0].set_ylabel(case["name"], fontsize=7)
        figure.suptitle(title, fontsize=9)
        if caption:
            add_caption(figure, caption)
        save_figure(figure, path)
    return figure


def cohort_caption(simulated: bool, outlined: bool) -> str:
    """The caption of a ``cohort_picture``."""
    origin = "Simulated cohort, not patients. " if simulated else ""
    where = "centroid of the mask (orange)" if outlined else "centre of the image"
    return f"{origin}Slices through the {where}. {ALL_LETTERS}"
