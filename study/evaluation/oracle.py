"""The oracle: the smallest error with which a grid of control points can represent the true displacement.

A registration has two errors. The approximation error exists because the grid cannot represent the truth; it shrinks with
more control points. The estimation error (Lesson 1) exists because the method does not find the best field of its grid,
owing to noise, homogeneous tissue and the network. The least-squares fit of the control points to the truth has the first
error alone. It needs the truth, so it exists for simulated cohorts only, and no setting may be chosen by it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.ndimage import find_objects
from scipy.sparse.linalg import LinearOperator, lsmr
from tqdm import tqdm

from gridreg.metrics import tre_mm
from gridreg.spatial import Shape, as_shape, check_grid_size
from gridreg.upsampling import basis
from study.cohorts.dataset import Preprocessed
from study.methods.table import grid_name

TOLERANCE = 1e-8  # relative, of the residual's gradient; the error is then exact in all digits of a table
ITERATIONS = 2000


def best_control_points(truth: np.ndarray, region: np.ndarray, grid_size: int | Shape, method: str) -> np.ndarray:
    """Control points whose upsampled field has the least mean squared distance to ``truth`` over ``region``.

    truth      (3, W, H, D) voxels
    region     (W, H, D) bool
    grid_size  control points of the whole image
    method     "trilinear", "bspline" or "deconv"
    returns    (3, gw, gh, gd) voxels, float64; a control point that reaches no voxel of the region stays 0

    LSMR solves for them, with the basis applied as one small matrix per axis. ValueError on an empty region, on shapes
    that do not fit, and on a grid size below 2 or above that of the image.
    """
    truth, region = np.asarray(truth, float), np.asarray(region, bool)
    if truth.shape != (3, *region.shape):
        raise ValueError(f"truth is {truth.shape} and region {region.shape}, expected (3, W, H, D) and (W, H, D)")
    if not region.any():
        raise ValueError("the region is empty, expected at least one voxel")
    grid_size = check_grid_size(grid_size, region.shape)
    box = find_objects(region.astype(np.int8))[0]  # outside it there is nothing to fit
    inside = region[box].astype(float)
    rows = [basis(n, g, method).double().numpy()[part] for n, g, part in zip(region.shape, grid_size, box)]
    # columns of unit length, so that a control point at the rim of the region is as well conditioned as one in its middle
    length = np.sqrt(_along_axes(inside[None], [b.T**2 for b in rows]))
    scale = np.divide(1, length, out=np.zeros_like(length), where=length > 1e-6)
    columns, observed = [b.T for b in rows], (3, *inside.shape)

    def forward(c):
        return (_along_axes(c.reshape(3, *grid_size) * scale, rows) * inside).ravel()

    def adjoint(r):
        return (_along_axes(r.reshape(observed) * inside, columns) * scale).ravel()

    operator = LinearOperator((3 * inside.size, 3 * scale.size), matvec=forward, rmatvec=adjoint, dtype=float)
    wanted = (truth[(slice(None), *box)] * inside).ravel()
    fitted = lsmr(operator, wanted, atol=TOLERANCE, btol=TOLERANCE, conlim=0, maxiter=ITERATIONS)[0]
    return fitted.reshape(3, *grid_size) * scale


def _along_axes(volume: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """``upsampling.apply_along_axes`` in NumPy and float64: volume (C, a, b, c), matrices (A, a), (B, b), (C', c)."""
    first, second, third = matrices
    return np.einsum("Aa,cabd->cAbd", first, second @ (volume @ third.T), optimize=True)


def oracle_error_mm(
    truth: np.ndarray, region: np.ndarray, spacing_mm: float, grid_size: int | Shape, method: str = "trilinear"
) -> float:
    """Mean distance in mm over ``region`` between the truth and the best field of a grid; NaN for an empty region.

    The arguments are those of ``best_control_points``. "Best" means least squares, for which the squared errors add up:
    mean |u - truth|² = mean |u - best|² + mean |best - truth|² for every field u of the grid.
    """
    if not region.any():
        return float("nan")
    control_points = best_control_points(truth, region, grid_size, method)
    matrices = [basis(n, g, method).double().numpy() for n, g in zip(region.shape, control_points.shape[1:])]
    return tre_mm(_along_axes(control_points, matrices), truth, region, spacing_mm)


def oracle_table(
    data: Preprocessed, dataset: str, grids: Iterable[int | Shape], method: str = "trilinear", split: str = "test"
) -> pd.DataFrame:
    """``oracle_error_mm`` of every pair of a split at every grid, within the region in which evaluation measures the TRE.

    Returns columns dataset, fixed, moving, grid ("5x5x5"), oracle_mm; a pair without a known truth has no row.
    """
    rows = []
    for fixed, moving in tqdm(data.pairs(split), f"oracle {dataset}", unit="pair", mininterval=2):
        pair = data.pair(fixed, moving)
        if pair.truth is None:
            continue
        truth, known = pair.truth
        for grid in map(as_shape, grids):
            error = oracle_error_mm(truth, known & pair.region, pair.spacing_mm, grid, method)
            rows.append((dataset, fixed, moving, grid_name(grid), error))
    return pd.DataFrame(rows, columns=["dataset", "fixed", "moving", "grid", "oracle_mm"])
