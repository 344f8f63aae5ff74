"""GridReg: registration by displacements of a sparse grid of control points (Yan et al., Medical Physics 2026).

In reading order:
    grid            conventions, warp, transform_points
    interpolation   from control points to a dense displacement field
    fold_free       control points so bounded that the field cannot fold
    network         the GridReg network
    methods         every method, by name
    losses, metrics, devices, checkpoint, objective, train, refine, evaluate
    learn2reg, volumes, resample, align, truth, preprocess, dataset    cohorts in, arrays out
    memory, cost, benchmark, cost_report                               what registration costs
    results, stats, tables, figures, panels, architecture              per-case results to tables and figures
    oracle, calibration, false_correspondence, panels_truth            what a known truth can tell
    widget_keys, pair, explorer, lesson_freedom, lesson_basis, lesson_attention    the interactive notebooks
    subjects, phantom, brain, diffeo, scanner, cohort                  the simulated cohorts
    params, schema                                                     params.yaml

Names load when they are used, so that what needs no network does not wait for PyTorch.
"""

import os
from importlib import import_module
from pathlib import Path

# Read when PyTorch loads OpenMP: a thread that waits spins for some microseconds, then sleeps. By default it spins on,
# and as soon as anything else wants the core, a training step takes twenty times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

ROOT = Path(__file__).resolve().parents[1]  # of the repository: the notebooks work from there

_HOMES = {
    "GridReg": "network",
    "Registration": "network",
    "warp": "grid",
    "transform_points": "grid",
    "upsample": "interpolation",
    "upsample_sigma": "interpolation",
    "refine": "refine",
}
_MODULES = ("checkpoint", "losses", "metrics")
__all__ = ["ROOT", *_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"gridreg.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"gridreg.{name}")
    raise AttributeError(f"module 'gridreg' has no attribute {name!r}")
