"""Signed distances of simple shapes (mm, negative inside) and a canvas that paints tissues into them.

A shape is a function of x, y, z (RAS mm, broadcastable arrays). Unions are minima, intersections maxima.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Shape = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def ellipsoid(centre, radii, exponent: float = 2.0) -> Shape:
    """First-order distance to |(p - c) / r| = 1; exponents above 2 make it squarer. An infinite radius: a cylinder."""

    def distance(x, y, z):
        scaled = [np.abs(v - c) / r for v, c, r in zip((x, y, z), centre, radii)]
        if exponent == 2:  # the usual case, without slow powers
            powers, slopes = [s * s for s in scaled], scaled
        else:
            slopes = [s ** (exponent - 1) for s in scaled]
            powers = [s * p for s, p in zip(scaled, slopes)]
        level = sum(powers) ** (1 / exponent) + 1e-6
        slope = np.sqrt(sum((p / r) ** 2 for p, r in zip(slopes, radii))) + 1e-6
        return (level - 1) * level ** (exponent - 1) / slope

    return distance


def capsule(start, end, radius: float) -> Shape:
    """Everything within ``radius`` of the segment from ``start`` to ``end``."""
    a, axis = np.asarray(start, float), np.subtract(end, start).astype(float)

    def distance(x, y, z):
        t = sum((v - c) * d for v, c, d in zip((x, y, z), a, axis)) / (axis @ axis)
        t = np.clip(t, 0, 1)
        return np.sqrt(sum((v - c - t * d) ** 2 for v, c, d in zip((x, y, z), a, axis))) - radius

    return distance


def union(*shapes: Shape, blend: float = 0.0) -> Shape:
    """The least distance; ``blend`` mm rounds the seam."""

    def distance(x, y, z):
        out = shapes[0](x, y, z)
        for shape in shapes[1:]:
            other = shape(x, y, z)
            h = np.maximum(blend - np.abs(out - other), 0) / blend if blend else 0.0
            out = np.minimum(out, other) - h * h * blend / 4
        return out

    return distance


def inset(shape: Shape, depth: float) -> Shape:
    """The same shape, ``depth`` mm smaller all round (negative: larger)."""
    return lambda x, y, z: shape(x, y, z) + depth


def both(*shapes: Shape) -> Shape:
    """The intersection."""
    return lambda x, y, z: np.maximum.reduce(np.broadcast_arrays(*(s(x, y, z) for s in shapes)))


def mirrored(shape: Shape) -> Shape:
    """A shape given for the right side (x > 0), on both sides."""
    return lambda x, y, z: shape(np.abs(x), y, z)


class Canvas:
    """Tissue fractions on a grid, painted one shape over another with soft, partial-volume edges.

    ``wobble`` (3, W, H, D) mm displaces every shape's surface a little: nothing in a body is an exact ellipsoid.
    """

    SKIP = 4  # nodes: every shape is first evaluated on each fourth node, to find the box that it lies in

    def __init__(self, affine: np.ndarray, shape: tuple[int, int, int], tissues: tuple[str, ...], wobble: np.ndarray):
        self.spacing = float(affine[0, 0])
        axes = [affine[a, 3] + self.spacing * np.arange(n) for a, n in enumerate(shape)]
        self.xyz = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.seen = [(v + w).astype(np.float32) for v, w in zip(self.xyz, wobble)]
        self.fractions = {name: np.zeros(shape, np.float32) for name in tissues}

    def coverage(self, shape: Shape) -> tuple[tuple[slice, ...], np.ndarray]:
        """A box (slices) that holds the shape, and how much of each of its voxels the shape covers, in [0, 1]."""
        coarse = np.broadcast_to(
            shape(*(v[:: self.SKIP, :: self.SKIP, :: self.SKIP] for v in self.seen)),
            [-(-n // self.SKIP) for n in self.seen[0].shape],
        )
        # distances are first-order, so twice the diagonal of a skipped cell is the margin
        near = np.nonzero(coarse < 2 * self.SKIP * self.spacing * 3**0.5)
        if not near[0].size:
            return (slice(0, 0),) * 3, np.zeros((0, 0, 0), np.float32)
        box = tuple(slice(self.SKIP * max(i.min() - 1, 0), self.SKIP * (i.max() + 1) + 1) for i in near)
        distance = np.broadcast_to(shape(*(v[box] for v in self.seen)), self.seen[0][box].shape)
        return box, np.clip(0.5 - distance / self.spacing, 0, 1).astype(np.float32)

    def paint(self, tissue: str | None, shape: Shape, opacity: float = 1.0) -> None:
        """Put ``tissue`` over what is there (None: nothing that gives signal)."""
        box, cover = self.coverage(shape)
        for fraction in self.fractions.values():
            fraction[box] *= 1 - opacity * cover
        if tissue is not None:
            self.fractions[tissue][box] += opacity * cover

    def mask(self, shape: Shape) -> np.ndarray:
        """The voxels whose greater part lies in the shape, (W, H, D) uint8."""
        box, cover = self.coverage(shape)
        out = np.zeros(self.seen[0].shape, np.uint8)
        out[box] = cover > 0.5
        return out

    def centroid(self, weight: np.ndarray, box: tuple[slice, ...] = (slice(None),) * 3) -> np.ndarray:
        """Centre of a weight (given on ``box``) in RAS mm, (3,)."""
        total = weight.sum(dtype=float)
        return np.array(
            [
                float(
                    (
                        weight.sum(axis=tuple(a for a in range(3) if a != k), dtype=float) * self.xyz[k].ravel()[box[k]]
                    ).sum()
                    / total
                )
                for k in range(3)
            ]
        )
