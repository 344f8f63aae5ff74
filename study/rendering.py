"""Write copies of notebooks with their figures into docs/rendered/, for readers on GitHub.

    python -m study.rendering            executes the quick start and the lessons, and writes the copies
    python -m study.rendering --check    exits with 1 if a copy is older than its notebook

A copy holds PNG outputs and tables; sliders need JupyterLab and are left out. It stores a hash of the cells from which it
was made.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from gridreg.checkpoint import write_text
from gridreg.errors import InputError, exit_status
from study import ROOT

FOLDER = ROOT / "docs" / "rendered"
SOURCES = (
    ROOT / "notebooks" / "explore" / "quick_start.ipynb",
    *sorted((ROOT / "notebooks" / "lessons").glob("*.ipynb")),
)
SHOWN = ("text/plain", "text/html", "image/png")


def cells_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of the text and code of every cell."""
    return hashlib.sha256("\n\0".join(cell.source for cell in notebook.cells).encode()).hexdigest()[:16]


def stale() -> list[Path]:
    """The notebooks whose copy is missing or was made from other cells."""
    found = []
    for source in SOURCES:
        copy = FOLDER / source.name
        made_from = nbformat.read(copy, 4).metadata.get("made_from") if copy.is_file() else None
        if made_from != cells_hash(nbformat.read(source, 4)):
            found.append(source)
    return found


def render(source: Path) -> Path:
    """Execute a notebook in its own folder and write its copy."""
    notebook = nbformat.read(source, 4)
    made_from = cells_hash(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(source.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times would change at every run
        if cell.cell_type == "code":
            cell.outputs = [shown for shown in map(_shown, cell.outputs) if shown is not None]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["made_from"] = made_from
    copy = FOLDER / source.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_text(copy, nbformat.writes(notebook) + "\n")
    return copy


def _shown(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output as GitHub can show it; None for widgets and for what went to stderr."""
    if output.output_type == "stream":
        output.text = output.text.replace(f"{ROOT}/", "")
        return output if output.name == "stdout" else None
    data = output.get("data", {})
    if any("widget" in kind for kind in data):
        return None
    output.data = {kind: data[kind] for kind in SHOWN if kind in data}
    for kind in ("text/plain", "text/html"):
        if kind in output.data:
            output.data[kind] = output.data[kind].replace(f"{ROOT}/", "")
    return output


def check() -> None:
    names = ", ".join(path.name for path in stale())
    if names:
        raise InputError(f"docs/rendered: found no copy of the present {names}; expected one, which `make docs` writes")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.rendering", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check whether a copy is older than its notebook")
    options = parser.parse_args()

    def write() -> None:
        for source in SOURCES:
            print(render(source).relative_to(ROOT))

    return exit_status(check if options.check else write)


if __name__ == "__main__":
    sys.exit(main())
