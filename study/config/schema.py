"""What one value of `params.yaml` may be: a rule for each kind of value, of which `schema` makes its tables."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gridreg.errors import InputError

REQUIRED = object()


class Rule(NamedTuple):
    """What one value must be: `expected` ends the sentence "… expected …"; `default` is for a value left out."""

    expected: str
    holds: Callable[[Any], bool]
    default: Any = REQUIRED


def whole(low: int, high: float = math.inf) -> Rule:
    text = f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    return Rule(text, lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high)


def number(low: float, above: bool = False) -> Rule:
    def holds(v: Any) -> bool:
        real = isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
        return real and (v > low if above else v >= low)

    return Rule(f"a number {'above' if above else 'of at least'} {low:g}", holds)


def choice(*names: str) -> Rule:
    return Rule("one of " + ", ".join(names), lambda v: isinstance(v, str) and v in names)


def each(rule: Rule, expected: str, lengths: Iterable[int] = range(1, 1000)) -> Rule:
    return Rule(expected, lambda v: isinstance(v, list) and len(v) in lengths and all(map(rule.holds, v)))


def or_null(rule: Rule) -> Rule:
    return Rule(rule.expected + ", or null", lambda v: v is None or rule.holds(v))


def by_dataset(rule: Rule) -> Rule:
    def holds(v: Any) -> bool:
        return all(map(rule.holds, v.values())) if isinstance(v, dict) else rule.holds(v)

    return Rule(rule.expected + ", or a mapping from datasets to such", holds)


def default(rule: Rule, value: Any) -> Rule:
    """May be left out, then it is `value`; where that is null, null may also be written."""
    return (or_null(rule) if value is None else rule)._replace(default=value)


# MERGED Which names and values may stand in `params.yaml`: the tables below, and the check against them.
#
# Bad values get one sentence: where, what was found, what was expected, and the nearest name that exists.
#


LETTERS = re.compile(r"[A-Za-z0-9_-]+")  # what DVC allows in the name of a stage
NAME = Rule("a name of letters, digits, - and _", lambda v: isinstance(v, str) and bool(LETTERS.fullmatch(v)))
TEXT = Rule("a text", lambda v: isinstance(v, str) and v.strip() != "")
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
NAMES = each(NAME, "a list of names", lengths=range(1000))
SHARE = Rule("a number from 0 to below 1", lambda v: isinstance(v, (int, float)) and 0 <= v < 1)
SHAPE = each(whole(2), "three whole numbers of at least 2", lengths=[3])
SHAPES = each(SHAPE, "a list of sizes, each three whole numbers of at least 2")
VOXELS = Rule("three whole numbers of at least 2, the largest above 16", lambda v: SHAPE.holds(v) and max(v) > 16)
LABELS = each(whole(1), "a list of label numbers of at least 1")

# ---- The schema: every name that may stand in params.yaml. A new parameter is a new line here. --------------------
TOP = {"profile": NAME, "seed": whole(0)}  # beside the sections use, datasets, train, …
USE = {
    "datasets": NAMES,
    "skipped": default(NAMES, []),  # these two are written by gridreg/in_use.py
    "order": default(NAMES, []),
    "trained": NAMES,
    "untrained": NAMES,
    "refined": default(NAMES, []),  # trained runs that are evaluated refined, too
}
DATASET = {  # `make repro` writes what is left out: DVC reads each
    "title": default(TEXT, None),  # null: the dataset's name
    "path": TEXT,  # a folder in Learn2Reg layout
    "shape": VOXELS,  # voxels after preprocessing
    "spacing_mm": number(0, above=True),  # isotropic, after preprocessing
    "affine_reference": default(TEXT, None),  # mni152 or an image file; null: none
    "labels": default(LABELS, None),  # null: every label of dataset.json
    "budget": default(number(0, above=True), 1.0),  # times the steps or epochs of every run
    "similarity": default(choice("mse", "ncc", "mi"), "mse"),  # of training, in the image and at control points
    "dice_weight": default(number(0), 0.0),
    "bending_weight": number(0),
    "max_subjects": default(whole(2), None),  # null: all
    "max_pairs": default(whole(1), None),  # null: all
}
TRAIN = {
    "steps": default(whole(1), None),  # exactly one of steps and epochs is a number
    "epochs": default(whole(1), None),
    "batch": whole(1),
    "learning_rate": number(0, above=True),
    "beta2": default(SHARE, 0.999),  # of Adam: its memory of squared gradients
    "bending": default(number(0), 1.0),  # times the dataset's bending_weight
    "validate_every": whole(1),  # steps
}
TUNED = ("learning_rate", "bending")  # a run may give one for each dataset by name
EVALUATE = {
    "refine_steps": default(whole(1), 40),  # of instance refinement, for the runs of use.refined
    "refine_bending": default(number(0), 1.0),  # there, times the bending weight of training
}
METHODS = {  # a trained run may give any name of TRAIN, too
    "identity": {},
    "voxelmorph": {
        "width": default(whole(1), 16),
        "levels": default(whole(2), 5),
        "integration_steps": default(whole(0), 5),  # of a velocity; 0: the output is the displacement
    },
    "syn": {
        "iterations": default(each(whole(0), "a list of whole numbers, coarsest level first"), [40, 20, 0]),
        "metric": default(choice("mattes", "CC", "meansquares"), "mattes"),
        "gradient_step": default(number(0, above=True), 0.2),
        "flow_sigma": default(number(0), 3.0),  # smoothing of each update, and of the whole field,
        "total_sigma": default(number(0), 0.0),  # in voxels squared
        "affine_stage": default(by_dataset(FLAG), True),
        "mask_margin": default(by_dataset(whole(0)), None),  # voxels around the labels that the metric looks at, too
    },
    "transmorph": {
        "embed": default(Rule("a multiple of 4", lambda v: whole(4).holds(v) and v % 4 == 0), 96),
        "convolutions": default(whole(1, 2), 1),  # 1: the paper's 41 476 659 parameters; 2: as published
        "drop_path": default(SHARE, 0.3),
    },
    "keymorph": {
        "keypoints": default(whole(5), 80),
        "layers": default(whole(4, 9), 9),
        "width": default(whole(1), 12),
        "poolings": default(whole(0, 4), 4),  # at most; images need 2^(poolings + 1) voxels
        "align": default(choice("tps", "affine"), "tps"),
        "tps_lambda": default(number(0), 1.0),
    },
    "gridreg": {
        "grids": SHAPES,  # control points; several: one drawn at every step
        "base_channels": default(whole(1), 16),
        "num_layers": default(whole(4, 9), 5),
        "upsampling": default(choice("trilinear", "bspline", "deconv"), "trilinear"),
        "projector": default(FLAG, True),
        "fold_free": default(FLAG, False),  # bound the control points; needs upsampling bspline
        "bayesian": default(FLAG, False),  # a standard deviation for every control point
        "samples": default(whole(1), 1),  # Monte-Carlo samples a step, for a Bayesian run
    },
}
UNTRAINED = ("identity", "syn")
MAIN_RUN = "gridreg-adaptive"
BENCHMARK = {
    "methods": default(
        each(choice(*METHODS), "a list of methods"), ["gridreg", "voxelmorph"]
    ),  # in their published size
    "grids": default(SHAPES, [[10, 10, 10]]),  # control points, for GridReg
    "shapes": default(SHAPES, [[32, 32, 32]]),  # voxels of the images
    "batches": default(each(whole(1), "a list of whole numbers of at least 1", range(100)), []),  # []: no training
    "limit_seconds": default(number(0, above=True), 60.0),  # a call expected to take longer is left out
}
FALSE_CORRESPONDENCE = {"pairs": default(whole(1), 5)}  # simulated slices for Figure 1
# --------------------------------------------------------------------------------------------------------------------


def run_rules(method: str) -> dict[str, Rule]:
    """The schema of a run of `method`; the names of TRAIN have no default there, `train` is theirs."""
    own = {"method": choice(*METHODS), **METHODS[method]}
    rules = TRAIN | {name: by_dataset(TRAIN[name]) for name in TUNED}
    return own if method in UNTRAINED else own | {name: default(rule, None) for name, rule in rules.items()}


def refuse_unknown(name: Any, known: Iterable[str], what: str, where: str) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f" (nearest: {near[0]})" if near else ""
        raise InputError(f"{where}: unknown {what} {name!r}; expected one of {', '.join(known)}{hint}")


def check_section(values: Any, rules: dict[str, Rule], where: str, others: Iterable[str] = ()) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{where} is {values!r:.60}; expected names with values")
    for name in values:
        refuse_unknown(name, [*rules, *others], "parameter", where)
    for name, rule in rules.items():
        if name not in values and rule.default is REQUIRED:
            raise InputError(f"{where}: {name} is missing; expected {rule.expected}")
        if name in values and not rule.holds(values[name]):
            raise InputError(f"{where}: {name} is {values[name]!r:.60}; expected {rule.expected}")


def validate(params: Any, source: str | Path = "params.yaml", profiles: Iterable[str] = ()) -> None:
    """Raise InputError, one sentence, at the first value of `params` that is unknown or out of range.

    `source` is the file named in the sentence; `profiles` are the known profiles (none: any name will do).
    """
    sections = {
        "use": USE,
        "datasets": None,
        "unused": None,
        "runs": None,
        "train": TRAIN,
        "evaluate": EVALUATE,
        "benchmark": BENCHMARK,
        "false_correspondence": FALSE_CORRESPONDENCE,
    }
    check_section(params, TOP, str(source), others=[*sections, "ablation"])
    for section, rules in sections.items():
        where = f"{source}: {section}"
        if section in ("unused", "evaluate", "benchmark", "false_correspondence") and section not in params:
            continue
        if section not in params:
            raise InputError(f"{where} is missing; expected this section")
        if rules is not None:
            check_section(params[section], rules, where)
            continue
        check_section(params[section], {}, where, others=params[section] or ())
        for name in params[section]:
            if not NAME.holds(name):
                raise InputError(f"{where}: {name!r} is no usable name; expected {NAME.expected}")
    if profiles:
        refuse_unknown(params["profile"], profiles, "profile", str(source))
    for section in ("datasets", "unused"):
        for name, values in params.get(section, {}).items():
            check_section(values, DATASET, f"{source}: {section}.{name}")
            if section == "unused" and name in params["datasets"]:
                raise InputError(
                    f"{source}: the dataset {name!r} stands under datasets and under unused; expected it once"
                )
    for name, values in params["runs"].items():
        where = f"{source}: runs.{name}"
        if not isinstance(values, dict) or "method" not in values:
            raise InputError(f"{where} has no method; expected method: and one of {', '.join(METHODS)}")
        refuse_unknown(values["method"], METHODS, "method", where)
        check_section(values, run_rules(values["method"]), where)
        check_run(params, name, where)
    check_use(params, source)


def check_run(params: dict, name: str, where: str) -> None:
    """The values of the run `name` of `params` agree with each other and with the sections beside `runs`."""
    values = params["runs"][name]
    if values.get("fold_free") and values.get("upsampling") != "bspline":
        raise InputError(
            f"{where}: fold_free is true and upsampling {values.get('upsampling', 'trilinear')}; "
            "expected bspline, for which the bound holds"
        )
    for tuned, by_name in values.items():
        for dataset in by_name if isinstance(by_name, dict) else ():
            refuse_unknown(dataset, [*params["datasets"], *params.get("unused", {})], "dataset", f"{where}.{tuned}")
    if values["method"] not in UNTRAINED:
        budget = train_settings(params, name)
        if (budget["steps"] is None) == (budget["epochs"] is None):
            raise InputError(
                f"{where}: steps and epochs are {budget['steps']} and {budget['epochs']}; "
                "expected a number for exactly one of them (there or in train)"
            )


def check_fit(run: dict, name: str, block: dict, where: str) -> None:
    """A run can be trained on the dataset `name`, whose values are `block`: its loss is defined, its grids fit."""
    similarity = block.get("similarity", DATASET["similarity"].default)
    if run.get("bayesian") and similarity != "mse":
        raise InputError(
            f"{where} is bayesian and {name} has similarity {similarity}; "
            "expected mse, which the uncertainty-weighted loss is made of"
        )
    for grid in run.get("grids", []):
        if any(g > n for g, n in zip(grid, block["shape"])):
            raise InputError(f"{where} has the grid {grid}; expected at most {block['shape']}, the shape of {name}")


def check_use(params: dict, source: str | Path) -> None:
    """Every name under `use` exists, once, in the right list, and every run fits every dataset."""
    use = params["use"]
    blocks = {"datasets": {**params["datasets"], **params.get("unused", {})}, "runs": params["runs"]}
    for lists, section in ((("datasets", "skipped"), "datasets"), (("trained", "untrained"), "runs")):
        seen: list[str] = []
        for name in (name for key in lists for name in use.get(key, [])):
            refuse_unknown(name, blocks[section], section[:-1], f"{source}: use")
            if name in seen:
                raise InputError(f"{source}: use names the {section[:-1]} {name!r} twice; expected it once")
            seen.append(name)
    if not use["datasets"]:
        raise InputError(f"{source}: use.datasets is empty; expected at least one dataset")
    if MAIN_RUN not in use["trained"]:
        raise InputError(f"{source}: use.trained lacks {MAIN_RUN}; expected it there: every table compares with it")
    for key in ("trained", "untrained"):
        for name in use[key]:
            method = params["runs"][name]["method"]
            if (method in UNTRAINED) != (key == "untrained"):
                other = "untrained" if key == "trained" else "trained"
                raise InputError(
                    f"{source}: use.{key} names the run {name!r} of method {method}; expected it in use.{other}"
                )
            for dataset in use["datasets"]:
                check_fit(params["runs"][name], dataset, blocks["datasets"][dataset], f"{source}: runs.{name}")
    for name in use.get("refined", []):
        if name not in use["trained"] or "grids" not in params["runs"][name]:
            raise InputError(
                f"{source}: use.refined names {name!r}; expected runs of use.trained that have control points"
            )


def train_settings(params: dict, run: str, dataset: str | None = None) -> dict[str, Any]:
    """The training values of a run: its own where given, else those of `train`; its steps or epochs replace both.

    With a dataset, its `budget` multiplies them, and what the run has for this dataset alone is taken.
    """
    own = {name: params["runs"][run].get(name) for name in TRAIN}
    own |= {name: own[name].get(dataset) for name in TUNED if isinstance(own[name], dict)}
    shared = {name: params["train"].get(name, rule.default) for name, rule in TRAIN.items()}
    if own["steps"] is not None or own["epochs"] is not None:
        shared["steps"] = shared["epochs"] = None
    settings = {name: shared[name] if own[name] is None else own[name] for name in TRAIN}
    if dataset is not None:
        for name in ("steps", "epochs"):
            if settings[name] is not None:
                settings[name] = max(1, round(settings[name] * params["datasets"][dataset]["budget"]))
    return settings


def settings_for(run: dict[str, Any], dataset: str) -> dict[str, Any]:
    """A run whose settings by dataset are those for one; where it names others only, the method's default."""
    rules = METHODS[run["method"]]
    return {n: v.get(dataset, rules[n].default) if isinstance(v, dict) and n in rules else v for n, v in run.items()}


def training_arguments(params: dict, dataset: str, run: str) -> dict[str, Any]:
    """What ``train.train`` needs to know of one run on one dataset, beside the data and where to write."""
    block = {name: params["datasets"][dataset][name] for name in ("similarity", "bending_weight", "dice_weight")}
    return {
        "run": params["runs"][run],
        "settings": train_settings(params, run, dataset),
        "seed": params["seed"],
    } | block
