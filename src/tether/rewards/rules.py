"""Rules and verifiers: rewards that code can check. Each is a frozen dataclass; its fields are its config."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
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


_FRACTION = re.compile(r"\d\s*/\s*$")  # what stands before a denominator


def _is_denominator(text: str) -> bool:
    """Whether the last number in ``text`` is the second half of a fraction."""
    found = list(_NUMBER.finditer(text))
    return bool(found) and _FRACTION.search(text[: found[-1].start()]) is not None


def last_number(text: str) -> Decimal | None:
    """The last number in ``text`` as it is written, thousands commas and exponents allowed; None where there is none.
    NaN, which equals nothing, where its exponent has more than 18 digits."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return Decimal("NaN")


def _calculated(value: object) -> bool:
    """Whether ``value`` is a float of more than 15 digits, as a calculation leaves it (0.3333333333333333). Up to 15
    digits, and whole numbers below 2^53, come through a float as they were written."""
    if not isinstance(value, float) or not math.isfinite(value) or (value.is_integer() and abs(value) < 2**53):
        return False
    return len(Decimal(repr(value)).normalize().as_tuple().digits) > 15


@dataclass(frozen=True, kw_only=True)
class ExactNumber:
    """1 where the last number of the completion equals the prompt's ``column``, else 0 (GSM8K; Cobbe 2021).

    Equal is the same value, to the last digit: 42 and 42.00, 1,000 and 1e3, but not 0.33 and 0.333. Only where the
    column is a float that nobody wrote (more than 15 digits, the result of a calculation) a relative 1e-6 is enough.
    ``within``: judge only what the last tag of this name holds, e.g. answer for <answer>…</answer>."""

    beside: ClassVar[int] = 1
    column: str = "answer"
    within: str = ""

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=score_each("exact_number", rollouts, self._right))

    def _right(self, rollout: Rollout) -> float:
        answer = column(rollout, self.column)
        got = last_number(inside(rollout.text, self.within))
        if _calculated(answer):
            return float(got is not None and math.isclose(answer, float(got), rel_tol=1e-6))
        wanted = last_number(str(answer))
        if wanted is None or not wanted.is_finite():
            raise RewardFailure(f"its column {self.column!r} holds no number: {answer!r}")
        if _is_denominator(str(answer)):
            raise RewardFailure(
                f"its column {self.column!r} holds a fraction, {answer!r}, and exact_number would compare its last "
                "number alone; use mathematics, or write it as a decimal"
            )
        return float(got == wanted)


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
