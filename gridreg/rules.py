"""What one value of `params.yaml` may be: a rule for each kind of value, of which `schema` makes its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
