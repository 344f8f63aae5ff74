"""Figure 7: fixed and moving image, the uncertainty in millimetres, and the error that was made, where it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt

from gridreg.errors import InputError
from gridreg.panels import VIEWS, central_voxel, show_contour, show_slice
from gridreg.style import FIXED_COLOUR, MAGNITUDE, WARPED_COLOUR, add_caption, save_figure, styled

SHOWN, NEAR_MM = 99.5, 15.0  # colours end at this percentile of what lies in or so near the mask: corners say little


def figure7(path: Path | str, cases: Sequence[Mapping[str, Any]], simulated: bool, note: str = "") -> Figure:
    """A row a case. Writes ``<path>.png`` and ``<path>.pdf``; InputError without a case.

    Every case holds ``title``, ``fixed`` and ``moving`` (W, H, D) in [0, 1], ``fixed_labels`` and ``moving_labels`` or
    None, ``sigma_mm`` (W, H, D), ``error_mm`` (W, H, D), NaN where it is not known, and ``spacing_mm``.
    """
    if not cases:
        raise InputError(f"{path}: no uncertainty to show, expected at least one case of a Bayesian run")
    with styled():
        figure, axes = plt.subplots(len(cases), 4, figsize=(7.2, 1.62 * len(cases) + 0.9), squeeze=False, layout="constrained")
        for row, case in zip(axes, cases):
            index = central_voxel(case["fixed_labels"], case["fixed"].shape)[VIEWS["axial"][0]]
            spacing = [case["spacing_mm"]] * 3
            for ax, side, colour in zip(row, ("fixed", "moving"), (FIXED_COLOUR, WARPED_COLOUR)):
                show_slice(ax, case[side], "axial", index, spacing, letters=side == "fixed")
                show_contour(ax, case[f"{side}_labels"], "axial", index, colour)
            for ax, values in zip(row[2:], (case["sigma_mm"], case["error_mm"])):
                known = values[np.isfinite(values) & _near(case["fixed_labels"], case["spacing_mm"], values.shape)]
                if not known.size:
                    ax.set_axis_off()
                    ax.text(0.5, 0.5, "not known", transform=ax.transAxes, ha="center", va="center", color="#555555")
                    continue
                limits = (0.0, float(np.percentile(known, SHOWN)))
                drawn = show_slice(ax, values, "axial", index, spacing, limits, letters=False, cmap=MAGNITUDE)
                show_contour(ax, case["fixed_labels"], "axial", index, FIXED_COLOUR)
                figure.colorbar(drawn, ax=ax, shrink=0.85, pad=0.02, extend="max").set_label("mm", fontsize=7)
            row[0].set_ylabel(case["title"], fontsize=6.5)
        for ax, head in zip(axes[0], ("Fixed", "Moving", "Uncertainty σ", "Error made")):
            ax.set_title(head)
        origin = "Simulated cohorts, not patients. " if simulated else ""
        add_caption(figure, f"{origin}Axial slices through the centre of the fixed mask (orange; blue: moving mask; of many "
                            "labels, all together). σ: √(σx² + σy² + σz²) of the Bayesian head, as predicted, carried to the "
                            "image as the variance of a weighted sum; error: distance from the true displacement; white: not known. "
                            f"Each map has its own colours, which end at what lies in the mask or {NEAR_MM:g} mm around it. {note}".strip())  # fmt: skip
        save_figure(figure, path)
    return figure


def _near(labels: np.ndarray | None, spacing_mm: float, shape: tuple[int, ...]) -> np.ndarray:
    """(W, H, D) bool: in the mask or close to it; everywhere without one."""
    if labels is None or not labels.any():
        return np.ones(shape, bool)
    return distance_transform_edt(labels == 0) * spacing_mm <= NEAR_MM
