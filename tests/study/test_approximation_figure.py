"""Approximation and excess error: they add up, and the figure names them."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest

from gridreg.errors import InputError
from study.reporting.figures import approximation


def texts(figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")


def make_cases() -> tuple[pd.DataFrame, pd.DataFrame]:
    runs = [
        ("identity", "identity", ""),
        ("gridreg-5", "gridreg", "5x5x5"),
        *(("gridreg-adaptive", "gridreg", g) for g in ("5x5x5", "8x8x8")),
    ]
    rows = [("pelvis", run, method, grid, f"f{k}", "m", 3.0 + k) for run, method, grid in runs for k in range(3)]
    cases = pd.DataFrame(rows, columns=["dataset", "run", "method", "grid", "fixed", "moving", "tre_mm"])
    oracle = [
        ("pelvis", f"f{k}", "m", grid, 1.0 / size)
        for grid, size in (("3x3x3", 3), ("5x5x5", 5), ("8x8x8", 8))
        for k in range(3)
    ]
    return pd.DataFrame(oracle, columns=["dataset", "fixed", "moving", "grid", "oracle_mm"]), cases


def test_approximation_and_excess_error_add_up():
    parts = approximation.error_parts(*make_cases())
    assert len(parts) == 9 and set(parts["run"]) == {"gridreg-5", "gridreg-adaptive"}
    np.testing.assert_allclose(parts["oracle_mm"] + parts["gap_mm"], parts["tre_mm"])


def test_the_table_has_both_errors_of_every_grid():
    table = approximation.error_table(*make_cases())
    assert list(table.columns) == ["dataset", "grid", "run", "pairs", "oracle_mm", "reached_mm", "gap_mm"]
    found = list(table[["grid", "run"]].itertuples(index=False, name=None))
    assert found == [
        ("3x3x3", ""),
        ("5x5x5", "gridreg-5"),
        ("5x5x5", "gridreg-adaptive"),
        ("8x8x8", "gridreg-adaptive"),
    ]
    np.testing.assert_allclose(table["oracle_mm"], [1 / 3, 0.2, 0.2, 0.125])
    np.testing.assert_allclose(table["reached_mm"], [np.nan, 4, 4, 4])
    np.testing.assert_allclose(table["gap_mm"], [np.nan, 3.8, 3.8, 3.875])
    assert (table["pairs"] == 3).all()


def test_the_answer_is_the_share_of_the_grid():
    oracle, cases = make_cases()
    said = approximation.answer(approximation.error_parts(oracle, cases))
    assert "pelvis 5 % at 5×5×5 to 3.1 % at 8×8×8" in said and "Most of the true TRE" in said
    coarse = oracle.assign(oracle_mm=3.0)
    assert "Most" not in approximation.answer(approximation.error_parts(coarse, cases))
    assert approximation.answer(approximation.error_parts(oracle, cases[cases["run"] == "gridreg-5"])) == ""


def test_oracle_figure(tmp_path):
    oracle, cases = make_cases()
    figure = approximation.oracle_figure(tmp_path / "oracle", oracle, cases, {"pelvis": {"simulated": True}})
    shown = texts(figure)
    caption = (tmp_path / "oracle.txt").read_text()
    assert "Simulated cohorts, not patients" in caption and "grids are not nested" in caption
    assert "The excess error is the true TRE minus the approximation error" in caption
    assert "before registration" in shown and "excess error, one adaptive model" in shown and "(b)" in shown
    assert sorted(f.name for f in tmp_path.iterdir()) == ["oracle.pdf", "oracle.png", "oracle.txt"]
    above, below = figure.axes
    assert above.get_yscale() == "log" and below.get_yscale() == "linear"
    tops = {(round(bar.get_x(), 2), round(bar.get_y() + bar.get_height(), 3)) for bar in below.patches}
    assert tops == {
        (-0.38, 0.2),
        (-0.38, 4.0),
        (0.02, 0.2),
        (0.02, 4.0),
        (1.02, 0.125),
        (1.02, 4.0),
    }  # oracle, and what was reached
    with pytest.raises(InputError, match="no oracle error"):
        approximation.oracle_figure(tmp_path / "f", oracle[:0], cases, {})
