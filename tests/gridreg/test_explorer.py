"""The uncertainty explorer: what it reads out, its samples, and what it writes for two files."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from small_scans import body, upright

from gridreg.checkpoint import save_model
from gridreg.errors import InputError
from gridreg.explorer import registered as explorer
from gridreg.explorer import widgets as explorer_widgets
from gridreg.explorer.picture import View, first_look
from gridreg.explorer.widgets import Explorer
from gridreg.network import GridReg
from gridreg.scans.export import save
from gridreg.scans.geometry import apply_affine
from gridreg.scans.volumes import read_displacement, read_field_mm, read_image, write_volume
from study.cohorts.dataset import Preprocessed
from study.cohorts.pairs import demo_pair, own_pair, sources
from study.cohorts.preprocess import preprocess_dataset

VALUES = {"datasets": {"mine": {"shape": [24, 22, 20], "spacing_mm": 2.0, "affine_reference": None, "labels": None}}}


def test_the_read_out_is_the_field_in_millimetres(registered):
    voxel = (5, 9, 7)
    found = explorer.read_out(registered, voxel)
    np.testing.assert_allclose(found["displacement_mm"], 2.0 * registered.displacement[:, 5, 9, 7], rtol=1e-6)
    np.testing.assert_allclose(found["sigma_mm"], registered.sigma_mm[:, 5, 9, 7])
    corner = explorer.read_out(registered, (0, 0, 0))["sigma_mm"]
    np.testing.assert_allclose(corner, 2.0 * registered.sigma[0, :, 0, 0, 0], rtol=1e-5, err_msg="a control point")
    assert found["label"] is None and found["error_mm"] is None


def test_samples_spread_by_sigma(registered):
    samples = np.stack([explorer.draw_sample(registered, n)[0] for n in range(400)])
    mean = np.abs(samples.mean(0) - registered.displacement) * 2
    assert (mean / registered.sigma_mm).max() < 5.5 / 400**0.5
    assert np.median(samples.std(0) * 2 / registered.sigma_mm) == pytest.approx(1, abs=0.02)
    assert np.array_equal(explorer.draw_sample(registered, 3)[0], samples[3])


def test_what_is_saved_loads_and_agrees(registered, tmp_path):
    pair = registered.pair
    warped, field, sigma, _ = save(pair, registered.displacement, tmp_path, registered.sigma_mm)
    fixed, moving = (read_image(path) for path in pair.files)
    assert nibabel.load(warped).shape == fixed.data.shape
    vectors, affine = read_field_mm(field)
    np.testing.assert_allclose(affine, fixed.affine, atol=1e-5)
    world = apply_affine(fixed.affine, np.moveaxis(np.indices(fixed.data.shape), 0, -1)) + np.moveaxis(vectors, 0, -1)
    at = np.moveaxis(apply_affine(np.linalg.inv(moving.affine), world), -1, 0)
    expected = map_coordinates(moving.data, at, order=1, mode="constant", cval=moving.data.min())
    np.testing.assert_allclose(nibabel.load(warped).get_fdata(), expected, atol=1e-4)
    assert nibabel.load(sigma).shape == fixed.data.shape and np.isfinite(read_displacement(field)[0]).all()
    # a voxel of the grid: its partner there, brought to the moving scan, is where the written vector leads
    voxel = np.array((11, 10, 9))
    p = pair.scan_mm(voxel)
    partner = voxel + registered.displacement[(slice(None), *voxel)]
    wanted = apply_affine(pair.to_source[1] @ pair.affine, partner)
    at = apply_affine(np.linalg.inv(fixed.affine), p)[:, None]
    found = p + [map_coordinates(v, at, order=1)[0] for v in vectors]
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_bad_files_get_a_sentence(pair, tmp_path):
    with pytest.raises(InputError, match="nothing.nii.gz: found no such file, expected"):
        own_pair(VALUES, pair.files[0], tmp_path / "nothing.nii.gz", "mine")
    with pytest.raises(InputError, match="the same file"):
        own_pair(VALUES, pair.files[0], pair.files[0], "mine")
    for bad, sentence in (
        (tmp_path, "found a folder, expected a NIfTI file"),
        ("", "moving: found '', expected the path"),
        (7, "moving: found 7, expected the path of a NIfTI file"),
    ):
        with pytest.raises(InputError, match=sentence):
            own_pair(VALUES, pair.files[0], bad, "mine")
    with pytest.raises(InputError, match="found no dataset 'other'"):
        own_pair(VALUES, *pair.files, "other")
    with pytest.raises(InputError, match="found no trained model"):
        explorer.load_network(tmp_path)


def test_a_home_folder_may_be_abbreviated(pair, monkeypatch):
    monkeypatch.setenv("HOME", str(pair.files[0].parent))
    assert np.array_equal(own_pair(VALUES, "~/fixed.nii.gz", "~/moving.nii.gz", "mine", "centre").fixed, pair.fixed)


def test_saved_sigma_is_in_the_millimetres_of_the_moving_scan(registered, tmp_path):
    larger = replace(
        registered.pair, to_source=tuple(np.diag([1.5, 1.5, 1.5, 1.0]) @ m for m in registered.pair.to_source)
    )
    plain, scaled = (nibabel.load(save(pair, registered.displacement, tmp_path / name, registered.sigma_mm)[2]).get_fdata()
                     for name, pair in (("a", replace(registered.pair, to_source=(larger.to_source[0], registered.pair.to_source[1]))),
                                        ("b", larger)))  # fmt: skip
    np.testing.assert_allclose(scaled, 1.5 * plain, rtol=1e-5)


def test_a_notebook_shows_the_sentence_alone():
    assert InputError("a: found b, expected c")._render_traceback_() == ["InputError: a: found b, expected c"]


def test_numbers_wait_for_the_last_of_several_wishes(pair, tmp_path, monkeypatch):
    run = {"method": "gridreg", "grids": [[5, 5, 5]], "base_channels": 4, "num_layers": 4, "bayesian": True}
    save_model(
        tmp_path / "mine", GridReg(base_channels=4, num_layers=4, bayesian=True), {"run": run, "grid": [5, 5, 5]}
    )
    measured = []
    monkeypatch.setattr(
        explorer_widgets, "measure", lambda registered: measured.append(1) or explorer.measure(registered)
    )

    async def drag() -> None:
        explored = Explorer(sources(VALUES, *pair.files, results=tmp_path, checkpoints=tmp_path), "mine")
        pictures = set()
        for grid in (6, 7, 8):
            explored.grid.value = grid
            pictures.add(explored.picture.png)
            assert "folded" not in explored.found.value
        assert len(pictures) == 3 and not measured
        await asyncio.sleep(3 * explorer_widgets.PAUSE)
        assert measured == [1] and "folded" in explored.found.value

    asyncio.run(drag())


def test_a_click_on_the_crosshair_is_the_voxel(registered):
    view, look = View(registered), first_look(registered)
    look.voxel = (7, 12, 5)
    before = view.draw(look)
    for (name, _), panel in view.panels.items():
        _, across, up, _ = {"axial": (2, 0, 1, 0), "coronal": (1, 0, 2, 0), "sagittal": (0, 1, 2, 0)}[name]
        x, y = panel["ax"].transData.transform((look.voxel[across], look.voxel[up]))
        assert view.voxel_at(x, view.figure.bbox.height - y, look.voxel) == look.voxel
    assert view.voxel_at(0, 0, look.voxel) is None
    look.voxel = (8, 12, 5)
    assert view.draw(look) != before


def test_widgets_answer_and_errors_become_a_sentence(pair, registered, tmp_path):
    """The whole explorer on two files, without a browser."""
    network = GridReg(base_channels=4, num_layers=4, bayesian=True)
    run = {"method": "gridreg", "grids": [[5, 5, 5]], "base_channels": 4, "num_layers": 4, "bayesian": True}
    save_model(tmp_path / "models" / "mine", network, {"run": run, "grid": [5, 5, 5], "training": {}})
    models = {"results": tmp_path, "checkpoints": tmp_path / "models"}
    explored = Explorer(sources(VALUES, *pair.files, **models), "mine", tmp_path / "out")
    first = explored.picture.png
    assert first.startswith(b"\x89PNG") and explored.grid.value == 5
    explored.crosshair[0].value = 3
    second = explored.picture.png
    assert second != first and "right–left" in explored.found.value
    explored.grid.value = 7
    assert explored.registered.control_points.shape[2:] == (7, 7, 7) and explored.picture.png != second
    ax = explored.view.panels["axial", 0]["ax"]
    x, y = ax.transData.transform((12, 9))
    explored.picture.clicked = [x, explored.view.figure.bbox.height - y, 1]
    assert [slider.value for slider in explored.crosshair][:2] == [12, 9]
    explored.comparison.value, explored.vectors.value = "sample", "deformed grid"
    explored.errors.value = True
    assert "not known" in explored.said.value
    explored.button.click()
    assert (tmp_path / "out" / "displacement.nii.gz").is_file() and "written" in explored.said.value
    (tmp_path / "taken").touch()
    explored.out = tmp_path / "taken"
    explored.button.click()
    assert "taken: File exists; expected" in explored.said.value
    pair.files[1].rename(pair.files[1].with_name("gone.nii.gz"))
    explored.button.click()
    pair.files[1].with_name("gone.nii.gz").rename(pair.files[1])
    assert "moving.nii.gz" in explored.said.value
    with pytest.raises(InputError, match="found no model 'other', expected one of mine"):
        Explorer(sources(VALUES, *pair.files, **models), "other")
    with pytest.raises(InputError, match="expected both or neither"):
        sources(VALUES, pair.files[0])


def save_run(folder, method: str = "gridreg", bayesian: bool = True) -> None:
    run = {"method": method, "grids": [[5, 5, 5]], "base_channels": 4, "num_layers": 4, "bayesian": bayesian}
    save_model(folder, GridReg(base_channels=4, num_layers=4, bayesian=bayesian), {"run": run, "grid": [5, 5, 5]})


@pytest.fixture
def cohort(tmp_path):
    """A cohort of six subjects, two of them tested, in Learn2Reg layout."""
    names = [f"mine_{n:04d}" for n in range(6)]
    for n, name in enumerate(names):
        part = "Ts" if n > 3 else "Tr"
        write_volume(tmp_path / f"cohort/images{part}/{name}.nii.gz", body((30, 28, 20), seed=n), upright())
    entries = [{"image": f"./images{'Ts' if n > 3 else 'Tr'}/{name}.nii.gz"} for n, name in enumerate(names)]
    pairs = {f"registration_{split}": [{"fixed": names[a], "moving": names[b]}]
             for split, a, b in (("val", 2, 3), ("test", 4, 5))}  # fmt: skip
    (tmp_path / "cohort/dataset.json").write_text(json.dumps({"training": entries[:4], "test": entries[4:], **pairs}))
    return tmp_path / "cohort"


def test_any_trained_gridreg_opens_whatever_its_cohort(cohort, tmp_path, pair):
    """Runs of a user's cohort, of the ablation, and of a cohort that params.yaml no longer names."""
    block = VALUES["datasets"]["mine"] | {"path": str(cohort)}
    values = {"datasets": {"mine": block}, "ablation": {"dataset": "mine"}}
    train = tmp_path / "results" / "train"
    save_run(train / "mine" / "gridreg-adaptive", bayesian=False)
    save_run(train / "mine" / "gridreg-bayesian")
    save_run(train / "ablation" / "default")
    save_run(train / "gone" / "gridreg-5")
    save_run(tmp_path / "checkpoints" / "bundled")  # of a cohort that is not in use
    (train / "mine" / "voxelmorph").mkdir()
    (train / "mine" / "voxelmorph" / "model.json").write_text(json.dumps({"run": {"method": "voxelmorph"}}))
    (train / "mine" / "broken").mkdir()
    (train / "mine" / "broken" / "model.json").write_text("{")
    where = {"results": tmp_path / "results", "checkpoints": tmp_path / "checkpoints"}
    mine = ["ablation, default", "mine, gridreg-adaptive", "mine, gridreg-bayesian"]
    assert list(sources(values, **where)) == mine
    preprocess_dataset(cohort, tmp_path / "results" / "preprocess" / "gone", name="gone", shape=(24, 22, 20), spacing_mm=2.0,
                       progress=False)  # fmt: skip
    found = sources(values, **where)
    assert sorted(found) == sorted([*mine, "gone, gridreg-5"])
    assert found["mine, gridreg-bayesian"].pairs == ("0004 ← 0005",)
    explored = Explorer(found, "mine, gridreg-bayesian")
    for name in sorted(found, key="gone, gridreg-5".__eq__):
        explored.dataset.value = name
        assert explored.registered.displacement.shape == (3, 24, 22, 20) and "<b>" not in explored.said.value, name
        explored.out = tmp_path / "out" / name
        explored.button.click()
        assert explored.said.value.startswith("written"), name
        fixed = nibabel.load(explored.view.pair.files[0])
        np.testing.assert_allclose(nibabel.load(explored.out / "warped.nii.gz").affine, fixed.affine, atol=1e-5)
    field, _ = read_field_mm(tmp_path / "out" / "gone, gridreg-5" / "displacement.nii.gz")  # on the preprocessed images
    np.testing.assert_allclose(field, explored_mm := explored.registered.displacement_mm, atol=1e-4)
    assert explored.dataset.value == "gone, gridreg-5" and np.abs(explored_mm).max() > 0
    own = sources(values, *pair.files, **where)
    assert sorted(own) == sorted(found)
    assert own["gone, gridreg-5"].open(0).shape == (24, 22, 20)
    with pytest.raises(InputError, match="found no trained GridReg whose images are there, expected one under"):
        sources(values, results=tmp_path, checkpoints=tmp_path)


def test_a_cohorts_pair_opens_as_it_was_preprocessed(cohort, tmp_path):
    for start in (None, "headers", "centre"):
        block = VALUES["datasets"]["mine"] | {"path": str(cohort), "start": start, "window": [0, 800]}
        opened = demo_pair({"datasets": {"mine": block}}, "mine")
        preprocess_dataset(cohort, tmp_path / "out", name="mine", shape=(24, 22, 20), spacing_mm=2.0, start=start,
                           window=(0, 800), progress=False)  # fmt: skip
        data = Preprocessed(tmp_path / "out")
        kept = data.pair(*data.pairs("test")[0])
        np.testing.assert_array_equal(opened.fixed, kept.fixed)
        np.testing.assert_array_equal(opened.moving, kept.moving)
        np.testing.assert_allclose(opened.affine, kept.affine, atol=1e-5)
