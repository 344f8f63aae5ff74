"""Landmark files of every kind, in the scan's own millimetres."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from small_scans import OBLIQUE, body, upright, write_scan

from gridreg.errors import InputError
from gridreg.scans.geometry import apply_affine
from gridreg.scans.landmarks import read_landmarks, read_points
from gridreg.scans.volumes import read_image
from study.cohorts.preprocess import write_landmarks

SHAPE = (9, 11, 7)
POINTS = {"verumontanum": (3.5, -12.0, 8.0), "left cyst": (-9.0, 4.5, -2.0)}


def of_image(path, volume) -> dict[str, np.ndarray]:
    return read_landmarks(path, volume.data, volume.affine, volume.geometry)


@pytest.fixture
def image(tmp_path):
    affine = OBLIQUE @ np.diag((-1.0, 1, 1, 1))  # not RAS
    return read_image(write_scan(tmp_path / "i.nii", np.random.default_rng(0).random(SHAPE, np.float32), affine))


def test_landmarks_in_both_units(tmp_path, image):
    stored = np.array((2.0, 3.5, 4.0))  # voxel of the file, which is not RAS
    world = apply_affine(image.geometry.affine, stored)
    (tmp_path / "v.csv").write_text("name,x_voxel,y_voxel,z_voxel\ncyst,2,3.5,4\n")
    (tmp_path / "w.csv").write_text("name,x_mm,y_mm,z_mm\n\ncyst," + ",".join(map(str, world)) + "\n")
    for table in ("v.csv", "w.csv"):
        np.testing.assert_allclose(of_image(tmp_path / table, image)[0]["cyst"], world)
    write_landmarks(tmp_path / "o.csv", {"cyst, left": stored})
    points, unit = read_points(tmp_path / "o.csv")
    assert unit == "voxel" and points["cyst, left"].tolist() == stored.tolist()


def tables() -> dict[str, bytes]:
    """The same two points in every format, by file name."""
    ras = [(name, x, y, z) for name, (x, y, z) in POINTS.items()]
    lps = [(name, -x, -y, z) for name, x, y, z in ras]

    def table(mark: str, unit: str, rows: list) -> str:
        head = mark.join(["name", *(f"{axis}_{unit}" for axis in "xyz")])
        return "\n".join([head, *(mark.join(map(str, row)) for row in rows)]) + "\n"

    def fcsv(system: str, rows: list) -> str:
        lines = [f"{n},{x},{y},{z},0,0,0,1,1,1,0,{name},," for n, (name, x, y, z) in enumerate(rows)]
        columns = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
        return "\n".join(["# Markups fiducial file version = 4.11", f"# CoordinateSystem = {system}", columns, *lines])

    def markups(system: str | None, rows: list) -> str:
        points = [{"label": name, "position": [x, y, z], "positionStatus": "defined"} for name, x, y, z in rows]
        points.append({"label": "never placed", "position": [0, 0, 0], "positionStatus": "undefined"})
        stated = {} if system is None else {"coordinateSystem": system}
        return json.dumps(
            {"markups": [{"type": "Fiducial", "coordinateUnits": "mm", **stated, "controlPoints": points}]}
        )

    comma = "name;x_mm;y_mm;z_mm\n" + "".join(f"{n};{x};{y};{z}\n".replace(".", ",") for n, x, y, z in ras)
    texts = {
        "plain.csv": table(",", "mm", ras), "ras.csv": table(",", "mm_ras", ras), "lps.csv": table(",", "mm_lps", lps),
        "semicolons.csv": table(";", "mm", ras), "tabs.tsv": table("\t", "mm_lps", lps), "decimal_comma.csv": comma,
        "crlf.csv": table(",", "mm", ras).replace("\n", "\r\n"), "new.fcsv": fcsv("LPS", lps), "ras.fcsv": fcsv("RAS", ras),
        "old.fcsv": fcsv("0", ras), "one.fcsv": fcsv("1", lps), "lps.mrk.json": markups("LPS", lps),
        "ras.mrk.json": markups("RAS", ras), "unstated.mrk.json": markups(None, lps),
    }  # fmt: skip
    files = {name: text.encode() for name, text in texts.items()}
    files["mark.csv"] = table(";", "mm", ras).encode("utf-8-sig")
    files["utf16.csv"] = table("\t", "mm", ras).encode("utf-16")
    files["mark.mrk.json"] = texts["lps.mrk.json"].encode("utf-8-sig")
    return files


@pytest.mark.parametrize("name", tables())
def test_points_in_every_format(tmp_path, name):
    (tmp_path / name).write_bytes(tables()[name])
    points, unit = read_points(tmp_path / name)
    assert unit == "mm" and list(points) == list(POINTS)
    for key, point in POINTS.items():
        np.testing.assert_allclose(points[key], point)


def test_latin_1_names(tmp_path):
    (tmp_path / "w.csv").write_bytes("name,x_voxel,y_voxel,z_voxel\nDrüse,1,2,3\n".encode("latin-1"))
    assert list(read_points(tmp_path / "w.csv")[0]) == ["Drüse"]


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("", "an empty file", "landmarks"),
        ("name,x_mm,y_mm,z_mm\n", "a header and no landmarks", "at least one"),
        ("12.5,3,4\n1,2,3\n", "states no unit", "x_voxel,y_voxel,z_voxel"),
        ("name,x,y,z\na,1,2,3\n", "states no unit", "x_mm"),
        ("name,x_voxel,y_voxel,z_voxel\na,1,2,30\n", "landmark 'a' at voxel [1.0, 2.0, 30.0]", "inside the 9×11×7"),
        ("name,x_mm,y_mm,z_mm\na,1,2\n", "the row 'a,1,2'", "three finite"),
        ("name,x_mm,y_mm,z_mm\na,1,2,nan\n", "nan", "finite"),
        ("name,x_mm,y_mm,z_mm\na,1,2,3\na,1,2,4\n", "the row 'a,1,2,4'", "a new name"),
        (None, "no such file", "table"),
    ],
)
def test_landmarks_refused(tmp_path, text, found, expected):
    image = read_image(write_scan(tmp_path / "i.nii", np.random.default_rng(0).random(SHAPE, np.float32), np.eye(4)))
    if text is not None:
        (tmp_path / "points.csv").write_text(text)
    with pytest.raises(InputError) as error:
        of_image(tmp_path / "points.csv", image)
    message = str(error.value)
    assert "points.csv: found" in message and found in message
    assert expected in message.split("expected", 1)[1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.fcsv", "# columns = id,x,y,z,label\n1,2,3,4,a\n", "coordinate system None"),
        ("p.fcsv", "# CoordinateSystem = IJK\n# columns = id,x,y,z,label\n1,2,3,4,a\n", "coordinate system IJK"),
        ("p.fcsv", "# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n", "no points"),
        ("p.mrk.json", "{}", "a point list of 3D Slicer"),
        ("p.mrk.json", "no json", "a point list of 3D Slicer"),
        ("p.mrk.json", '{"markups": [{"coordinateSystem": "IJK", "controlPoints": []}]}', "LPS or RAS"),
        ("p.mrk.json", '{"markups": [{"coordinateSystem": "LPS", "controlPoints": []}]}', "no points"),
    ],
)
def test_point_lists_of_slicer_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"p\.\w+.*: found .*{message}"):
        read_points(tmp_path / name)


def test_points_that_fit_only_when_negated_are_noted(tmp_path):
    """A table in LPS whose header does not say so."""
    data = np.zeros((30, 30, 12), np.float32)
    data[2:12, 3:13, 2:10] = body((10, 10, 8)) + 100  # a small body on the right, at the back
    volume = read_image(write_scan(tmp_path / "scan.nii", data, upright((2, 2, 2), (-29, -29, -11))))
    rows = [(-15, -13, 0), (-17, -15, 2), (-11, -9, -2)]
    for name, sign in (("ras", 1), ("lps", -1)):
        lines = [f"p{n},{sign * x},{sign * y},{z}" for n, (x, y, z) in enumerate(rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["name,x_mm,y_mm,z_mm", *lines]) + "\n")
    assert of_image(tmp_path / "ras.csv", volume)[1] == ()
    _, (note,) = of_image(tmp_path / "lps.csv", volume)
    assert f"{tmp_path / 'lps.csv'}: 0 of 3 points lie within the body and 3 would with x and y negated" in note
    beside = read_image(write_scan(tmp_path / "s.nii", data[:12], upright((2, 2, 2), (-29, -29, -11))))
    with pytest.raises(InputError, match="with x and y negated all would lie inside"):
        of_image(tmp_path / "lps.csv", beside)


def test_millimetres_need_an_orientation(tmp_path):
    image = nibabel.Nifti1Image(body((9, 11, 7)), None)
    nibabel.save(image, tmp_path / "none.nii")
    volume = read_image(tmp_path / "none.nii")
    (tmp_path / "w.csv").write_text("name,x_mm,y_mm,z_mm\na,1,2,3\n")
    (tmp_path / "v.csv").write_text("name,x_voxel,y_voxel,z_voxel\na,1,2,3\n")
    with pytest.raises(
        InputError, match=r"w\.csv: found points in mm of .*none\.nii, whose header states no orientation"
    ):
        of_image(tmp_path / "w.csv", volume)
    assert list(of_image(tmp_path / "v.csv", volume)[0]) == ["a"]
