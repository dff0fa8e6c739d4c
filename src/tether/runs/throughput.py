"""How fast a step or a run was: useful tokens a second, share of the machine's ceiling, where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tether.runs.progress import split_line

TRAINED = "throughput/trained_tokens_per_s"
SAMPLED = "throughput/sampled_tokens_per_s"
SHARE = "throughput/share_of_ceiling"
CEILING = "throughput/ceiling_gflops"


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was done in ``seconds`` (by phase): tokens ``trained`` on in "update" and ``sampled`` in "sample", useful
    ``flops`` of the updates. ``ceiling``: FLOP/s of the machine's matrix products; None where no share is told."""

    seconds: Mapping[str, float]
    trained: float = 0.0
    sampled: float = 0.0
    flops: float = 0.0
    ceiling: float | None = None

    def metrics(self) -> dict[str, float]:
        """What there is to say, by name of the metric; tokens per second of their own phase, not of the whole."""
        update, sample = self.seconds.get("update", 0.0), self.seconds.get("sample", 0.0)
        numbers: dict[str, float] = {}
        if update > 0:
            numbers[TRAINED] = self.trained / update
        if sample > 0:
            numbers[SAMPLED] = self.sampled / sample
        if update > 0 and self.ceiling:
            numbers[SHARE] = self.flops / update / self.ceiling
            numbers[CEILING] = self.ceiling / 1e9
        return numbers

    def line(self, peak_gib: float) -> str:
        """One line: ``trained 412 tokens/s (71% of the matrix-multiply ceiling of 182 GFLOP/s), sampled 241 tokens/s;
        93.1s: sample 52% update 41% ...; peak 3.1 GiB``."""
        numbers = self.metrics()
        speeds = []
        if TRAINED in numbers:
            share = ""
            if SHARE in numbers:
                share = f" ({numbers[SHARE]:.0%} of the matrix-multiply ceiling of {_rate(numbers[CEILING])})"
            speeds.append(f"trained {numbers[TRAINED]:,.0f} tokens/s{share}")
        if SAMPLED in numbers:
            speeds.append(f"sampled {numbers[SAMPLED]:,.0f} tokens/s")
        parts = (", ".join(speeds), split_line(self.seconds), f"peak {peak_gib:.1f} GiB")
        return "; ".join(part for part in parts if part)


def of_steps(steps: Mapping[float, Mapping[str, float]]) -> Throughput:
    """Recorded steps, metrics by name each, as one. Steps without a phase count nothing in it."""
    seconds: dict[str, float] = {}
    done = {TRAINED: 0.0, SAMPLED: 0.0, SHARE: 0.0}
    phase = {TRAINED: "update", SAMPLED: "sample", SHARE: "update"}
    at_ceiling = 0.0
    for numbers in steps.values():
        for name, value in numbers.items():
            if name.startswith("time/"):
                seconds[name.removeprefix("time/")] = seconds.get(name.removeprefix("time/"), 0.0) + value
        for name in done.keys() & numbers.keys():
            weight = numbers[CEILING] * 1e9 if name == SHARE else 1.0
            done[name] += numbers[name] * weight * numbers.get(f"time/{phase[name]}", 0.0)
        at_ceiling += numbers.get(CEILING, 0.0) * 1e9 * numbers.get("time/update", 0.0)
    update = seconds.get("update", 0.0)
    return Throughput(
        seconds=seconds,
        trained=done[TRAINED],
        sampled=done[SAMPLED],
        flops=done[SHARE],
        # The parts of a resumed run may have been measured against different ceilings.
        ceiling=at_ceiling / update if update else None,
    )


def _rate(gflops: float) -> str:
    return f"{gflops / 1000:,.0f} TFLOP/s" if gflops >= 10_000 else f"{gflops:,.0f} GFLOP/s"
