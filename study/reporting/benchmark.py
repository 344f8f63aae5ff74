"""The benchmark as a table and as a figure: cost against grid size and against image size, with the floor of any method."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from study.reporting.figures.style import PAGE, letter_panels, save_figure
from study.reporting.results import grid_label, in_order, run_label
from study.style import NEUTRAL, colour, styled

FLOOR = "floor"
REFERENCE = "gridreg-10"  # what the others are divided by; the first GridReg where there is none
LABELS = {FLOOR: "Floor (read two images, write one)"}
VARIANTS = {  # main runs that differ from the default network of their method
    "voxelmorph": "VoxelMorph, not integrated",
    "gridreg-bayesian": "GridReg-10, Bayesian",
}
MARKERS = {"voxelmorph": "s", "transmorph": "^", "keymorph": "D", "ants-syn": "v"}
PARTS = {"encoder_s": "encoder", "decoder_s": "decoder", "upsampling_s": "upsampling", "warp_s": "warp"}


def label(run: str) -> str:
    if run.startswith("gridreg-") and run_label(run) == run:  # of a grid that is not among the paper's
        return grid_label(run.replace("gridreg", "GridReg"))
    return LABELS.get(run) or run_label(run)


def runs_in_order(frame: pd.DataFrame) -> list[str]:
    """GridReg from coarse to fine, the peers as in the tables, the floor."""
    points = frame["grid"].where(frame["grid"] != "", "0x0x0").map(voxels)
    gridreg = frame.assign(points=points)[frame["method"] == "gridreg"].sort_values("points", kind="stable")
    others = frame.loc[~frame["method"].isin(["gridreg", FLOOR]), "run"]
    return [
        *dict.fromkeys(gridreg["run"]),
        *in_order(others),
        *dict.fromkeys(frame.loc[frame["method"] == FLOOR, "run"]),
    ]


def voxels(size: str) -> int:
    """Points in "10x10x10"."""
    return int(np.prod([int(n) for n in size.split("x")]))


def of_methods(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of registration and training of every method, without the variants of the ablations."""
    return frame[frame["task"].isin(["register", "train"])]


def shapes_in_order(frame: pd.DataFrame) -> list[str]:
    return sorted(set(frame["shape"]), key=voxels)


# --- table -------------------------------------------------------------------------------------------------------


def significant(value: float, factor: float = 1.0) -> str:
    """Three significant digits, no exponent, thousands with commas; "–" for nothing."""
    value = value * factor
    if not np.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - int(np.floor(np.log10(abs(value))))}f}"


def on_gpu(frame: pd.DataFrame) -> bool:
    return str(frame["device"].iloc[0]).startswith("cuda")


def setting(frame: pd.DataFrame) -> str:
    """Device, threads and precision, in words."""
    device, threads = frame["device"].iloc[0], int(frame["threads"].iloc[0])
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}, float32"


def to_markdown(frame: pd.DataFrame) -> str:
    """One pipe table per image size, then notes on what the columns mean and why a cell is empty."""
    main = frame[(frame["task"] == "variant") & frame["run"].isin(list(VARIANTS))]
    frame, bending = of_methods(frame), frame[frame["task"] == "bending"]
    batches = sorted(set(frame.loc[frame["task"] == "train", "batch"]))
    heads = ["", "ms per case", "ratio to GridReg", *PARTS.values(), "memory (MB)"]
    heads += [*(["all memory (MB)"] if on_gpu(frame) else []), "parameters", "multiply-adds (10⁹)"]
    heads += [head for batch in batches for head in (f"training step, batch {batch} (ms)", "memory (MB)")]
    runs = runs_in_order(frame)
    reference = REFERENCE if REFERENCE in runs else runs[0]
    text = [f"**What a registration costs.** Device: {setting(frame)}.", ""]
    for shape in shapes_in_order(frame):
        rows = {(row.run, row.task, row.batch): row for row in frame[frame["shape"] == shape].itertuples()}
        unit = rows[reference, "register", 1].seconds if (reference, "register", 1) in rows else np.nan
        text += [
            f"Images of {grid_label(shape)} voxels",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
        ]
        lines = [(label(run), rows[run, "register", 1]) for run in runs]
        lines += [(VARIANTS[row.run], row) for row in main[main["shape"] == shape].itertuples()]
        for name, row in lines:
            ratio = significant(row.seconds / unit)
            cells = [significant(row.seconds, 1e3), ratio if ratio == "–" else f"{ratio}×"]
            cells += [significant(getattr(row, part), 1e3) for part in PARTS]
            cells += [significant(row.memory_mb), *([significant(row.peak_mb)] if on_gpu(frame) else [])]
            cells += ["–" if np.isnan(row.parameters) else f"{row.parameters:,.0f}"]
            cells += [significant(row.multiply_adds, 1e-9)]
            for batch in batches:
                step = rows.get((row.run, "train", batch)) if row.task == "register" else None
                cells += [significant(step.seconds, 1e3), significant(step.memory_mb)] if step else ["–", "–"]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("")
    text += bending_table(bending)
    return "\n".join([*text, *(f"- {note}" for note in [*definitions(frame, reference), *left_out(frame)]), ""])


