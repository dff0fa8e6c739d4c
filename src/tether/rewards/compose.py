"""Several rewards as one: gates first, then a weighted sum of parts, each under its own name in the breakdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Reward, Scores
from tether.core.text import Rollout
from tether.rewards.beside import Beginning, Beside
from tether.rewards.function import checked
from tether.rewards.meter import counted

# What a part's own value is called beside its contribution to the total.
RAW = ".raw"


@runtime_checkable
class Remembering(Protocol):
    """A reward with a memory. It moves once a step, by what the step learns from, and is kept with a checkpoint."""

    def advance(self, parts: Mapping[str, Tensor]) -> None:
        """``parts``: of the scores of the step, by the names under which this reward gave them."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


def bring_back(reward: Reward, state: Mapping[str, Any] | None, what: str) -> None:
    """Give ``reward`` what it remembered at a checkpoint. Raises UserError where one of them knows of no memory: the
    config is the same, so the code of the reward has changed since."""
    if isinstance(reward, Remembering) and state is not None:
        reward.restore(state)
    elif isinstance(reward, Remembering) or state is not None:
        now, then = ("a", "none") if state is None else ("no", "one")
        raise UserError(
            f"the reward has changed since the checkpoint: {what} ({getattr(reward, 'name', type(reward).__name__)}) "
            f"has {now} memory, and had {then} then\n  put its code back as it was, or begin a run of its own from the "
            "checkpoint's model"
        )


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations: numbers that can be joined in any pieces (Chan 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.squares + other.squares + apart**2 * self.count * other.count / count)

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of the values [N] that are not NaN."""
        known = values[~values.isnan()].double()
        if not len(known):
            return cls()
        mean = known.mean()
        return cls(len(known), float(mean), float(((known - mean) ** 2).sum()))

    @property
    def std(self) -> float:
        """The standard deviation; 1 where the values do not differ."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """How a part enters the sum: weight · clip((value - mean) / std), the brackets where they are asked for.

    ``normalise``: by mean and std of all its values in the steps before (in the first step, of the first values that
    it gave). ``clip``: a number c for -c ... c, or [low, high]; of the normalised value where it is normalised.
    A weight of 0 shows a part and trains on none of it.
    """

    weight: float = 1.0
    clip: float | tuple[float, float] | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight is a finite number, got {self.weight}")
        if self.clip is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"clip is a number above 0, or [low, high] with low < high, got {self.clip}")
        if not self.weight and (self.clip is not None or self.normalise):
            raise ValueError("clip and normalise would be ignored: with weight 0 the part is shown as it is")

    @property
    def bounds(self) -> tuple[float, float]:
        clip = math.inf if self.clip is None else self.clip
        return clip if isinstance(clip, tuple) else (-clip, clip)

    @property
    def plain(self) -> bool:
        """Whether a part contributes its own value."""
        return self == PartOptions()


@dataclass(kw_only=True, eq=False)
class Part:
    """A reward and its place in the sum. ``known``: the moments of its values in the steps before; ``first``: of the
    first values it gave, which stand in for them until there are any."""

    reward: Reward
    options: PartOptions = field(default_factory=PartOptions)
    known: Moments = Moments()
    first: Moments = Moments()

    def contribution(self, values: Tensor) -> Tensor:
        """[N] -> [N]; NaN stays NaN, unless nothing of it is wanted."""
        weight, (low, high) = self.options.weight, self.options.bounds
        if not weight:
            return torch.zeros_like(values)
        if self.options.normalise:
            if not self.first.count:
                self.first = Moments.of(values)
            by = self.known if self.known.count else self.first
            values = (values - by.mean) / by.std
        return weight * values.clamp(low, high)


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """``otherwise``: the total of a completion that does not pass."""

    otherwise: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.otherwise):
            raise ValueError(f"otherwise is a finite number, got {self.otherwise}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate:
    """A reward that must be 1. Where it is not, the total is ``otherwise`` and no later gate or part is asked."""

    reward: Reward
    options: GateOptions


@dataclass(frozen=True, kw_only=True, eq=False)
class Sum:
    """Σ of the parts' contributions where all gates are 1; gates are asked first, in their order.

    The breakdown: ``NAME`` is what a gate or part adds to the total, so that these add up to it; ``NAME.raw`` its own
    value where that is another number (NaN: it was not asked); ``NAME.PART`` what it is made of itself. NaN in a gate
    or part leaves the completion unscored.
    """

    gates: Mapping[str, Gate] = field(default_factory=dict)
    parts: Mapping[str, Part]

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        try:
            return self._scores(rollouts)
        finally:
            self.forget()

    def _scores(self, rollouts: Sequence[Rollout]) -> Scores:
        total = torch.zeros(len(rollouts))
        found: dict[str, Tensor] = {}
        asked = torch.ones(len(rollouts), dtype=torch.bool)
        for name, gate in self.gates.items():
            values = self._ask(name, gate.reward, rollouts, asked, found)
            failed = asked & (values != 1)  # NaN, too, is not 1
            added = torch.where(failed, gate.options.otherwise, 0.0).masked_fill(asked & values.isnan(), math.nan)
            found |= {name: added, name + RAW: values}
            total, asked = total + added, asked & ~failed
        for name, part in self.parts.items():
            values = self._ask(name, part.reward, rollouts, asked, found)
            found[name] = torch.where(asked, part.contribution(values), 0.0)
            if not part.options.plain:
                found[name + RAW] = values
            total = total + found[name]
        return Scores(total=total, parts=found)

    def _ask(
        self, name: str, reward: Reward, rollouts: Sequence[Rollout], asked: Tensor, found: dict[str, Tensor]
    ) -> Tensor:
        """The values [N] of the rollouts that are ``asked`` about, NaN for the others; what they are made of goes to
        ``found``."""
        values = torch.full((len(rollouts),), math.nan)
        some = [r for r, ok in zip(rollouts, asked.tolist(), strict=True) if ok]
        if not some:
            return values
        try:
            scores = checked(reward(some), some, name)
        except RewardFailure as error:
            raise RewardFailure(f"{error}\n  (the part {name} of the reward)") from error
        for inner, part in scores.parts.items():
            found[f"{name}.{inner}"] = torch.full_like(values, math.nan).masked_scatter(asked, part)
        return values.masked_scatter(asked, scores.total)

    def counts(self) -> dict[str, float]:
        """What the gates and parts counted of their asking, together."""
        return counted(entry.reward for entry in (*self.gates.values(), *self.parts.values()))

    # -- beside the sampling -------------------------------------------------------------------------------------------

    def begin(self, rollout: Rollout) -> None:
        """Begin with what is sure to be asked: the first gate, and what stands behind it once it is passed."""
        self._begin(rollout, tuple(self.gates.values()))

    def _begin(self, rollout: Rollout, gates: Sequence[Gate]) -> None:
        """``gates``: those that are not passed yet; the parts where there are none."""
        if not gates:
            for part in self.parts.values():
                if isinstance(part.reward, Beginning):
                    part.reward.begin(rollout)
            return
        first, *behind = gates

        def passed(scores: Scores) -> None:
            if float(scores.total) == 1:
                self._begin(rollout, behind)

        if isinstance(first.reward, Beside):
            first.reward.begin(rollout, passed)
        elif isinstance(first.reward, Beginning):  # a sum: what is behind it waits until it is asked
            first.reward.begin(rollout)

    def forget(self) -> None:
        """Gates first: one that is still being asked may begin what is behind it."""
        for entry in (*self.gates.values(), *self.parts.values()):
            if isinstance(entry.reward, Beginning):
                entry.reward.forget()

    # -- memory --------------------------------------------------------------------------------------------------------

    def advance(self, parts: Mapping[str, Tensor]) -> None:
        """The values of this step are among those that the next step's are normalised by."""
        for name, part in self.parts.items():
            if part.options.normalise and name + RAW in parts:
                part.known = part.known + Moments.of(parts[name + RAW])
        for name, inner in self._inner().items():
            inner.advance({n.removeprefix(f"{name}."): p for n, p in parts.items() if n.startswith(f"{name}.")})

    def state(self) -> dict[str, Any]:
        """JSON-able, and exact."""
        moments = {n: [astuple(p.known), astuple(p.first)] for n, p in self.parts.items() if p.options.normalise}
        return {"moments": moments, "inner": {name: inner.state() for name, inner in self._inner().items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, (known, first) in state["moments"].items():
            self.parts[name].known, self.parts[name].first = Moments(*known), Moments(*first)
        for name, entry in {**self.gates, **self.parts}.items():
            bring_back(entry.reward, state["inner"].get(name), f"its part {name}")

    def _inner(self) -> dict[str, Remembering]:
        """Gates and parts that have a memory themselves."""
        rewards = {name: entry.reward for name, entry in {**self.gates, **self.parts}.items()}
        return {name: reward for name, reward in rewards.items() if isinstance(reward, Remembering)}
