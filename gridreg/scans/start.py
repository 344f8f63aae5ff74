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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import entr

from gridreg.errors import InputError
from gridreg.scans.geometry import Geometry, apply_affine, check_orientations, corners
from gridreg.scans.intensity import Intensity, normalise
from gridreg.scans.landmarks import inside
from gridreg.scans.prepare import Target, centred_on_content, placed
from gridreg.scans.resample import resample_image
from gridreg.scans.volumes import Volume, read_geometry, read_image

Loaded = tuple[Volume, np.ndarray]  # a scan, and its image in [0, 1]

STARTS = ("headers", "centre", "affine")
OVERLAP = 0.25  # of the smaller of a scan's box and the grid: less is no overlap
COUPLES = 5  # scans of a cohort that are looked at two by two
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


def choose_start(files: Sequence[Path | str], target: Target, wanted: str | None = None) -> Start:
    """The start of a whole cohort, from the headers of its images and, where it must be decided, a few of the images.

    wanted  "headers", "centre" or None

    With headers, the median of the scans' centres comes to the centre of the grid. InputError where scans with and
    without an orientation are mixed, and for ``headers`` where there is none.
    """
    geometries = [read_geometry(file) for file in files]
    boxes = [_box(apply_affine(g.affine, corners(g.shape))) for g in geometries]
    chosen = np.unique(np.linspace(0, max(len(files) - 2, 0), COUPLES).round().astype(int))

    def couples() -> Iterator[tuple[Loaded, Loaded]]:
        for number in chosen[: len(files) - 1]:
            yield tuple(_load(file) for file in files[number : number + 2])

    return decide_start(geometries, boxes, np.median([g.centre for g in geometries], axis=0), target, wanted, couples)


def _load(file: Path | str) -> Loaded:
    volume = read_image(file, "background")
    return volume, normalise(volume.data, Intensity(nan="background"), str(file))


def decide_start(
    geometries: Sequence[Geometry],
    boxes: Sequence[np.ndarray],
    centre_mm: np.ndarray,
    target: Target,
    wanted: str | None,
    couples: Callable[[], Iterable[tuple[Loaded, Loaded]]],
) -> Start:
    """Headers or centres, for scans whose content lies in ``boxes``, each (lowest, highest) world RAS mm, (2, 3).

    centre_mm  (3,) the point that headers would bring to the centre of the grid, up to half a voxel: where the voxels of the
               first scan differ from the grid's by a shift only, it is rounded to whole ones
    couples    reads pairs of the scans, each with its image in [0, 1]; called where it matters
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
    if wanted is None and relative > target.spacing_mm:
        by_headers, by_centres = _agreements(couples(), target, centre_mm)
        if by_centres > max(BETTER[0] * by_headers, BETTER[1] + by_headers):
            return Start("centre", None, (f"start: centre, since the images agree better by it (mutual information {by_centres:.2f} "
                                          f"against {by_headers:.2f} by the headers); {disagree}",))  # fmt: skip
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


def _agreements(couples: Iterable[tuple[Loaded, Loaded]], target: Target, centre_mm: np.ndarray) -> np.ndarray:
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
