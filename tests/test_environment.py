"""One list of pinned versions, used by everything that makes an environment, and installed as it says."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
CARD = ("torch", "jupyterlab", "papermill", "matplotlib", "seaborn", "nibabel", "scipy", "dvc", "pytest")
LINES = (ROOT / "requirements.txt").read_text().splitlines()


def pins(lines: list[str]) -> dict[str, str]:
    """Canonical name → pinned version; fails on anything but `name==version`."""
    found = {}
    for line in lines:
        text = line.split("#")[0].strip()
        if text:
            requirement = Requirement(text)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and "*" not in specifier.version and requirement.url is None, line
            assert canonicalize_name(requirement.name) not in found, f"{line}: pinned twice"
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


BOUNDARY = next(i for i, line in enumerate(LINES) if line.startswith("# ---- Transitive"))
DIRECT, ALL = pins(LINES[:BOUNDARY]), pins(LINES)


@pytest.mark.parametrize("name", CARD)
def test_the_packages_of_the_card_are_pinned_directly(name):
    assert name in DIRECT


def test_the_installed_versions_are_the_pinned_ones():
    installed = {name: Version(version(name)).public for name in ALL}  # public: torch 2.13.0+cpu is a build of 2.13.0
    assert installed == {name: Version(pinned).public for name, pinned in ALL.items()}


def test_nothing_of_cuda_is_pinned():
    """torch chooses those for the machine it is installed on."""
    assert not [name for name in ALL if name.startswith(("triton", "pynvml", "nvidia-", "cuda-"))]


def test_conda_users_get_the_same_list_and_the_project_in_one_step():
    environment = YAML(typ="safe", pure=True).load((ROOT / "environment.yml").read_text())
    *conda, by_pip = environment["dependencies"]
    assert "python=3.11" in conda and not [name for name in conda if "=" in name and not name.startswith("python=")]
    assert by_pip == {"pip": ["-r requirements.txt", "-e ."]}


def test_the_project_names_what_the_list_pins_and_no_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert not [name for name in named if re.search(r"[<>=~!]", name)]
    assert {canonicalize_name(name) for name in named if not name.startswith("gridreg[")} == set(DIRECT)


def test_continuous_integration_calls_what_readme_gives():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test$", script, re.M) and re.search(r"^ *make test-browser$", script, re.M)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111 == 0o111


def test_no_second_place_pins_versions_or_names_an_index():
    for name in ("Makefile", ".ci/run", "environment.yml", "requirements.txt"):
        text = (ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|trusted-host|https?://", text), name


def sources() -> dict[str, str]:
    """The Python of the package and of the notebooks' code cells, by file name."""
    code = {str(file): file.read_text() for wing in ("gridreg", "study") for file in (ROOT / wing).rglob("*.py")}
    for file in ROOT.glob("notebooks/*/*.ipynb"):
        cells = [
            "".join(cell["source"]) for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"
        ]
        code[str(file)] = re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(cells), flags=re.M)
    return code


def test_what_the_code_imports_is_a_direct_dependency():
    """A module that is there by luck, through another package, may be gone with that package's next version."""
    distributions, by_luck = packages_distributions(), set()
    for file, code in sources().items():
        for node in ast.walk(ast.parse(code)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"gridreg", "study"}:
                if not {canonicalize_name(owner) for owner in distributions.get(module, [module])} & set(DIRECT):
                    by_luck.add(f"{file}: {module}")
    assert not by_luck, "not in the first part of requirements.txt"


def test_make_lists_its_targets():
    listed = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True
    ).stdout
    for target in ("env", "profile", "repro", "smoke", "test", "test-browser", "lab", "cohort"):
        assert f"make {target} " in listed


def test_the_licence_is_apache_2_in_the_file_and_in_the_citation():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    citation = YAML(typ="safe", pure=True).load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == "Apache-2.0" and str(citation["version"]) == project["version"]
    paper = citation["preferred-citation"]
    assert (
        paper["title"]
        == "On the degrees of freedom of gridded control points in learning-based medical image registration"
    )
    assert [a["family-names"] for a in paper["authors"]] == [
        "Yan", "Yang", "Wang", "Punwani", "Emberton", "Stavrinides", "Hu", "Barratt"]  # fmt: skip
