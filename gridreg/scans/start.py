"""Where registration starts: how scans are laid over each other before a network sees them.

* ``headers``: one point of the scanner's world comes to the centre of the grid for every scan, so scans lie as their
  headers say. Right for scans of one session, one patient, or one template space, whatever their fields of view.
* ``centre``: each scan's own centre comes to the centre of the grid. Right where headers have lost their origins, as in many
  pooled cohorts of cropped scans.
* ``affine``: an affine alignment by ANTs, of a cohort to a reference, or of the moving scan of a pair to the fixed one.

Where nothing is asked for, headers are taken if every scan states an orientation and what the scans hold overlaps by them:
the boxes do, and the images agree there about as well as they would by their centres. Otherwise centres are taken. A note
says which was taken and how far the two disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from gridreg.errors import refused
from gridreg.scans.geometry import Geometry, apply_affine, check_orientations
from gridreg.scans.intensity import Loaded
from gridreg.scans.landmarks import inside
from gridreg.scans.prepare import Target, centred_on_content, placed, to_whole_voxels
from gridreg.scans.resample import resample_image
from gridreg.scans.volumes import Volume

STARTS = ("headers", "centre", "affine")
OVERLAP = 0.25  # of the smaller of a scan's box and the grid: less is no overlap
BINS = 16  # of the intensities of two images that are compared
BETTER = 1.25, 0.05  # times the agreement by headers, and above it: from there on centres are taken
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


def decide_start(
    geometries: Sequence[Geometry],
    boxes: Sequence[np.ndarray],
    centre_mm: np.ndarray,
    target: Target,
    wanted: str | None,
    couples: Iterable[Sequence[Loaded]],
) -> Start:
    """Headers or centres, for two scans or a cohort. InputError for "headers" where they state no orientation or overlap.

    boxes      where the content of each scan lies: (lowest, highest) world RAS mm, (2, 3)
    centre_mm  (3,) the point that headers would bring to the centre of the grid, but for ``to_whole_voxels`` of the first scan
    wanted     "headers", "centre" or None
    couples    pairs of the scans to compare; nothing is taken from it where headers and boxes decide
    """
    if wanted not in ("headers", "centre", None):
        raise refused("start", repr(wanted), f"one of {', '.join(STARTS)}")
    check_orientations(geometries)
    first = geometries[0]
    if not first.oriented:
        if wanted == "headers":
            raise refused(first.path, "no orientation in the header", "one for `start: headers`")
        return Start("centre", None, ("start: centre, since the headers state no orientation",))
    relative = max(float(np.linalg.norm(g.centre - first.centre)) for g in geometries)
    disagree = f"headers and centres disagree by up to {relative:.1f} mm"
    grid = np.stack([centre_mm - target.extent_mm / 2, centre_mm + target.extent_mm / 2])
    beside = [g.path for g, box in zip(geometries, boxes) if _overlap(box, grid) < OVERLAP]
    reason = ""
    if wanted is None and beside:
        reason = f", since {beside[0]} and the others do not overlap by their headers"
    elif wanted is None and relative > target.spacing_mm:
        by_headers, by_centres = _agreements(couples, target, centre_mm)
        if by_centres > max(BETTER[0] * by_headers, BETTER[1] + by_headers):
            reason = (f", since the images agree better by it (mutual information {by_centres:.2f} against {by_headers:.2f} by the "
                      "headers)")  # fmt: skip
    notable = wanted is None or relative > NOTABLE
    if wanted == "centre" or reason:
        return Start("centre", None, (f"start: centre{reason}; {disagree}",) if notable else ())
    if beside:
        found = f"next to nothing of the scan on a grid around {np.round(centre_mm, 1).tolist()} mm"
        raise refused(beside[0], found, "an overlap by the headers; `start: centre` does without them")
    centre_mm = centre_mm + to_whole_voxels(first.affine, target, placed(target, centre_mm))
    return Start("headers", centre_mm, (f"start: headers; {disagree}",) if notable else ())


def _agreements(couples: Iterable[Sequence[Loaded]], target: Target, centre_mm: np.ndarray) -> np.ndarray:
    """How well two images agree on the grid by their headers and by their centres, (2,), the mean over couples of scans."""
    found = []
    for couple in couples:
        by_headers = [_on_grid(*each, target, placed(target, centre_mm)) for each in couple]
        by_centres = [_on_grid(*each, target, centred_on_content(*each, target)[0]) for each in couple]
        found.append([mutual_information(*by_headers), mutual_information(*by_centres)])
    return np.mean(found, axis=0)


def _on_grid(volume: Volume, image: np.ndarray, target: Target, to_source: np.ndarray) -> np.ndarray:
    """An image on the grid, NaN outside its field of view."""
    grid_to_source = np.linalg.inv(volume.affine) @ to_source @ target.affine
    at = apply_affine(grid_to_source, np.moveaxis(np.indices(target.shape), 0, -1))
    return np.where(inside(at, image.shape), resample_image(image, grid_to_source, target.shape), np.nan)


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Mutual information of two images in [0, 1] where both are known, as a share of the smaller entropy; 0 if that is 0."""
    known = ~(np.isnan(one) | np.isnan(other))
    if not known.any():
        return 0.0
    joint = np.histogram2d(one[known], other[known], BINS, ((0, 1), (0, 1)))[0] / known.sum()
    together, first, second = (entr(p).sum() for p in (joint, joint.sum(1), joint.sum(0)))
    smaller = min(first, second)
    return float((first + second - together) / smaller) if smaller > 0 else 0.0


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Volume of the intersection of two boxes (2, 3), as a share of the smaller one."""
    common = np.clip(np.minimum(one[1], other[1]) - np.maximum(one[0], other[0]), 0, None)
    smaller = min(np.prod(one[1] - one[0]), np.prod(other[1] - other[0]))
    return float(np.prod(common) / smaller) if smaller > 0 else 0.0
