"""What is said of one metric."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One metric. ``meaning`` is one line, with the unit; ``healthy`` a range; ``action`` what to do outside it."""

    meaning: str
    healthy: str
    action: str
