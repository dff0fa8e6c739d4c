"""Guards against over-optimisation: what is watched while a reward is optimised, and when enough is enough.

Limits on numbers that a run measures anyway, each step; and a second judge, never trained on, that scores answers to
held-out prompts: the model it likes best is kept, and a run whose reward rises while that judge's falls is told apart
(Gao 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from tether.core.errors import RewardFailure, UserError
from tether.core.pass_at import pass_at
from tether.core.protocols import Reward
from tether.core.text import Prompt, Rollout
from tether.rewards.compose import Sum
from tether.rewards.ensemble import Ensemble, Heads

# Limit -> the metric that it is on. What ends in _max is an upper limit, what ends in _min a lower one.
WATCHED = {
    "kl_max": "kl/reference",
    "entropy_min": "policy/entropy",
    "length_ratio_max": "rollout/length",
    "length_ratio_min": "rollout/length",
    "distinct_min": "rollout/distinct_2",
    "disagreement_max": "reward/disagreement",
}


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Limits, a judge on held-out prompts, and what becomes of a run that breaks them.

    ``kl_max``: nats per completion from the reference; ``entropy_min``: nats per token; ``length_ratio_max``,
    ``length_ratio_min``: mean length over that of the first step; ``distinct_min``: different token bigrams / all of
    the step's; ``disagreement_max``: mean disagreement of an ensemble, in units of its scores.
    ``judge``: a reward, named as any other. ``patience``: steps in a row beyond a limit, or evaluations in a row below
    the judge's best, before ``action``: "note" says so, "stop" ends the run there.
    """

    kl_max: float | None = None
    entropy_min: float | None = None
    length_ratio_max: float | None = None
    length_ratio_min: float | None = None
    distinct_min: float | None = None
    disagreement_max: float | None = None
    judge: Mapping[str, Any] | str | None = None
    patience: int = 3
    action: Literal["note", "stop"] = "note"

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if not 0 < limit < math.inf:
                raise ValueError(f"{name} is a number above 0, got {limit}")
        if self.patience < 1:
            raise ValueError(f"patience is 1 or more, got {self.patience}")
        if not self.limits and self.judge is None:
            raise ValueError(f"nothing is guarded: set one of {', '.join(WATCHED)}, judge")
        high, low = self.length_ratio_max, self.length_ratio_min
        if (high is not None and high <= 1) or (low is not None and low >= 1):
            raise ValueError("length_ratio_max is above 1 and length_ratio_min below: the first step is at 1")

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in WATCHED}
        return {name: limit for name, limit in found.items() if limit is not None}


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Several answers to a prompt, each right (1) or wrong (0) by ``verifier``: pass@k for each k of ``ks``."""

    verifier: Reward
    ks: Sequence[int]
    samples: int

    def rates(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """``pass@K`` and the ends of its 95 % interval over prompts, ``pass@K/low`` and ``pass@K/high``; mean length,
        share of answers cut at the length limit, and how many were left unscored. UserError for other scores."""
        scores = self.verifier(rollouts).total
        numbers: dict[str, float] = {}
        for found in pass_at(scores, [r.group for r in rollouts], self.ks, "verify.reward"):
            name, interval = f"pass@{found.k}", found.interval
            numbers |= {name: interval.estimate, f"{name}/low": interval.low, f"{name}/high": interval.high}
        return numbers | {
            "rollout/length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
            "rollout/truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
            "reward/dropped": float((~scores.isfinite()).sum()),
        }


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Prompts that are never trained on, and who judges the answers to them: a second judge whose favourite is kept
    (it sees the first answer to each), a verifier that counts the right ones, or both."""

    prompts: Sequence[Prompt]
    judge: Reward | None = None
    verify: Verify | None = None

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return self.verify.samples if self.verify is not None else 1

    @property
    def rewards(self) -> list[Reward]:
        """Who is asked."""
        return [r for r in (self.judge, self.verify and self.verify.verifier) if r is not None]

    def scores(self, rollouts: Sequence[Rollout], reward: Reward) -> dict[str, float]:
        """Means over the answers that both judge and reward scored; ``reward/gold_error``: standard error of gold, NaN
        for a single answer; ``reward/gold_dropped``: answers that one of the two left unscored."""
        assert self.judge is not None
        gold, proxy = self.judge(rollouts).total, reward(rollouts).total
        both = gold.isfinite() & proxy.isfinite()
        if not both.any():
            raise RewardFailure(f"no answer to the {len(rollouts)} held-out prompts was scored by judge and reward")
        gold, proxy = gold[both].double(), proxy[both].double()
        error = float(gold.std(correction=1)) / math.sqrt(len(gold)) if len(gold) > 1 else math.nan
        return {
            "reward/gold": float(gold.mean()),
            "reward/gold_error": error,
            "reward/gold_dropped": float(len(rollouts) - len(gold)),
            "reward/proxy": float(proxy.mean()),
            "rollout/length": float(torch.tensor([len(r.tokens) for r in rollouts]).double().mean()),
        }


