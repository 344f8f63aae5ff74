"""One exception for input that cannot be used, so that callers can show its sentence without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """A file, parameter or name that cannot be used; the message says what was found and what was expected."""
