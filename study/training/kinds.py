"""The kinds of computation in a run: their names in ``fingerprints.yaml``, and the numbers that DVC compares.

A training depends on its data, its settings and what the code computes, but not on the text of the code. A few numbers
for each kind of computation show when the code computes something else (``study.training.fingerprint``). A run has
several kinds: its network, its number of layers, its similarity.

    python -m study.training.kinds results/fingerprints     writes the numbers of every run in use, one file per run

These files are dependencies of DVC's stages. When a kind changes, only its runs are trained or evaluated again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from gridreg.errors import InputError, exit_status
from study.config import params
from study.config.ablation import ABLATION_FOLDER, ablations
from study.config.files import write as write_text

FILE = Path(__file__).parents[2] / "fingerprints.yaml"
COMMAND = "python -m study.training.fingerprint"


def network_kinds(run: dict[str, Any]) -> list[str]:
    """The kinds of a run's network. A setting makes a kind if it selects other code, not only another size."""
    method = run["method"]
    if method == "gridreg":
        kind = f"gridreg-{run.get('upsampling', 'trilinear')}"
        kind += "-fold-free" * run.get("fold_free", False)
        kind += "-bayesian" * run.get("bayesian", False) + "-no-projector" * (not run.get("projector", True))
        layers = run.get("num_layers", 5)
        matching = ["gridreg-match"] if run.get("encoder") == "match" else []
        return [kind, *([] if layers == 5 else [f"gridreg-{layers}-layers"]), *matching]
    if method == "keymorph":
        layers = run.get("layers", 9)
        return [f"keymorph-{run.get('align', 'tps')}", *([] if layers == 9 else [f"keymorph-{layers}-layers"])]
    if method == "voxelmorph":
        return ["voxelmorph-integrated" if run.get("integration_steps", 5) else "voxelmorph"]
    if method == "transmorph":
        return [f"transmorph-{run.get('convolutions', 1)}-convolutions"]
    return [method]


def training_kinds(run: dict[str, Any], similarity: str, dice_weight: float) -> list[str]:
    """The kinds of a training, which are under ``train`` in the file."""
    losses = [] if similarity == "mse" else [f"similarity-{similarity}"]
    return [*network_kinds(run), *losses, "labels" if dice_weight else "no-labels"]


def evaluation_kinds(run: dict[str, Any], refined_by: str | None = None) -> list[str]:
    """The kinds of an evaluation, which are under ``evaluate`` in the file; ``refined_by`` is a refinement's similarity."""
    return ["metrics", *network_kinds(run), *([] if refined_by is None else [f"refinement-{refined_by}"])]


def read() -> dict[str, Any]:
    """``fingerprints.yaml``: {"preprocess": numbers, "train": {kind: numbers}, "evaluate": {kind: numbers}}."""
    return _parsed(FILE, FILE.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _parsed(file: Path, modified: int) -> dict[str, Any]:
    return YAML(typ="safe").load(file.read_text(encoding="utf-8"))


def numbers_of(section: str, kinds: Sequence[str]) -> dict[str, Any]:
    """The numbers that the file has for some kinds. InputError for a kind that it lacks."""
    stored = read()[section]
    for kind in kinds:
        if kind not in stored:
            raise InputError(f"{FILE}: found no {section}.{kind}; expected it there, as `{COMMAND}` writes it")
    return {kind: stored[kind] for kind in kinds}


def write(folder: Path | str, values: dict[str, Any]) -> None:
    """Write the numbers on which every run in use depends: ``train/<dataset>/<run>.json`` and ``evaluate/…``.

    A refined evaluation is ``<run>-refined.json``. Ablations are in the folder ``ablation``.
    """

    def save(section: str, dataset: str, name: str, kinds: list[str]) -> None:
        file = Path(folder) / section / dataset / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(numbers_of(section, kinds), indent=1) + "\n")

    use, runs = values["use"], values["runs"]
    for dataset in use["datasets"]:
        block = values["datasets"][dataset]
        for name in use["trained"]:
            save("train", dataset, name, training_kinds(runs[name], block["similarity"], block["dice_weight"]))
        for name in [*use["trained"], *use["untrained"]]:
            save("evaluate", dataset, name, evaluation_kinds(runs[name]))
        for name in use.get("refined", []):
            save("evaluate", dataset, f"{name}-refined", evaluation_kinds(runs[name], block["similarity"]))
    for name, run in ablations(values).items():
        block = values["datasets"][values["ablation"]["dataset"]]
        save("train", ABLATION_FOLDER, name, training_kinds(run, block["similarity"], block["dice_weight"]))
        save("evaluate", ABLATION_FOLDER, name, evaluation_kinds(run))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.training.kinds", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the files")
    folder = parser.parse_args().folder
    return exit_status(lambda: write(folder, params.load()))


if __name__ == "__main__":
    sys.exit(main())
