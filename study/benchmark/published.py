"""Costs in the published size, which the tables give for every method even if a profile makes its network smaller.

A small profile trains some baselines with fewer features, so that they learn within its budget. The cost of such a network
says nothing about the method. The tables therefore take costs from ``figures/benchmark.csv`` (``make benchmark``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from study.config.schema import METHODS, UNTRAINED, defaults
from study.reporting.results import run_label

# Settings that a profile may make smaller; the published values are the defaults of the schema.
SIZES = {"voxelmorph": ("width", "levels"), "transmorph": ("embed", "convolutions"),
         "keymorph": ("keypoints", "width", "poolings")}  # fmt: skip
# Settings of training, and settings that do not affect the cost of a registration.
COST_NEUTRAL = ("grids", "samples", "drop_path", "tps_lambda")
SETTING_WORDS = {"width": "width", "levels": "levels", "embed": "embedding", "convolutions": "convolutions a level",
         "keypoints": "keypoints", "poolings": "poolings"}  # fmt: skip


def published(run: Mapping[str, Any]) -> dict[str, Any]:
    """The network of a run in published size: method and settings for ``methods.table.build``."""
    method = run["method"]
    full = defaults(method) if method in METHODS else {}
    fixed = (*SIZES.get(method, ()), *COST_NEUTRAL)
    return {"method": method} | {n: value if n in fixed else run.get(n, value) for n, value in full.items()}


def cost_grid(run: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The grid at which a run is measured: the middle one of its grids (10×10×10 of four); None without control points."""
    grids = run.get("grids")
    return tuple(grids[len(grids) // 2]) if grids else None


def variants(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The runs to measure besides each method's default network: one for each network and grid, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        if (
            run["method"] not in UNTRAINED
            and not is_default(run)
            and not any(same_cost(run, other) for other in found.values())
        ):
            found[name] = dict(run)
    return found


def same_cost(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs have the same network and the same grid."""
    return published(run) == published(other) and cost_grid(run) == cost_grid(other)


def is_default(run: Mapping[str, Any]) -> bool:
    """Whether the network is the method's default, which the benchmark measures under the name of the method."""
    return published(run) == published({"method": run["method"]})


def read_benchmark(path: Path | str) -> pd.DataFrame:
    """``benchmark.csv`` as ``measure.measure`` returned it, with "" for no grid and no note."""
    return pd.read_csv(path).fillna({"grid": "", "note": ""})


class Costs(NamedTuple):
    """The cost of each run: ``rows`` by run, with parameters, memory_mb and seconds (NaN: not measured).

    memory_mb  on a CPU the growth of the process besides weights and images, on a GPU all allocated memory
    """

    rows: pd.DataFrame
    shape: str  # of the images, "128x128x102"
    device: str
    threads: int
    notes: Mapping[str, str] = MappingProxyType({})  # run → the note of its row in the benchmark

    def in_words(self) -> str:
        where = f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.shape.replace('x', '×')} voxels, {where}"

    def of(self, run: str, name: str) -> float:
        """The parameters, memory_mb or seconds of a run; NaN where they were not measured."""
        return float(self.rows.loc[run, name]) if run in self.rows.index else np.nan


def costs(frame: pd.DataFrame, runs: Mapping[str, Mapping[str, Any]]) -> Costs:
    """The costs of ``runs`` at the middle one of the benchmark's image sizes (of two the smaller).

    frame  from ``read_benchmark``; a network that is missing there or was not measured gets NaN
    """
    sizes = sorted(set(frame["shape"]), key=lambda shape: np.prod([int(n) for n in shape.split("x")]))
    shape = sizes[(len(sizes) - 1) // 2]
    here = frame[frame["shape"] == shape]
    registered, varied = (here[here["task"] == task] for task in ("register", "variant"))
    measured = variants(runs)
    rows, notes = {}, {}
    for name, run in runs.items():
        grid = "x".join(map(str, cost_grid(run) or ()))
        if is_default(run) or run["method"] in UNTRAINED:  # untrained methods are measured under the name of the method
            row = registered[(registered["method"] == run["method"]) & (registered["grid"] == grid)]
        else:
            row = varied[varied["run"].isin([other for other, its in measured.items() if same_cost(run, its)])]
        if len(row):
            row = row.iloc[0]
            memory = row["peak_mb"] if str(row["device"]).startswith("cuda") else row["memory_mb"]
            rows[name] = {"parameters": row["parameters"], "memory_mb": memory, "seconds": row["seconds"]}
            if row["note"]:
                notes[name] = row["note"]
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["parameters", "memory_mb", "seconds"], dtype=float)
    return Costs(found, shape, str(frame["device"].iloc[0]), int(frame["threads"].iloc[0]), notes)


def reductions(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A phrase for each network smaller than published: ``VoxelMorph: width 8, levels 4 (published 16, 5)``."""
    said = []
    for run in runs.values():
        full = {name: defaults(run["method"])[name] for name in SIZES.get(run["method"], ())}
        own = {name: run.get(name, value) for name, value in full.items()}
        less = [name for name in full if own[name] != full[name]]
        if less:
            values = ", ".join(f"{SETTING_WORDS[name]} {own[name]}" for name in less)
            said.append(
                f"{run_label(run['method'])}: {values} (published {', '.join(str(full[name]) for name in less)})"
            )
    return list(dict.fromkeys(said))
