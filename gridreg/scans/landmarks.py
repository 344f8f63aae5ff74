"""Landmark files: tables of points in mm or voxels, and the point lists of 3D Slicer.

A table has a header that states what its numbers are, and rows of a name and three numbers; commas, semicolons or tabs part
them:

* ``name,x_mm,y_mm,z_mm`` or ``name,x_mm_ras,y_mm_ras,z_mm_ras``: world, RAS mm;
* ``name,x_mm_lps,y_mm_lps,z_mm_lps``: world, LPS mm, as DICOM, ITK and ANTs state points;
* ``name,x_voxel,y_voxel,z_voxel``: indices from 0 into the image file as stored.

Slicer's ``.fcsv`` and ``.mrk.json`` state their coordinate system themselves.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from gridreg.errors import refused
from gridreg.scans.files import read_text
from gridreg.scans.geometry import RAS_TO_LPS, Geometry, apply_affine

SUFFIXES = (".csv", ".tsv", ".fcsv", ".mrk.json")
UNITS = {"mm": "ras", "mm_ras": "ras", "mm_lps": "lps", "voxel": "voxel"}  # of a header → what the numbers are
SLICER = {"RAS": "ras", "LPS": "lps", "0": "ras", "1": "lps"}  # numbers in files from before Slicer 4.11
BODY = 0.5  # times the mean intensity: brighter voxels are the body
STATE_LPS = "a table in LPS states x_mm_lps,y_mm_lps,z_mm_lps"

Rows = list[list[str]]  # of a name and three numbers


def read_points(path: Path | str) -> tuple[dict[str, np.ndarray], str]:
    """The points of a landmark file, {name: (3,)}, and their unit: "mm" (RAS, whatever the file states) or "voxel".

    InputError for a file that states no unit, an empty one, a repeated name, or a value that is no finite number.
    """
    path = Path(path)
    if not path.is_file():
        raise refused(path, "no such file", "a landmark table")
    name = path.name.lower()
    read = _markups if name.endswith(".json") else _fcsv if name.endswith(".fcsv") else _table
    system, rows = read(path, read_text(path))
    if not rows:
        raise refused(path, "no points", "at least one")
    points: dict[str, np.ndarray] = {}
    for name, *cells in rows:
        try:
            point = np.array([float(cell) for cell in cells])
        except (TypeError, ValueError):
            point = np.array([])
        if point.shape != (3,) or not np.isfinite(point).all() or name in points:
            row = ",".join(map(str, (name, *cells)))
            raise refused(path, f"the row '{row}'", "a new name and three finite numbers")
        points[name] = point * RAS_TO_LPS if system == "lps" else point
    return points, "voxel" if system == "voxel" else "mm"


def read_landmarks(
    path: Path | str, data: np.ndarray, affine: np.ndarray, geometry: Geometry
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The landmarks of an image as {name: world RAS mm, (3,)}, and notes on them.

    data      (W, H, D) intensities in canonical order, affine: their voxel → world matrix
    geometry  of the image file

    Refused: a point outside the image, and points in mm of an image whose header states no orientation. A note says so
    where most points lie outside the body but would lie within it with x and y negated, as if the file were in LPS.
    """
    points, unit = read_points(path)
    if unit == "voxel":
        points = {name: apply_affine(geometry.affine, point) for name, point in points.items()}
    elif not geometry.oriented:
        found = f"points in mm of {geometry.path}, whose header states no orientation"
        raise refused(path, found, "x_voxel,y_voxel,z_voxel")
    world = np.array(list(points.values()))
    stated, negated = (apply_affine(np.linalg.inv(affine), at) for at in (world, world * RAS_TO_LPS))
    mirrored = unit == "mm" and inside(negated, data.shape).all()
    for name, voxel in zip(points, stated):
        if not inside(voxel, data.shape):
            found = f"landmark '{name}' at voxel {np.round(voxel, 1).tolist()} (RAS order)"
            hint = f": with x and y negated all would lie inside; {STATE_LPS}" if mirrored else ""
            raise refused(
                path, found, f"it inside the {'×'.join(map(str, data.shape))} voxels of {geometry.path}{hint}"
            )
    if mirrored:
        body = data > BODY * np.nanmean(data)
        hit, would = (int(body[tuple(np.rint(at).astype(int).T)].sum()) for at in (stated, negated))
        if 2 * hit < would:
            return points, (f"{path}: {hit} of {len(points)} points lie within the body and {would} would with x and y negated; "
                            f"they are used as stated, in RAS; {STATE_LPS}",)  # fmt: skip
    return points, ()


