"""What both loops share: where a run starts, what it writes after each step, when it saves, how it stops.

A loop hands ``Session.run`` one function, ``step number -> metrics``. Interrupts finish the step, save, and say how
to go on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.core.errors import Interrupted
from tether.core.protocols import Learner
from tether.runs import checkpoints
from tether.runs.clock import Split, peak_device_bytes, peak_memory_bytes
from tether.runs.folder import RunFolder
from tether.runs.log import MetricsLog, SamplesLog, cut_to, offsets
from tether.runs.progress import Progress
from tether.runs.storage import write_folder
from tether.runs.throughput import Throughput


@dataclass(kw_only=True, eq=False)
class Session:
    """One training run in its folder. ``save_model`` writes the model in its normal form (a Hugging Face folder).

    ``state`` and ``restore`` carry what a loop keeps beside the learner (JSON-able), ``save_more`` and ``load_more``
    what it keeps in files of its own in the checkpoint's folder; everything else that a resumed run needs is derived
    from the step number and the seed.
    """

    folder: RunFolder
    learner: Learner
    save_model: Callable[[Path], None]
    total_steps: int
    title: str
    checkpoint_every: int = 0
    keep: int = 2
    quiet: bool = False
    # FLOP/s of this machine's matrix products, as measured before the run; None: no share of it is told.
    ceiling: float | None = None
    state: Callable[[], dict[str, Any]] = dict
    restore: Callable[[dict[str, Any]], None] = lambda state: None
    save_more: Callable[[Path], None] = lambda folder: None
    load_more: Callable[[Path], None] = lambda folder: None
    # Set by a loop that has reached its end before ``total_steps``: the step that sets it is the last.
    enough: bool = False
    split: Split = field(default_factory=Split)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(
        self,
        one_step: Callable[[int], Mapping[str, float]],
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        eval_every: int = 0,
        at_start: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Steps 1 .. total, each recorded; ``evaluate`` every ``eval_every`` steps and after the last. ``at_start`` is
        an evaluation too, before the first step and recorded as step 0, once: a resumed run has it already."""
        with Progress(self.total_steps, self.title, self.quiet) as self.progress:
            start = self._resume()
            self._began = self._done_so_far()
            self.metrics, self.samples = MetricsLog(self.folder.metrics), SamplesLog(self.folder.samples)
            for log in (self.metrics, self.samples):
                for note in log.notes:
                    self.progress.note(note)
            try:
                with self._signals():
                    if at_start and not self.metrics.offset:
                        with self.split("evaluate"):
                            self._evaluate(0, at_start)
                        self.progress.start_at(0)  # no part of a step's time
                    for step in range(start + 1, self.total_steps + 1):
                        self._one(step, one_step)
                        last = step == self.total_steps or self.enough
                        if evaluate and (last or (eval_every and step % eval_every == 0)):
                            with self.split("evaluate"):
                                self._evaluate(step, evaluate)
                            last = last or self.enough
                        due = bool(self.checkpoint_every) and step % self.checkpoint_every == 0 and not last
                        if due or (self._stop.is_set() and not last):
                            self._checkpoint(step)
                        if self._stop.is_set() and not last:
                            raise Interrupted(
                                f"stopped after step {step} of {self.total_steps}, saved\n"
                                "  go on: the same command with --resume"
                            )
                        if last:
                            break
                with self.split("save"):
                    write_folder(self.folder.final, self.save_model)
            finally:
                self._sum_up()
                self.metrics.close()
                self.samples.close()

    def _one(self, step: int, one_step: Callable[[int], Mapping[str, float]]) -> None:
        before = self._done_so_far()
        numbers = dict(one_step(step))
        times = self.split.take()
        numbers |= self._done_since(before, times).metrics()
        numbers["memory/peak_gib"] = peak_memory_bytes() / 2**30
        if on_device := peak_device_bytes():
            numbers["memory/peak_gpu_gib"] = on_device / 2**30
        self.metrics.append(step, "train", {**numbers, **{f"time/{k}": round(v, 3) for k, v in times.items()}})
        self.progress.step(step, numbers, times)

    def _done_so_far(self) -> tuple[float, float, float]:
        """Tokens trained on, tokens sampled, useful FLOPs."""
        return self.learner.tokens_seen, self.split.tokens["sample"], self.learner.flops_seen

    def _done_since(self, before: tuple[float, float, float], seconds: Mapping[str, float]) -> Throughput:
        trained, sampled, flops = (now - then for now, then in zip(self._done_so_far(), before, strict=True))
        # A learner that doesn't count its arithmetic has no share of the ceiling.
        ceiling = self.ceiling if self.learner.flops_seen else None
        return Throughput(seconds=seconds, trained=trained, sampled=sampled, flops=flops, ceiling=ceiling)

    def _sum_up(self) -> None:
        """The throughput line: what this process did, however it ends."""
        if self.split.total:
            peak = max(peak_memory_bytes(), peak_device_bytes()) / 2**30
            self.progress.say(self._done_since(self._began, self.split.total).line(peak))

    def _evaluate(self, step: int, evaluate: Callable[[], Mapping[str, float]]) -> None:
        numbers = dict(evaluate())
        self.metrics.append(step, "eval", numbers)
        self.progress.say(f"held out, step {step}:  " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

    def _checkpoint(self, step: int) -> None:
        def write(path: Path) -> None:
            self.save_model(path / "model")
            self.learner.save(path / "learner")
            self.save_more(path)
            save_file(random_states(), path / "rng.safetensors")

        with self.split("save"):
            state = {"offsets": offsets([self.metrics, self.samples]), "loop": self.state()}
            path = checkpoints.save(self.folder, step, write, state, self.keep)
        self.progress.say(f"saved {path}")

    def _resume(self) -> int:
        """The step the run stands at: 0, or that of the newest whole checkpoint."""
        for note in self.folder.notes:
            self.progress.note(note)
        if not self.folder.resumed:
            return 0
        found = checkpoints.latest(self.folder, self.progress.note)
        kept = step_0(self.folder.metrics) if found is None else 0
        recorded = found.state["offsets"] if found else {"metrics.jsonl": kept, "samples.jsonl": 0}
        for name in recorded:
            (self.folder.path / name).touch()
        for line in cut_to(self.folder.path, recorded):
            self.progress.note(line)
        if found is None:
            self.progress.note("no checkpoint in this run yet: starting from its first step")
            return 0
        self.learner.load(found.path / "learner")
        set_random_states(load_file(found.path / "rng.safetensors"))
        self.load_more(found.path)
        self.restore(found.state["loop"])
        self.progress.say(f"going on from {found.path}")
        self.progress.start_at(found.step)
        return found.step

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for a stop after the step; a second one stops at once."""

        def ask(number: int, frame: object) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()
            # Where the signal came in the middle of a print, Python refuses a second one; the stop is what counts.
            with suppress(RuntimeError):
                self.progress.say("stopping after this step; once more to stop at once (the step is lost)")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def step_0(metrics: Path) -> int:
    """Bytes of the rows of step 0, which come first: they speak of the start, and hold however often the run begins."""
    rows = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    return sum(map(len, takewhile(lambda row: row.startswith(b'{"step": 0,') and row.endswith(b"\n"), rows)))


def random_states() -> dict[str, Tensor]:
    """Torch's generators, of the processor and of every GPU in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), **{f"cuda:{i}": state for i, state in enumerate(devices)}}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Put back what ``random_states`` gave."""
    torch.set_rng_state(states["torch"])
    for name, state in states.items():
        if name.startswith("cuda:"):
            torch.cuda.set_rng_state(state, name)
