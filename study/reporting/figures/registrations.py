"""Registration results in slices (paper Figures 5 and 6), and a test pair of a cohort in three views.

Volumes are (W, H, D), canonical RAS: axis 0 points to the patient's right, axis 1 to the front, axis 2 to the head. Axial
and coronal slices are in radiological convention, with the patient's right on the left of the panel; letters say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gridreg.errors import InputError
from gridreg.explorer.slices import VIEWS, central_voxel, show_slice
from gridreg.scans.volumes import read_displacement
from study.cohorts.dataset import Preprocessed
from study.reporting.figures.slices import ALL_LETTERS, AXIAL_LETTERS, show_contour, show_deformed_grid
from study.reporting.figures.style import PAGE, SMALL, letter, origin, save_figure
from study.reporting.results import METRICS, REFERENCE, in_order, run_label
from study.style import FIXED_COLOUR, WARPED_COLOUR, styled

GRIDREG = "gridreg"  # the method of which one run is pictured
SCORES = ("dice", "tre_mm", "landmark_mm")


# --- gathered from an evaluation ---------------------------------------------------------------------------------


def pictured_runs(cases: pd.DataFrame) -> list[str]:
    """The runs of Figures 5 and 6, as in the paper: every other method, and GridReg's main run."""
    methods = cases.groupby("run")["method"].first()
    return in_order(run for run, method in methods.items() if run == REFERENCE or method not in (GRIDREG, "identity"))


def pictured_cases(
    data: Preprocessed, folder: Path | str, runs: list[str], cases: pd.DataFrame
) -> list[dict[str, Any]]:
    """One dict per case for ``registration_figure``, for the test pairs of which every run has pictures.

    folder  results/evaluate/<dataset>
    cases   per-case results at the chosen grids (``results.chosen_rows``)
    """
    gathered = []
    for fixed, moving in data.pairs("test"):
        stems = {run: Path(folder) / run / "pictures" / f"{fixed}__{moving}" for run in runs}
        if not all(Path(f"{stem}.nii.gz").is_file() for stem in stems.values()):
            continue
        of_pair = cases[(cases["fixed"] == fixed) & (cases["moving"] == moving)].set_index("run")
        gathered.append({
            "name": fixed, "pair": (fixed, moving),
            "fixed": data.image(fixed), "fixed_labels": data.labels(fixed),
            "moving": data.image(moving), "moving_labels": data.labels(moving),
            "methods": {run: _read_picture(stem) for run, stem in stems.items()},
            "scores": {run: of_pair.loc[run, list(SCORES)].to_dict() for run in of_pair.index},
        })  # fmt: skip
    return gathered


def _read_picture(stem: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(warped image, warped labels or None, displacement in voxels) of one saved case."""
    labels = Path(f"{stem}_labels.nii.gz")
    return (
        np.asarray(nibabel.load(f"{stem}.nii.gz").dataobj, np.float32),
        np.asarray(nibabel.load(labels).dataobj, np.int16) if labels.is_file() else None,
        read_displacement(f"{stem}_displacement.nii.gz")[0],
    )


# --- Figures 5 and 6 ---------------------------------------------------------------------------------------------


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
    caption: Sequence[str],
    view: str = "axial",
    groups: Sequence[Sequence[int]] | None = None,
    deformed_grid: bool = True,
) -> Figure:
    """Per case a row of fixed, moving and every method's warped moving image, and a row of deformed grids.

    Every case holds ``fixed`` (W, H, D) in [0, 1], ``moving`` likewise, and ``methods``: run → (warped (W, H, D),
    warped_labels (W, H, D) or None, displacement (3, W, H, D) voxels or None); optionally ``fixed_labels``,
    ``moving_labels``, ``name``, ``pair`` (fixed, moving) and ``scores``: run → {"dice", "tre_mm" …}; those of "identity"
    stand under the moving image. The slice goes through the centroid of the fixed labels. ``groups`` of label values get
    one contour each; without, all labels share one. Writes ``<path>.png``, ``.pdf`` and ``.txt``.
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
    n_rows, n_columns = per_case * len(cases), 2 + len(methods)
    width = min(1.18, (PAGE - 0.3) / n_columns)
    size = (width * n_columns + 0.3, len(cases) * (per_case * width * ratio + 0.28) + 0.5)
    with styled():
        figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.015, h_pad=0.025, wspace=0.01, hspace=0.01)
        for number, case in enumerate(cases):
            row = axes[per_case * number]
            index = central_voxel(case.get("fixed_labels"), shape)[cut]
            scores = case.get("scores", {})
            columns = [
                ("fixed", case["fixed"], None, ""),
                ("moving", case["moving"], case.get("moving_labels"), "identity"),
            ]
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
                    ax.set_title(_head(name), fontsize=SMALL)
            row[0].set_ylabel(f"{letter(number)} {case.get('name', f'case {number + 1}')}", fontsize=SMALL)
            if has_grids:
                fields = [case["methods"][run][2] for run in methods]
                _grid_row(axes[per_case * number + 1], fields, view, index, spacing_mm)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    save_figure(figure, path, *caption)
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
    row[1].text(0.98, 0.5, "deformed\ngrid", transform=row[1].transAxes, ha="right", va="center", fontsize=SMALL)


