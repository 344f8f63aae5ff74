"""The interactive notebooks without a browser: each runs to the end in its own folder, and its figures are there."""

from __future__ import annotations

from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).parents[1]
FIGURES = {"explore/quick_start": 1, "explore/where_not_to_trust": 2, "lessons/lesson_1_degrees_of_freedom": 3,
           "lessons/lesson_2_grid_to_field": 1, "lessons/lesson_3_attention": 1}  # at least so many  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_whole_and_shows_its_figures(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = ROOT / "notebooks" / f"{name}.ipynb"
    executed = papermill.execute_notebook(
        str(source),
        str(tmp_path / "executed.ipynb"),
        {"out": str(tmp_path / "out")} if name.startswith("explore/") else {},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(source.parent),  # as JupyterLab does
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= FIGURES[name]
