"""Complete settings of a run: joined with its base, resolved for a dataset, and in the form that a training takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gridreg.errors import InputError
from study.config.messages import check, refuse_unknown
from study.config.schema import BUNDLED, METHODS, RUNS, TUNED, UNTRAINED, Train, defaults, hints


def check_base(base: Any, source: str | Path, place: str) -> None:
    """Raise InputError where a base has a setting that no run may have. A base may be incomplete."""
    own = _without_method(base, {}, f"{source}: {place}")
    check(own, RUNS[base["method"]], source, place, ("method",), partial=True)


def complete(run: Any, bases: dict[str, dict], source: str | Path, place: str, others: tuple = ()) -> dict[str, Any]:
    """A run of the file as one mapping: its base, the settings that differ, and the defaults of its method.

    ``others`` are names that are allowed besides the settings of the method; the result does not contain them. Raises
    InputError where a value is wrong.
    """
    where = f"{source}: {place}"
    if isinstance(run, dict) and "of" in run:
        refuse_unknown(run["of"], bases, "base", where)
        run = bases[run["of"]] | {name: value for name, value in run.items() if name != "of"}
    own = {name: value for name, value in _without_method(run, bases, where).items() if name not in others}
    found = check(own, RUNS[run["method"]], source, place, ("method", *others))
    settings = METHODS[run["method"]].model_fields
    return {"method": run["method"]} | {n: v for n, v in found.items() if n in settings or v is not None}


def _without_method(run: Any, bases: dict[str, dict], where: str) -> dict[str, Any]:
    if not isinstance(run, dict) or "method" not in run:
        found = "has no method" if run is None or isinstance(run, dict) else f"is {run!r:.60}"
        of = f", or of: and one of {', '.join(bases)}" if bases else ""
        raise InputError(f"{where} {found}; expected method: and one of {', '.join(METHODS)}{of}")
    refuse_unknown(run["method"], METHODS, "method", where)
    return {name: value for name, value in run.items() if name != "method"}


def train_settings(params: dict, run: str, dataset: str | None = None) -> dict[str, Any]:
    """The training settings of a run: those of the run where given, else those of `train`.

    Steps or epochs of the run replace both of `train`. With a dataset, its `budget` multiplies steps and epochs, and
    settings given per dataset are resolved.
    """
    names = hints(Train)
    own = {name: params["runs"][run].get(name) for name in names}
    own |= {name: own[name].get(dataset) for name in TUNED if isinstance(own[name], dict)}
    shared = {name: params["train"].get(name) for name in names}
    if own["steps"] is not None or own["epochs"] is not None:
        shared["steps"] = shared["epochs"] = None
    settings = {name: shared[name] if own[name] is None else own[name] for name in names}
    if dataset is not None:
        for name in ("steps", "epochs"):
            if settings[name] is not None:
                settings[name] = max(1, round(settings[name] * params["datasets"][dataset]["budget"]))
    return settings


def settings_for(run: dict[str, Any], dataset: str) -> dict[str, Any]:
    """The method and settings of a run for one dataset. A setting given for other datasets alone has its default."""
    known = defaults(run["method"])
    own = {
        name: value for name, value in run.items() if name == "method" or name in METHODS[run["method"]].model_fields
    }
    return {n: v.get(dataset, known.get(n)) if isinstance(v, dict) else v for n, v in own.items()}


def training_arguments(params: dict, dataset: str, run: str) -> dict[str, Any]:
    """The arguments of ``train.train`` for a run on a dataset, other than the data and the output folder."""
    block = {name: params["datasets"][dataset][name] for name in ("similarity", "bending_weight", "dice_weight")}
    return {
        "run": settings_for(params["runs"][run], dataset),
        "settings": train_settings(params, run, dataset),
        "seed": params["seed"],
    } | block


def refinement_arguments(params: dict[str, Any], dataset: str, run: str) -> dict[str, Any]:
    """Arguments of ``gridreg.refine`` that refine a run with the losses of its training except Dice.

    The bending weight is that of the training, multiplied by ``refine_bending``.
    """
    section, trained = params["evaluate"], training_arguments(params, dataset, run)
    bending_weight = trained["bending_weight"] * trained["settings"]["bending"] * section["refine_bending"]
    return {"steps": section["refine_steps"], "similarity": trained["similarity"], "bending_weight": bending_weight}


def known_datasets(params: dict) -> list[str]:
    """Datasets that settings may name. They include bundled cohorts, so that a user may delete one without other edits."""
    return list(dict.fromkeys([*params["datasets"], *BUNDLED]))


def agree(params: dict, name: str, where: str) -> None:
    """Raise InputError unless the settings of the run ``name`` agree with each other and with the other sections."""
    values = params["runs"][name]
    if values.get("fold_free") and values["upsampling"] != "bspline":
        raise InputError(
            f"{where}: fold_free is true and upsampling {values['upsampling']}; expected bspline, for which the bound holds"
        )
    if values.get("passes", 1) > 1 and values["encoder"] != "match":
        raise InputError(f"{where}: passes is {values['passes']} and encoder {values['encoder']}; expected match")
    for tuned, by_name in values.items():
        for dataset in by_name if isinstance(by_name, dict) else ():
            refuse_unknown(dataset, known_datasets(params), "dataset", f"{where}.{tuned}")
    if values["method"] not in UNTRAINED:
        budget = train_settings(params, name)
        if (budget["steps"] is None) == (budget["epochs"] is None):
            raise InputError(
                f"{where}: steps and epochs are {budget['steps']} and {budget['epochs']}; "
                "expected a number for exactly one of them (there or in train)"
            )


def fit(run: dict, name: str, block: dict, where: str) -> str:
    """The reason why a run cannot be trained with the loss of the dataset ``name`` (settings ``block``); "" if it can.

    Raises InputError where a grid of the run has more control points along an axis than the dataset has voxels.
    """
    for grid in run.get("grids", []):
        if any(g > n for g, n in zip(grid, block["shape"])):
            raise InputError(f"{where} has the grid {grid}; expected at most {block['shape']}, the shape of {name}")
    if run.get("bayesian") and block["similarity"] != "mse":
        return (
            f"it is bayesian and {name} has similarity {block['similarity']}; expected mse, of which its loss is made"
        )
    return ""
