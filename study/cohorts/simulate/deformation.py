"""Random diffeomorphisms with an exact, stored definition, for the simulated cohorts.

A subject's deformation is a pull-back, q = phi(p) = p + d(p): p in the subject's world, q in the template's, both RAS
millimetres. The displacement d is stored on a lattice in steps of ``STEP_MM`` and is linear between the nodes; that
stored field *is* the deformation. Images, labels and landmarks are made with it, so what is written beside them is
the exact truth, not an approximation of it.

It is built as phi(p) = exp(-v)(A⁻¹ p): anatomy moves along the smooth stationary velocity field v, then the patient is
repositioned by the affine A. Scaling and squaring gives exp; ``smallest_jacobian`` proves that nothing folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.ndimage import map_coordinates

STEP_MM = 1 / 64  # a power of two: whole steps are exact in floating point and in the NIfTI header's float32 slope
SQUARINGS = 6
EXTENT_MM = 200.0  # random nodes cover the cube [-EXTENT_MM, EXTENT_MM]³ whatever the image, so sizes share subjects


@dataclass(frozen=True)
class Lattice:
    """Nodes of an axis-aligned RAS lattice: node index i sits at origin + spacing * i (mm)."""

    origin: tuple[float, float, float]
    spacing: float
    shape: tuple[int, int, int]

    @property
    def affine(self) -> np.ndarray:
        """Node index → RAS mm, (4, 4)."""
        affine = np.diag([self.spacing] * 3 + [1.0])
        affine[:3, 3] = self.origin
        return affine

    def index(self, points: np.ndarray) -> np.ndarray:
        """RAS mm (3, ...) → fractional node index (3, ...)."""
        return (points - _column(self.origin, points)) / self.spacing

    def points(self) -> np.ndarray:
        """RAS mm of every node, (3, W, H, D)."""
        grid = np.indices(self.shape, dtype=float)
        return _column(self.origin, grid) + self.spacing * grid


@dataclass(frozen=True)
class Deformation:
    """A stored displacement field: ``steps`` (3, W, H, D) int16 on ``lattice``, d = STEP_MM * steps in RAS mm."""

    lattice: Lattice
    steps: np.ndarray

    def displacement(self) -> np.ndarray:
        """d at the nodes, (3, W, H, D) RAS mm."""
        return self.steps * STEP_MM

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """phi(p): points (3, ...) RAS mm of the subject → RAS mm of the template."""
        return points + _interpolate(self.displacement(), self.lattice.index(points), order=1)

    def on_grid(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """phi on the tensor grid of RAS coordinates (mm) x, y, z → (3, X, Y, Z); as ``__call__``, several times faster.

        Trilinear interpolation is separable: one (points × nodes) matrix of hat functions per axis.
        """
        d = self.displacement()
        for axis, mm in reversed(list(enumerate((x, y, z)))):  # z first: callers ask for thin slabs
            last = self.lattice.shape[axis] - 1
            index = np.clip((mm - self.lattice.origin[axis]) / self.lattice.spacing, 0, last)
            hats = np.maximum(1 - np.abs(index[:, None] - np.arange(last + 1)), 0)
            d = np.moveaxis(np.tensordot(d, hats, axes=(1 + axis, 1)), -1, 1 + axis)
        return d + np.stack(np.meshgrid(x, y, z, indexing="ij"))

    def inverse(self, points: np.ndarray, tolerance_mm: float = 1e-3) -> np.ndarray:
        """phi⁻¹(q) for template points (3, N) mm, by Newton's method with the Jacobian of the point's own cell.

        Raises ArithmeticError if a point does not converge, as one that comes from outside the lattice.
        """
        p = points - _interpolate(self.displacement(), self.lattice.index(points), order=1)
        for _ in range(50):
            residual = self(p) - points
            if np.abs(residual).max() < tolerance_mm:
                return p
            h = self.lattice.spacing * 1e-3
            jacobian = np.stack([(self(p + h * e) - self(p - h * e)) / (2 * h) for e in np.eye(3)[:, :, None]], axis=-1)
            p = p - np.linalg.solve(jacobian.transpose(1, 0, 2), residual.T[..., None])[..., 0].T
        raise ArithmeticError(f"inverse: {np.abs(residual).max():.3f} mm left, expected under {tolerance_mm} mm")


def covering(corners_mm: np.ndarray, spacing: float, margin_mm: float = 0.0) -> Lattice:
    """The lattice of ``spacing`` mm centred on the points ``corners_mm`` (3, N) that reaches ``margin_mm`` beyond."""
    low, high = corners_mm.min(axis=1) - margin_mm, corners_mm.max(axis=1) + margin_mm
    cells = np.ceil((high - low) / spacing - 1e-6)
    origin = (low + high) / 2 - cells * spacing / 2
    return Lattice(tuple(origin.tolist()), float(spacing), tuple(int(c) + 1 for c in cells))


def smooth_noise(rng: np.random.Generator, points: np.ndarray, spacing_mm: float) -> np.ndarray:
    """A random vector field of about unit variance per component: cubic B-spline, nodes ``spacing_mm`` apart.

    points (3, ...) RAS mm → (3, ...). The nodes are fixed in space: the same generator state gives the same field on
    any lattice.
    """
    n = int(np.ceil(2 * EXTENT_MM / spacing_mm)) + 3
    nodes = rng.standard_normal((3, n, n, n))
    index = (points + EXTENT_MM) / spacing_mm + 1
    # a cubic B-spline keeps on average 0.479 of the nodes' variance along each axis (its squared integral)
    return _interpolate(nodes, index, order=3, prefilter=False) / 0.479**1.5


def limited_normal(rng: np.random.Generator, deviation: np.ndarray | float, size: int) -> np.ndarray:
    """Normal draws, zero mean, cut off at two standard deviations: no subject is an outlier by chance."""
    return np.clip(rng.standard_normal(size), -2, 2) * deviation


def bump(points: np.ndarray, centre: np.ndarray, radius_mm: np.ndarray | float) -> np.ndarray:
    """exp(-½ |(p - c) / r|²) at points (3, ...) mm → (...), ``radius_mm`` one number or one per axis."""
    radius = _column(np.broadcast_to(radius_mm, 3), points)
    return np.exp(-0.5 * (((points - _column(centre, points)) / radius) ** 2).sum(axis=0))


def swelling(points: np.ndarray, centre: np.ndarray, radius_mm: np.ndarray | float) -> np.ndarray:
    """The velocity (p - c) exp(-½ |(p - c) / r|²): flowing along s times it enlarges the place c about e^s times."""
    return (points - _column(centre, points)) * bump(points, centre, radius_mm)


def exponential(velocity: np.ndarray, spacing: float) -> np.ndarray:
    """Displacement of exp(v) for a velocity (3, W, H, D) in mm on nodes ``spacing`` mm apart; scaling and squaring."""
    nodes = np.indices(velocity.shape[1:], dtype=float)
    d = velocity / 2**SQUARINGS
    for _ in range(SQUARINGS):
        d = d + _interpolate(d, nodes + d / spacing, order=1)
    return d


def deformation(lattice: Lattice, velocity, affine: np.ndarray) -> Deformation:
    """phi(p) = exp(-v)(A⁻¹ p), quantised on ``lattice``.

    velocity: function points (3, ...) mm → v (3, ...) mm, in template space. affine: A (4, 4), template → subject, mm.
    Raises ArithmeticError if the stored field folds anywhere.
    """
    nodes = lattice.points()
    back = np.linalg.inv(affine)
    anatomical = np.einsum("ab,b...->a...", back[:3, :3], nodes) + _column(back[:3, 3], nodes)  # A⁻¹ p
    around = covering(anatomical.reshape(3, -1), lattice.spacing, margin_mm=2 * lattice.spacing)
    flow = exponential(-velocity(around.points()), around.spacing)
    d = anatomical + _interpolate(flow, around.index(anatomical), order=3) - nodes
    stored = Deformation(lattice, np.rint(d / STEP_MM).astype(np.int16))
    smallest = smallest_jacobian(stored)
    if not smallest > 0:
        raise ArithmeticError(f"deformation: the smallest Jacobian determinant is {smallest:.3f}, expected above 0")
    return stored


def smallest_jacobian(field: Deformation) -> float:
    """A lower bound of det(dphi/dp) over the whole stored, piecewise trilinear field.

    Inside a cell each column of the Jacobian is a weighted mean (weights ≥ 0, sum 1) of the cell's four edges along
    that axis, and the determinant is linear in each column: it is nowhere below its least value over the 4·4·4 choices
    of one edge per axis. Above 0, the field is invertible in every point, not only at the nodes.
    """
    phi = field.lattice.points() + field.displacement()
    columns = []
    for axis in range(3):
        edges = np.diff(phi, axis=1 + axis) / field.lattice.spacing
        others = [a for a in range(3) if a != axis]
        columns.append([_corner(edges, others, offset) for offset in product((0, 1), repeat=2)])
    crosses = [np.cross(b, c, axis=0) for b, c in product(columns[1], columns[2])]
    return float(min((a * cross).sum(axis=0).min() for a in columns[0] for cross in crosses))


def rigid(
    rotation_deg: np.ndarray, translation_mm: np.ndarray, centre: np.ndarray, scale: np.ndarray | float = 1.0
) -> np.ndarray:
    """(4, 4): scale per axis, then rotate about x, y, z, both about ``centre``, then translate."""
    x, y, z = np.deg2rad(rotation_deg)
    rx = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    ry = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    rz = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rz @ ry @ rx @ np.diag(np.broadcast_to(scale, 3))
    affine[:3, 3] = np.asarray(translation_mm) + centre - affine[:3, :3] @ np.asarray(centre, float)
    return affine


def _corner(edges: np.ndarray, axes: list[int], offset: tuple[int, ...]) -> np.ndarray:
    """The edges at one corner of every cell: node ``offset`` along the two ``axes`` across them."""
    for axis, o in zip(axes, offset):
        n = edges.shape[1 + axis]
        edges = np.take(edges, np.arange(o, n - 1 + o), axis=1 + axis)
    return edges


def _interpolate(field: np.ndarray, index: np.ndarray, order: int, prefilter: bool = True) -> np.ndarray:
    """field (C, W, H, D) at fractional indices (3, ...) → (C, ...); beyond the border the nearest node counts."""
    return np.stack([map_coordinates(c, index, order=order, mode="nearest", prefilter=prefilter) for c in field])


def _column(vector, like: np.ndarray) -> np.ndarray:
    """(3,) shaped to broadcast against (3, ...)."""
    return np.asarray(vector, float).reshape(3, *[1] * (like.ndim - 1))
