"""One exception for unusable input, and the way in which command lines show it: one sentence, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A file, parameter or name cannot be used; the message says what was found and what was expected."""

    def _render_traceback_(self) -> list[str]:
        """A notebook shows the sentence without the traceback."""
        return [f"{type(self).__name__}: {self}"]


def refused(where: object, found: str, expected: str) -> InputError:
    """An InputError in one sentence: the file or parameter, what was found there, and what was expected."""
    return InputError(f"{where}: found {found}, expected {expected}.")


def exit_status(call: Callable[[], object]) -> int:
    """Run the work of a command line. Returns 0, or 1 after one line on stderr for an error that the user can correct."""
    try:
        call()
    except (InputError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def sentence(error: Exception) -> str:
    """The sentence that the user reads about an error."""
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{reason(error)}; expected space and permission to read and write it"


def reason(error: Exception) -> str:
    """The cause alone: the system's words, without the error number and the name of a temporary file."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Wrap the import of a package that an extra of pyproject.toml installs. InputError names the package if it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{what} needs the package {error.name}, which is not installed; expected `pip install 'gridreg[{name}]'` first"
        ) from error
