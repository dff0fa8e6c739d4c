"""Where the time and the memory go. Durations are monotonic; a change of the wall clock can't touch them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Split:
    """Seconds per named phase: ``with split("sample"): ...``, then ``split.take()`` once a step.

    Phases may nest; each second is counted once, in the innermost. ``tokens``: tokens drawn in a phase so far, as
    whoever draws them counts.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self.tokens: Counter[str] = Counter()
        self._inner = [0.0]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.monotonic() - start
            own = spent - self._inner.pop()
            self._inner[-1] += spent
            self.seconds[phase] = self.seconds.get(phase, 0.0) + own
            self.total[phase] = self.total.get(phase, 0.0) + own

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last ``take``. ``total`` keeps the sum over the run."""
        taken, self.seconds = self.seconds, {}
        return taken


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def peak_device_bytes() -> int:
    """Most that tensors have held on one GPU so far; 0 without one."""
    # Asked only where torch is loaded already: importing it takes seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
