"""The rendered copies of the notebooks in docs/rendered are those of the present notebooks."""

from __future__ import annotations

import nbformat
import pytest

from gridreg.errors import InputError
from study import rendering


def notebook(*sources: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_no_copy_is_older_than_its_notebook():
    assert [path.name for path in rendering.stale()] == [], "run `make docs`"


def test_copies_hold_pictures_and_no_widgets_or_paths():
    for source in rendering.SOURCES:
        text = (rendering.FOLDER / source.name).read_text(encoding="utf-8")
        assert '"image/png"' in text and "widget-view" not in text and "/.venv/" not in text
        assert '"output_type": "error"' not in text


def test_a_changed_cell_makes_the_copy_stale_and_a_render_mends_it(tmp_path, monkeypatch):
    source = tmp_path / "small.ipynb"
    nbformat.write(notebook("print(1 + 1)"), source)
    monkeypatch.setattr(rendering, "SOURCES", (source,))
    monkeypatch.setattr(rendering, "FOLDER", tmp_path / "rendered")
    with pytest.raises(InputError, match="found no copy of the present small.ipynb"):
        rendering.check()
    copy = nbformat.read(rendering.render(source), 4)
    assert copy.cells[0].outputs[0].text == "2\n" and rendering.stale() == []
    nbformat.write(notebook("print(1 + 2)"), source)
    assert rendering.stale() == [source]