def bending_table(rows: pd.DataFrame) -> list[str]:
    """Cost of the bending energy and its gradient in both forms; empty where it was not measured."""
    if rows.empty:
        return []
    text = [f"Bending energy of {grid_label(rows['grid'].iloc[0])} control points and its gradient, from second derivatives of "
            "the dense field, and as a quadratic form of the control points, which gives the same number", "",
            "| voxels | dense (ms) | memory (MB) | control points (ms) | memory (MB) |", "|---" * 5 + "|"]  # fmt: skip
    for shape, pair in rows.groupby("shape", sort=False):
        cells = [significant(value, factor) for row in pair.sort_values("run").itertuples()
                 for value, factor in ((row.seconds, 1e3), (row.memory_mb, 1))]  # fmt: skip
        text.append(f"| {grid_label(shape)} | " + " | ".join(cells) + " |")
    return [*text, ""]


def definitions(frame: pd.DataFrame, reference: str) -> list[str]:
    """What the columns mean."""
    memory = (
        "the memory that was allocated on the GPU"
        if on_gpu(frame)
        else ("the growth of the process, after a warm-up and with freed memory given back to the system,")
    )
    notes = [
        "Time: network and warp, with the images on the device. It is the median of several calls after a warm-up; a slow call "
        f"is measured once. Ratio to GridReg: the time divided by that of {label(reference)}. The parts of GridReg were timed in "
        "separate calls.",
        f"Memory: {memory} at the peak of a call, beyond weights and images. It is the median of several calls; a slow call is "
        "measured once. For training it includes gradients and Adam's state.",
        "Multiply-adds: those of convolutions, matrix products and attention, without norms, activations and interpolation.",
        "Every method has its published size and pads the images where it needs to. VoxelMorph integrates a velocity field, as "
        "its package builds it. Table 1 uses it without integration, which was measured at one size.",
        "Floor: the bytes of both images and of the warped one, divided by the bandwidth that a copy in memory reaches.",
    ]
    if not on_gpu(frame):
        notes.append("All methods run with the same settings of the memory allocator, those of glibc.")
    return notes


def left_out(frame: pd.DataFrame) -> list[str]:
    """Every note of the benchmark once, each with the rows to which it belongs."""
    lines = []
    for note, rows in frame[frame["note"] != ""].groupby("note", sort=False):
        names = []
        for (run, task, batch), part in rows.groupby(["run", "task", "batch"], sort=False):
            name = label(run) + (f", training with batch {batch}" if task == "train" else "")
            everywhere = part["shape"].nunique() == frame["shape"].nunique()
            names.append(name if everywhere else f"{name}, at {' and '.join(map(grid_label, part['shape']))}")
        lines.append(f"{'; '.join(names)}: {note}.")
    return lines


# --- figure ------------------------------------------------------------------------------------------------------


