"""Predicted uncertainty beside the known error: gathered in mm, calibrated on validation pairs, drawn with units."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gridreg.errors import InputError
from gridreg.network import GridReg
from gridreg.scans.pair import Pair
from gridreg.upsampling import upsample
from study import style
from study.evaluation import uncertainty
from study.evaluation.uncertainty import (
    COLUMNS,
    CORRELATED,
    INDEPENDENT,
    Uncertain,
    calibration_rows,
    joined,
    uncertain_pairs,
)
from study.reporting.figures.uncertainty import calibration_figure, figure7

pytestmark = pytest.mark.filterwarnings("error")
SHAPE = (20, 18, 17)


def pairs(seed: int, factor: float, known: bool = True) -> list[Uncertain]:
    """Errors that are ``factor`` times as large as predicted for independent control points, half that for correlated ones."""
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(0.5, 2, (3, *SHAPE))
    region = np.zeros(SHAPE, bool)
    region[4:12, 5:14, 3:13] = True
    error = factor * sigma * rng.standard_normal(sigma.shape)
    return [
        Uncertain(
            "f", "m", {INDEPENDENT: sigma, CORRELATED: 2 * sigma}, error if known else error * np.nan, region & known
        )
    ]


def test_the_factor_is_fitted_on_validation_and_applied_to_test():
    rows = calibration_rows(
        "prostate", "gridreg-bayesian", "10x10x10", True, joined(pairs(0, 2.0)), joined(pairs(1, 2.0)), (3, 5)
    )
    before, after = rows.iloc[0], rows.iloc[1]
    assert list(rows["propagation"]) == [INDEPENDENT] * 2 + [CORRELATED] * 2
    assert list(rows["scaling"]) == ["as predicted", "rescaled"] * 2 and list(rows.columns[: len(COLUMNS)]) == COLUMNS
    assert after["factor"] == pytest.approx(2, rel=0.05) and before["factor"] == 1
    assert set(rows["pairs"]) == {3} and set(rows["fitted_on"]) == {"5 validation pairs"}
    assert after["coverage_90"] == pytest.approx(0.9, abs=0.02) and before["coverage_90"] < 0.65
    assert after["ause"] == pytest.approx(before["ause"])  # a factor changes no ranking
    correlated = rows.iloc[2:]
    assert list(correlated["factor"]) == pytest.approx([1, 1], rel=0.05)
    assert list(correlated["coverage_90"]) == pytest.approx([0.9, 0.9], abs=0.02)
    other = calibration_rows("prostate", "run", "", True, joined(pairs(0, 2.0)), joined(pairs(1, 4.0)), (1, 1))
    assert other.iloc[1]["factor"] == pytest.approx(4, rel=0.05)


def test_of_a_large_region_some_voxels_stand_for_all(monkeypatch):
    whole = joined(pairs(0, 2.0))[INDEPENDENT]
    monkeypatch.setattr(uncertainty, "VOXELS", 200)
    error, sigma = joined(pairs(0, 2.0))[INDEPENDENT]
    assert error.shape == sigma.shape == (3, 200) and whole[0].shape == (3, 720)
    columns = [np.flatnonzero((whole[0] == each[:, None]).all(0)) for each in error.T]
    assert all(len(found) == 1 for found in columns) and np.ptp(np.diff(np.concatenate(columns))) <= 1, "evenly chosen"
    assert np.array_equal(sigma, whole[1][:, np.concatenate(columns)])


def test_without_a_truth_there_is_no_row():
    assert joined(pairs(0, 1, known=False)) == {}
    assert calibration_rows("a", "b", "c", False, joined(pairs(0, 1)), {}, (1, 1)).empty
    assert calibration_rows("a", "b", "c", False, {}, joined(pairs(0, 1)), (1, 1)).empty


def test_errors_and_sigmas_are_in_mm_and_within_the_mask(monkeypatch):
    rng = np.random.default_rng(0)
    images = {name: rng.random(SHAPE, np.float32) for name in "fm"}
    labels, truth = np.zeros(SHAPE, np.int16), np.ones((3, *SHAPE), np.float32)
    labels[3:9, 3:9, 3:9] = 2
    known = np.ones(SHAPE, bool)
    known[3] = False

    def cohort(truth) -> SimpleNamespace:
        sides = Path("f"), Path("m")
        pair = Pair("f ← m", images["f"], images["m"], np.eye(4), 2.5, sides, (np.eye(4),) * 2, (labels, labels),
                    truth=(truth, known))  # fmt: skip
        return SimpleNamespace(pairs=lambda split: [("f", "m")], pair=lambda fixed, moving: pair)

    network = GridReg(base_channels=8, num_layers=4, bayesian=True)
    for name, sigma in ((INDEPENDENT, 0.4), (CORRELATED, 0.8)):
        monkeypatch.setitem(
            uncertainty.PROPAGATIONS,
            name,
            lambda values, shape, method, sigma=sigma: values.new_full((1, 3, *shape), sigma),
        )
    (pair,) = uncertain_pairs(cohort(truth), network, (5, 5, 5), "test")
    assert pair.region.sum() == 5 * 6 * 6
    assert np.allclose(pair.sigma_mm[INDEPENDENT], 1.0) and np.allclose(pair.sigma_mm[CORRELATED], 2.0)
    (other,) = uncertain_pairs(cohort(truth * 0), network, (5, 5, 5), "test")
    np.testing.assert_allclose((other.error_mm - pair.error_mm)[:, known], 2.5, atol=1e-5)
    assert np.isnan(pair.error_mm[:, ~known]).all()
    assert pair.within(INDEPENDENT)[0].shape == (3, 180)


@pytest.mark.parametrize("method", ["trilinear", "bspline", "deconv"])
def test_the_two_propagations_are_the_ends_of_what_correlations_can_do(method):
    """Drawn displacements of correlated control points spread more than independent ones would, and less than σ interpolated."""
    generator = torch.Generator().manual_seed(0)
    sigma = 0.5 + torch.rand(1, 1, 4, 4, 4, generator=generator)
    low, high = (uncertainty.PROPAGATIONS[name](sigma, (9, 9, 9), method) for name in (INDEPENDENT, CORRELATED))
    assert (low <= high + 1e-6).all() and (low < 0.8 * high).any()
    shared, own = torch.randn(4000, 1, 1, 1, 1, generator=generator), torch.randn(4000, 1, 4, 4, 4, generator=generator)
    for weight, wanted in ((0.0, low), (1.0, high)):
        drawn = upsample(sigma * (weight**0.5 * shared + (1 - weight) ** 0.5 * own), (9, 9, 9), method).std(
            0, keepdim=True
        )
        torch.testing.assert_close(drawn, wanted, rtol=0.08, atol=0)
    between = upsample(sigma * (shared + own) / 2**0.5, (9, 9, 9), method).std(0, keepdim=True)
    assert (between > 0.95 * low).all() and (between < 1.05 * high).all()


def test_figure7_is_written_with_units_and_says_what_is_simulated(tmp_path, monkeypatch):
    monkeypatch.setitem(style.RC, "savefig.dpi", 50)
    image = np.random.default_rng(0).random(SHAPE, np.float32)
    labels = np.zeros(SHAPE, np.int16)
    labels[4:9, 5:12, 4:9] = 1
    case = dict(title="Prostate\np 1", fixed=image, moving=image, fixed_labels=labels, moving_labels=labels, sigma_mm=image,
                error_mm=np.where(labels > 0, 3 * image, np.nan), spacing_mm=2.0)  # fmt: skip
    unknown = case | {"error_mm": np.full(SHAPE, np.nan), "fixed_labels": None, "moving_labels": None}
    figure = figure7(tmp_path / "figure7", [case, unknown], simulated=True)
    text = " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")
    caption = (tmp_path / "figure7.txt").read_text()
    assert "not patients" in caption and "σ and error share a colour scale within each row." in caption
    assert "not known" in text and "Uncertainty σ" in text and text.count("mm") >= 2 and "(b) Prostate" in text
    maps = [
        ax.images[0].get_clim() for ax in figure.axes if ax.images and ax.images[0].get_cmap().name == style.MAGNITUDE
    ]
    assert (
        len(maps) == 3 and maps[0] == maps[1] and maps[0][1] > 2 > 1 >= maps[2][1]
    )  # a row shares the range of its larger map
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figure7.pdf", "figure7.png", "figure7.txt"]
    with pytest.raises(InputError, match="no uncertainty to show"):
        figure7(tmp_path / "none", [], simulated=True)


def test_calibration_figure_shows_both_propagations(tmp_path, monkeypatch):
    monkeypatch.setitem(style.RC, "savefig.dpi", 50)
    measured, factors = {"brain": joined(pairs(0, 2.0))}, {("brain", INDEPENDENT): 2.0, ("brain", CORRELATED): 1.0}
    figure = calibration_figure(tmp_path / "c", measured, factors, simulated=True)
    text = " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")
    assert "× 2.00 (independent), × 1.00 (fully correlated)" in text and "AUSE" in text and "(c)" in text
    assert "Simulated cohorts, not patients." in (tmp_path / "c.txt").read_text()
    reliability = {(line.get_color(), line.get_linestyle()): line.get_ydata() for line in figure.axes[0].get_lines()}
    at_half = [values[49] for (tint, dash), values in reliability.items() if len(values) == 99]
    assert at_half == pytest.approx([0.264, 0.5, 0.5, 0.5], abs=0.02)  # half the interval, then the whole one
    with pytest.raises(InputError, match="no uncertainty"):
        calibration_figure(tmp_path / "d", {}, {}, simulated=True)
