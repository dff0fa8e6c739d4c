"""Multiple choice: which letter a completion settles on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Rollout
from tether.rewards.verifiers.base import column, inside, score_each


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """1 where the letter that the completion settles on is the prompt's ``column``, else 0.

    Read in this order, the last one of its kind: ``\\boxed{B}``; "answer is B", "Answer: (B)"; "option B", "the choice
    is B"; a line that is only "B." or "(B)"; a line "B. its text" where no other choice has one; "(B)" anywhere. Two
    letters at once ("A or B") are no answer. ``letters``: the choices there are. ``within``: judge only what the last
    tag of this name holds.
    """

    beside: ClassVar[int] = 1
    column: str = "answer"
    letters: str = "ABCDEFGHIJ"
    within: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Z]{2,26}", self.letters) or len(set(self.letters)) != len(self.letters):
            raise UserError(f"reward.letters must be two or more different capital letters, got {self.letters!r}")

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=score_each("multiple_choice", rollouts, self._right))

    def _right(self, rollout: Rollout) -> float:
        answer = str(column(rollout, self.column)).strip()
        wanted = answer.strip("().").upper()
        if len(wanted) != 1 or wanted not in self.letters:
            raise RewardFailure(f"its column {self.column!r} must hold one of {self.letters}, got {answer!r}")
        return float(chosen_letter(inside(rollout.text, self.within), self.letters) == wanted)


def chosen_letter(text: str, letters: str = "ABCDEFGHIJ") -> str | None:
    """The letter that ``text`` settles on; None where it names none, or several at once."""
    L = f"[{letters}]"
    # "I" before a small word is a person; a letter before a letter, digit or apostrophe is a word.
    one = rf"({L})(?![A-Za-z0-9'’])(?!(?<=I) [a-z])"
    # Possessive (*+): what was taken is not given back, so that no text takes longer than its length.
    named = (
        r"[*_]*+(?:(?i:\s++(?:is|would be|should be))|\s*+[:=])?[*_:]*+"
        rf"[(\[*_\s$]*+(?:\\(?:text|boxed|mathrm)\{{)?\(?{one}[)\]}}*_$]*+"
    )
    settled = (
        rf"\\boxed\{{\s*+(?:\\text\{{)?\(?{one}\)?[.\s}}]*+\}}?",
        # Apart: what is said of other options after the answer ("Option C is wrong because ...") settles nothing.
        rf"(?i:\banswer)\b{named}",
        rf"(?i:\b(?:choice|option))\b{named}",
        rf"^[ \t*_(]*+{one}[ \t*_).:]*+$",
    )
    for kind in settled:
        found = list(re.finditer(kind, text, re.MULTILINE))
        if found:
            several = rf"\s*(?:(?i:or|and)\b|[,/&])\s*[(*]*{one}"
            after = text[found[-1].end() : found[-1].end() + 20]
            return None if re.match(several, after) else found[-1].group(1)
    listed = re.findall(rf"^[ \t*_]*+(?:\({one}\)(?![^\n]*\({L}\))|{one}[.):](?=[\s*_]))", text, re.MULTILINE)
    if listed:  # "B. its text"; the list of the choices, repeated, is no answer
        named = {first or second for first, second in listed}
        return named.pop() if len(named) == 1 else None
    found = re.findall(rf"\({one}\)", text)
    return found[-1] if found else None