def has_ensemble(reward: object) -> bool:
    """Whether a reward is made of several models whose disagreement it gives, or has such a part."""
    if isinstance(reward, Sum):
        return any(has_ensemble(entry.reward) for entry in (*reward.gates.values(), *reward.parts.values()))
    return isinstance(reward, Ensemble | Heads)


class Watch:
    """The guards of one run at work. ``note`` tells the user; ``stop`` is set where the run should end.
    ``ensemble``: there is one in the reward, so that a step without its disagreement is one that did not ask it."""

    def __init__(self, guards: Guards, note: Callable[[str], None], *, ensemble: bool = False) -> None:
        self.guards, self.note, self.ensemble = guards, note, ensemble
        self.stop = False
        self.first_length: float | None = None
        self.beyond: dict[str, int] = {}
        self.best: dict[str, float] | None = None
        self.since_best = 0

    def step(self, step: int, numbers: Mapping[str, float]) -> dict[str, float]:
        """``guard/LIMIT`` is 1 where the limit is crossed in this step; ``guard/stopped`` where that ends the run."""
        found: dict[str, float] = {}
        for name, limit in self.guards.limits.items():
            value = self._measured(name, numbers)
            if value is None:
                found[f"guard/{name}"] = 0.0
                continue
            crossed = value > limit if name.endswith("_max") else value < limit
            found[f"guard/{name}"] = float(crossed)
            self.beyond[name] = self.beyond.get(name, 0) + 1 if crossed else 0
            if self.beyond[name] == self.guards.patience:
                what = WATCHED[name] + (" over that of the first step" if "ratio" in name else "")
                side = "above" if name.endswith("_max") else "below"
                self._act(
                    f"step {step}: {what} is {value:.3g}, {side} guards.{name}={limit:g}, "
                    f"{self.guards.patience} steps in a row"
                )
        return found | ({"guard/stopped": 1.0} if self.stop else {})

    def _measured(self, name: str, numbers: Mapping[str, float]) -> float | None:
        """None: a step that tells nothing, for or against."""
        metric = WATCHED[name]
        found = [v for n, v in numbers.items() if n == metric]
        if name == "disagreement_max":  # of an ensemble, or of one that is a part of the reward
            found += [v for n, v in numbers.items() if n.startswith("reward/") and n.endswith(".disagreement")]
        if not found and name == "disagreement_max" and self.ensemble:  # no completion of the step passed the gates
            return None
        if not found:
            raise UserError(f"guards.{name}: the run measures no {metric}; take it out, or use a reward that gives it")
        if "ratio" not in name:
            return max(found)
        if self.first_length is None:
            self.first_length = found[0]
        return found[0] / self.first_length

    def judged(self, step: int, numbers: Mapping[str, float]) -> tuple[bool, dict[str, float]]:
        """Whether the judge likes the policy better than ever before, and what is recorded of that."""
        best = self.best
        if best is None or numbers["reward/gold"] > best["gold"]:
            self.best = {"step": step, "gold": numbers["reward/gold"], "proxy": numbers["reward/proxy"]}
            self.since_best = 0
            return True, {"guard/best_step": float(step)}
        self.since_best += 1
        if self.since_best == self.guards.patience:
            rose = "risen" if numbers["reward/proxy"] > best["proxy"] else "not risen"
            self._act(
                f"step {step}: the held-out judge gives {numbers['reward/gold']:.3g}, no more than its best, "
                f"{best['gold']:.3g} at step {best['step']:g}, for {self.guards.patience} evaluations in a row; since "
                f"then the reward has {rose} ({best['proxy']:.3g} to {numbers['reward/proxy']:.3g})"
            )
        return False, {"guard/best_step": float(best["step"])} | ({"guard/stopped": 1.0} if self.stop else {})

    def _act(self, words: str) -> None:
        self.stop = self.stop or self.guards.action == "stop"
        self.note(words + (": the run ends here (guards.action=stop)" if self.stop else ""))

    def state(self) -> dict[str, Any]:
        """What a resumed run could not know otherwise."""
        return {
            "first_length": self.first_length,
            "beyond": self.beyond,
            "best": self.best,
            "since_best": self.since_best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.first_length, self.beyond = state["first_length"], dict(state["beyond"])
        self.best, self.since_best = state["best"], state["since_best"]
