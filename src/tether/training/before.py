"""What the policy said of its own rollouts before an update: by a pass of the learner, or by the sampler's word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tether.core.batches import Batch
from tether.core.protocols import Learner

# Mean |difference| in nats a token up to which the sampler's log-probs stand for the learner's: ratios of policies are
# off by as much, a thousandth of the usual clip range.
AGREES = 1e-4
# One rollout of this many is scored by the learner, to see whether the sampler agrees.
CHECKED = 16

Source = Literal["sampler", "learner"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Before:
    """``logprobs`` [B, T]: log-probs of the rollouts' tokens before the update; ``values`` [B, T] of the critic.

    ``gap`` = |learner - sampler| [B, T] in nats holds at the tokens ``known`` [B, T] that the learner scored.
    """

    logprobs: Tensor
    gap: Tensor
    known: Tensor
    source: Source
    values: Tensor | None = None


def before_update(
    learner: Learner, batch: Batch, sampled: Tensor, source: Source, *, turn: int, critic: bool
) -> Before:
    """Of the policy as it is, and of its ``critic``. ``sampled`` [B, T]: the log-probs that the sampler drew with.

    With ``source`` "sampler" the learner scores one rollout in ``CHECKED`` only, others at each ``turn``, and the
    sampler's numbers are taken for all where the two agree on those; where they don't, the learner scores all.
    """
    if source == "sampler":
        gap, known = _compared(learner, batch, sampled, turn)
        if float(gap[known].mean()) <= AGREES:  # a NaN is no agreement
            values = learner.values(batch) if critic else None
            return Before(logprobs=sampled, gap=gap, known=known, source="sampler", values=values)
    found = learner.outputs(batch)
    assert found.logprobs is not None
    gap = (found.logprobs - sampled).abs()
    return Before(logprobs=found.logprobs, gap=gap, known=batch.loss_mask, source="learner", values=found.values)


def _compared(learner: Learner, batch: Batch, sampled: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """|learner - sampler| [B, T] of some rollouts, zeros elsewhere, and where it holds."""
    # Neighbours, so that they share a prompt.
    count = max(1, batch.size // CHECKED)
    rows = (turn * count + torch.arange(count)) % batch.size
    scored = learner.logprobs(batch.select(rows))
    gap, known = torch.zeros_like(sampled), torch.zeros_like(batch.loss_mask)
    gap[rows, : scored.shape[1]] = (scored - sampled[rows, : scored.shape[1]]).abs()
    known[rows] = batch.loss_mask[rows]
    return gap, known
