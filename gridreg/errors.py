"""One exception for input that cannot be used, and the command lines that show its sentence without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A file, parameter or name that cannot be used; the message says what was found and what was expected."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the sentence, not the way it took."""
        return [f"{type(self).__name__}: {self}"]


def refused(where: object, found: str, expected: str) -> InputError:
    """The error of one sentence: a file or parameter, what was found there, and what was expected."""
    return InputError(f"{where}: found {found}, expected {expected}.")


def exit_status(call: Callable[[], object]) -> int:
    """Do what a command line asks for: 0, or 1 after one line on stderr for an error that is the user's to mend."""
    try:
        call()
    except (InputError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def sentence(error: Exception) -> str:
    """What to say of an error that is the user's to mend."""
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{reason(error)}; expected to be able to read and write it"


def reason(error: Exception) -> str:
    """The cause alone: what the system says, without the number of the error or the name of a temporary file."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Import a package in here that one of the extras of pyproject.toml brings; InputError names it where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{what} needs the package {error.name}, which is not installed; expected `pip install 'gridreg[{name}]'` first"
        ) from error
