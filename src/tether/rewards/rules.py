"""Rules: rewards that a few lines of code can check. Each is a frozen dataclass; its fields are its config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Rollout

# A minus after a digit or a bracket is a subtraction or a range, not a sign; commas only between thousands.
_NUMBER = re.compile(r"(?:(?<![\d)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")


def last_number(text: str) -> float | None:
    """The last number in ``text``, thousands commas allowed; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@dataclass(frozen=True, kw_only=True)
class ExactNumber:
    """1 where the last number of the completion equals the prompt's ``column``, else 0 (GSM8K; Cobbe 2021)."""

    column: str = "answer"

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=torch.tensor([float(self._right(r)) for r in rollouts]))

    def _right(self, rollout: Rollout) -> bool:
        if self.column not in rollout.prompt.metadata:
            raise RewardFailure(
                f"prompt {rollout.prompt.id} has no column {self.column!r} to compare with; "
                f"it has {sorted(rollout.prompt.metadata) or 'none'}: name it with reward.column"
            )
        answer = rollout.prompt.metadata[self.column]
        wanted = last_number(str(answer))
        if wanted is None:
            raise RewardFailure(f"prompt {rollout.prompt.id}: its column {self.column!r} holds no number: {answer!r}")
        got = last_number(rollout.text)
        return got is not None and abs(wanted - got) < 1e-6


@dataclass(frozen=True, kw_only=True)
class Matches:
    """1 where the regular expression ``pattern`` is found in the completion, else 0."""

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

    target: int = 30

    def __post_init__(self) -> None:
        if self.target < 1:
            raise UserError(f"reward.target is a number of words above 0, got {self.target}")

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=torch.tensor([-abs(len(r.text.split()) - self.target) / self.target for r in rollouts]))


RULES = {"exact_number": ExactNumber, "matches": Matches, "target_length": TargetLength}
