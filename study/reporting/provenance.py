"""How the numbers were made, in words: cohorts, budgets, network sizes, machines, hashes of the data.

Tables, figures, claims and the report all quote these sentences, so that they say the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gridreg.errors import InputError
from study import ROOT
from study.benchmark.published import Costs, reductions
from study.reporting.paper_numbers import PAPER_DATASETS
from study.reporting.results import in_order, pairs_in_words, run_label

PACKAGES = ("torch", "numpy", "scipy", "monai", "antspyx", "voxelmorph", "keymorph", "nibabel", "nilearn", "dvc",
            "papermill")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a reader must know of how the numbers were made."""

    profile: str  # smoke, demo or paper
    budgets: dict[str, dict[str, tuple[int, int]]]  # dataset → run → (steps, batch)
    sizes: str  # of the methods that are smaller than published, in words; "" if none is
    refinement: str = ""  # what instance refinement did, in words
    syn: str = ""  # what ANTs SyN was given, in words


def setting(params: dict[str, Any], costs: pd.DataFrame) -> Setting:
    """The setting of results made with ``params`` (of params.yaml), its budgets as ``read_costs`` found them."""
    budgets: dict[str, dict[str, tuple[int, int]]] = {}
    for row in costs.dropna(subset=["steps"]).itertuples():
        budgets.setdefault(row.dataset, {})[row.run] = (int(row.steps), int(row.batch))
    used = {name: params["runs"][name] for name in params["use"]["trained"]}
    syn = next(
        (params["runs"][name] for name in params["use"]["untrained"] if params["runs"][name]["method"] == "syn"), None
    )
    words = syn_in_words(syn, params["use"]["datasets"]) if syn else ""
    refined = "{refine_steps} steps on the training loss without its Dice term, with the bending weight times {refine_bending:g}"
    return Setting(params["profile"], budgets, "; ".join(reductions(used)), refined.format(**params["evaluate"]), words)


# --- sentences ---------------------------------------------------------------------------------------------------


def setting_in_words(setting: Setting) -> str:
    """Profile, budgets, and what is smaller than published."""
    return f"Profile {setting.profile}. {budgets_in_words(setting)} {sizes_in_words(setting.sizes)}".strip()


def budgets_in_words(setting: Setting) -> str:
    """``Training budget: 600 steps × batch 4 for prostate, pelvis (every run); …``, equal budgets named together."""
    who: dict[tuple[int, int], dict[str, list[str]]] = {}  # budget → runs in words → datasets
    for dataset, budgets in setting.budgets.items():
        for budget in dict.fromkeys(map(tuple, budgets.values())):
            runs = [run for run in budgets if tuple(budgets[run]) == budget]
            words = "every run" if len(runs) == len(budgets) else ", ".join(map(run_label, runs))
            who.setdefault(budget, {}).setdefault(words, []).append(dataset)
    if not who:
        return "The training budget is not known."
    parts = []
    for (steps, batch), members in who.items():
        names = "; ".join(f"{', '.join(datasets)} ({words})" for words, datasets in members.items())
        parts.append(f"{steps:,} steps × batch {batch} for {names}")
    return f"Training budget: {'; '.join(parts)}."


def sizes_in_words(sizes: str) -> str:
    """A sentence on ``sizes``, the methods that are smaller than published; "" if none is."""
    return f"This profile uses networks that are smaller than published: {sizes}." if sizes else ""


def syn_in_words(run: Mapping[str, Any], datasets: list[str]) -> str:
    """What ANTs SyN, a run of ``params.yaml``, was given: its iterations, and the labels that no other method sees."""
    words = f"ANTs SyN runs {', '.join(map(str, run['iterations']))} iterations, from the coarsest level to the finest"
    margin = run.get("mask_margin")
    margins = margin if isinstance(margin, dict) else dict.fromkeys(datasets, margin)
    masked = {name: margins.get(name) for name in datasets if margins.get(name) is not None}
    if not masked:
        return f"{words}, without masks."
    near = ", ".join(f"{name}: {voxels}" for name, voxels in masked.items())
    elsewhere = [name for name in datasets if name not in masked]
    return (
        f"{words}. It sees the organ labels of both images of every test pair, which no other method does: its metric is "
        f"evaluated inside them and within a margin ({near} voxels). "
        + (f"It gets no masks for {', '.join(elsewhere)}. " if elsewhere else "")
        + "The paper also gave it masks and does not say on which datasets."
    )


