"""Several reward models as one reward, cautious where they disagree: what fools one of them may not fool the others.

After Coste 2023 (Reward Model Ensembles Help Mitigate Overoptimization) and Eisenstein 2023 (Helping or Herding?). With
r_k the score of member k of K, m their mean and σ their standard deviation:

    mean            m
    minimum         min_k r_k      worst-case optimisation in Coste 2023
    mean_minus_std  m - c σ        uncertainty-weighted optimisation; Coste 2023 subtracts λ σ² (the variance), this σ

σ is in the unit of the scores, so c means the same for every reward; it is the population's, σ² = Σ (r_k - m)² / K, as
Coste's variance is. For two members m - σ is their minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tether.core.batches import Batch
from tether.core.protocols import Reward, Scores
from tether.core.text import Rollout
from tether.rewards.model import ScoreScale

DISAGREEMENT = "disagreement"
HEAD = "head-"


def disagreement(scores: Tensor) -> Tensor:
    """σ = √(Σ_k (r_k - m)² / K): [K, N] -> [N], the standard deviation over the members (population). 0 for one."""
    return scores.std(dim=0, correction=0)


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions:
    """Which reward models, and how their scores become one.

    ``members``: folders or hub ids of reward models, or the folder of a ``tether reward members=K`` run, which stands
    for the K in it; or one reward model of several heads, which are the members then. ``c`` (mean_minus_std only; 1
    where it is not given): how many standard deviations are taken off. ``scale``: every member's scores in its own
    scale (mean 0, std 1 on held-out completions) before they are combined, as scores of different models have no common
    unit; false takes them as they are.
    """

    members: tuple[str, ...]
    combine: Literal["mean", "minimum", "mean_minus_std"] = "mean"
    c: float | None = None
    scale: bool = True

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members is empty: name reward model folders, as in members: [runs/a, runs/b]")
        if self.combine not in ("mean", "minimum", "mean_minus_std"):
            raise ValueError(f"combine is mean, minimum or mean_minus_std, got {self.combine!r}")
        if self.c is not None and self.combine != "mean_minus_std":
            raise ValueError(f"c would be ignored with combine={self.combine}: take it out, or use mean_minus_std")
        if self.c is not None and not (math.isfinite(self.c) and self.c > 0):
            raise ValueError(f"c is a finite number above 0, got {self.c}; without a penalty use combine=mean")

    def total(self, scores: Tensor) -> Tensor:
        """[K, N] -> [N]. NaN of one member leaves the completion unscored, however they are combined."""
        if self.combine == "minimum":
            return scores.amin(dim=0)
        mean = scores.mean(dim=0)
        if self.combine == "mean":
            return mean
        return mean - (1.0 if self.c is None else self.c) * disagreement(scores)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """Every member scores the same rollouts, the prompt once for all completions of it.

    The breakdown: each member's score under its name, as it enters the total, and ``disagreement``.
    """

    options: EnsembleOptions
    members: Mapping[str, Reward]

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return _combined(self.options, {name: member(rollouts).total for name, member in self.members.items()})


def _combined(options: EnsembleOptions, found: Mapping[str, Tensor]) -> Scores:
    scores = torch.stack(list(found.values()))
    return Scores(total=options.total(scores), parts={**found, DISAGREEMENT: disagreement(scores)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """The heads of one reward model, from one pass: combined as ``options`` say, or without them the model's own score,
    which is their mean.

    ``batch_of`` lays rollouts out in the reward model's own tokens; ``score`` gives [N, K] scores of a batch. With a
    ``scale`` each head has its own, as members of an ensemble have, and so has the mean of the heads as they are.

    The breakdown: with ``options`` each head's score as it enters the total, under head-0, head-1, ...; without them
    "unscaled", the mean as the model gives it, where there is a scale. ``disagreement`` in both, in the same unit.
    """

    batch_of: Callable[[Sequence[Rollout]], Batch]
    score: Callable[[Batch], Tensor]
    scale: ScoreScale | None = None
    options: EnsembleOptions | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        scores = self.score(self.batch_of(rollouts)).float().cpu().T
        heads = scores
        if self.scale is not None:
            heads = torch.stack([own(one) for own, one in zip(self.scale.heads, scores, strict=True)])
        if self.options is not None:
            return _combined(self.options, {f"{HEAD}{k}": one for k, one in enumerate(heads)})
        mean, parts = scores.mean(dim=0), {DISAGREEMENT: disagreement(heads)}
        if self.scale is None:
            return Scores(total=mean, parts=parts)
        return Scores(total=self.scale(mean), parts={"unscaled": mean, **parts})
