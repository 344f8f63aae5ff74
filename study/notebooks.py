"""The code of a notebook without the parts that change no result. A stage depends on this code, not on the notebook.

    python -m study.notebooks results/fingerprints/notebooks     writes NN_name.py for every notebook that trains or evaluates

An edited text cell, a comment or a moved import then repeats no stage. A changed call does.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tokenize
from pathlib import Path

from gridreg.errors import InputError, exit_status
from study import ROOT

NOTEBOOKS = ROOT / "notebooks" / "pipeline"
NAMES = ("01_preprocess", "02_train", "03_evaluate", "04_ablate")  # notebooks of stages that take hours


def code_of(path: Path | str) -> str:
    """The code cells of a notebook, without comments, imports and empty lines. InputError if it cannot be read.

    The lines are kept as written, because code made from the syntax tree would differ between versions of Python.
    """
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        comments = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise InputError(f"{path}: {error}; expected a notebook of plain Python") from error
    lines = source.splitlines()
    for comment in comments:
        row, column = comment.start
        lines[row - 1] = lines[row - 1][:column]
    for node in imports:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / f"{name}.py").write_text(code_of(NOTEBOOKS / f"{name}.ipynb"), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the files")
    folder = parser.parse_args().folder
    return exit_status(lambda: write(folder))


if __name__ == "__main__":
    sys.exit(main())
