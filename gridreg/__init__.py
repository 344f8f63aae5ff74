"""GridReg: registration by displacements of a sparse grid of control points (Yan et al., Medical Physics 2026).

In reading order:
    spatial         conventions, warp, transform_points
    upsampling      from control points to a dense displacement field, and the bound that forbids folds
    attention       control points attend to image features
    network         the GridReg network
    losses          what training minimises
    metrics         what evaluation measures
    refinement      control points optimised for one pair
    gauss_newton    the same optimum, reached by Gauss-Newton steps
    laplace         the uncertainty of a registered pair: a Gaussian posterior
    unfolding       folds of a displacement field, found and smoothed out
    calibration     whether an uncertainty agrees with known errors
    checkpoint      weights on disk
    scans           NIfTI files in and out, and the pair that everything else takes
    explorer        the interactive views

Names are imported when they are first used, so that code without a network does not wait for PyTorch.
"""

import os
from importlib import import_module

# OpenMP reads this variable when PyTorch loads it. A waiting thread then spins for some microseconds and goes to sleep.
# By default it keeps spinning, and a training step takes twenty times as long as soon as another process uses the core.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

_HOMES = {
    "GridReg": "network",
    "Registration": "network",
    "warp": "spatial",
    "transform_points": "spatial",
    "upsample": "upsampling",
    "upsample_sigma": "upsampling",
    "refine": "refinement",
    "Posterior": "laplace",
    "posterior": "laplace",
}
_MODULES = ("checkpoint", "losses", "metrics")
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"gridreg.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"gridreg.{name}")
    raise AttributeError(f"module 'gridreg' has no attribute {name!r}")
