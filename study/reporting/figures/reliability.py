"""Is the error of one registered pair as large as its σ says? Beside the explorer, for pairs whose truth is known."""

from __future__ import annotations

import matplotlib as mpl

from gridreg.calibration import LEVELS, coverage, scale, spread_bins
from gridreg.explorer.picture import DPI, NotebookFigure
from gridreg.explorer.registered import Registered
from study.style import COLOURS, styled


def error_figure(registered: Registered) -> NotebookFigure | None:
    """Error against σ within the pair's region: a reliability diagram and coverage. None where either is not known."""
    pair = registered.pair
    if pair.truth is None or registered.sigma_mm is None or not (pair.region & pair.truth[1]).any():
        return None
    where = pair.region & pair.truth[1]
    error, sigma = registered.error_mm()[:, where], registered.sigma_mm[:, where]
    line = {"color": COLOURS["gridreg-adaptive"], "ms": 3}
    with styled(), mpl.rc_context({"axes.titlesize": 9}):
        figure = NotebookFigure((7.2, 3.2), dpi=DPI)  # a layout engine would draw everything twice
        left, right = (figure.add_axes((x, 0.225, 0.345, 0.69)) for x in (0.08, 0.6))
        predicted, found = spread_bins(error, sigma)
        most = 1.05 * max(predicted.max(), found.max())
        left.plot(predicted, found, "o-", label="this pair, tenths of σ", **line)
        left.set(xlim=(0, most), ylim=(0, most), xlabel="σ, root mean square (mm)", ylabel="error, root mean square (mm)",
                 title="Is the error as large as σ says?")  # fmt: skip
        right.plot(LEVELS, coverage(error, sigma, LEVELS), "o-", label="this pair", **line)
        right.set(xlim=(0, 1), ylim=(0, 1), xlabel="central interval of the predicted distribution",
                  ylabel="share of errors within it", title="Coverage")  # fmt: skip
        for ax, free in ((left, "lower right"), (right, "upper left")):
            ax.axline((0, 0), slope=1, color="#999999", lw=0.8, ls="--", label="ideal")
            ax.set_aspect("equal")
            ax.legend(loc=free)
        region = "fixed mask" if pair.labels[0] is not None else "whole image"
        source = "A simulated pair: the" if pair.simulated else "The"
        figure.text(0.01, 0.015, f"{source} true displacement is known at {error.shape[1]} voxels of the {region}. "
                    f"Each axis counts by itself.\nErrors are {scale(error, sigma):.1f} times as large as σ says.",
                    fontsize=7, color="#333333", linespacing=1.3)  # fmt: skip
    return figure
