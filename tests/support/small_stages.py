"""A replacement for a DVC stage in tests of processes: it records when it ran, and fails when its name says so."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def note(name: str, options, environment: dict[str, str]) -> None:
    folder = Path(environment["NOTES"])
    (folder / f"{name}.start").write_text(str(time.monotonic()))
    time.sleep(0.3)
    (folder / f"{name}.slot").write_text(environment["SLOT"])
    (folder / f"{name}.end").write_text(str(time.monotonic()))
    sys.exit(name.startswith("bad"))
