"""Numbers that add up across micro-batches and ranks: a mean is kept as a sum and a count until it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Mean:
    """total / count, divided once at the end, so that pieces of any size add up exactly."""

    total: torch.Tensor | float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def detach(self) -> Mean:
        return Mean(self.total.detach() if isinstance(self.total, torch.Tensor) else self.total, self.count)

    def value(self) -> float:
        """The mean as a Python float; NaN where nothing was counted."""
        return float(self.total) / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value seen."""

    largest: float

    def __add__(self, other: Max) -> Max:
        return Max(max(self.largest, other.largest))

    def detach(self) -> Max:
        return self

    def value(self) -> float:
        return self.largest


@dataclass(frozen=True, slots=True)
class Spread:
    """The largest of several means less the smallest; each is added up by itself first."""

    means: tuple[Mean, ...]

    def __add__(self, other: Spread) -> Spread:
        return Spread(tuple(a + b for a, b in zip(self.means, other.means, strict=True)))

    def detach(self) -> Spread:
        return Spread(tuple(m.detach() for m in self.means))

    def value(self) -> float:
        values = [m.value() for m in self.means]
        return max(values) - min(values)


Metric = Mean | Max | Spread
Metrics = dict[str, Metric]


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> Mean:
    """Mean over the slots where ``mask`` is True; the others are never read. Both: the same shape."""
    return Mean(values.detach().masked_fill(~mask, 0.0).sum(), float(mask.sum()))


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Add up the metrics of several micro-batches, name by name."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric  # type: ignore[operator]
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The printed numbers."""
    return {name: metric.value() for name, metric in metrics.items()}
