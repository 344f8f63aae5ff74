"""How the package holds together: it is imported alone, PyTorch loads only where it is needed, nothing is pickled.

Layers and circles are checked by import-linter (`make test`; contracts in pyproject.toml).
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from study import ROOT

FILES = sorted(path for wing in ("gridreg", "study") for path in (ROOT / wing).rglob("*.py"))
WITHOUT_TORCH = ("gridreg", "gridreg.errors", "gridreg.calibration", "gridreg.scans.volumes", "gridreg.scans.pair", "study.config.params",
                 "study.config.pipeline", "study.training.kinds", "study.notebooks", "study.pipeline")  # fmt: skip
LAZY = ("ants", "nilearn", "monai", "pandas", "matplotlib", "IPython", "ipywidgets", "anywidget", "PIL")
CORE = ("gridreg.network", "gridreg.losses", "gridreg.metrics", "gridreg.refinement", "gridreg.checkpoint", "gridreg.calibration",
        "gridreg.scans.pair", "gridreg.scans.export", "gridreg.scans.align")  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_device_is_named_and_nothing_is_pickled(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in names}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save"), f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert not ast.unparse(node.func).endswith(".cuda"), f"line {node.lineno}"
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)


def loaded_after(modules: tuple[str, ...], without: tuple[str, ...]) -> subprocess.CompletedProcess:
    """In a fresh interpreter, since another test may have imported it here."""
    code = ("import sys\nfrom importlib import import_module\n"
            f"for name in {modules}:\n"
            "    import_module(name)\n"
            f"    found = [other for other in {without} if other in sys.modules]\n"
            "    assert not found, (name, found)\n")  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_what_needs_no_network_does_not_wait_for_pytorch():
    done = loaded_after(WITHOUT_TORCH, ("torch",))
    assert done.returncode == 0, done.stderr


def test_the_method_loads_nothing_that_only_an_extra_brings():
    done = loaded_after(CORE, LAZY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("module", "call", "extra"), [
    ("nilearn", "from gridreg.scans.align import read_reference; read_reference('mni152')", "align"),
    ("monai", "import gridreg.losses; gridreg.losses.mi_loss(torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 8, 8, 8))", "mi"),
])  # fmt: skip
def test_a_missing_extra_is_named(module, call, extra):
    code = f"import sys, torch\nsys.modules['{module}'] = None\n{call}\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"{module}" in done.stderr and f"expected `pip install 'gridreg[{extra}]'` first" in done.stderr
