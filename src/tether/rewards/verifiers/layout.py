"""Layout: whether a completion has the tags it was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tether.core.errors import UserError
from tether.core.protocols import Scores
from tether.core.text import Rollout
from tether.rewards.verifiers.base import score_each


@dataclass(frozen=True, kw_only=True)
class FormatTags:
    """1 where ``<tag>…</tag>`` stands once for each of ``tags``, in this order, none empty, else 0.

    ``whole``: nothing but white space stands outside them. ``prefilled``: the prompt already ends with the first
    opening tag, so that the completion starts inside it.
    """

    beside: ClassVar[int] = 1
    tags: tuple[str, ...] = ("think", "answer")
    whole: bool = True
    prefilled: bool = False

    def __post_init__(self) -> None:
        wrong = [tag for tag in self.tags if not re.fullmatch(r"[A-Za-z][\w.-]*", tag)]
        if not self.tags or wrong or len(set(self.tags)) != len(self.tags):
            raise UserError(f"reward.tags must be different names such as think, without brackets, got {self.tags!r}")

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=score_each("format_tags", rollouts, lambda r: float(self._holds(r.text))))

    def _holds(self, text: str) -> bool:
        if self.prefilled:
            text = f"<{self.tags[0]}>{text}"
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(text.count(mark) != 1 for mark in marks):
            return False
        places = [text.index(mark) for mark in marks]
        if places != sorted(places):
            return False
        starts = [0, *(place + len(mark) for place, mark in zip(places, marks, strict=True))]
        pieces = [text[start:end].strip() for start, end in zip(starts, [*places, len(text)], strict=True)]
        between, held = pieces[::2], pieces[1::2]  # outside, inside, outside, inside ... outside
        return all(held) and not (self.whole and any(between))
