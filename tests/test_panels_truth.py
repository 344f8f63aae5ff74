"""Figures of oracle error and calibration: they are written, say what they are, and add up."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest

from gridreg import panels_truth
from gridreg.errors import InputError


def texts(figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")


def make_cases() -> tuple[pd.DataFrame, pd.DataFrame]:
    runs = [("identity", "identity", ""), ("gridreg-5", "gridreg", "5x5x5"), *(("gridreg-adaptive", "gridreg", g) for g in ("5x5x5", "8x8x8"))]
    rows = [("pelvis", run, method, grid, f"f{k}", "m", 3.0 + k) for run, method, grid in runs for k in range(3)]
    cases = pd.DataFrame(rows, columns=["dataset", "run", "method", "grid", "fixed", "moving", "tre_mm"])
    oracle = [("pelvis", f"f{k}", "m", grid, 1.0 / size) for grid, size in (("3x3x3", 3), ("5x5x5", 5), ("8x8x8", 8)) for k in range(3)]
    return pd.DataFrame(oracle, columns=["dataset", "fixed", "moving", "grid", "oracle_mm"]), cases


def test_the_gap_is_what_is_left_of_the_error():
    parts = panels_truth.error_parts(*make_cases())
    assert len(parts) == 9 and set(parts["run"]) == {"gridreg-5", "gridreg-adaptive"}
    np.testing.assert_allclose(parts["oracle_mm"] + parts["gap_mm"], parts["tre_mm"])


def test_oracle_figure(tmp_path):
    oracle, cases = make_cases()
    shown = texts(panels_truth.oracle_figure(tmp_path / "oracle", oracle, cases, {"pelvis": {"simulated": True}}))
    assert "Simulated cohorts" in shown and "before registration" in shown and "mean error (mm)" in shown
    assert sorted(f.name for f in tmp_path.iterdir()) == ["oracle.pdf", "oracle.png"]
    with pytest.raises(InputError, match="no oracle error"):
        panels_truth.oracle_figure(tmp_path / "f", oracle[:0], cases, {})


def test_calibration_figure(tmp_path):
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.5, 3, (3, 500))
    measured = {"brain": (sigma * rng.standard_normal(sigma.shape), sigma / 2)}
    shown = texts(panels_truth.calibration_figure(tmp_path / "c", measured, {"brain": 2.0}, simulated=True))
    assert "scale × 2.00" in shown and "Simulated cohorts" in shown and "AUSE" in shown and "mm" in shown
    with pytest.raises(InputError, match="no uncertainty"):
        panels_truth.calibration_figure(tmp_path / "d", {}, {}, simulated=True)
