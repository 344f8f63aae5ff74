"""Sort the datasets of `params.yaml` into those in use and those that are not.

DVC runs a stage for every block under `datasets` and stops at a folder that is not there. So only the blocks of
datasets in use stand under `datasets`; the others wait under `unused`:

- a dataset whose folder is not found is moved from `use.datasets` to `use.skipped`, and back when the folder appears,
  to its old place, which `use.order` remembers for that long;
- a dataset that `use` does not name is set aside, and comes back when it is named again.

The blocks are moved as lines of text, not as values, so that they arrive as they were written. The comment and empty
lines above a block belong to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.comments import CommentedSeq

from gridreg.errors import InputError

SECTIONS = ("datasets", "unused")
HEADER = ["\n", "# Datasets that are not in use now; they wait here, moved by `make repro`.\n", "unused:\n"]


def set_list(owner: Any, name: str, items: list, after: str | None = None) -> None:
    """Replace a list in place, so that its comment and its [style] survive. A new one comes below the name `after`.

    At the end of a section a new name would come below the comment of the next section.
    """
    current = owner.get(name)
    if not isinstance(current, CommentedSeq):
        current = CommentedSeq()
        if name in owner or after not in owner:
            owner[name] = current
        else:
            owner.insert(list(owner).index(after) + 1, name, current)
    if not current:
        current.fa.set_flow_style()
    current[:] = items


def insert_in_order(names: list[str], name: str, order: list[str]) -> None:
    """Put `name` before the first of `names` that follows it in `order`, else at the end, in place."""
    later = order[order.index(name) + 1 :] if name in order else []
    names.insert(next((i for i, other in enumerate(names) if other in later), len(names)), name)


def skip_missing(params: Any, path: str | Path) -> list[str]:
    """Update `use.datasets`, `use.skipped` and `use.order` of valid values, in place, by which folders are there.

    A path under data/ counts as there: DVC pulls it. Returns one line for each dataset that is skipped or back.
    Raises InputError if no folder is left.
    """
    root, use = Path(path).parent, params["use"]
    folders = {name: block["path"] for section in SECTIONS for name, block in params.get(section, {}).items()}

    def there(name: str) -> bool:
        folder = os.path.join(root, folders[name])
        return os.path.relpath(folder, root).split(os.sep)[0] == "data" or os.path.exists(folder)

    names, before = list(use["datasets"]), list(use.get("skipped", []))
    for name in before:
        insert_in_order(names, name, list(use.get("order", [])))
    used, skipped = [n for n in names if there(n)], [n for n in names if not there(n)]
    if not used:
        raise InputError(
            f"{path}: no folder of any dataset in use was found "
            f"({', '.join(folders[n] for n in skipped)}); expected at least one "
            "(`make cohort PROFILE=paper` makes the simulated ones under cohorts/paper)"
        )
    for name, new, above in (("datasets", used, None), ("skipped", skipped, "datasets"), ("order", names, "skipped")):
        if name == "order" and not skipped:
            use.pop("order", None)
        elif list(use.get(name, [])) != new:
            set_list(use, name, new, above)
    lines = [f"dataset {name}: back in use, {folders[name]} found" for name in before if name in used]
    return lines + [f"dataset {n}: skipped, folder {folders[n]} not found (named in {path})" for n in skipped]


# ---- The blocks, as text ------------------------------------------------------------------------------------------


def spans(params: Any, section: str, lines: list[str]) -> dict[str, tuple[int, int]]:
    """The lines of every block of a section, name → (first, last + 1), with the comment and empty lines above it.

    What stands below the last block belongs to the next section.
    """
    header = params.lc.key(section)[0]
    starts = [params[section].lc.key(name)[0] for name in params[section]]
    stop = min((line for line, _ in map(params.lc.key, params) if line > header), default=len(lines))
    found, first = {}, header + 1
    for name, start, end in zip(params[section], starts, [*starts[1:], stop]):
        while end > start + 1 and lines[end - 1].strip()[:1] in ("", "#"):
            end -= 1
        found[name] = first, end
        first = end
    return found


def move(params: Any, lines: list[str], used: list[str], waiting: list[str]) -> str:
    """The lines with the blocks of `used` under `datasets` and those of `waiting` under `unused`, in this order."""
    found = {section: spans(params, section, lines) for section in SECTIONS if section in params}
    blocks = {name: lines[first:end] for each in found.values() for name, (first, end) in each.items()}
    new = list(lines)
    for section in sorted(found, key=lambda section: -params.lc.key(section)[0]):  # from below: line numbers stay true
        header = params.lc.key(section)[0]
        first, last = header + 1, max((end for _, end in found[section].values()), default=header + 1)
        names = used if section == "datasets" else waiting
        content = [line for name in names for line in blocks[name]]
        if section == "unused" and not (found[section] and waiting):
            first = header - 2 if lines[header - 2 : header] == HEADER[:2] else header  # the section goes
            content = []
        elif section == "datasets" and waiting and not found.get("unused"):
            content += [*HEADER, *(line for name in waiting for line in blocks[name])]
        new[first:last] = content
    return "".join(new)


def set_aside(text: str, params: Any, path: str | Path, yaml: YAML) -> tuple[str, list[str]]:
    """Move blocks between `datasets` and `unused`, so that `datasets` has those in use.

    `text` is a `params.yaml` with the valid values `params`, `yaml` a round-trip reader. Returns the new text, the same
    one if every block is where it should be, and one line for each dataset that `use` does not name any more. Raises
    InputError where blocks are no lines of their own.
    """
    use = params["use"]
    here, away = (dict(params.get(section, {})) for section in SECTIONS)
    out = [name for name in here if name not in use["datasets"]]
    back = [name for name in use["datasets"] if name in away]
    if not out and not back:
        return text, []
    used = [name for name in here if name not in out]
    waiting = [*(name for name in away if name not in back), *out]
    for name in back:
        insert_in_order(used, name, list(use["datasets"]))
    blocks = here | away
    wanted = {**params, "datasets": {n: blocks[n] for n in used}, "unused": {n: blocks[n] for n in waiting}}
    lines = (text if text.endswith("\n") else text + "\n").splitlines(keepends=True)
    try:
        moved = move(yaml.load(text), lines, used, waiting)  # values fresh from a file know their lines
        found = {"unused": {}, **yaml.load(moved)}
    except (YAMLError, KeyError, TypeError):
        found = None
    if found != wanted:
        raise InputError(
            f"{path}: the datasets {', '.join(out + back)} cannot be moved between datasets and unused; "
            "expected every dataset on lines of its own, equally indented, without anchors"
        )
    said = use.get("skipped", [])
    return moved, [f"dataset {n}: not named in use.datasets, set aside under unused" for n in out if n not in said]
