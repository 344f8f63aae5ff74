"""The ablations of ``params.yaml``: each varies one setting of a default run (paper, Tables 2 and 3, Figure 8).

A run of the section ``ablation`` names its base (``of``) and the settings that differ. All ablations are trained on one
dataset with the same, shorter budget. They can be compared with each other, but not with Table 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gridreg.errors import InputError
from study.config.messages import check, refuse_unknown
from study.config.runs import agree, complete, fit, known_datasets, training_arguments
from study.config.schema import UNTRAINED, AblationRun, defaults, hints

RUN_KEYS = tuple(hints(AblationRun))  # of and seed, beside the settings that differ
BUDGET = ("steps", "epochs")  # not allowed in a single run: all runs have the same budget
ABLATION_FOLDER = "ablation"  # used instead of the dataset's name in folders and in lists of trainings


def resolve(params: dict[str, Any], source: str | Path = "params.yaml") -> None:
    """Check the section ``ablation`` of otherwise complete values, and add the bases to it, in place.

    A run that cannot be trained on the dataset is moved to `use.left_out`. Without the dataset all runs are. Raises
    InputError where the section is wrong.
    """
    section, bases = params["ablation"], params["base"]
    section["base"] = bases
    for name, run in section["runs"].items():
        place = f"ablation.runs.{name}"
        where = f"{source}: {place}"
        if not isinstance(run, dict) or run.get("of") not in bases:
            raise InputError(f"{where} is {run!r:.60}; expected of: and one of {', '.join(bases)}")
        check({key: run[key] for key in RUN_KEYS if key in run}, AblationRun, source, place)
        whole = complete(run, bases, source, place, RUN_KEYS)
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
    """The ablations in use, by name, in the form of the section ``runs``: method, settings and steps."""
    section = params.get("ablation", {})
    return {name: _run(section, name) for name in section.get("use", [])}


def _run(section: dict[str, Any], name: str) -> dict[str, Any]:
    run = section["runs"][name]
    return _full(section, run["of"], {key: value for key, value in run.items() if key not in RUN_KEYS})


def _full(section: dict[str, Any], base: str, differs: dict[str, Any]) -> dict[str, Any]:
    own = section["base"][base]
    return defaults(own["method"]) | dict(own) | differs | {"steps": section.get("steps")}


def find(params: dict[str, Any], base: str, **differs: Any) -> str | None:
    """The ablation in use that differs from its base in these settings alone and has the common seed; None without one."""
    section = params.get("ablation", {})
    if base not in section.get("base", {}):
        return None
    wanted = _full(section, base, differs)
    same = [name for name, run in ablations(params).items() if run == wanted and "seed" not in section["runs"][name]]
    return same[0] if same else None


def seeds(params: dict[str, Any]) -> list[str]:
    """The default run and the runs that differ from it in the seed alone. With fewer than two, seeds are not varied."""
    section, default = params.get("ablation", {}), find(params, "gridreg")
    others = [name for name in section.get("use", []) if set(section["runs"][name]) == set(RUN_KEYS)]
    return [default, *others] if default else []


def trainings(params: dict[str, Any]) -> list[tuple[str, str]]:
    """Every training in use as (dataset, run); an ablation is (``"ablation"``, run)."""
    runs = [(dataset, run) for dataset in params["use"]["datasets"] for run in params["use"]["trained"]]
    return runs + [(ABLATION_FOLDER, name) for name in params["ablation"]["use"]]


def named_arguments(params: dict[str, Any], dataset: str, run: str) -> tuple[str, dict[str, Any]]:
    """The dataset of one of ``trainings``, and the arguments of ``train.train`` other than the data and the output folder."""
    if dataset != ABLATION_FOLDER:
        return dataset, training_arguments(params, dataset, run)
    section = params["ablation"]
    arguments = training_arguments(params | {"runs": ablations(params)}, section["dataset"], run)
    seed = section["runs"][run].get("seed")
    return section["dataset"], arguments if seed is None else arguments | {"seed": seed}
