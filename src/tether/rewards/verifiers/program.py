"""Unit tests for code that a model wrote, run in a sandbox."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Rollout
from tether.rewards.sandbox import Check, Limits, Outcome, SandboxName, open_sandbox
from tether.rewards.verifiers.base import CannotJudge, Undecided, column, judge_one, last_block


@dataclass(frozen=True, kw_only=True)
class CodeTests:
    """1 where the completion's code passes every test of the prompt's ``column``, else 0; with ``share``, the share of
    tests that pass (Chen 2021, HumanEval; Austin 2021, MBPP).

    The code is the last fenced block of Python, or the whole text where there is no block. The column holds one test
    or a list: Python that raises where the code is wrong (``assert add(1, 2) == 3``), or ``{call: add(1, 2), equals:
    3}``, whose value is compared outside the sandbox, where a program can neither read nor fake it. In CPython (every
    sandbox but "monty") a program can fake an ``assert``: it shares the process with its tests.
    ``entry_column``: the column that names a function to hand to the tests' ``check`` (HumanEval).
    ``prepend_prompt``: the program starts with the prompt itself, for completions that continue it.

    ``sandbox``: "monty" (a subset of Python in Rust; no files, network or processes to reach), "sandlock" (all of
    CPython's standard library; Linux with Landlock), "monty_then_sandlock" (sandlock for what raises in Monty), or
    "unsafe_subprocess" (no protection but limits). ``seconds`` and ``megabytes`` are for a program with its tests:
    what breaks a limit is wrong. What Monty can't run is ``undecided``: "stop" is a RewardFailure, "unscored" is left
    to the run. ``workers``: programs at once.
    """

    column: str = "tests"
    entry_column: str = ""
    prepend_prompt: bool = False
    sandbox: SandboxName = "monty"
    seconds: float = 5.0
    megabytes: int = 256
    share: bool = False
    undecided: Undecided = "stop"
    workers: int = 1

    def __post_init__(self) -> None:
        Limits(seconds=self.seconds, megabytes=self.megabytes)
        if self.workers < 1:
            raise UserError(f"reward.workers is a number of programs above 0, got {self.workers}")
        if self.undecided != "stop" and "monty" not in self.sandbox:
            raise UserError(f"reward.undecided would be ignored: {self.sandbox} runs all of Python")
        open_sandbox(self.sandbox)  # what is missing here is missing before the run begins

    @property
    def beside(self) -> int:
        return self.workers

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        """parts: "tests_passed", the share of tests."""

        def judge(rollout: Rollout) -> float:
            return judge_one("code_tests", rollout, self._share, self.undecided)

        if self.workers == 1:
            shares = [judge(rollout) for rollout in rollouts]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                shares = list(pool.map(judge, rollouts))
        passed = torch.tensor(shares, dtype=torch.float32)
        total = passed if self.share else torch.where(passed.isnan(), passed, (passed == 1.0).float())
        return Scores(total=total, parts={"tests_passed": passed})

    def outcome(self, rollout: Rollout) -> Outcome:
        """What the sandbox says of one rollout, limits and errors in words: to look at, or to count."""
        limits = Limits(seconds=self.seconds, megabytes=self.megabytes)
        return open_sandbox(self.sandbox)(self._program(rollout), self._checks(rollout), limits)

    def _share(self, rollout: Rollout) -> float:
        outcome = self.outcome(rollout)
        if outcome.stop == "unsupported":
            raise CannotJudge(
                f"Monty can't run it: {outcome.detail}\n"
                "  reward.sandbox=monty_then_sandlock runs such programs in full CPython (Linux)"
            )
        return sum(outcome.passed) / len(outcome.passed)

    def _program(self, rollout: Rollout) -> str:
        block = last_block(rollout.text, ("python", "py", "python3"))
        code = rollout.text if block is None else block
        return f"{rollout.prompt.question}{'' if block is None else chr(10)}{code}" if self.prepend_prompt else code

    def _checks(self, rollout: Rollout) -> list[Check]:
        tests = column(rollout, self.column)
        listed = list(tests) if isinstance(tests, list | tuple) else [tests]
        if not listed:
            raise RewardFailure(f"its column {self.column!r} holds no test")
        checks = [_check(test, self.column) for test in listed]
        if self.entry_column:
            entry = f"check({column(rollout, self.entry_column, 'entry_column')})"
            checks = [Check(code=f"{check.code}\n{entry}") for check in checks]
        return checks


def _check(test: Any, column: str) -> Check:
    try:
        if isinstance(test, str) and test.strip():
            ast.parse(test)
            return Check(code=test)
        if isinstance(test, Mapping) and set(test) == {"call", "equals"}:
            compile(str(test["call"]), "call", "eval")
            return Check(code=str(test["call"]), judged=True, equals=test["equals"])
    except SyntaxError as error:
        raise RewardFailure(f"a test in its column {column!r} is no Python: {error}: {str(test)[:120]!r}") from error
    raise RewardFailure(
        f"a test in its column {column!r} must be Python text or {{call: ..., equals: ...}}, got {str(test)[:120]!r}"
    )
