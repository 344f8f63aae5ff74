"""Read YAML files, and write text files whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from gridreg.errors import InputError


def read(path: str | Path, yaml: YAML | None = None) -> Any:
    """The content of a YAML file, which must be a mapping. Raises InputError where it cannot be read or is none."""
    yaml = yaml or YAML(typ="safe", pure=True)  # pure: YAML 1.2, where 1e-4 is a number
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"))
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


def write(path: Path, text: str) -> None:
    """Write a file in one step, so that an interruption leaves the old file intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
