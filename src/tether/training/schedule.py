"""Learning-rate schedules: step number -> rate."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate(kind: str, peak: float, warmup: float, total_steps: int) -> Callable[[int], float]:
    """Linear warm-up over ``warmup`` (below 1: a share of all steps; else a number of steps), then "constant",
    "linear" or "cosine" down to 0 at ``total_steps``. The first step (0) already learns: (0 + 1) / warm-up steps."""
    rising = round(warmup * total_steps) if warmup < 1 else int(warmup)

    def rate(step: int) -> float:
        if step < rising:
            return peak * (step + 1) / rising
        if kind == "constant":
            return peak
        left = max(0.0, (total_steps - step) / max(1, total_steps - rising))
        return peak * (left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left)))

    return rate
