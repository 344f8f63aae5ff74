"""Figure 7 of the paper, the predicted uncertainty beside the error that was made; and its calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.ndimage import distance_transform_edt

from gridreg import calibration
from gridreg.errors import InputError
from gridreg.explorer.slices import VIEWS, central_voxel, show_slice
from study.reporting.figures.slices import AXIAL_LETTERS, show_contour
from study.reporting.figures.style import PAGE, SMALL, letter, letter_panels, origin, save_figure
from study.reporting.paper_numbers import PAPER_DATASETS
from study.reporting.results import dataset_label, in_order
from study.style import FIXED_COLOUR, MAGNITUDE, NEUTRAL, OTHERS, WARPED_COLOUR, styled

TOP_PERCENTILE, NEAR_MM = 99.5, 15.0  # colours end at this percentile, in the mask and so many mm around it
LEVELS = np.linspace(0.01, 0.99, 99)
_MARKERS = "os"


def figure7(path: Path | str, cases: Sequence[Mapping[str, Any]], simulated: bool, note: str = "") -> Figure:
    """A row per case. Writes ``<path>.png``, ``.pdf`` and ``.txt``; InputError without a case.

    Every case holds ``title``, ``fixed`` and ``moving`` (W, H, D) in [0, 1], ``fixed_labels`` and ``moving_labels`` or
    None, ``sigma_mm`` (W, H, D), ``error_mm`` (W, H, D), NaN where it is not known, and ``spacing_mm``.
    """
    if not cases:
        raise InputError(f"{path}: no uncertainty to show, expected at least one case of a Bayesian run")
    with styled():
        figure, axes = plt.subplots(
            len(cases), 4, figsize=(PAGE, 1.62 * len(cases) + 0.3), squeeze=False, layout="constrained"
        )
        for number, (row, case) in enumerate(zip(axes, cases)):
            index = central_voxel(case["fixed_labels"], case["fixed"].shape)[VIEWS["axial"][0]]
            spacing = [case["spacing_mm"]] * 3
            for ax, side, colour in zip(row, ("fixed", "moving"), (FIXED_COLOUR, WARPED_COLOUR)):
                show_slice(ax, case[side], "axial", index, spacing, letters=side == "fixed")
                show_contour(ax, case[f"{side}_labels"], "axial", index, colour)
            maps = (case["sigma_mm"], case["error_mm"])
            near = _near(case["fixed_labels"], case["spacing_mm"], case["fixed"].shape)
            top = max(
                np.percentile(known, TOP_PERCENTILE) for known in (m[near & np.isfinite(m)] for m in maps) if known.size
            )
            for ax, values in zip(row[2:], maps):
                if not (near & np.isfinite(values)).any():
                    ax.set_axis_off()
                    ax.text(0.5, 0.5, "not known", transform=ax.transAxes, ha="center", va="center", color="#555555")
                    continue
                drawn = show_slice(ax, values, "axial", index, spacing, (0.0, top), letters=False, cmap=MAGNITUDE)
                show_contour(ax, case["fixed_labels"], "axial", index, FIXED_COLOUR)
            figure.colorbar(drawn, ax=row[2:], shrink=0.85, pad=0.02, extend="max").set_label("mm", fontsize=7)
            row[0].set_ylabel(f"{letter(number)} {case['title']}", fontsize=SMALL)
        for ax, head in zip(axes[0], ("Fixed", "Moving", "Uncertainty σ", "Error made")):
            ax.set_title(head)
    known = any(np.isfinite(case["error_mm"]).all() for case in cases)
    save_figure(
        figure, path, "Predicted uncertainty and the error that was made.", origin(simulated),
        "Axial slices through the centre of the fixed mask. Orange: fixed mask; blue: moving mask; several labels are "
        f"outlined as one. {AXIAL_LETTERS}",
        "σ = √(σx² + σy² + σz²), as the Bayesian head predicts it. It is carried to the image as the variance of a weighted "
        "sum of independent control points, whose errors average out between them: hence the lattice.",
        "The error is the distance from the true displacement." + ("" if known else " It is not known where the map is white."),
        "σ and error share a colour scale within each row. The scale ends at the larger of the two maps in the mask and "
        f"within {NEAR_MM:g} mm of it.", note,
    )  # fmt: skip
    return figure


def _near(labels: np.ndarray | None, spacing_mm: float, shape: tuple[int, ...]) -> np.ndarray:
    """(W, H, D) bool: in the mask or close to it; everywhere without one."""
    if labels is None or not labels.any():
        return np.ones(shape, bool)
    return distance_transform_edt(labels == 0) * spacing_mm <= NEAR_MM


def calibration_figure(
    path: Path | str,
    measured: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    factors: Mapping[tuple[str, str], float],
    simulated: bool,
    note: str = "",
) -> Figure:
    """Reliability (coverage, spread by bin) and sparsification of the predicted uncertainty, one row per dataset.

    measured   dataset → propagation (``uncertainty.PROPAGATIONS``) → (error, sigma) of its test cases, (3, ...) mm
    factors    (dataset, propagation) → ``calibration.scale`` of its *validation* cases

    Full lines: as predicted. Dashed lines: times the factor. Writes ``<path>.png``, ``.pdf`` and ``.txt``.
    """
    if not measured:
        raise InputError(f"{path}: no uncertainty to show, expected at least one dataset with a Bayesian run")
    datasets = in_order(measured, PAPER_DATASETS)
    tints = dict(zip(measured[datasets[0]], OTHERS[1:]))
    with styled():
        figure = plt.figure(figsize=(PAGE, 2.35 * len(datasets) + 0.6), layout="constrained")
        for place, (part, dataset) in enumerate(
            zip(figure.subfigures(len(datasets), 1, squeeze=False)[:, 0], datasets)
        ):
            row = part.subplots(1, 3)
            letter_panels(row, start=3 * place)
            for number, (name, tint) in enumerate(tints.items()):
                _reliability(row, *measured[dataset][name], factors[dataset, name], tint, number)
            ends = [calibration.coverage(*measured[dataset][name], LEVELS) for name in tints]
            row[0].fill_between(LEVELS, ends[0], ends[-1], color="#EEEEEE", lw=0, zorder=0)
            error, _ = measured[dataset][name]
            fractions, _, best = calibration.sparsification(error, np.ones_like(error))
            row[2].plot(fractions, best, color=NEUTRAL, lw=1.0, ls=(0, (1, 1)))
            row[0].plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
            limit = max(row[1].dataLim.max)
            row[1].plot([0, limit], [0, limit], color="#999999", lw=0.8, ls=":")
            row[2].axhline(1, color="#999999", lw=0.8, ls=":")
            blind = calibration.ause(error, np.ones_like(error))
            _number(row[2], 0, f"AUSE; constant σ: {blind:.2f}", NEUTRAL)
            _number(row[0], 0, "ECE (→ rescaled)", NEUTRAL, low=True)
            _number(row[1], 0, "ENCE (→ rescaled)", NEUTRAL)
            row[0].set(xlabel="level of the interval", ylabel="fraction of errors within", xlim=(0, 1), ylim=(0, 1))
            row[1].set(xlabel="predicted SD (RMS of a bin, mm)", ylabel="error (RMS of the bin, mm)", xlim=(0, None))
            row[1].set_ylim(0, 1.35 * limit)  # room for the numbers
            row[2].set(xlabel="fraction of voxels removed", ylabel="relative mean error left", xlim=(0, 1))
            row[2].set_ylim(0, 1.35 * row[2].dataLim.y1)
            scales = ", ".join(f"× {factors[dataset, name]:.2f} ({name})" for name in tints)
            part.suptitle(
                f"{dataset_label(dataset, simulated)}. Factor fitted on validation pairs: {scales}",
                x=0.01,
                ha="left",
                fontsize=8,
            )
        figure.legend(handles=_legend(tints), loc="outside upper center", ncols=3)
    save_figure(
        figure, path, "Calibration and sparsification of the Bayesian head, beyond the paper.", origin(simulated),
        "Test pairs, against the true displacement. Left and middle: each axis separately. Right: lengths of the vectors.",
        "The head predicts σ at the control points without their correlations. Between them, σ is that of a weighted sum of "
        "independent control points, or σ itself interpolated, as if neighbours erred together (fully correlated). "
        "The right value lies between the two (shaded).",
        f"ECE: mean |coverage − level|. ENCE: mean |RMS SD − RMS error| / RMS SD over {calibration.BINS} bins. AUSE: area "
        "between a curve and the curve of the error itself. A factor changes no ranking and no AUSE.", note,
    )  # fmt: skip
    return figure


def _reliability(
    row: Sequence[Axes], error: np.ndarray, sigma: np.ndarray, factor: float, tint: str, number: int
) -> None:
    """Draw the ``number``-th propagation in the three panels, as predicted and rescaled."""
    found = {}
    for spread, style in ((sigma, dict(ls="-")), (factor * sigma, dict(ls="--", mfc="white"))):
        row[0].plot(LEVELS, calibration.coverage(error, spread, LEVELS), color=tint, **style)
        row[1].plot(*calibration.spread_bins(error, spread), color=tint, marker=_MARKERS[number], ms=3, lw=1, **style)
        for column, measure in enumerate((calibration.coverage_error, calibration.spread_error)):
            found.setdefault(column, []).append(measure(error, spread))
    fractions, left, _ = calibration.sparsification(error, sigma)
    row[2].plot(fractions, left, color=tint)
    _number(row[0], number + 1, "{:.3f} → {:.3f}".format(*found[0]), tint, low=True)
    _number(row[1], number + 1, "{:.2f} → {:.2f}".format(*found[1]), tint)
    _number(row[2], number + 1, f"{calibration.ause(error, sigma):.2f}", tint)


def _number(ax: Axes, line: int, text: str, tint: str, low: bool = False) -> None:
    """A line of text in the corner without curves: at the top left, or at the lower right."""
    x, y, side = (0.98, 0.21, "right") if low else (0.03, 0.98, "left")
    ax.text(x, y - 0.07 * line, text, transform=ax.transAxes, ha=side, va="top", fontsize=6.5, color=tint)


def _legend(tints: Mapping[str, str]) -> list[Line2D]:
    propagations = [Line2D([], [], color=tint, label=f"control points {name}") for name, tint in tints.items()]
    return [
        *propagations,
        Line2D([], [], color="#777777", ls="-", label="as predicted"),
        Line2D([], [], color="#777777", ls="--", label="times the factor"),
        Line2D([], [], color=NEUTRAL, lw=1.0, ls=(0, (1, 1)), label="removed by the error itself (oracle)"),
        Line2D([], [], color="#999999", lw=0.8, ls=":", label="ideal; right: constant σ"),
    ]