def cohort_registrations(
    path: Path | str, what: str, cases: Sequence[Mapping[str, Any]], methods: Sequence[str], spacing_mm: Sequence[float],
    simulated: bool = True, deformed_grid: bool = True, note: str = "", groups: Sequence[Sequence[int]] | None = None,
) -> Figure:  # fmt: skip
    """``registration_figure`` of a cohort, say "prostate", with its title and caption."""
    title = f"{what[:1].upper()}{what[1:]} registration" + (" (simulated)" if simulated else "")
    caption = [f"{title}.", *_caption(what, simulated, cases, deformed_grid), note]
    return registration_figure(path, cases, methods, spacing_mm, title, caption, "axial", groups, deformed_grid)


def figure5(path: Path | str, cases: Sequence[Mapping[str, Any]], *arguments: Any, **more: Any) -> Figure:
    """Figure 5, prostate, up to four cases; arguments as in ``cohort_registrations``."""
    return cohort_registrations(path, "prostate", cases[:4], *arguments, **more)


def figure6(path: Path | str, cases: Sequence[Mapping[str, Any]], *arguments: Any, **more: Any) -> Figure:
    """Figure 6, brain, up to two cases; arguments as in ``cohort_registrations``."""
    return cohort_registrations(path, "brain", cases[:2], *arguments, **more)


def _caption(what: str, simulated: bool, cases: Sequence[Mapping[str, Any]], deformed_grid: bool) -> list[str]:
    """Sentences on what is seen; masks, grids and scores are explained only where there are any."""
    fixed = any(case.get("fixed_labels") is not None for case in cases)
    results = [result for case in cases for result in case["methods"].values()]
    shown = any(case.get("moving_labels") is not None for case in cases)
    shown |= any(labels is not None for _, labels, _ in results)
    scores = [score for case in cases for score in case.get("scores", {}).values()]
    where = "centroid of the fixed mask" if fixed else "centre of the fixed image"
    masks = ["orange: fixed mask"] * fixed + ["blue: mask of the image shown"] * shown
    sentences = [
        origin(simulated, f"{what} cohort"),
        f"Axial slices through the {where}" + (f"; {', '.join(masks)}." if masks else "."),
    ]
    sentences.append(AXIAL_LETTERS)
    if deformed_grid and any(field is not None for _, _, field in results):
        sentences.append(
            "Deformed grid: lines of the fixed image, carried to the moving image by the displacement field."
        )
    if any(np.isfinite(score.get("tre_mm", np.nan)) for score in scores):
        inside = "over the fixed mask" if fixed else "over the image"
        sentences.append(f"TRE: mean distance between the displacement found and the true one, {inside} in 3-D.")
    pairs = [f"{letter(n)} {case['pair'][0]} and {case['pair'][1]}" for n, case in enumerate(cases) if "pair" in case]
    if pairs:
        sentences.append(f"Fixed and moving image of each case: {'; '.join(pairs)}.")
    return sentences


# --- a pair of a cohort ------------------------------------------------------------------------------------------


def cohort_picture(
    path: Path | str,
    cases: Sequence[Mapping[str, Any]],
    title: str = "Simulated cohort",
    caption: Sequence[str] = (),
    groups: Sequence[Sequence[int]] | None = None,
) -> Figure:
    """Three orthogonal views through the mask centroid per subject, with the outline of the mask.

    Every case holds ``image`` (W, H, D) in [0, 1], ``name``, ``spacing_mm`` (3 numbers) and optionally ``labels`` (W, H, D).
    ``cohort_caption`` makes a caption. Writes ``<path>.png``, ``.pdf`` and ``.txt``.
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
        for number, (row, case) in enumerate(zip(axes, cases)):
            centre = central_voxel(case.get("labels"), np.shape(case["image"]))
            for ax, view in zip(row, VIEWS):
                index = centre[VIEWS[view][0]]
                show_slice(ax, case["image"], view, index, case["spacing_mm"])
                show_contour(ax, case.get("labels"), view, index, FIXED_COLOUR, groups)
            row[0].set_ylabel(f"{letter(number)} {case['name']}", fontsize=SMALL)
        figure.suptitle(title, fontsize=9)
    save_figure(figure, path, f"{title}.", *caption)
    return figure


def cohort_caption(simulated: bool, outlined: bool) -> list[str]:
    """Sentences of the caption of a ``cohort_picture``, after its title."""
    where = "centroid of the mask (orange)" if outlined else "centre of the image"
    return [origin(simulated, "cohort"), f"Slices through the {where}.", ALL_LETTERS]
