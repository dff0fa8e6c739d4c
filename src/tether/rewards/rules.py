"""Rules and verifiers: rewards that code can check. Each is a frozen dataclass; its fields are its config."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Rollout
from tether.rewards.verifiers.base import column, inside, score_each
from tether.rewards.verifiers.choice import MultipleChoice
from tether.rewards.verifiers.ifeval import IFEval
from tether.rewards.verifiers.layout import FormatTags
from tether.rewards.verifiers.mathematics import Mathematics
from tether.rewards.verifiers.program import CodeTests
from tether.rewards.verifiers.schema import JsonSchema

# A minus (U+2212 is one) after a digit or a bracket is a subtraction or a range, not a sign; commas only between
# thousands; an exponent has digits, and no letter after them.
_NUMBER = re.compile(
    r"(?:(?<![\d)\]])[-\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+\u2212]?\d+(?![\w]))?"
)


def last_number(text: str) -> float | None:
    """The last number in ``text``, thousands commas and exponents allowed; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


@dataclass(frozen=True, kw_only=True)
class ExactNumber:
    """1 where the last number of the completion equals the prompt's ``column``, else 0 (GSM8K; Cobbe 2021).

    ``within``: judge only what the last tag of this name holds, e.g. answer for <answer>…</answer>."""

    beside: ClassVar[int] = 1
    column: str = "answer"
    within: str = ""

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=score_each("exact_number", rollouts, self._right))

    def _right(self, rollout: Rollout) -> float:
        answer = column(rollout, self.column)
        wanted = answer if isinstance(answer, float) else last_number(str(answer))
        if wanted is None or not math.isfinite(wanted):
            raise RewardFailure(f"its column {self.column!r} holds no number: {answer!r}")
        got = last_number(inside(rollout.text, self.within))
        return float(got is not None and abs(wanted - got) < 1e-6)


@dataclass(frozen=True, kw_only=True)
class Matches:
    """1 where the regular expression ``pattern`` is found in the completion, else 0."""

    beside: ClassVar[int] = 1
    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"reward.pattern is not a regular expression: {error}: {self.pattern!r}") from error

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        found = re.compile(self.pattern)
        return Scores(total=torch.tensor([float(bool(found.search(r.text))) for r in rollouts]))


@dataclass(frozen=True, kw_only=True)
class TargetLength:
    """-|words - target| / target: closest to 0 where the completion has ``target`` words."""

    beside: ClassVar[int] = 1
    target: int = 30

    def __post_init__(self) -> None:
        if self.target < 1:
            raise UserError(f"reward.target is a number of words above 0, got {self.target}")

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=torch.tensor([-abs(len(r.text.split()) - self.target) / self.target for r in rollouts]))


RULES = {
    "exact_number": ExactNumber,
    "mathematics": Mathematics,
    "multiple_choice": MultipleChoice,
    "matches": Matches,
    "format_tags": FormatTags,
    "json_schema": JsonSchema,
    "ifeval": IFEval,
    "code_tests": CodeTests,
    "target_length": TargetLength,
}
