"""The ablations of ``params.yaml``: what is varied, one thing at a time, around a default (paper, Tables 2 and 3, Figure 8).

The section ``ablation`` says it all: every run there names the base it is made ``of`` and what is different in it. All
are trained on one dataset with the same, shorter budget, so they compare with each other and with nothing in Table 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gridreg.errors import InputError
from study.config.schema import (
    METHODS,
    NAME,
    NAMES,
    REQUIRED,
    UNTRAINED,
    check_fit,
    check_run,
    check_section,
    default,
    refuse_unknown,
    run_rules,
    training_arguments,
    whole,
)

ABLATION = {
    "dataset": NAME,
    "steps": default(whole(1), None),  # of every run; null: those of `train`
    "use": default(NAMES, []),  # which of runs, []: none
}
OWN = {"of": NAME, "seed": default(whole(0), None)}  # of a run, beside what differs from its base
BUDGET = ("steps", "epochs")  # never of one run: all have the same
PLACE = "ablation"  # stands for the dataset where trainings are named


def check(params: dict[str, Any], source: str | Path = "params.yaml") -> None:
    """Raise InputError, one sentence, at the first value of the section that is unknown or out of range; it may be missing."""
    if "ablation" not in params:
        return
    section, where = params["ablation"], f"{source}: ablation"
    check_section(section, ABLATION, where, others=("base", "runs"))
    bases, runs = (section.get(name) or {} for name in ("base", "runs"))
    for name, base in bases.items():
        if not isinstance(base, dict) or base.get("method") not in METHODS or base["method"] in UNTRAINED:
            raise InputError(f"{where}.base.{name} has no method that is trained; expected method: and a name")
        check_section(base, run_rules(base["method"]), f"{where}.base.{name}")
        _refuse_budget(base, f"{where}.base.{name}")
    for name, run in runs.items():
        if not isinstance(run, dict) or run.get("of") not in bases:
            raise InputError(f"{where}.runs.{name} is {run!r:.60}; expected of: and one of {', '.join(bases)}")
        base = bases[run["of"]]
        check_section(dict(base) | dict(run), run_rules(base["method"]) | OWN, f"{where}.runs.{name}")
        _refuse_budget(run, f"{where}.runs.{name}")
        check_run(params | {"runs": {name: _run(section, name)}}, name, f"{where}.runs.{name}")
    for name in section.get("use", []):
        refuse_unknown(name, runs, "run", f"{where}.use")
    if section.get("use") and section["dataset"] not in params["use"]["datasets"]:
        raise InputError(
            f"{where}: dataset is {section['dataset']}, which is not in use; expected one of "
            f"{', '.join(params['use']['datasets'])}, or an empty list under use"
        )
    blocks = {**params["datasets"], **params.get("unused", {})}
    for name, run in ablations(params).items():
        check_fit(run, section["dataset"], blocks[section["dataset"]], f"{where}.runs.{name}")


def _refuse_budget(run: dict[str, Any], where: str) -> None:
    for name in BUDGET:
        if name in run:
            raise InputError(f"{where} has {name}; expected them for all runs alike, as ablation.steps")


def ablations(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs that are in use, by name, as a run of ``runs`` is given: method, its settings, steps."""
    section = params.get("ablation", {})
    return {name: _run(section, name) for name in section.get("use", [])}


def _run(section: dict[str, Any], name: str) -> dict[str, Any]:
    run = section["runs"][name]
    return _full(section, run["of"], {key: value for key, value in run.items() if key not in OWN})


def _full(section: dict[str, Any], base: str, differs: dict[str, Any]) -> dict[str, Any]:
    own = section["base"][base]
    defaults = {key: rule.default for key, rule in METHODS[own["method"]].items() if rule.default is not REQUIRED}
    return defaults | dict(own) | differs | {"steps": section.get("steps")}


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
    return runs + [(PLACE, name) for name in params["ablation"]["use"]]


def named_arguments(params: dict[str, Any], dataset: str, run: str) -> tuple[str, dict[str, Any]]:
    """The dataset of one of ``trainings``, and what ``train.train`` needs beside its data and where to write."""
    if dataset != PLACE:
        return dataset, training_arguments(params, dataset, run)
    section = params["ablation"]
    arguments = training_arguments(params | {"runs": ablations(params)}, section["dataset"], run)
    seed = section["runs"][run].get("seed")
    return section["dataset"], arguments if seed is None else arguments | {"seed": seed}
