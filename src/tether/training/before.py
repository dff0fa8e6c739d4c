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


def before_update(learner: Learner, batch: Batch, sampled: Tensor, source: Source, *, turn: int) -> Before:
    """Of the policy as it is. ``sampled`` [B, T]: the log-probs that the sampler drew with.

    With ``source`` "sampler" the learner scores one rollout in ``CHECKED`` only, others at each ``turn``, and the
    sampler's numbers are taken for all where the two agree on those; where they don't, the learner scores the rest too.
    """
    every = torch.ones(batch.size, dtype=torch.bool)
    if source == "learner":
        return _scored(learner, batch, sampled, every)
    # Neighbours, so that they share a prompt.
    count = max(1, batch.size // CHECKED)
    asked = torch.zeros_like(every)
    asked[(turn * count + torch.arange(count)) % batch.size] = True
    found = _scored(learner, batch, sampled, asked)
    if float(found.gap[found.known].mean()) <= AGREES:  # a NaN is no agreement
        return Before(logprobs=sampled, gap=found.gap, known=found.known, source="sampler")
    return _scored(learner, batch, sampled, every)


def _scored(learner: Learner, batch: Batch, sampled: Tensor, asked: Tensor) -> Before:
    """The learner's numbers for the rows ``asked`` [B], zeros for the others."""
    rows = asked.nonzero().squeeze(1)
    outputs = learner.outputs(batch if bool(asked.all()) else batch.select(rows))
    assert outputs.logprobs is not None
    logprobs = _spread(outputs.logprobs, rows, sampled)
    return Before(
        logprobs=logprobs,
        gap=(logprobs - sampled).abs(),
        known=batch.loss_mask & asked[:, None],
        source="learner",
        values=None if outputs.values is None else _spread(outputs.values, rows, sampled),
    )


def _spread(found: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Numbers [b, t] of some rows in their places of [B, T]."""
    out = torch.zeros_like(like)
    out[rows, : found.shape[1]] = found
    return out
