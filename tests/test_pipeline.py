"""dvc.yaml and the notebooks: they fit together, list what they use, and the whole of it runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Messages and names: an edit here changes no number, and should recompute none. Nor does an edit of how a figure looks,
# but where a stage writes figures it must draw them anew. How much memory is free decides what is read twice, no more.
NO_DEPENDENCY = {"__init__", "ablation", "errors", "memory", "params", "rules", "schema", "in_use"}
LOOKS = {"figures", "panels", "style"}


def body(name: str) -> dict:
    """The cmd, deps, … of a stage, also where it stands under foreach's do."""
    return STAGES[name].get("do", STAGES[name])


def notebook_of(name: str) -> Path:
    return ROOT / re.search(r"papermill (\S+)", body(name)["cmd"]).group(1)


def code_of(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")


def imports(source: str) -> set[str]:
    """Modules of gridreg that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "gridreg":
            found |= {alias.name for alias in node.names if (ROOT / "gridreg" / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gridreg."):
            found.add(node.module.split(".")[1])
    return found


def outputs(name: str) -> list[str]:
    """What a stage writes, metrics among it."""
    listed = [*body(name).get("outs", []), *body(name).get("metrics", [])]
    return [path if isinstance(path, str) else next(iter(path)) for path in listed]


def draws(name: str) -> bool:
    """Whether a stage writes figures; one into executed/ is nobody's input."""
    return any(
        path.startswith("figures/") and not path.endswith((".csv", ".md", ".tex", ".html")) for path in outputs(name)
    )


def closure(modules: set[str]) -> set[str]:
    done: set[str] = set()
    while modules - done:
        name = (modules - done).pop()
        done.add(name)
        modules = modules | imports((ROOT / "gridreg" / f"{name}.py").read_text())
    return done


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_calls_the_library_and_defines_nothing(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell for cell in code if "parameters" in cell.metadata.get("tags", [])] == code[:1]
    tree = ast.parse(code_of(path))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
    assert len(code) <= 12


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_given_is_one_the_notebook_has(name):
    notebook = nbformat.read(notebook_of(name), 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    known = {target.id for node in ast.parse(cell.source).body for target in node.targets}
    given = set(re.findall(r"-p (\w+) ", body(name)["cmd"]))
    assert given <= known, f"{name}: papermill would only warn of {given - known}"
    assert "-k python3" in body(name)["cmd"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_lists_the_notebook_and_the_modules_it_uses(name):
    deps = {dep for dep in body(name)["deps"] if isinstance(dep, str)}
    assert str(notebook_of(name).relative_to(ROOT)) in deps
    listed = {Path(dep).stem for dep in deps if dep.startswith("gridreg/")}
    used = closure(imports(code_of(notebook_of(name)))) - NO_DEPENDENCY
    if not draws(name):
        used -= LOOKS
    if name == "evaluate_untrained":  # the same notebook, but no weights to read
        used -= {"attention", "checkpoint", "network", "interpolation", "losses", "fold_free", "refine"}
    assert listed - {"align"} <= closure(imports(code_of(notebook_of(name))))
    missing = used - listed - OPTIONAL.get(name, set())
    assert not missing, f"{name} should list {sorted(missing)}"


# Imported on the way, but nothing of them reaches what the stage writes.
# ANTs SyN is not trained: what it alone imports belongs to evaluate_untrained.
SYN = {"syn", "pairwise", "preprocess", "align", "learn2reg", "resample", "splits", "results"}
OPTIONAL = {
    "false_correspondence": {"attention", "fold_free", "network"},
    "approximation": {
        "attention",
        "fold_free",
        "grid",
        "keymorph",
        "methods",
        "network",
        "transmorph",
        "truth",
        "volumes",
        *SYN,
    },
    "train": {"volumes", "truth", *SYN},
    "evaluate": SYN,
    "evaluate_refined": SYN,
    "ablate": SYN,
    "uncertainty": {"keymorph", "losses", "metrics", "refine", "transmorph", *SYN},
    "report": {
        "attention",
        "checkpoint",
        "fold_free",
        "grid",
        "interpolation",
        "keymorph",
        "methods",
        "network",
        "regions",
        "transmorph",
        "truth",
        "volumes",
        *SYN,
    },
    "evaluate_untrained": {"keymorph", "transmorph", *SYN},
    "preprocess": {"dataset", "devices", "results", "truth"},
    "tables": {"dataset", "grid", "volumes", "truth", "learn2reg"},
    "figures": {"truth"},
    "benchmark": {
        "align",
        "checkpoint",
        "cost_report",
        "dataset",
        "devices",
        "fold_free",
        "learn2reg",
        "metrics",
        "preprocess",
        "resample",
        "results",
        "splits",
        "style",
        "truth",
        "volumes",
    },  # to draw is to measure anew
}


UNCACHED = (
    "tables",
    "figures",
    "false_correspondence",
    "approximation",
    "uncertainty",
    "report",
    "benchmark",
)  # what git keeps; cheap


def test_an_output_is_of_one_stage_and_listed_once():
    every = [path for name in STAGES for path in outputs(name)]
    matrix = "results/evaluate/${item.dataset}/${item.run}"  # of two stages, whose runs are others
    twice = {path for path in every if every.count(path) > 1 and not path.startswith(matrix)}
    assert not twice
    for name in STAGES:
        assert len(outputs(name)) == len(set(outputs(name))), f"{name} lists an output twice"


def test_an_edit_of_the_style_redraws_every_figure():
    drawing = [
        name for name in STAGES if draws(name) and not body(name).get("frozen")
    ]  # benchmark redraws by make benchmark
    assert {"figures", "false_correspondence", "approximation", "uncertainty"} <= set(drawing)
    for name in drawing:
        assert "gridreg/style.py" in body(name)["deps"], f"{name} keeps figures of another style"


@pytest.mark.parametrize("name", STAGES)
def test_nothing_executed_is_an_input_or_an_output(name):
    stage = body(name)
    paths = [
        p if isinstance(p, str) else next(iter(p)) for key in ("deps", "outs", "metrics") for p in stage.get(key, [])
    ]
    assert not [path for path in paths if path.startswith("executed/")]
    uncached = [p for p in stage.get("outs", []) if isinstance(p, dict)]
    assert not uncached or name in UNCACHED, "an uncached output takes the stage out of the run-cache"


def test_nothing_that_is_ignored_by_git_is_needed_to_start():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for needed in ("executed/.gitkeep", ".dvc/config", "data.dvc", "params.yaml", "dvc.lock"):
        assert needed in tracked, f"{needed} must come with the clone"


@pytest.mark.slow
def test_the_whole_pipeline_runs_in_the_smoke_profile_and_leaves_the_tree_alone(tmp_path):
    def state() -> str:
        return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout

    before = state()
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "smoke"] + ([f"VENV={os.environ['VENV']}"] if os.environ.get("VENV") else [])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    listed = done.stdout.split("tables and figures, after")[-1]
    print("tables and figures, after" + listed)
    for name in [*(f"table{n}.{suffix}" for n in range(1, 5) for suffix in ("csv", "md", "tex")),
                 *(f"figure{n}.{suffix}" for n in range(1, 9) for suffix in ("pdf", "png")), "report.html"]:  # fmt: skip
        assert name in listed
    assert state() == before
