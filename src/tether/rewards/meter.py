"""What asking took: rewards that count it, and a meter that is read between the steps of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Counting(Protocol):
    """A reward that asks somebody, and counts what that takes."""

    def counts(self) -> Mapping[str, float]:
        """Metric (``judge/requests``, ...) -> its sum since this reward was made."""
        ...


class Meter:
    """``meter()``: what ``rewards`` counted since it was last read, by metric."""

    def __init__(self, rewards: Iterable[object]) -> None:
        # Once each: the reward of a run may be its verifier, too.
        self._rewards = list({id(reward): reward for reward in rewards if isinstance(reward, Counting)}.values())
        self._before = counted(self._rewards)

    def __call__(self) -> dict[str, float]:
        before, self._before = self._before, counted(self._rewards)
        return {name: count - before.get(name, 0.0) for name, count in self._before.items()}


def counted(rewards: Iterable[object]) -> dict[str, float]:
    """The sums of several rewards together."""
    return added(reward.counts() for reward in rewards if isinstance(reward, Counting))


def added(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Counts added up by name."""
    found: dict[str, float] = {}
    for one in counts:
        for name, count in one.items():
            found[name] = found.get(name, 0.0) + count
    return found
