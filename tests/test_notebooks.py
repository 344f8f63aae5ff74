"""The interactive notebooks without a browser: under Papermill they run to the end, and their figures are there."""

from __future__ import annotations

from pathlib import Path

import papermill
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FIGURES = {"quick_start": 1, "explore_uncertainty": 2, "teach_1_degrees_of_freedom": 3, "teach_2_grid_to_field": 1,
           "teach_3_attention": 1}  # at least so many  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_whole_and_shows_its_figures(name, tmp_path):
    given = {"out": str(tmp_path)} if name in ("quick_start", "explore_uncertainty") else {}
    executed = papermill.execute_notebook(
        str(NOTEBOOKS / f"{name}.ipynb"),
        str(tmp_path / "executed.ipynb"),
        given,
        kernel_name="python3",
        progress_bar=False,
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= FIGURES[name]
