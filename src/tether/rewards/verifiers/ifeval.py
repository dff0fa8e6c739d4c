"""Instruction following that code can check: the 25 kinds of IFEval (Zhou 2023, arXiv:2311.07911)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from tether.core.errors import RewardFailure
from tether.core.protocols import Scores
from tether.core.text import Rollout
from tether.rewards.verifiers.base import column, judge_one
from tether.rewards.verifiers.ifeval_kinds import KINDS


@dataclass(frozen=True, kw_only=True)
class IFEval:
    """1 where every instruction of the prompt is followed, else 0; with ``score="share"``, the share that is.

    The prompt carries ``instruction_id_list`` and ``kwargs``, one mapping per instruction, as in the published file.
    ``variant``: "strict" reads the completion as it stands; "loose" is content if an instruction is followed once the
    first line, the last line, both, or the asterisks of markdown are taken away (Zhou 2023, eq. 2).
    """

    beside: ClassVar[int] = 1
    score: Literal["all", "share"] = "all"
    variant: Literal["strict", "loose"] = "strict"

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        """parts: "instructions_followed", the share of the prompt's instructions."""
        shares = torch.tensor([judge_one("ifeval", r, self._share) for r in rollouts], dtype=torch.float32)
        return Scores(
            total=shares if self.score == "share" else (shares == 1.0).float(), parts={"instructions_followed": shares}
        )

    def _share(self, rollout: Rollout) -> float:
        names = column(rollout, "instruction_id_list", "data.columns")
        options = column(rollout, "kwargs", "data.columns")
        if not names or len(names) != len(options):
            raise RewardFailure(f"instruction_id_list names {len(names)} instructions and kwargs {len(options)}")
        texts = [rollout.text] if self.variant == "strict" else loosened(rollout.text)
        followed = [follows(name, given, texts) for name, given in zip(names, options, strict=True)]
        return sum(followed) / len(followed)


def follows(name: str, options: Mapping[str, Any] | None, texts: Sequence[str]) -> bool:
    """Whether any of ``texts`` follows the instruction ``name``; an empty text follows none. Options that are None are
    taken as not given, as in copies of the file that keep every key. RewardFailure for what is not one of the kinds."""
    if name not in KINDS:
        raise RewardFailure(f"unknown instruction {name!r}; known are {', '.join(KINDS)}")
    given = {key: value for key, value in (options or {}).items() if value is not None}
    try:
        return any(text.strip() and KINDS[name](text, **given) for text in texts)
    except TypeError as error:
        raise RewardFailure(f"the kwargs of {name} do not fit: {error}: {given}") from error


def loosened(text: str) -> list[str]:
    """The eight readings of the loose score: whole, without the first line, the last line or both; each with and
    without asterisks."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(reading.replace("*", "") for reading in cut)]
