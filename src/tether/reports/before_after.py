"""Before and after: pass@k of the held-out prompts at a run's start and at its last evaluation, told apart or not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Columns = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Point = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric before the first step and after step ``step``: estimate, low and high of its 95 % interval."""

    name: str
    step: int
    before: Point
    after: Point

    @property
    def said(self) -> str:
        """Two intervals that overlap do not tell a change from chance. A strict rule: it errs on the quiet side."""
        (_, low, high), (_, low_after, high_after) = self.before, self.after
        if low_after > high:
            return "rose"
        if high_after < low:
            return "fell"
        return "no measurable change: the 95 % intervals overlap"

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Of the report's table."""
        return self.name, shown(self.before), shown(self.after), self.said

    @property
    def sentence(self) -> str:
        return f"Held-out {self.name} was {shown(self.before)} before and {shown(self.after)} after: {self.said}."


def changes(held_out: Columns) -> list[Change]:
    """pass@k in rising k, where it was measured before the first step and later."""
    found = []
    for name in sorted((n for n in held_out if re.fullmatch(r"pass@\d+", n)), key=lambda n: int(n[5:])):
        steps = held_out[name][0]
        if steps[0] != 0 or steps[-1] == 0:
            continue
        middle, low, high = (held_out[f"{name}{end}"][1] for end in ("", "/low", "/high"))
        before, after = (middle[0], low[0], high[0]), (middle[-1], low[-1], high[-1])
        found.append(Change(name=name, step=int(steps[-1]), before=before, after=after))
    return found


def shown(point: Point) -> str:
    estimate, low, high = (100 * value for value in point)
    return f"{estimate:.1f} % [{low:.1f}, {high:.1f}]"
