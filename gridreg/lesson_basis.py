"""Lesson 2, the sums: what the three bases do to a few control points, in one, two and three dimensions.

Everything goes through ``interpolation``, ``metrics`` and ``fold_free``: what is seen here is what registration uses.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from numpy import ndarray

from gridreg.fold_free import bounded, displacement_bound
from gridreg.interpolation import METHODS, basis, upsample
from gridreg.metrics import folding_percent, jacobian_determinant, nondiffeomorphic_percent

NAMES = {"trilinear": "linear", "bspline": "cubic B-spline", "deconv": "Gaussian (deconv)"}
SHAPE = (41, 41, 41)  # voxels, in two dimensions 41×41×3
PATTERNS = ("random", "one point", "squeeze", "diagonal squeeze", "checkerboard")


def profile(values: ndarray, n: int, method: str) -> ndarray:
    """(n,) displacement along one axis from control-point values (g,), same units."""
    return basis(n, len(values), method, dtype=torch.float64).numpy() @ values


def properties(g: int, n: int) -> pd.DataFrame:
    """What each basis of g control points at n voxels keeps, as the largest error over the voxels of one axis.

    Columns: a constant of 1; a line from 0 to g - 1; the value at a control point that alone is 1; the largest jump of
    the slope between neighbouring voxels, per control spacing, for that same control point.
    """
    rows = []
    for method in METHODS:
        single = np.zeros(g)
        single[g // 2] = 1
        bump = profile(single, n, method)
        slope = np.diff(bump) * (n - 1) / (g - 1)
        rows.append({
            "basis": NAMES[method],
            "constant: error": np.abs(profile(np.ones(g), n, method) - 1).max(),
            "line: error": np.abs(profile(np.arange(g, dtype=float), n, method) - np.linspace(0, g - 1, n)).max(),
            "value at its own control point": bump.max(),
            "control points that move a voxel": int((basis(n, g, method).numpy() > 1e-6).sum(1).max()),
            "largest jump of the slope": np.abs(np.diff(slope)).max(),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("basis")


@lru_cache(maxsize=64)
def pattern(name: str, grid: int, dimensions: int) -> ndarray:
    """(3, g, g, g) displacements of unit size, in control spacings; (3, g, g, 2) with none along z in two dimensions.

    "random", equally likely in [-1, 1]; "one point", the middle one pushed along x; "squeeze", every point towards the
    middle along each axis; "diagonal squeeze", towards the plane at right angles to the diagonal, the worst that can be
    done to the middle; "checkerboard", neighbours against each other.
    """
    sizes = (grid, grid, grid if dimensions == 3 else 2)
    moved = np.zeros((3, *sizes))
    places = np.indices(sizes) - (np.array(sizes).reshape(3, 1, 1, 1) - 1) / 2
    if name == "random":
        plane = np.random.default_rng(4).uniform(-1, 1, (3, *sizes[:2], 1 if dimensions == 2 else grid))
        moved[:] = plane
    elif name == "one point":
        moved[(0, *(n // 2 for n in sizes[:2]), slice(None) if dimensions == 2 else grid // 2)] = 1
    elif name == "squeeze":
        moved[:] = -np.sign(places)
    elif name == "diagonal squeeze":
        moved[:] = -np.sign(places[:dimensions].sum(0).round(6))
    elif name == "checkerboard":
        moved[:] = (-1.0) ** np.indices(sizes)[:dimensions].sum(0)
    else:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; found {name!r}")
    moved[dimensions:] = 0
    return moved


@lru_cache(maxsize=256)
def field(name: str, grid: int, size: float, method: str, dimensions: int = 2, fold_free: bool = False) -> ndarray:
    """(3, W, H, D) displacement in voxels of a pattern whose control points move by ``size`` control spacings.

    In two dimensions the volume is three voxels thick and the same in each. With ``fold_free`` the control points are
    pressed into the bound of ``fold_free`` first, as the network does.
    """
    moved = pattern(name, grid, dimensions)
    shape = SHAPE if dimensions == 3 else (*SHAPE[:2], 3)
    spacing = (SHAPE[0] - 1) / (grid - 1)
    control_points = torch.from_numpy(size * spacing * moved)[None]
    if fold_free:
        control_points = bounded(control_points, shape)
    return upsample(control_points, shape, method)[0].numpy()


def bound_in_spacings(grid: int) -> float:
    """How far, in control spacings, the fold-free bound lets a control point in the middle of a cube move along an axis."""
    return float(displacement_bound((grid,) * 3, SHAPE)[0].max()) * (grid - 1) / (SHAPE[0] - 1)


def folds(displacement: ndarray) -> dict[str, float]:
    """Least det J, % of voxels with det J ≤ 0 (central differences), % of the volume turned over (tetrahedra)."""
    determinant = jacobian_determinant(displacement)
    where = np.ones(determinant.shape, bool)
    return {
        "least det J": float(determinant.min()),
        "voxels folded (%)": folding_percent(determinant, where),
        "volume turned over (%)": nondiffeomorphic_percent(displacement, where),
    }


@lru_cache(maxsize=64)
def least_determinants(name: str, grid: int, sizes: tuple[float, ...], fold_free: bool, method: str) -> tuple[float, ...]:
    """Least det J over all voxels of a cube for growing displacements."""
    return tuple(float(jacobian_determinant(field(name, grid, s, method, 3, fold_free)).min()) for s in sizes)
