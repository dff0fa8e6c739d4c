"""What a reward may not be made of outside RL: refused by its path in the config, before a model is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tether.config.build import find
from tether.core.errors import UserError
from tether.rewards.function import remembers
from tether.rewards.penalties import PENALTIES

# Reads how a completion ended, which a row may say; the other penalties read its tokens.
ENDING = "missing_eos_penalty"


def check_no_memory(spec: Mapping[str, Any] | str, method: str, what: str = "reward") -> None:
    """Raises UserError where a part is normalised, or a class of the user's own remembers: both move with training
    steps. Elsewhere the first batch alone would set mean and std, so that scores would hang on how the work is cut into
    batches, and the class would score with an empty memory."""
    for path, entry in _entries(spec, what):
        if isinstance(entry, Mapping) and entry.get("normalise"):
            raise UserError(
                f"{path}.normalise: {method} has no training steps to take mean and std from; take it out, and bring "
                "the parts to one scale with weight"
            )
    for path, name in named(spec, what):
        if isinstance(name, str) and ":" in name and remembers(find({}, name, path)):
            raise UserError(
                f"{path}: {name} has a memory (advance), and {method} has no training steps that move it, so it would "
                "score as in the first one\n  name a class or function without a memory"
            )


def check_no_tokens(spec: Mapping[str, Any] | str, what: str = "reward") -> None:
    """Raises UserError where a penalty counts tokens: candidates that are given as text have none."""
    for path, name in named(spec, what):
        if name in PENALTIES and name != ENDING:
            raise UserError(
                f"{path}: {name} counts tokens, and candidates that are given are text without any, so all would "
                "score 0; take it out, or write a rule on the text (file.py:function)"
            )


def named(spec: Mapping[str, Any] | str, what: str = "reward") -> Iterator[tuple[str, Any]]:
    """(path, name) of every reward that ``spec`` is made of, itself included."""
    entries = [(what, spec), *_entries(spec, what)]
    for path, entry in entries:
        own = isinstance(entry, Mapping) and "reward" in entry
        made = entry["reward"] if own else entry
        yield f"{path}.reward" if own else path, made.get("type") if isinstance(made, Mapping) else made


def _entries(spec: Any, what: str) -> Iterator[tuple[str, Any]]:
    """(path, gate or part) of a sum, and of the sums in it."""
    if not isinstance(spec, Mapping) or spec.get("type") != "sum":
        return
    for kind in ("gates", "parts"):
        for name, entry in spec.get(kind, {}).items():
            path = f"{what}.{kind}.{name}"
            yield path, entry
            own = isinstance(entry, Mapping) and "reward" in entry
            yield from _entries(entry["reward"] if own else entry, f"{path}.reward" if own else path)
