"""What a person sees while a run goes on: a live panel in a terminal, one plain line a step anywhere else."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from tether.runs.clock import peak_memory_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# The surrogate loss of policy gradients says nothing about progress, so what does comes first.
HEADLINE = (
    "reward/mean", "kl/reference", "rewards/accuracies", "rewards/margins", "accuracy", "rollout/length",
    "rollout/truncated", "policy/entropy", "policy/clip_high", "loss", "grad_norm", "throughput/trained_tokens_per_s",
)  # fmt: skip
SHOWN = 8
# Steps that the remaining time is estimated from: recent, because completions grow or shrink during a run.
WINDOW = 20


class Progress:
    """``with Progress(100, "PPO") as progress: ... progress.step(1, {"reward": 0.2}, {"sample": 3.1})``.

    ``quiet`` prints warnings only. NO_COLOR and a dumb terminal are honoured (rich does both).
    """

    def __init__(self, total_steps: int, title: str, quiet: bool = False, *, stream: IO[str] | None = None) -> None:
        self.total = total_steps
        self.title = title
        self.quiet = quiet
        self.stream = stream or sys.stdout
        self.done = 0
        self.live = not quiet and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._metrics: dict[str, float] = {}
        self._times: dict[str, float] = {}
        self._started = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()
        self._panel: Any = None

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        self._recent.append((self._started, self.done))
        if self.live:
            from rich.live import Live

            self._panel = Live(get_renderable=self._render, console=self._console(), refresh_per_second=2)
            self._panel.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._panel is not None:
            self._panel.refresh()
            self._panel.stop()
            self._panel = None

    def start_at(self, step: int) -> None:
        """A resumed run has ``step`` steps behind it already; they don't count into the estimate."""
        self.done = step
        self._recent.clear()
        self._recent.append((time.monotonic(), step))

    def step(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float]) -> None:
        """Step ``step`` (from 1) is done: its numbers, and its seconds per phase."""
        self.done = step
        self._metrics = {**self._metrics, **metrics}
        self._times = dict(times)
        self._recent.append((time.monotonic(), step))
        if not self.live and not self.quiet:
            self._print(self._line())

    def say(self, text: str) -> None:
        """A line of its own, above the panel."""
        if not self.quiet:
            self._print(text)

    def note(self, text: str) -> None:
        """A warning, said once per run however often it is met; printed even when quiet."""
        if text not in self._said:
            self._said.add(text)
            self._print(f"note: {text}")

    def remaining(self) -> float | None:
        """Seconds to the end by the pace of the last steps; None before the first."""
        if not self._recent:
            return None
        (then, first), (now, last) = self._recent[0], self._recent[-1]
        return (now - then) / (last - first) * max(0, self.total - self.done) if last > first else None

    def _print(self, text: str) -> None:
        if self._panel is not None:
            # Never as markup: the text may hold brackets from a model or a path.
            self._panel.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def _line(self) -> str:
        left = self.remaining()
        parts = [f"{self.title} {self.done}/{self.total}"]
        parts += [f"{name} {number(value)}" for name, value in headline(self._metrics)]
        parts += [split_line(self._times)] if self._times else []
        parts += [f"{duration(left)} left"] if left is not None and self.done < self.total else []
        return "  ".join(parts)

    def _console(self) -> Console:
        from rich.console import Console

        return Console(file=self.stream)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.remaining()
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        ahead = f"{duration(left)} left" if left is not None else "first step ..."
        spent = duration(time.monotonic() - self._started)
        bar.add_row(
            ProgressBar(total=max(self.total, 1), completed=self.done),
            Text(f"{self.done}/{self.total}  {spent} spent  {ahead}"),
        )
        rows = Table.grid(padding=(0, 2))
        shown = headline(self._metrics)
        for i in range(0, len(shown), 2):
            pair = shown[i : i + 2]
            rows.add_row(*(t for n, v in pair for t in (Text(n, style="dim"), Text(number(v), style="bold"))))
        memory = f"peak memory {peak_memory_bytes() / 2**30:.1f} GiB"
        foot = Text("  ".join(p for p in (split_line(self._times), memory) if p), style="dim")
        return Panel(Group(bar, rows, foot), title=Text(self.title), border_style="cyan")


def headline(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """The few numbers worth a line: known ones in order, then others as they come."""
    known = [n for n in HEADLINE if n in metrics]
    others = [n for n in metrics if n not in known]
    return [(n, metrics[n]) for n in (known + others)[:SHOWN]]


def number(value: float | None) -> str:
    """Short, and never misleading: 4 significant digits, tiny ones as powers of ten."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """``42s``, ``3m10s``, ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def split_line(times: Mapping[str, float]) -> str:
    """``12.3s: sample 71% train 24% score 5%``, largest first."""
    total = sum(times.values())
    if total <= 0:
        return ""
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return f"{total:.1f}s: " + " ".join(f"{name} {100 * spent / total:.0f}%" for name, spent in ordered)
