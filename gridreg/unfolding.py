"""Find the folds of a displacement field, and remove them by smoothing control points.

The bound of ``upsampling.displacement_bound`` forbids folds, but no control point can then move by half a spacing. On a
fine grid this is less than anatomies differ. ``unfold`` works without the bound: it smooths the control points around a
fold, and only those, until no fold is left.
"""

from __future__ import annotations

from itertools import permutations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from gridreg.spatial import Shape, check_volume
from gridreg.upsampling import apply_along_axes, basis, upsample

LEAST_VOLUME = 0.01  # relative to the undeformed cell; a smaller volume counts as a fold, as a margin for rounding
MAX_ROUNDS = 200
SMOOTHED_WEIGHT = 0.5  # in round 1, a control point is smoothed if its summed weight at folded voxels is above this
SMOOTHING = 0.25  # weight of the neighbours' mean in a smoothed control point


def folds(displacement: Tensor, where: Tensor | None = None) -> Tensor:
    """(W, H, D) bool: voxels at a fold of x + u(x), for u (3, W, H, D) in voxels. A fold meets either definition:

    - A tetrahedron is mirrored: each cell of eight voxels is cut into six tetrahedra, in two mirror-image ways
      (``metrics.nondiffeomorphic_percent``). All eight voxels are marked.
    - det J ≤ 0 with central differences (``metrics.folding_percent``).

    where: (W, H, D) bool, the voxels to test; None: all. Cells that cannot fold are skipped (``_steep_cells``).
    """
    shape, device = displacement.shape[1:], displacement.device
    marked = torch.zeros(shape, dtype=torch.bool, device=device)
    corners = torch.tensor(list(product((0, 1), repeat=3)), device=device)
    steep = _steep_cells(displacement)
    if where is not None:
        steep &= F.max_pool3d(where[None, None].float(), 2, 1)[0, 0] > 0
    cells = steep.nonzero()  # (K, 3)
    if len(cells) == 0:
        return marked

    def moved(voxels: Tensor) -> Tensor:
        """x + u(x) of voxels x (..., 3)."""
        return displacement[:, voxels[..., 0], voxels[..., 1], voxels[..., 2]].movedim(0, -1) + voxels

    around = cells[:, None] + corners  # (K, 8, 3)
    place, turned = moved(around), torch.zeros(len(cells), dtype=torch.bool, device=device)
    for mirror, path in product((0, 1), permutations(range(3))):
        offset, vertices = [mirror, 0, 0], []
        for axis in (None, *path):
            if axis is not None:
                offset[axis] = 1 - offset[axis]
            vertices.append(place[:, 4 * offset[0] + 2 * offset[1] + offset[2]])
        a, b, c = (vertex - vertices[0] for vertex in vertices[1:])
        sign = torch.linalg.det(torch.eye(3)[list(path)]).item() * (-1 if mirror else 1)
        turned |= sign * (torch.linalg.cross(a, b) * c).sum(-1) < LEAST_VOLUME
    marked[around[turned].flatten(0, 1).unbind(1)] = True

    corner = torch.zeros_like(marked)
    corner[around.flatten(0, 1).unbind(1)] = True
    voxels, last = corner.nonzero(), torch.tensor(shape, device=device) - 1
    columns = []
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.long, device=device)
        step[axis] = 1
        after, before = torch.minimum(voxels + step, last), (voxels - step).clamp(min=0)
        columns.append((moved(after) - moved(before)) / (after - before)[:, axis, None])
    determinant = (torch.linalg.cross(columns[0], columns[1]) * columns[2]).sum(-1)
    marked[voxels[determinant < LEAST_VOLUME].unbind(1)] = True
    return marked


def _steep_cells(displacement: Tensor) -> Tensor:
    """(W - 1, H - 1, D - 1) bool: cells in which the differences along the edges do not rule out a fold.

    With G_ab = ∂u_a/∂x_b and A = I + G, det A ≥ m³ if every eigenvalue of (A + Aᵀ) / 2 is at least m > 0, and each is at
    least the smallest over a of 1 + G_aa - Σ_b≠a |G_ab + G_ba| / 2 (Gershgorin).
    """
    least = torch.ones(3, *(n - 1 for n in displacement.shape[1:]), device=displacement.device)
    for axis in range(3):
        difference = displacement.diff(dim=1 + axis)
        lowest, highest = difference[axis], difference.abs()
        for other in range(3):  # over the four edges of a cell along this axis
            if other != axis:
                n = displacement.shape[1 + other] - 1
                lowest = torch.minimum(lowest.narrow(other, 0, n), lowest.narrow(other, 1, n))
                highest = torch.maximum(highest.narrow(1 + other, 0, n), highest.narrow(1 + other, 1, n))
        least[axis] += lowest
        for other in range(3):
            if other != axis:
                least[axis] -= highest[other] / 2
                least[other] -= highest[other] / 2
    return (least < LEAST_VOLUME ** (1 / 3)).any(0)


@torch.no_grad()
def unfold(control_points: Tensor, shape: Shape, upsampling: str = "trilinear") -> Tensor:
    """Control points (1, 3, gw, gh, gd) in voxels whose field has no folds; unchanged if it had none.

    Each round averages the control points around folds with their neighbours. ValueError on other shapes, and
    RuntimeError if folds are left after ``MAX_ROUNDS``.
    """
    check_volume(control_points, 3, "control_points")
    back = [basis(n, g, upsampling, control_points.device).T for n, g in zip(shape, control_points.shape[2:])]
    field = upsample(control_points, shape, upsampling)[0]
    marked = folds(field)
    for number in range(1, MAX_ROUNDS + 1):
        if not marked.any():
            return control_points
        touched = apply_along_axes(marked[None, None].float(), back) > SMOOTHED_WEIGHT / number  # wider each round
        smooth = F.avg_pool3d(F.pad(control_points, (1,) * 6, mode="replicate"), 3, 1)
        control_points = torch.where(touched, torch.lerp(control_points, smooth, SMOOTHING), control_points)
        before, field = field, upsample(control_points, shape, upsampling)[0]
        changed = (field != before).any(0)
        changed = F.max_pool3d(changed[None, None].float(), 3, 1, 1)[0, 0] > 0  # differences reach one voxel further
        marked = (marked & ~changed) | folds(field, changed)
    raise RuntimeError(f"found folds after {MAX_ROUNDS} rounds of smoothing, expected none")
