"""The interactive notebooks without a browser: under Papermill they run to the end, and their figures are there."""

from __future__ import annotations

import papermill
import pytest

from study import ROOT

FIGURES = {"explore/quick_start": 1, "explore/where_not_to_trust": 2, "lessons/lesson_1_degrees_of_freedom": 3,
           "lessons/lesson_2_grid_to_field": 1, "lessons/lesson_3_attention": 1}  # at least so many  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_whole_in_its_own_folder_and_shows_its_figures(name, tmp_path):
    """As JupyterLab runs it; the project is installed, so the folder need not be the root."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    given = {"out": str(tmp_path)} if name.startswith("explore/") else {}
    executed = papermill.execute_notebook(
        str(path), str(tmp_path / "executed.ipynb"), given, kernel_name="python3", progress_bar=False, cwd=path.parent
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= FIGURES[name]


def test_every_interactive_notebook_is_run_here():
    found = {str(path.relative_to(ROOT / "notebooks").with_suffix("")) for path in ROOT.glob("notebooks/*/*.ipynb")}
    assert {name for name in found if not name.startswith("pipeline/")} == set(FIGURES)
