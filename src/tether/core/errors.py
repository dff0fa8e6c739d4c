"""Errors for people: what happened, what was got, what to do. The exit code is part of the class."""

from __future__ import annotations


class TetherError(Exception):
    """Base of every error we raise on purpose. ``str(error)`` is what the user reads; no traceback is shown."""

    exit_code = 2


class UserError(TetherError):
    """The input, the config or the command can't be used as given (exit 2)."""


class MissingModel(UserError):
    """A model that is not on this machine; the message holds the command that fetches it."""


class DataError(UserError):
    """A row that can't be read; the message starts with file:line:column."""


class StorageError(TetherError):
    """Disk or I/O (exit 3)."""

    exit_code = 3


class NumericStop(TetherError):
    """Loss or gradient stopped being finite (exit 4)."""

    exit_code = 4


class RewardFailure(TetherError):
    """A reward function raised, or returned something that is not a score (exit 5)."""

    exit_code = 5


class Interrupted(TetherError):
    """Ctrl-C or SIGTERM: the step was finished and saved (exit 130)."""

    exit_code = 130


def nearest(name: str, known: list[str]) -> str:
    """', did you mean X?' where something in ``known`` is close to ``name``, else ''."""
    import difflib

    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""
