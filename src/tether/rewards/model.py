"""A reward model as a reward: the score at a completion's last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tether.core.batches import Batch
from tether.core.protocols import Scores
from tether.core.text import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardModel:
    """``batch_of`` lays rollouts out in the reward model's own tokens; ``score`` gives [N] scores of a batch."""

    batch_of: Callable[[Sequence[Rollout]], Batch]
    score: Callable[[Batch], Tensor]

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=self.score(self.batch_of(rollouts)).float().cpu())
