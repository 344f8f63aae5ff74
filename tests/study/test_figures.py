"""Figures reach the disk whole, say what they are, and show the right side of the patient."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gridreg.errors import InputError
from gridreg.explorer.slices import VIEWS, central_voxel, show_slice, slice_of
from gridreg.scans.pair import Pair
from study import style
from study.evaluation.evaluate import save_pictures
from study.reporting.figures import grid_sizes, landmarks, training
from study.reporting.figures import registrations as panels
from study.reporting.figures.landmarks import landmark_figure
from study.reporting.figures.slices import AXIAL_LETTERS, show_deformed_grid
from study.reporting.figures.style import PAGE, missing_figure, save_figure
from study.reporting.results import RUN_LABELS

pytestmark = pytest.mark.filterwarnings("error")  # a missing glyph or a failed layout is a warning of matplotlib
SHAPE = (10, 12, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few pixels: what is tested does not depend on them."""
    monkeypatch.setitem(style.RC, "savefig.dpi", 50)


@pytest.fixture
def captions(monkeypatch):
    """Captions of figures that are laid out and not written: writing takes longest and is tested on others."""
    written = []

    def keep(figure, path, *caption):
        plt.close(figure)
        written.append(" ".join(" ".join(caption).split()))

    for module in (panels, grid_sizes, landmarks, training):
        monkeypatch.setattr(module, "save_figure", keep)
    return written


