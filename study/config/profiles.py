"""Switch `params.yaml` to a profile: write the values of `profiles/NAME.yaml` into it. Nothing else writes this file.

    python -m study.config.profiles smoke        (make profile PROFILE=smoke)

Values that a profile does not name are the user's and are kept. Values that it names are replaced. If the user had edited
one of them, a copy of the old file is kept beside the new one. The lists of what is run (`use` and `ablation.use`) stay
as the user chose them.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from gridreg.errors import InputError, exit_status
from study.config.files import read, write
from study.config.messages import refuse_unknown
from study.config.params import profile_names, resolve

ABSENT = object()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`; by default ruamel.yaml writes an empty value."""


_Representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))


def round_trip() -> YAML:
    """A reader and writer that keeps comments, order and the style of lists."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml


def leaves(values: dict, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is not a mapping, with its path of names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*at, name))
        else:
            yield (*at, name), value


def get(values: Any, at: tuple[str, ...]) -> Any:
    """The value at a path of names, or ABSENT."""
    for name in at:
        if not isinstance(values, dict) or name not in values:
            return ABSENT
        values = values[name]
    return values


def belongs(params: dict, new: dict, at: tuple[str, ...]) -> bool:
    """Whether a profile's value applies to `params`, where the user may have deleted its dataset, run or base."""
    owned = at[0] not in ("datasets", "runs", "base") or get(params, at[:2]) is not ABSENT
    by_dataset = at[0] == "runs" and len(at) > 3  # runs.voxelmorph.learning_rate.brain
    return owned and not (by_dataset and at[3] in new["datasets"] and at[3] not in params["datasets"])


def chosen(at: tuple[str, ...]) -> bool:
    """Whether a value belongs to the lists of what is run, which the user chooses."""
    return at[0] == "use" or at == ("ablation", "use")


def existing(params: dict, at: tuple[str, ...], names: Any) -> Any:
    """A list of what is run, without names whose dataset or run the user has deleted."""
    known = get(
        params, ("datasets",) if at == ("use", "datasets") else ("runs",) if at[0] == "use" else ("ablation", "runs")
    )
    return [name for name in names if name in known] if isinstance(names, list) and isinstance(known, dict) else names


def set_value(owner: Any, name: str, value: Any) -> None:
    """Set a value in place; a list keeps its comment and its flow style."""
    if not isinstance(value, list):
        owner[name] = value
        return
    if not isinstance(owner.get(name), CommentedSeq):
        owner[name] = CommentedSeq()
    if not owner[name]:
        owner[name].fa.set_flow_style()
    owner[name][:] = value


def write_values(params: Any, new: dict, old: dict, profile: str) -> tuple[bool, list[str]]:
    """Write the values of profile `new` into `params` in place. `old` holds the original values of the present profile.

    Returns whether edited values were replaced, and the names of the lists that keep the user's values.
    """
    edited, stay = False, []
    for at, value in leaves(new):
        if not belongs(params, new, at):
            continue
        current, stock = get(params, at), get(old, at)
        if chosen(at):
            value, stock = existing(params, at, value), existing(params, at, stock)
        mine = current != (value if stock is ABSENT else stock)
        if mine and current is not ABSENT and chosen(at):
            stay += [".".join(at)] if current != value else []
            continue
        edited |= mine
        owner = params
        for name in at[:-1]:
            if not isinstance(owner.get(name), dict):
                owner[name] = {}
            owner = owner[name]
        if current is ABSENT or current != value:
            set_value(owner, at[-1], value)
    params["profile"] = profile
    return edited, stay


def keep(path: Path, profile: str) -> Path:
    """Copy the file to params.<profile>.yaml, with a number if that exists already; returns the path of the copy."""
    number = 1
    while True:
        copy = path.with_name(f"{path.stem}.{profile}{'' if number == 1 else f'.{number}'}{path.suffix}")
        try:
            with copy.open("xb") as file:
                file.write(path.read_bytes())
            return copy
        except FileExistsError:
            number += 1


def switch(path: str | Path, profile: str) -> list[str]:
    """Switch the file at `path` to a profile. It is not changed if it has that profile already. Returns lines for the user.

    Raises InputError, without a change to the file, if the file is wrong or would be wrong afterwards.
    """
    path, known, yaml = Path(path), profile_names(path), round_trip()
    refuse_unknown(profile, known, "profile", "PROFILE")
    resolve(read(path), path)
    params = read(path, yaml)
    before = params["profile"]
    if profile == before:
        return [f"{path}: is in profile {profile} already; nothing is written"]
    new, old = (read(path.parent / "profiles" / f"{name}.yaml", round_trip()) for name in (profile, before))
    edited, stay = write_values(params, new, old, profile)
    stream = io.StringIO()
    yaml.dump(params, stream)
    text = stream.getvalue()
    try:
        resolve(YAML(typ="safe", pure=True).load(text), path)
    except InputError as error:
        raise InputError(f"profile {profile} does not fit your values, so nothing is written: {error}") from None
    lines = [f"{path}: rewritten with the values of profile {profile}"]
    if edited:
        lines.append(f"{path}: your edited {before} values are kept in {keep(path, before)}")
    lines += [f"{path}: {name} stays as you have it" for name in stay]
    write(path, text)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.config.profiles", description=__doc__.splitlines()[0])
    parser.add_argument("profile", help="smoke, demo or paper: a file of profiles/")
    parser.add_argument("--file", default=Path("params.yaml"), type=Path, help="another file than params.yaml")
    options = parser.parse_args()

    def start() -> None:
        for line in switch(options.file, options.profile):
            print(line, file=sys.stderr)

    return exit_status(start)


if __name__ == "__main__":
    sys.exit(main())