def cost_figure(path: Path | str, frame: pd.DataFrame) -> Figure:
    """Cost against grid size at one image size (left) and against image size (right), on logarithmic axes.

    The image size on the left is the largest of those at which most methods were measured. Writes ``<path>.png``, ``.pdf``
    and ``.txt``. Rows: time and memory of a registration, then of a training step at the smallest batch that was measured.
    """
    frame = of_methods(frame)
    batches = sorted(set(frame.loc[(frame["task"] == "train") & frame["seconds"].notna(), "batch"]))
    panels = [
        ("register", 1, "seconds", "time per case (s)"),
        ("register", 1, "memory_mb", "extra memory\nat the peak (MB)"),
    ]
    if batches:
        panels += [("train", batches[0], "seconds", f"training step,\nbatch {batches[0]} (s)"),
                   ("train", batches[0], "memory_mb", "its extra memory\nat the peak (MB)")]  # fmt: skip
    runs, shapes = runs_in_order(frame), shapes_in_order(frame)
    measured = frame[frame["seconds"].notna() & (frame["task"] == "register")]
    shown = max(shapes, key=lambda shape: (measured.loc[measured["shape"] == shape, "run"].nunique(), voxels(shape)))
    with styled():
        figure, axes = plt.subplots(
            len(panels), 2, figsize=(PAGE, 1.75 * len(panels) + 0.9), squeeze=False, sharex="col", sharey="row",
            layout="constrained",
        )  # fmt: skip
        for pair, (task, batch, column, title) in zip(axes, panels):
            rows = frame[(frame["task"] == task) & (frame["batch"] == batch) & (frame[column] > 0)]
            _against_grids(pair[0], rows[rows["shape"] == shown], column)
            _against_images(pair[1], rows, column, runs, shapes)
            pair[0].set_ylabel(title)
            low, high = np.log10(pair[0].get_ylim())
            pair[0].set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))  # whole decades: at least two are labelled
        axes[0, 0].set_title(f"Grid size, images of {grid_label(shown)}", loc="left")
        axes[0, 1].set_title("Image size", loc="left")
        axes[-1, 0].set_xlabel("control points per axis")
        axes[-1, 1].set_xlabel("image (voxels)")
        handles = {h.get_label(): h for ax in axes[:, 1] for h in ax.get_lines()}
        names = [label(run) for run in runs if label(run) in handles]
        figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=4)
        letter_panels(axes.flat)
    missing = [label(run) for run in runs if frame.loc[frame["run"] == run, "seconds"].isna().all()]
    save_figure(
        figure, path, "Cost of a registration and of a training step.", f"Device: {setting(frame)}.",
        "Left: GridReg at several grid sizes; methods without a grid are horizontal lines. Right: all methods at several image sizes.",
        f"Not measured: {', '.join(missing)}; benchmark.md gives the reason." if missing else "",
    )  # fmt: skip
    return figure


def _line(run: str, method: str) -> dict:
    """Colour, marker and label of a run, the same in both columns."""
    if method == FLOOR:
        return {"color": NEUTRAL, "ls": "--", "lw": 1.0, "label": label(run)}
    return {"color": colour(run), "marker": "o" if method == "gridreg" else MARKERS.get(run, "P"), "label": label(run)}


def _against_grids(ax: Axes, rows: pd.DataFrame, column: str) -> None:
    """GridReg at every grid; the other methods as horizontal lines."""
    grids = rows[rows["method"] == "gridreg"]
    points = grids["grid"].map(voxels).to_numpy()
    order = np.argsort(points, kind="stable")
    ax.plot(points[order], grids[column].to_numpy()[order], color=colour("gridreg-adaptive"), lw=1.0, zorder=2)
    for x, row in zip(points, grids.itertuples()):
        ax.plot(x, getattr(row, column), ls="", zorder=3, **_line(row.run, row.method))
    for row in rows[rows["method"] != "gridreg"].itertuples():
        ax.axhline(getattr(row, column), **_line(row.run, row.method) | {"marker": None}, zorder=1)
    _log(ax)
    if len(points):
        cubes = [g.split("x") for g in grids["grid"]]
        ax.set_xticks(points, [c[0] if len(set(c)) == 1 else "×".join(c) for c in cubes])


def _against_images(ax: Axes, rows: pd.DataFrame, column: str, runs: list[str], shapes: list[str]) -> None:
    """One line per run."""
    for run in runs:
        part = rows[rows["run"] == run].assign(size=lambda f: f["shape"].map(voxels)).sort_values("size")
        if len(part):
            ax.plot(part["size"], part[column], **_line(run, part["method"].iloc[0]))
    _log(ax)
    ax.set_xticks([voxels(shape) for shape in shapes], [grid_label(shape) for shape in shapes])


def _log(ax: Axes) -> None:
    ax.set(xscale="log", yscale="log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12)
    ax.grid(axis="y", color="#E5E5E5", lw=0.5, zorder=0)