def inside(voxel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Whether voxel positions (..., 3) lie in a volume of ``shape``, to the outer faces of its border voxels."""
    return ((voxel >= -0.5) & (voxel <= np.asarray(shape) - 0.5)).all(axis=-1)


def _rows(lines: list[str], delimiter: str) -> Rows:
    rows = ([cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter))
    return [row for row in rows if any(row)]


def _table(path: Path, text: str) -> tuple[str, Rows]:
    """What the numbers are ("ras", "lps" or "voxel") and the rows below the header."""
    lines = text.strip().splitlines()
    if not lines:
        raise refused(path, "an empty file", "landmarks")
    delimiter = max(",;\t", key=lines[0].count)
    head, *rows = _rows(lines, delimiter)
    systems = {("name", *(f"{axis}_{unit}" for axis in "xyz")): system for unit, system in UNITS.items()}
    system = systems.get(tuple(cell.lower() for cell in head))
    if system is None:
        expected = "'name,x_mm,y_mm,z_mm' (RAS), 'name,x_mm_lps,y_mm_lps,z_mm_lps' or 'name,x_voxel,y_voxel,z_voxel'"
        raise refused(path, f"the header '{','.join(head)}', which states no unit", expected)
    if not rows:
        raise refused(path, "a header and no landmarks", "at least one")
    if delimiter == ";":  # where a comma is the decimal mark, semicolons part the cells
        rows = [[name, *(cell.replace(",", ".") for cell in cells)] for name, *cells in rows]
    return system, rows


def _fcsv(path: Path, text: str) -> tuple[str, Rows]:
    """Slicer's older point list: comments that state the coordinate system and the columns, then rows."""
    lines = text.splitlines()
    stated = dict(
        line.lstrip("# ").replace(" ", "").split("=", 1) for line in lines if line.startswith("#") and "=" in line
    )
    system, columns = stated.get("CoordinateSystem"), stated.get("columns", "").split(",")
    if system not in SLICER or not {"x", "y", "z", "label"} <= set(columns):
        expected = "a point list of 3D Slicer with '# CoordinateSystem = LPS' or RAS and the columns x, y, z and label"
        raise refused(path, f"the coordinate system {system} and the columns {columns}", expected)
    rows = [dict(zip(columns, row)) for row in _rows([line for line in lines if not line.startswith("#")], ",")]
    return SLICER[system], [[row.get(column, "") for column in ("label", "x", "y", "z")] for row in rows]


def _markups(path: Path, text: str) -> tuple[str, Rows]:
    """Slicer's point list in JSON. Points that were listed but never placed are passed over."""
    expected = "a point list of 3D Slicer (.mrk.json)"
    try:
        lists = json.loads(text)["markups"]
        systems = {SLICER.get(str(each.get("coordinateSystem", "LPS")).upper()) for each in lists}
        units = {str(each.get("coordinateUnits", "mm")) for each in lists}
        rows = [[str(point.get("label", "")), *point["position"]] for each in lists for point in each["controlPoints"]
                if point.get("positionStatus", "defined") == "defined"]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(path, f"other content ({error})", expected) from error
    if len(systems) != 1 or None in systems or not units <= {"mm", "[mm]", ""}:
        raise refused(path, "no single coordinate system of LPS or RAS in mm", expected)
    return systems.pop(), rows
