"""Read, check and switch `params.yaml`, the one file of values that every DVC stage depends on.

DVC cannot nest interpolation, so a profile is resolved into the flat `params.yaml` before DVC starts:
`profiles/NAME.yaml` holds the values that belong to a profile, everything else in `params.yaml` is the user's.

    python -m study.config.params --check                    # what `make repro` does
    python -m study.config.params --profile smoke --check    # what `make repro PROFILE=smoke` does

Devices, nodes and precision never stand in `params.yaml` (another machine would invalidate every stage): they are
the environment variables GRIDREG_ACCELERATOR, GRIDREG_DEVICES, GRIDREG_NODES and GRIDREG_PRECISION.
Which names and values are allowed is in `gridreg/schema.py`, which datasets are in use in `gridreg/in_use.py`.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from gridreg.errors import InputError, exit_status
from study.config import ablation
from study.config.in_use import set_aside, set_list, skip_missing
from study.config.schema import (
    BENCHMARK,
    DATASET,
    EVALUATE,
    FALSE_CORRESPONDENCE,
    METHODS,
    REQUIRED,
    TRAIN,
    USE,
    Rule,
    refuse_unknown,
    train_settings,
    training_arguments,
    validate,
)

__all__ = ["load", "validate", "train_settings", "training_arguments", "switch_profile", "update"]

ABSENT = object()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, which ruamel.yaml would otherwise turn into nothing at all."""


_Representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))


def round_trip() -> YAML:
    """A reader and writer that keeps comments, order and the style of lists."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml


def read(path: str | Path, yaml: YAML) -> Any:
    """The content of one YAML file, which must be a mapping. Raises InputError."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a YAML file") from error
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not a text"
        raise InputError(f"{where}: {problem.splitlines()[0]}; expected YAML") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}; expected names with values")
    return content


def load(path: str | Path = "params.yaml") -> dict[str, Any]:
    """The checked values of `params.yaml` as plain dicts and lists, defaults filled in."""
    params = read(path, YAML(typ="safe", pure=True))  # pure: YAML 1.2, where 1e-4 is a number
    validate(params, path, profile_names(path))
    ablation.check(params, path)

    def fill(values: dict, rules: dict[str, Rule]) -> None:
        values.update({n: r.default for n, r in rules.items() if n not in values and r.default is not REQUIRED})

    fill(params["use"], USE)
    fill(params["train"], TRAIN)
    fill(params.setdefault("evaluate", {}), EVALUATE)
    fill(params.setdefault("benchmark", {}), BENCHMARK)
    fill(params.setdefault("false_correspondence", {}), FALSE_CORRESPONDENCE)
    params.setdefault("ablation", {"use": []})
    for name, values in {**params["datasets"], **params.get("unused", {})}.items():
        fill(values, DATASET)
        values["title"] = values["title"] or name
    for values in params["runs"].values():
        fill(values, METHODS[values["method"]])
    return params


def state_defaults(params: dict, path: str | Path) -> list[str]:
    """Write what use and a dataset in use leave out, in place: DVC reads each value by name. One line for each."""
    lines = []
    if "refined" not in params["use"]:
        params["use"]["refined"] = []
        lines.append(f"{path}: use has the default for refined")
    for name, values in params["datasets"].items():
        absent = {n: rule.default for n, rule in DATASET.items() if n not in values and n != "title"}
        values.update(absent)
        if absent:
            lines.append(f"{path}: dataset {name} has the default for {', '.join(absent)}")
    return lines


def profile_path(path: str | Path, name: str) -> Path:
    return Path(path).parent / "profiles" / f"{name}.yaml"


def profile_names(path: str | Path) -> list[str]:
    """The profiles beside a `params.yaml`."""
    return sorted(file.stem for file in (Path(path).parent / "profiles").glob("*.yaml"))


# ---- Profiles -----------------------------------------------------------------------------------------------------


def leaves(values: dict, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no mapping, with its path of names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*at, name))
        else:
            yield (*at, name), value


