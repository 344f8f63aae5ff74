"""Error messages for `params.yaml`, each in one sentence: the place, what was found, and what was expected."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from gridreg.errors import InputError
from study.config.schema import Expected, Section, hints


def refuse_unknown(name: Any, known: Iterable[str], what: str, where: str) -> None:
    """Raise InputError if ``name`` is not one of ``known``; the message suggests the nearest of them."""
    known = list(known)
    if name not in known:
        raise InputError(_unknown(name, known, what, where))


def _unknown(name: Any, known: list[str], what: str, where: str) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" (nearest: {near[0]})" if near else ""
    return f"{where}: unknown {what} {name!r}; expected one of {', '.join(known)}{hint}"


def expected(hint: Any) -> str:
    """The words after "expected" in a message about a value of this type."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return [note.words for note in hint.__metadata__ if isinstance(note, Expected)][-1]
    if kind in (Union, types.UnionType):
        return ", or ".join(expected(part) for part in parts)
    if kind is Literal:
        return "one of " + ", ".join(parts)
    if kind is dict:
        return "a mapping from datasets to such values"
    return {bool: "true or false", type(None): "null"}[hint]


def check(
    values: Any,
    model: type[Section],
    source: str | Path,
    place: str = "",
    others: Iterable[str] = (),
    partial: bool = False,
) -> dict[str, Any]:
    """``values``, checked against ``model`` and completed by its defaults. Raises InputError at the first wrong value.

    source   the file
    place    the section of the file that holds the values, for example "runs.voxelmorph"; "": the whole file
    others   names that are allowed besides those of the model; the caller checks them
    partial  True allows incomplete values, which are returned without defaults
    """
    try:
        return model.model_validate(values).model_dump()
    except ValidationError as error:
        errors = [each for each in error.errors() if not (partial and each["type"] == "missing")]
        if not errors:
            return values
        errors.sort(
            key=lambda each: each["type"] not in ("extra_forbidden", "invalid_key")
        )  # misspelt names come first
        raise InputError(_sentence(list(errors[0]["loc"]), values, model, f"{source}", place, others)) from None


def _sentence(
    loc: list, values: Any, model: type, source: str, place: str, others: Iterable[str] = ()
) -> str:  # fmt: skip
    """The message for the error at ``loc``, pydantic's list of names from ``values`` downwards."""
    where = f"{source}: {place}" if place else source
    if not loc:
        return f"{where} is {values!r:.60}; expected names with values"
    name, *rest = loc
    known = hints(model)
    if name not in known:
        return _unknown(name, [*known, *others], "parameter", where)
    hint, there = known[name], name in values
    inner = get_args(hint)[1] if get_origin(hint) is dict else hint
    if inner is not Any and not (isinstance(inner, type) and issubclass(inner, Section)):
        found = f"is {values[name]!r:.60}" if there else "is missing"
        return f"{where}: {name} {found}; expected {expected(hint)}"
    place = f"{place}.{name}" if place else name
    if not there:
        return f"{source}: {place} is missing; expected this section"
    values = values[name]
    if get_origin(hint) is dict and rest:
        key, *rest = rest
        if rest == ["[key]"]:
            return f"{source}: {place}: {key!r} is not a valid name; expected {expected(get_args(hint)[0])}"
        values, place = values[key], f"{place}.{key}"
    return _sentence(rest, values, inner, source, place)