def cohorts_in_words(datasets: list[str], indexes: Mapping[str, Mapping[str, Any]]) -> str:
    """What a title says the test pairs are of."""
    return "simulated cohorts" if all(indexes[name]["simulated"] for name in datasets) else "the cohorts named below"


def test_pairs_in_words(cases: pd.DataFrame, indexes: Mapping[str, Mapping[str, Any]]) -> str:
    """``prostate: 12 pairs of 5 patients, up to 6 pairs each; …``"""
    datasets = {name: cases[cases["dataset"] == name] for name in in_order(cases["dataset"], PAPER_DATASETS)}
    return "; ".join(f"{name}: {pairs_in_words(own, indexes.get(name, {}))}" for name, own in datasets.items())


def cost_note(costs: Costs) -> str:
    """What the costs are of."""
    return (
        "Memory, parameters and time are those of every method in its published size, measured on "
        f"{costs.in_words()} (figures/benchmark.md). Memory is the peak of one registration beyond weights and images. "
        "–: not measured. The paper measured on one GPU with 32 GB."
    )


# --- facts -------------------------------------------------------------------------------------------------------


def made_with(params: Mapping[str, Any], budgets: pd.DataFrame, folders: Iterable[Path | str]) -> dict[str, str]:
    """Environment, seeds, budget, training times and data hashes, for the end of the report.

    budgets  ``results.read_costs`` of every run
    folders  training results, each with a metrics.json; InputError where one has none
    """
    seconds, devices = {}, set()
    for folder in map(Path, folders):
        path = folder / "metrics.json"
        if not path.is_file():
            raise InputError(f"{path}: not found, expected the summary that the training writes")
        record = json.loads(path.read_text())
        devices.add(f"{record['device']}, precision {record['precision']}")
        if record["step_seconds"]:
            seconds[f"{folder.parent.name} {folder.name}"] = record["step_seconds"] * record["steps"]
    trained = budgets.dropna(subset="steps")
    longest = max(seconds, key=seconds.get, default="")
    facts = {
        "Profile": params["profile"],
        "Seed": f"{params['seed']}; the default of the ablations is also trained with other seeds (Table 3)",
        "Budgets": "; ".join(
            dict.fromkeys(f"{int(row.steps):,} steps × batch {int(row.batch)}" for row in trained.itertuples())
        ),
        "Trained on": "; ".join(sorted(devices)) or "nothing was trained",
        "Evaluated on": "; ".join(sorted(set(budgets["device"]))),
        "Training time": f"{sum(seconds.values()) / 60:.0f} min in total; the longest run, {longest}, took "
        f"{seconds[longest] / 60:.1f} min"
        if seconds
        else "–",
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "Packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }
    return facts | {f"Data, {name}": text for name, text in data_hashes(params).items()}


def data_hashes(
    params: Mapping[str, Any],
    results: Path | str = ROOT / "results/preprocess",
    pointer: Path | str = ROOT / "data.dvc",
) -> dict[str, str]:
    """Dataset → where it comes from, and the SHA-256 of its preprocessed images and labels."""
    known = re.search(r"md5: (\S+)", Path(pointer).read_text()) if Path(pointer).is_file() else None
    found = {}
    for name in params["use"]["datasets"]:
        digest = hashlib.sha256()
        for path in sorted(p for kind in ("images", "labels") for p in (Path(results) / name / kind).glob("*.nii.gz")):
            digest.update(path.name.encode() + path.read_bytes())
        origin = params["datasets"][name]["path"]
        version = f"data.dvc {known.group(1)}, " if known and origin.split("/")[0] == "data" else ""
        found[name] = f"{origin}: {version}preprocessed sha256 {digest.hexdigest()[:16]}"
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