def make_volume(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise in [0, 1] with a block of mask in the middle."""
    labels = np.zeros(SHAPE, np.int16)
    labels[3:7, 4:9, 2:6] = 1
    return np.random.default_rng(seed).random(SHAPE, np.float32), labels


def make_case(methods, masks: bool = True, fields: bool = True) -> dict:
    image, labels = make_volume()
    field = np.random.default_rng(1).normal(size=(3, *SHAPE))
    result = (image, labels if masks else None, field if fields else None)
    case = {
        "name": "p 1",
        "pair": ("p 1", "p 2"),
        "fixed": image,
        "moving": image,
        "methods": {run: result for run in methods},
    }
    case["scores"] = {
        "identity": {"dice": 0.5, "tre_mm": np.nan, "landmark_mm": 4.0},
        methods[0]: {"dice": 0.8, "tre_mm": 2.0},
    }
    return case | ({"fixed_labels": labels, "moving_labels": labels} if masks else {})


def make_cases(n: int = 5) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for dataset in ("prostate", "pelvis"):
        for run, grids in {"identity": [""], "gridreg-5": ["5x5x5"], "gridreg-15": ["15x15x15"],
                           "gridreg-adaptive": ["5x5x5", "10x10x10", "15x15x15"]}.items():  # fmt: skip
            for grid in grids:
                for case in range(n):
                    rows.append(
                        {"dataset": dataset, "run": run, "method": run.split("-")[0], "grid": grid, "fixed": f"f{case}",
                         "moving": "m", "chosen": grid != "5x5x5" and grid != "15x15x15" or run != "gridreg-adaptive",
                         "dice": rng.random(), "mask_mm": rng.random(), "tre_mm": rng.random(),
                         "landmark_mm": np.nan if dataset == "pelvis" else rng.random()}
                    )  # fmt: skip
    return pd.DataFrame(rows)


INDEXES = {"prostate": {"simulated": True}, "pelvis": {"simulated": False}}


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(plt.Text))


def assert_written(stem) -> None:
    assert sorted(path.name for path in stem.parent.iterdir()) == [f"{stem.name}.{s}" for s in ("pdf", "png", "txt")]
    for suffix in ("png", "pdf"):
        assert stem.with_suffix(f".{suffix}").stat().st_size > 1000
    assert b"/Type /Font" in stem.with_suffix(".pdf").read_bytes()
    assert not plt.get_fignums()


def assert_nothing_clipped(figure) -> None:
    """Everything drawn lies within the figure, and the figure within a printed page (inches)."""
    assert figure.get_size_inches()[0] <= PAGE + 1e-9
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02, box


def test_registration_figure(tmp_path):
    methods = ["voxelmorph", "gridreg-adaptive"]
    figure = panels.figure5(tmp_path / "figure5", [make_case(methods)], methods, (1.0, 1.0, 2.0))
    assert_written(tmp_path / "figure5")
    shown = texts(figure)
    assert "Prostate registration (simulated)" in shown and "(a) p 1" in shown
    assert "Dice 0.80\nTRE 2.0 mm" in shown and "landmarks 4.0 mm" in shown and "GridReg\n(adaptive)" in shown
    assert_nothing_clipped(figure)
    said = (tmp_path / "figure5.txt").read_text()
    assert said.startswith("Prostate registration (simulated). Simulated prostate cohort, not patients.")
    assert "TRE: mean distance between" in said and "Deformed grid: lines of" in said and AXIAL_LETTERS in said
    assert "Fixed and moving image of each case: (a) p 1 and p 2." in said


def test_any_other_cohort_is_captioned_as_fully(tmp_path, captions):
    case = make_case(["voxelmorph"], fields=False)
    case["scores"] = {"voxelmorph": {"dice": 0.8}}
    shown = texts(panels.cohort_registrations(tmp_path / "f", "pelvis", [case], ["voxelmorph"], (1, 1, 1)))
    said = captions[0]
    assert "Pelvis registration (simulated)" in shown and "Simulated pelvis cohort, not patients." in said
    assert "p 1 and p 2" in said and AXIAL_LETTERS in said
    assert "TRE" not in said and "grid" not in said  # neither is shown
    real = texts(
        panels.cohort_registrations(tmp_path / "f", "mine", [case], ["voxelmorph"], (1, 1, 1), simulated=False)
    )
    assert "Mine registration" in real and "imulated" not in real and "imulated" not in captions[1]


def test_registration_figure_with_seven_methods_and_nothing_optional(tmp_path, captions):
    methods = [run for run in RUN_LABELS if run != "identity"][:7]
    case = {
        key: value
        for key, value in make_case(methods, masks=False, fields=False).items()
        if key not in ("name", "scores")
    }
    figure = panels.figure6(tmp_path / "f", [case] * 3, methods, (1, 1, 1), simulated=False)
    assert len(figure.axes) == 2 * 9  # two cases at most, no row of grids
    shown = texts(figure)
    assert "Brain registration" in shown and "simulated" not in shown.lower()
    assert "simulated" not in captions[0].lower() and "mask" not in captions[0]
    assert_nothing_clipped(figure)


def test_registration_figure_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(InputError, match="no case"):
        panels.figure5(tmp_path / "f", [], ["voxelmorph"], (1, 1, 1))
    with pytest.raises(InputError, match="no result of keymorph"):
        panels.figure5(tmp_path / "f", [make_case(["voxelmorph"])], ["keymorph"], (1, 1, 1))
    case = make_case(["voxelmorph"]) | {"moving": np.zeros((3, 3, 3))}
    with pytest.raises(InputError, match="moving image of shape"):
        panels.figure5(tmp_path / "f", [case], ["voxelmorph"], (1, 1, 1))
    plt.close("all")
    assert not list(tmp_path.iterdir())


def test_pictures_of_an_evaluation_are_read_back_for_the_pairs_that_every_run_has(tmp_path):
    image, labels = make_volume()
    affine = np.diag([2.0, 2, 2, 1])
    pair = Pair("p", image, image, affine, 2.0, (Path("f"), Path("m")), (np.eye(4),) * 2, (labels, labels))
    field = np.full((3, *SHAPE), 1.5, np.float32)
    for run, moving in (("voxelmorph", "m1"), ("voxelmorph", "m2"), ("gridreg-adaptive", "m1")):
        save_pictures(tmp_path / run / "pictures" / f"f__{moving}", pair, image, field)
    rows = [("f", m, run, 0.5, 1.0, 2.0) for m in ("m1", "m2") for run in ("voxelmorph", "gridreg-adaptive")]
    cases = pd.DataFrame(rows, columns=["fixed", "moving", "run", "dice", "tre_mm", "landmark_mm"])
    data = SimpleNamespace(
        pairs=lambda split: [("f", "m1"), ("f", "m2")], image=lambda _: image, labels=lambda _: labels
    )
    (case,) = panels.pictured_cases(data, tmp_path, ["voxelmorph", "gridreg-adaptive"], cases)
    warped, warped_labels, displacement = case["methods"]["voxelmorph"]
    assert case["pair"] == ("f", "m1") and case["scores"]["voxelmorph"] == {
        "dice": 0.5,
        "tre_mm": 1.0,
        "landmark_mm": 2.0,
    }
    np.testing.assert_array_equal(warped, image)
    np.testing.assert_allclose(displacement, field, atol=1e-5)
    assert warped_labels.dtype == np.int16 and set(np.unique(warped_labels)) == {0, 1}


def test_pictured_are_every_other_method_and_the_main_run():
    methods = {run: run.split("-")[0] for run in RUN_LABELS}
    cases = pd.DataFrame({"run": list(methods), "method": list(methods.values())})
    assert panels.pictured_runs(cases) == ["ants-syn", "voxelmorph", "transmorph", "keymorph", "gridreg-adaptive"]


def test_right_is_on_the_left_and_front_is_up():
    volume = np.zeros(SHAPE)
    volume[-1, :, 4] = 1  # the patient's right border (RAS: axis 0 grows to the right)
    figure, ax = plt.subplots()
    show_slice(ax, volume, "axial", 4, (1, 1, 3))
    x_right = ax.transData.transform((SHAPE[0] - 1, 0))[0]
    x_left = ax.transData.transform((0, 0))[0]
    y_front, y_back = ax.transData.transform((0, SHAPE[1] - 1))[1], ax.transData.transform((0, 0))[1]
    assert x_right < x_left and y_front > y_back
    letters = {text.get_text(): text.get_position() for text in ax.texts}
    assert letters["R"][0] < letters["L"][0] and letters["A"][1] > letters["P"][1]
    assert all(text.get_path_effects() for text in ax.texts), "white letters vanish on bright tissue"
    assert (ax.images[0].get_array()[:, -1] == 1).all()
    plt.close(figure)


@pytest.mark.parametrize(
    "view, shape, aspect", [("axial", (12, 10), 2), ("coronal", (8, 10), 3), ("sagittal", (8, 12), 1.5)]
)
def test_slices_keep_their_axes_and_aspect(view, shape, aspect):
    volume = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    plane = slice_of(volume, view, 3)
    assert plane.shape == shape
    cut, across, up, _ = VIEWS[view]
    at = [0, 0, 0]
    at[cut], at[across], at[up] = 3, 2, 5
    assert plane[5, 2] == volume[tuple(at)]
    figure, ax = plt.subplots()
    show_slice(ax, volume, view, 3, (1, 2, 3))
    assert ax.get_aspect() == aspect
    plt.close(figure)
    with pytest.raises(InputError, match="unknown"):
        slice_of(volume, "oblique", 0)


def test_slice_goes_through_the_centroid_of_the_mask():
    _, labels = make_volume()
    assert central_voxel(labels, SHAPE) == (4, 6, 4)  # centroid (4.5, 6, 3.5), halves to the even voxel
    assert central_voxel(np.zeros(SHAPE), SHAPE) == central_voxel(None, SHAPE) == (5, 6, 4)


def test_deformed_grid_is_x_plus_u():
    field = np.zeros((3, *SHAPE))
    field[0] += 0.5
    field[1] -= 0.25
    figure, ax = plt.subplots()
    show_deformed_grid(ax, field, "axial", 4, (1, 1, 1), lines=12)
    first = ax.collections[0].get_segments()[0]
    np.testing.assert_allclose(first, np.stack([np.arange(10) + 0.5, np.full(10, -0.25)], axis=-1))
    plt.close(figure)


def test_cohort_picture(tmp_path):
    image, labels = make_volume()
    cases = [{"name": f"s{k}", "image": image, "labels": labels, "spacing_mm": (1, 1, 2)} for k in range(2)]
    figure = panels.cohort_picture(tmp_path / "cohort", cases, "A pair", panels.cohort_caption(True, outlined=True))
    assert_written(tmp_path / "cohort")
    assert "A pair. Simulated cohort, not patients." in (tmp_path / "cohort.txt").read_text()
    assert "Sagittal" in texts(figure) and "(b) s1" in texts(figure)
    assert "imulated" not in " ".join(panels.cohort_caption(False, outlined=True))
    assert "mask" not in " ".join(panels.cohort_caption(True, outlined=False))
    assert_nothing_clipped(figure)


@pytest.mark.parametrize("datasets", [("prostate", "pelvis"), ("pelvis",)])
def test_figure8(tmp_path, captions, datasets):
    cases = make_cases()
    figure = grid_sizes.figure8(tmp_path / "figure8", cases[cases["dataset"].isin(datasets)], INDEXES)
    shown = texts(figure)
    assert "Mask centroid\n distance (mm)" in shown and "True TRE (mm)" in shown
    assert ("(simulated)" in shown) == ("prostate" in datasets) == ("Simulated cohorts" in captions[0])
    under = [label.get_text() for ax in figure.axes for label in ax.get_xticklabels()]
    tested = [label for label in under if re.fullmatch(r"(5|15)\n(<0.001|0\.\d+)", label)]
    assert len(tested) == 2 * 3 * len(datasets) and "10\n" in under  # there is no separate run at 10
    assert "equivalence was not tested" in captions[0] and f"({'abcdef'[3 * len(datasets) - 1]})" in shown
    assert_nothing_clipped(figure)


def test_figure8_shows_bending_weights_above(tmp_path, captions):
    cases = make_cases()
    one = cases[(cases["dataset"] == "prostate") & (cases["run"] == "gridreg-5")]
    bending = {weight: one.assign(dice=one["dice"] - 0.01 * n) for n, weight in enumerate((2.0, 20.0, 200.0))}
    marks = {"weight of the main runs": 20.0, "the paper's best, for these voxels": 781.25}
    figure = grid_sizes.figure8(
        tmp_path / "figure8", cases, INDEXES, bending=bending, bending_note="After 7 steps.", marks=marks
    )
    shown = texts(figure)
    assert "(a)" in shown and "weight of the bending energy" in shown and "7 steps" in captions[0]
    assert "weight of the main runs: 20" in shown and "the paper's best, for these voxels: 781" in shown
    panel = next(
        ax
        for ax in figure.get_axes()
        if ax.get_xlabel() == "weight of the bending energy" and ax.get_ylabel() == "Dice"
    )
    assert panel.get_xscale() == "log"
    np.testing.assert_allclose(panel.get_lines()[0].get_ydata(), [part["dice"].mean() for part in bending.values()])
    upright = [
        line.get_xdata()[0]
        for line in panel.get_lines()
        if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert upright == list(marks.values())
    assert_nothing_clipped(figure)


def test_the_papers_weight_is_that_of_the_same_deformation():
    assert grid_sizes.papers_bending_weight("prostate", 0.7) == grid_sizes.papers_bending_weight("brain", 1.0) == 2e5
    assert grid_sizes.papers_bending_weight("prostate", 2.8) == pytest.approx(2e5 / 4**4)
    assert grid_sizes.papers_bending_weight("mine", 5.0) == pytest.approx(320)


def test_figure8_without_truth_or_spread(tmp_path, captions):
    cases = make_cases(n=1).query("dataset == 'prostate'").assign(tre_mm=np.nan)
    figure = grid_sizes.figure8(tmp_path / "figure8", cases, INDEXES)
    assert "True TRE (mm)" not in texts(figure)
    assert all("\n" not in label.get_text() for ax in figure.axes for label in ax.get_xticklabels())


def test_figure8_shows_the_images_where_nothing_else_is_known(tmp_path, captions):
    cases = make_cases().assign(ncc=0.5)
    unknown = ["dice", "mask_mm", "tre_mm", "landmark_mm"]
    cases[unknown] = cases[unknown].mask(cases["dataset"] == "pelvis")
    figure = grid_sizes.figure8(tmp_path / "figure8", cases, INDEXES)
    assert "Image correlation" in texts(figure) and "Accuracy was not measured on pelvis" in captions[0]
    assert_nothing_clipped(figure)


def test_figure8_needs_the_adaptive_run_and_the_origin_of_the_data(tmp_path):
    cases = make_cases()
    with pytest.raises(InputError, match="no run gridreg-adaptive"):
        grid_sizes.figure8(tmp_path / "f", cases[cases["run"] != "gridreg-adaptive"], INDEXES)
    with pytest.raises(InputError, match="no key 'simulated'"):
        grid_sizes.figure8(tmp_path / "f", cases, {})


def test_grids_are_ordered_by_size_not_by_name():
    assert grid_sizes.grid_order(pd.Series(["10x10x10", "5x5x5", "6x9x12"])) == ["5x5x5", "6x9x12", "10x10x10"]


def test_training_curves(tmp_path):
    step = np.arange(1, 31)
    history = pd.DataFrame({"step": step, "loss": 1 / step, "val_dice": np.where(step % 10 == 0, 0.8, np.nan)})
    path = tmp_path / "history.csv"
    history.to_csv(path, index=False)
    read = training.read_history(path)
    stem = tmp_path / "curves" / "training"
    figure = training.training_curves(
        stem, {"voxelmorph": read, "gridreg-5": read.drop(columns="val_dice")}, "brain", True
    )
    assert_written(stem)
    assert "Brain, Dataset 3 (simulated)" in texts(figure)
    assert "Simulated cohort, not patients." in stem.with_suffix(".txt").read_text()
    assert_nothing_clipped(figure)
    history.drop(columns="loss").to_csv(path, index=False)
    with pytest.raises(InputError, match="no column loss"):
        training.read_history(path)


def test_many_runs_fit_a_page_and_share_their_axes(tmp_path, captions):
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "val_dice": [0.1, np.nan, 0.2]})
    runs = list(RUN_LABELS)[2:]
    histories = {run: history.assign(loss=history["loss"] * n) for n, run in enumerate(runs, 1)}
    figure = training.training_curves(tmp_path / "t", histories, "brain", True)
    assert_nothing_clipped(figure)
    titled = [ax for ax in figure.axes if ax.get_title()]
    assert len(titled) == len(runs) and len({ax.get_ylim() for ax in titled}) == 1


def test_equal_figures_are_equal_files(tmp_path):
    image, labels = make_volume()
    for name in ("a", "b"):
        case = {"name": "s", "image": image, "labels": labels, "spacing_mm": (1, 1, 1)}
        panels.cohort_picture(tmp_path / name / "cohort", [case])
    for suffix in ("png", "pdf", "txt"):
        first, second = ((tmp_path / name / f"cohort.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second


def test_every_run_has_a_colour_of_its_own():
    assert not set(style.OTHERS) & set(style.COLOURS.values())
    assert set(style.COLOURS) == set(RUN_LABELS) and len(set(style.COLOURS.values())) == len(RUN_LABELS)
    assert style.colour("something-new") == "#444444"


# ---- Landmarks --------------------------------------------------------------------------------------------------


def test_landmarks_are_marked_where_they_are(tmp_path):
    image, labels = make_volume()
    points = {"fixed": {"a": np.array([2.0, 3, 4]), "b": np.array([5.0, 6, 7]), "only": np.zeros(3)},
              "moving": {"b": np.array([5.0, 9, 3]), "a": np.array([2.0, 3, 4])}}  # fmt: skip
    both = [dict.fromkeys(("fixed", "moving"), value) for value in (image, labels)]
    figure = landmark_figure(
        tmp_path / "figure3", both[0], points, both[1], 2.0, "A pair", ["A pair.", "", "Simulated."]
    )
    marks = [[line.get_xydata()[0].tolist() for line in ax.get_lines()] for ax in figure.axes]
    assert marks == [[[2, 3]], [[5, 6]], [[2, 3]], [[5, 9]]]
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "", "0.0 mm", "10.0 mm"]
    assert (tmp_path / "figure3.txt").read_text() == "A pair. Simulated.\n"
    with pytest.raises(InputError, match="no landmark is in both images"):
        landmark_figure(tmp_path / "none", both[0], {"fixed": {"a": 0}, "moving": {}}, both[1], 2.0, "", [])


def test_many_landmarks_fit_a_page(tmp_path, captions):
    image, _ = make_volume()
    points = {f"anterior commissure {n}": np.array([2.0, 3, 4]) for n in range(8)}
    both = dict.fromkeys(("fixed", "moving"))
    figure = landmark_figure(
        tmp_path / "f", dict.fromkeys(both, image), dict.fromkeys(both, points), both, 2.0, "T", ["T."]
    )
    assert_nothing_clipped(figure)


def test_a_missing_figure_says_why_and_nothing_temporary_is_left(tmp_path):
    missing_figure(tmp_path / "figure7", "No Bayesian run is in use.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure7.pdf", "figure7.png", "figure7.txt"]
    assert (tmp_path / "figure7.txt").read_text() == "No Bayesian run is in use.\n"


def test_a_caption_is_one_line_without_gaps(tmp_path):
    save_figure(plt.figure(figsize=(1, 1)), tmp_path / "f", "A.", "", " B  is\nC. ")
    assert (tmp_path / "f.txt").read_text() == "A. B is C.\n"
