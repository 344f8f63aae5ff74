"""Training curves of the runs of one dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gridreg.errors import InputError
from study.reporting.figures.style import PAGE, letter_panels, origin, save_figure
from study.reporting.results import dataset_label, in_order, run_label
from study.style import colour, styled

PER_ROW = 5  # runs side by side


def read_history(path: Path | str) -> pd.DataFrame:
    """``history.csv`` of a training run: at least columns step and loss, usually val_dice (empty between validations)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found, expected the history that the training writes")
    history = pd.read_csv(path)
    missing = [column for column in ("step", "loss") if column not in history.columns]
    if missing or history.empty:
        found = f"no column {', '.join(missing)}" if missing else "no step"
        raise InputError(f"{path}: {found}, expected step, loss, similarity, dice_loss, bending, val_dice")
    return history


def training_curves(
    path: Path | str, histories: Mapping[str, pd.DataFrame], dataset: str, simulated: bool, note: str = ""
) -> Figure:
    """Loss above validation Dice against step, one column per run of a dataset, the other runs behind it in grey.

    ``histories`` maps a run to its ``read_history``. Thin: loss of every recorded step; thick: its running median. The
    loss axis ends at the 98th percentile, so that the first steps do not flatten the rest. Writes ``<path>.png``,
    ``.pdf`` and ``.txt``.
    """
    runs = in_order(histories)
    if not runs:
        raise InputError(f"{path}: no training history to show, expected at least one run")
    across = min(PER_ROW, len(runs))
    down = -(-len(runs) // across)
    with styled():
        figure, axes = plt.subplots(
            2 * down, across, figsize=(min(PAGE, 1.3 * across + 1.0), 2.6 * down + 0.4), squeeze=False, layout="constrained"
        )  # fmt: skip
        places = [
            (axes[2 * (n // across), n % across], axes[2 * (n // across) + 1, n % across]) for n in range(len(runs))
        ]
        for run, pair in zip(runs, places):
            pair[0].set_title(run_label(run).replace(" (", "\n("), fontweight="bold")
            for other in [name for name in runs if name != run] + [run]:
                _curves(pair, histories[other], colour(run) if other == run else "#DDDDDD", front=other == run)
            pair[1].set_xlabel("step")
        _share_limits(places, histories)
        scores = pd.concat([history.get("val_dice", pd.Series(dtype=float)) for history in histories.values()])
        score = "validation\nDice" if not scores.min() < 0 else "validation,\n−MSE"
        for number, (above, below) in enumerate(places):
            if number % across == 0:
                above.set_ylabel("training loss")
                below.set_ylabel(score)
            else:
                above.tick_params(labelleft=False)
                below.tick_params(labelleft=False)
        for ax in axes.flat[:]:
            if not ax.lines:
                ax.set_axis_off()
        letter_panels(above for above, _ in places)
        figure.suptitle(f"Training, {dataset_label(dataset, simulated)}", fontsize=9, x=0.01, ha="left")
    save_figure(
        figure, path, f"Training curves, {dataset}.", origin(simulated, "cohort"),
        "Each pair of panels shows one run in colour and the other runs in grey; above: training loss, below: validation score.",
        "Thin lines: every tenth step. Thick lines: running median.",
        "Methods weigh the terms of their losses differently, so compare them by the validation score.", note,
    )  # fmt: skip
    return figure


def _share_limits(places, histories: Mapping[str, pd.DataFrame]) -> None:
    """The same axes in all columns; the loss axis ends at the 98th percentile."""
    losses = np.concatenate([history["loss"].to_numpy(float) for history in histories.values()])
    losses = losses[np.isfinite(losses)]
    for rows in zip(*places):
        for ax in rows[1:]:
            ax.sharex(rows[0])
            ax.sharey(rows[0])
        rows[0].xaxis.set_major_locator(MaxNLocator(3, integer=True))
    for above, _ in places:
        above.tick_params(labelbottom=False)
    if len(losses):
        low, high = losses.min(), np.percentile(losses, 98)
        places[0][0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)


def _curves(axes, history: pd.DataFrame, tint: str, front: bool) -> None:
    """Loss on ``axes[0]``, validation Dice on ``axes[1]``."""
    loss = history[["step", "loss"]].dropna()
    window = max(1, len(loss) // 20)
    if front:
        axes[0].plot(loss["step"], loss["loss"], color=tint, lw=0.4, alpha=0.45)
    median = loss["loss"].rolling(window, center=True, min_periods=1).median()
    axes[0].plot(loss["step"], median, color=tint, lw=1.4 if front else 0.8)
    if "val_dice" in history.columns:
        validation = history[["step", "val_dice"]].dropna()
        axes[1].plot(validation["step"], validation["val_dice"], color=tint, lw=1.4 if front else 0.8,
                     marker="o" if front else None, ms=2.5)  # fmt: skip
