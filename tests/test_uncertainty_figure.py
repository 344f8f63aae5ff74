"""Predicted uncertainty beside the known error: gathered in mm, calibrated on validation pairs, drawn with units."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

from types import SimpleNamespace

import numpy as np
import pytest

from gridreg import style, uncertainty
from gridreg.errors import InputError
from gridreg.network import GridReg
from gridreg.uncertainty import COLUMNS, Uncertain, calibration_rows, joined, uncertain_pairs
from gridreg.uncertainty_figure import figure7

pytestmark = pytest.mark.filterwarnings("error")
SHAPE = (20, 18, 17)


def pairs(seed: int, factor: float, known: bool = True) -> list[Uncertain]:
    """Errors that are ``factor`` times as large as predicted."""
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(0.5, 2, (3, *SHAPE))
    region = np.zeros(SHAPE, bool)
    region[4:12, 5:14, 3:13] = True
    error = factor * sigma * rng.standard_normal(sigma.shape)
    return [Uncertain("f", "m", sigma, error if known else error * np.nan, region & known)]


def test_the_factor_is_fitted_on_validation_and_applied_to_test():
    rows = calibration_rows("prostate", "gridreg-bayesian", "10x10x10", True, pairs(0, 2.0), pairs(1, 2.0))
    before, after = rows.iloc[0], rows.iloc[1]
    assert list(rows["scaling"]) == ["as predicted", "rescaled"] and list(rows.columns[: len(COLUMNS)]) == COLUMNS
    assert after["factor"] == pytest.approx(2, rel=0.05) and before["factor"] == 1
    assert after["coverage_90"] == pytest.approx(0.9, abs=0.02) and before["coverage_90"] < 0.65
    assert after["ause"] == pytest.approx(before["ause"])  # a factor changes no ranking
    other = calibration_rows("prostate", "run", "", True, pairs(0, 2.0), pairs(1, 4.0))
    assert other.iloc[1]["factor"] == pytest.approx(4, rel=0.05)


def test_without_a_truth_there_is_no_row():
    assert joined(pairs(0, 1, known=False)) is None
    assert calibration_rows("a", "b", "c", False, pairs(0, 1, known=False), pairs(0, 1)).empty


def test_errors_and_sigmas_are_in_mm_and_within_the_mask(monkeypatch):
    rng = np.random.default_rng(0)
    images = {name: rng.random(SHAPE, np.float32) for name in "fm"}
    labels, truth = np.zeros(SHAPE, np.int16), np.ones((3, *SHAPE), np.float32)
    labels[3:9, 3:9, 3:9] = 2
    known = np.ones(SHAPE, bool)
    known[3] = False
    data = SimpleNamespace(pairs=lambda split: [("f", "m")], image=images.get, labels=lambda name: labels, shape=SHAPE,
                           truth=lambda *pair: (truth, known), spacing=2.5)  # fmt: skip
    network = GridReg(base_channels=8, num_layers=4, bayesian=True)
    monkeypatch.setattr(uncertainty, "upsample_sigma", lambda sigma, shape, method: sigma.new_full((1, 3, *shape), 0.4))
    (pair,) = uncertain_pairs(data, network, (5, 5, 5), "test")
    assert pair.region.sum() == 5 * 6 * 6 and np.allclose(pair.sigma_mm, 1.0)
    bare = SimpleNamespace(**vars(data) | {"truth": lambda *pair: (truth * 0, known)})
    (other,) = uncertain_pairs(bare, network, (5, 5, 5), "test")
    np.testing.assert_allclose((other.error_mm - pair.error_mm)[:, known], 2.5, atol=1e-5)
    assert np.isnan(pair.error_mm[:, ~known]).all()
    assert pair.within[0].shape == (3, 180)


def test_figure7_is_written_with_units_and_says_what_is_simulated(tmp_path, monkeypatch):
    monkeypatch.setitem(style.RC, "savefig.dpi", 50)
    image = np.random.default_rng(0).random(SHAPE, np.float32)
    labels = np.zeros(SHAPE, np.int16)
    labels[4:9, 5:12, 4:9] = 1
    case = dict(title="Prostate\np 1", fixed=image, moving=image, fixed_labels=labels, moving_labels=labels, sigma_mm=image,
                error_mm=np.where(labels > 0, image, np.nan), spacing_mm=2.0)  # fmt: skip
    unknown = case | {"error_mm": np.full(SHAPE, np.nan), "fixed_labels": None, "moving_labels": None}
    figure = figure7(tmp_path / "figure7", [case, unknown], simulated=True)
    text = " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")
    assert "not patients" in text and "not known" in text and "Uncertainty σ" in text and text.count(" mm") >= 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figure7.pdf", "figure7.png"]
    with pytest.raises(InputError, match="no uncertainty to show"):
        figure7(tmp_path / "none", [], simulated=True)
