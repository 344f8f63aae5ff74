"""The ablations of ``params.yaml``: what is varied, one thing at a time, around a default (paper, Tables 2 and 3, Figure 8).

A run of the section ``ablation`` names the base it is made ``of`` and what is different in it. All are trained on one
dataset with the same, shorter budget, so they compare with each other and with nothing in Table 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gridreg.errors import InputError
from study.config.messages import check, refuse_unknown
from study.config.runs import agree, complete, fit, known_datasets, training_arguments
from study.config.schema import UNTRAINED, AblationRun, defaults, hints

OWN = tuple(hints(AblationRun))  # of and seed, beside what differs
BUDGET = ("steps", "epochs")  # never of one run: all have the same
ABLATION_FOLDER = "ablation"  # takes the place of the dataset's name in folders and lists of trainings


def resolve(params: dict[str, Any], source: str | Path = "params.yaml") -> None:
    """Check the section of otherwise complete values, and give it the bases, in place.

    A run that cannot be trained on the dataset goes to `use.left_out`, and so do all without their dataset. InputError.
    """
    section, bases = params["ablation"], params["base"]
    section["base"] = bases
    for name, run in section["runs"].items():
        place = f"ablation.runs.{name}"
        where = f"{source}: {place}"
        if not isinstance(run, dict) or run.get("of") not in bases:
            raise InputError(f"{where} is {run!r:.60}; expected of: and one of {', '.join(bases)}")
        check({key: run[key] for key in OWN if key in run}, AblationRun, source, place)
        whole = complete(run, bases, source, place, OWN)
        if whole["method"] in UNTRAINED:
            raise InputError(f"{where} has method {whole['method']}; expected a base whose method is trained")
        for key in BUDGET:
            if whole.get(key) is not None:
                raise InputError(f"{where} has {key}; expected them for all runs alike, as ablation.steps")
        agree(params | {"runs": {name: _run(section, name)}}, name, where)
    for name in section["use"]:
        refuse_unknown(name, section["runs"], "run", f"{source}: ablation.use")
    if not section["use"]:
        return
    refuse_unknown(section["dataset"], known_datasets(params), "dataset", f"{source}: ablation")
    dataset, use = section["dataset"], params["use"]
    if dataset not in use["datasets"]:
        why = "was skipped" if dataset in use["skipped"] else "is not in use"
        use["left_out"]["the ablations"] = f"their dataset {dataset} {why}"
        section["use"] = []
    for name in list(section["use"]):
        reason = fit(_run(section, name), dataset, params["datasets"][dataset], f"{source}: ablation.runs.{name}")
        if reason:
            use["left_out"][f"ablation {name}"] = reason
            section["use"].remove(name)


def ablations(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs that are in use, by name, as a run of ``runs`` is given: method, its settings, steps."""
    section = params.get("ablation", {})
    return {name: _run(section, name) for name in section.get("use", [])}


def _run(section: dict[str, Any], name: str) -> dict[str, Any]:
    run = section["runs"][name]
    return _full(section, run["of"], {key: value for key, value in run.items() if key not in OWN})


def _full(section: dict[str, Any], base: str, differs: dict[str, Any]) -> dict[str, Any]:
    own = section["base"][base]
    return defaults(own["method"]) | dict(own) | differs | {"steps": section.get("steps")}


def find(params: dict[str, Any], base: str, **differs: Any) -> str | None:
    """The name of the run that differs from its base in this alone, trained with the seed of all; None: not in use."""
    section = params.get("ablation", {})
    if base not in section.get("base", {}):
        return None
    wanted = _full(section, base, differs)
    same = [name for name, run in ablations(params).items() if run == wanted and "seed" not in section["runs"][name]]
    return same[0] if same else None


def seeds(params: dict[str, Any]) -> list[str]:
    """The default and the runs that differ from it in the seed alone; fewer than two: seeds are not varied."""
    section, default = params.get("ablation", {}), find(params, "gridreg")
    others = [name for name in section.get("use", []) if set(section["runs"][name]) == set(OWN)]
    return [default, *others] if default else []


def trainings(params: dict[str, Any]) -> list[tuple[str, str]]:
    """Every training in use, (dataset, run); of the ablations (``ablation``, run)."""
    runs = [(dataset, run) for dataset in params["use"]["datasets"] for run in params["use"]["trained"]]
    return runs + [(ABLATION_FOLDER, name) for name in params["ablation"]["use"]]


def named_arguments(params: dict[str, Any], dataset: str, run: str) -> tuple[str, dict[str, Any]]:
    """The dataset of one of ``trainings``, and what ``train.train`` needs beside its data and where to write."""
    if dataset != ABLATION_FOLDER:
        return dataset, training_arguments(params, dataset, run)
    section = params["ablation"]
    arguments = training_arguments(params | {"runs": ablations(params)}, section["dataset"], run)
    seed = section["runs"][run].get("seed")
    return section["dataset"], arguments if seed is None else arguments | {"seed": seed}
