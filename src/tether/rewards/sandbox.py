"""Sandboxes: where code that a model wrote is run, and what may be asked of one.

A sandbox that this machine can't give is a named error; no sandbox stands in for another without being asked to.
"""

from __future__ import annotations

import ast
import builtins
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tether.core.errors import UserError

SandboxName = Literal["monty", "sandlock", "monty_then_sandlock", "unsafe_subprocess"]
Stop = Literal["", "error", "time", "memory", "unsupported"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program with its tests may use: ``seconds`` of wall clock and ``megabytes`` of memory."""

    seconds: float = 5.0
    megabytes: int = 256

    def __post_init__(self) -> None:
        if not (0.0 < self.seconds <= 600.0):
            raise UserError(f"reward.seconds must be above 0 and at most 600, got {self.seconds}")
        if self.megabytes < 32:
            raise UserError(f"reward.megabytes must be at least 32, got {self.megabytes}: Python itself needs that")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test: ``code`` raises where the program is wrong; or, where ``judged``, it is an expression whose value must
    equal ``equals``. The value is compared outside the sandbox, where the program can't see what is expected."""

    code: str
    judged: bool = False
    equals: Any = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``passed``: one per check. ``stop``: what else went wrong than a test that does not hold; ``detail`` says it in
    words. "error": the program or a test raised. "time", "memory": a limit was broken. "unsupported": the sandbox can't
    run this program, which says nothing about whether it is right."""

    passed: tuple[bool, ...]
    stop: Stop = ""
    detail: str = ""


RunCode = Callable[[str, Sequence[Check], Limits], Outcome]


def open_sandbox(name: SandboxName) -> RunCode:
    """(code, checks, limits) -> Outcome in the sandbox of this name; UserError where this machine can't give it."""
    if name == "monty":
        from tether.rewards.sandbox_monty import open_monty

        return open_monty()
    from tether.rewards.sandbox_cpython import open_sandlock, open_unsafe

    if name == "unsafe_subprocess":
        return open_unsafe()
    sandlock = open_sandlock()
    return sandlock if name == "sandlock" else _monty_then(sandlock)


def _monty_then(full: RunCode) -> RunCode:
    """Monty, and ``full`` for a program that raised there: it may use what Monty does not know. Passes, failed tests
    and broken limits are final."""
    monty = open_sandbox("monty")

    def run(code: str, checks: Sequence[Check], limits: Limits) -> Outcome:
        outcome = monty(code, checks, limits)
        return full(code, checks, limits) if outcome.stop in ("unsupported", "error") else outcome

    return run


def same(got: Any, wanted: Any) -> bool:
    """Whether a value from a sandbox is the one in the data: JSON has lists only, so a tuple equals a list, and
    text as keys only, so the key 1 equals "1"; numbers to 1e-9 relative; True is not 1."""
    try:
        return _same(got, wanted)
    except RecursionError:
        return False


def _same(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        alike = isinstance(got, list | tuple) and len(got) == len(wanted)
        return alike and all(_same(g, w) for g, w in zip(got, wanted, strict=True))
    if isinstance(wanted, dict):
        if not isinstance(got, dict):
            return False
        found, wanted = _json_keys(got), _json_keys(wanted)
        return found.keys() == wanted.keys() and all(_same(found[key], value) for key, value in wanted.items())
    if isinstance(wanted, bool) or isinstance(got, bool) or wanted is None or got is None:
        return got is wanted
    if isinstance(wanted, int | float) and isinstance(got, int | float):
        return got == wanted or (isinstance(wanted, float) and math.isclose(got, wanted, rel_tol=1e-9))
    return type(got) is type(wanted) and got == wanted


def _json_keys(values: dict[Any, Any]) -> dict[Any, Any]:
    """Keys as JSON writes them, which has text only: 1 is "1", True "true", None "null". Others stay."""
    spelt = {True: "true", False: "false", None: "null"}
    return {
        spelt[key] if isinstance(key, bool | None) else repr(key) if isinstance(key, int | float) else key: value
        for key, value in values.items()
    }


# -- tests see the true builtins ---------------------------------------------------------------------------------------

# What hostile code may redefine to make `abs(f(x) - y) < 1e-6` true. Names of exceptions stay: `assert` needs none.
# Those that look at where they are called from mean nothing under another name.
_BUILTINS = frozenset(
    name
    for name, value in vars(builtins).items()
    if name.islower() and callable(value) and not name.startswith("_") and type(value).__name__ != "Quitter"
) - {"super", "locals", "globals", "vars", "dir", "copyright", "credits", "license", "help"}


@dataclass(frozen=True)
class Shield:
    """Tests of one run, with every builtin function that they use renamed to a name that only this run knows.

    ``tests``: the code of each. ``aliases``: {new name: builtin}. A program that defines its own ``abs`` changes no
    test; one that can look into its own interpreter (CPython) can still find the new names.
    """

    tests: tuple[str, ...]
    aliases: dict[str, str]


def shield(codes: Sequence[str]) -> Shield:
    """Code that is no Python raises SyntaxError."""
    mark = f"_{secrets.token_hex(16)}"
    found = [_renamed(code, mark) for code in codes]
    aliases = {name + mark: name for _, used in found for name in used}
    return Shield(tuple(test for test, _ in found), dict(sorted(aliases.items())))


def _renamed(code: str, mark: str) -> tuple[str, set[str]]:
    tree = ast.parse(code)
    own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    own |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in _BUILTINS - own:
            used.add(node.id)
            node.id += mark
    return (ast.unparse(tree) if used else code), used
