"""How the package holds together: no circle of imports, no long file, and PyTorch only where it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {file.stem: file for file in sorted((ROOT / "gridreg").glob("*.py")) if file.stem != "__init__"}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
NEEDS_TORCH = {"architecture", "attention", "benchmark", "checkpoint", "cost", "devices", "evaluate", "explorer",
               "explorer_view", "explorer_volume", "explorer_widgets", "false_correspondence", "fold_free", "grid", "interpolation", "keymorph",
               "lesson_attention", "lesson_attention_view", "lesson_basis", "lesson_basis_view", "lesson_freedom",
               "lesson_freedom_view", "losses", "methods", "network", "objective", "oracle", "pairwise", "refine", "train",
               "transmorph", "uncertainty"}  # fmt: skip


def imported(tree: ast.Module) -> set[str]:
    """Every module that a file imports, `study.config.params` as such, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected `from gridreg.… import …`"
            own = node.module == "gridreg"
            names |= {f"gridreg.{alias.name}" if own else node.module for alias in node.names}
    return names


IMPORTS = {name: {m.split(".")[1] for m in imported(tree) if m.startswith("gridreg.")} & set(FILES)
           for name, tree in TREES.items()}  # fmt: skip


def test_no_circle_of_imports():
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("file", [ROOT / "gridreg" / "__init__.py", *FILES.values()], ids=lambda file: file.stem)
def test_every_file_is_short_and_says_what_it_is_for(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))


def test_no_drawer_for_everything():
    assert not {"utils", "util", "helpers", "common", "misc"} & set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_no_device_is_named_and_nothing_is_pickled(name):
    assert not {"pickle", "dill", "joblib"} & {module.split(".")[0] for module in imported(TREES[name])}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save"), f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert not ast.unparse(node.func).endswith(".cuda"), f"line {node.lineno}"
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)


def test_what_needs_no_network_does_not_wait_for_pytorch():
    """In a fresh interpreter, since another test may have imported it here."""
    without = sorted(set(FILES) - NEEDS_TORCH)
    code = ("import sys\nfrom importlib import import_module\n"
            f"for name in {without}:\n"
            "    import_module(f'gridreg.{name}')\n"
            "    assert 'torch' not in sys.modules, name\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_list_of_what_needs_pytorch_is_right():
    assert NEEDS_TORCH <= set(FILES)
    for name in set(FILES) - NEEDS_TORCH:
        assert not IMPORTS[name] & NEEDS_TORCH, name