def get(values: Any, at: tuple[str, ...]) -> Any:
    for name in at:
        if not isinstance(values, dict) or name not in values:
            return ABSENT
        values = values[name]
    return values


def place(params: dict, at: tuple[str, ...]) -> tuple[str, ...] | None:
    """Where a value of a profile stands in `params`: a dataset's may wait under `unused`.

    None if the user deleted the whole dataset or run that it belongs to; it then stays deleted.
    """
    sections = {"datasets": ("datasets", "unused"), "runs": ("runs",)}.get(at[0])
    if sections is None:
        return at
    return next(((section, *at[1:]) for section in sections if get(params, (section, *at[1:2])) is not ABSENT), None)


def switch_profile(params: Any, new: dict, old: dict, profile: str) -> bool:
    """Write the values of profile `new` into `params` in place; say whether the user had edited any of them.

    `old` are the stock values of the profile `params` is in now. Names that only `params` has are left alone.
    """
    edited = False
    for at, value in leaves(new):
        target = place(params, at)
        if target is None:
            continue
        current, stock = get(params, target), get(old, at)
        edited |= current != (value if stock is ABSENT else stock)
        owner = params
        for name in target[:-1]:
            if not isinstance(owner.get(name), dict):
                owner[name] = {}
            owner = owner[name]
        if current is ABSENT or current != value:
            set_list(owner, target[-1], value) if isinstance(value, list) else owner.__setitem__(target[-1], value)
    params["profile"] = profile
    return edited


# ---- The file -----------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that an interruption leaves the old one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep(path: Path, profile: str) -> Path:
    """Copy the file to params.<profile>.yaml, or with a number if there is one already; returns the copy."""
    number = 1
    while True:
        copy = path.with_name(f"{path.stem}.{profile}{'' if number == 1 else f'.{number}'}{path.suffix}")
        try:
            with copy.open("xb") as file:
                file.write(path.read_bytes())
            return copy
        except FileExistsError:
            number += 1


def update(path: str | Path = "params.yaml", profile: str | None = None, check: bool = True) -> list[str]:
    """Switch `path` to `profile` if it is in another one, sort its datasets if `check`, validate, write.

    The file is written only when something changed, and not at all on an error. Returns lines for the user.
    """
    path, known, lines = Path(path), profile_names(path), []
    yaml = round_trip()
    params = read(path, yaml)
    text = original = path.read_text(encoding="utf-8")
    before, edited = deepcopy(list(leaves(params))), None
    if profile is not None:
        refuse_unknown(profile, known, "profile", "PROFILE")
    if profile is not None and profile != params.get("profile"):
        refuse_unknown(params.get("profile"), known, "profile", str(path))
        old, new = params["profile"], read(profile_path(path, profile), round_trip())
        if switch_profile(params, new, read(profile_path(path, old), round_trip()), profile):
            edited = old
        lines.append(f"{path}: now in profile {profile}")
    validate(params, path, known)
    if check:
        lines += state_defaults(params, path)
        lines += skip_missing(params, path)
        validate(params, path, known)
    ablation.check(params, path)
    if list(leaves(params)) != before:  # else the text stays as it was written
        stream = io.StringIO()
        yaml.dump(params, stream)
        text = stream.getvalue()
    if check:
        text, moved = set_aside(text, params, path, round_trip())
        lines += moved
    if text != original:
        if edited is not None:
            lines.append(f"{path}: your edited {edited} values are kept in {keep(path, edited)}")
        write(path, text)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.config.params", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", metavar="NAME", help="switch params.yaml to this profile (smoke, demo, paper)")
    parser.add_argument("--check", action="store_true", help="also skip datasets whose folder is not there")
    parser.add_argument("--file", default="params.yaml", type=Path, help="another file than params.yaml")
    options = parser.parse_args()

    def switch() -> None:
        for line in update(options.file, options.profile, options.check):
            print(line, file=sys.stderr)

    return exit_status(switch)


if __name__ == "__main__":
    sys.exit(main())
