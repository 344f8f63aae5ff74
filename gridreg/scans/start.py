"""Where registration starts: how scans are laid over each other before a network sees them.

* ``headers``: one point of the scanner's world comes to the centre of the grid for every scan, so scans lie as their
  headers say. Right for scans of one session, one patient, or one template space, whatever their fields of view.
* ``centre``: each scan's own centre comes to the centre of the grid. Right where headers have lost their origins.
* ``affine``: an affine alignment by ANTs, of a cohort to a reference, or of the moving scan of a pair to the fixed one.

Where nothing is asked for, headers are taken if every scan states an orientation and what the scans hold overlaps on the
grid, and centres otherwise. A note says which was taken and how far the two disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gridreg.errors import InputError
from gridreg.scans.geometry import Geometry, apply_affine, check_orientations, corners
from gridreg.scans.prepare import Target
from gridreg.scans.volumes import read_geometry

STARTS = ("headers", "centre", "affine")
OVERLAP = 0.25  # of the smaller of a scan's box and the grid: less is no overlap
NOTABLE = 1.0  # mm: where a start was asked for and the other would differ by less, there is nothing to say


@dataclass(frozen=True)
class Start:
    """What was taken.

    kind       "headers" or "centre"
    centre_mm  (3,) world RAS mm of the scans that comes to the centre of the grid; None: each scan's own centre
    """

    kind: str
    centre_mm: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def choose_start(files: Sequence[Path | str], target: Target, wanted: str | None = None) -> Start:
    """The start of a whole cohort, from the headers of its images alone.

    wanted  "headers", "centre" or None

    With headers, the median of the scans' centres comes to the centre of the grid. InputError where scans with and
    without an orientation are mixed, and for ``headers`` where there is none.
    """
    geometries = [read_geometry(file) for file in files]
    boxes = [_box(apply_affine(g.affine, corners(g.shape))) for g in geometries]
    return decide_start(geometries, boxes, np.median([g.centre for g in geometries], axis=0), target, wanted)


def decide_start(
    geometries: Sequence[Geometry],
    boxes: Sequence[np.ndarray],
    centre_mm: np.ndarray,
    target: Target,
    wanted: str | None = None,
) -> Start:
    """Headers or centres, for scans whose content lies in ``boxes``, each (lowest, highest) world RAS mm, (2, 3).

    centre_mm  (3,) the point that headers would bring to the centre of the grid, up to half a voxel: where the voxels of the
               first scan differ from the grid's by a shift only, it is rounded to whole ones
    """
    if wanted not in ("headers", "centre", None):
        raise InputError(f"start: found {wanted!r}, expected one of {', '.join(STARTS)}.")
    check_orientations(geometries)
    unknown = [g for g in geometries if not g.oriented]
    if wanted == "headers" and unknown:
        raise InputError(f"{unknown[0].path}: found no orientation in the header, expected one for `start: headers`.")
    relative = max(float(np.linalg.norm(g.centre - geometries[0].centre)) for g in geometries)
    if unknown:
        return Start("centre", None, ("start: centre, since the headers state no orientation",))
    grid = np.stack([centre_mm - target.extent_mm / 2, centre_mm + target.extent_mm / 2])
    beside = [g for g, box in zip(geometries, boxes) if _overlap(box, grid) < OVERLAP]
    disagree = f"headers and centres disagree by up to {relative:.1f} mm"
    if wanted == "centre":
        return Start("centre", None, (f"start: centre; {disagree}",) if relative > NOTABLE else ())
    if beside and wanted is None:
        return Start("centre", None, (f"start: centre, since {beside[0].path} and the others do not overlap by their headers; "
                                      f"{disagree}",))  # fmt: skip
    if wanted == "headers" and beside:
        raise InputError(
            f"{beside[0].path}: found next to nothing of the scan on a grid around {np.round(centre_mm, 1).tolist()} mm, expected "
            "an overlap by the headers; `start: centre` does without them."
        )
    return Start(
        "headers",
        _rounded(geometries[0], target, centre_mm),
        (f"start: headers; {disagree}",) if wanted is None or relative > NOTABLE else (),
    )


def _rounded(geometry: Geometry, target: Target, centre_mm: np.ndarray) -> np.ndarray:
    """The centre moved by less than a voxel, so that voxels of grid and scan coincide where their sizes allow it."""
    grid_to_world = target.affine.copy()
    grid_to_world[:3, 3] += centre_mm - np.array(target.centre_mm)
    grid_to_source = np.linalg.inv(geometry.affine) @ grid_to_world
    axes = np.abs(grid_to_source[:3, :3])
    if not np.allclose(axes, np.rint(axes), atol=1e-3):
        return centre_mm
    fraction = grid_to_source[:3, 3] - np.floor(grid_to_source[:3, 3] + 0.5)
    return centre_mm - geometry.affine[:3, :3] @ fraction


def _box(points: np.ndarray) -> np.ndarray:
    return np.stack([points.min(axis=0), points.max(axis=0)])


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Volume of the intersection of two boxes (2, 3), as a share of the smaller one."""
    common = np.clip(np.minimum(one[1], other[1]) - np.maximum(one[0], other[0]), 0, None)
    smaller = min(np.prod(one[1] - one[0]), np.prod(other[1] - other[0]))
    return float(np.prod(common) / smaller) if smaller > 0 else 0.0
