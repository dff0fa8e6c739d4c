"""What each loss costs beside the forward and backward pass it belongs to: its share of an optimizer step's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms.common import Conversation, serve
from tether.algorithms import ALGORITHMS
from tether.core.batches import (
    Batch,
    Group,
    JudgementBatch,
    Outputs,
    PolicyBatch,
    PreferenceBatch,
    RankingBatch,
    StepBatch,
)
from tether.core.protocols import Loss
from tether.losses import PREFERENCE, REWARD, SUPERVISED, UNPAIRED, Outcome, Process, RankingLoss
from tether.losses.supervised import CrossEntropy
from tether.models.load import load_backbone
from tether.models.roles import Policy

PROMPTS, COMPLETIONS, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 2, 128, 64
REPEATS, STEPS = 30, 3
# Of its step; a loss that takes more is named.
LIMIT = 0.02


def losses() -> dict[str, Loss]:
    """Every loss of the tables as it stands, and that of every row of the algorithm table."""
    tables = {**SUPERVISED, **REWARD, **PREFERENCE, **UNPAIRED}
    return {**{name: kind() for name, kind in tables.items()}, **{n: row.loss for n, row in ALGORITHMS.items()}}


def groups(vocabulary: int) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(0, vocabulary, (count,), generator=generator)

    mask = torch.ones(COMPLETION_TOKENS, dtype=torch.bool)
    return [
        Group(
            id=str(i),
            prompt=tokens(PROMPT_TOKENS),
            completions=tuple(tokens(COMPLETION_TOKENS) for _ in range(COMPLETIONS)),
            loss_masks=(mask,) * COMPLETIONS,
        )
        for i in range(PROMPTS)
    ]


def batch_for(name: str, loss: Loss, rows: list[Group]) -> Batch:
    """The same completions as the kind of batch that ``loss`` reads, with random numbers in it."""
    size = PROMPTS * COMPLETIONS
    noise = torch.randn(6, size, COMPLETION_TOKENS, generator=torch.Generator().manual_seed(1)) * 0.1
    if name in ALGORITHMS:
        old, advantages, returns, values, reference, sampler = noise
        return PolicyBatch.from_groups(
            rows, old_logprobs=old - 2, advantages=advantages, returns=returns, values=values,
            ref_logprobs=reference - 2, sampler_logprobs=sampler - 2,
        )  # fmt: skip
    if isinstance(loss, RankingLoss):
        return RankingBatch.from_groups(rows, ranks=torch.arange(size) % COMPLETIONS)
    if isinstance(loss, Process):
        return StepBatch.from_groups(rows, labels=noise[0] > 0)
    if name in UNPAIRED or isinstance(loss, Outcome):
        desirable, baseline = torch.arange(size) % 2 == 0, torch.full((size,), 0.1)
        return JudgementBatch.from_groups(rows, desirable=desirable, ref_logprobs=noise[4] - 2, kl_baseline=baseline)
    if name in SUPERVISED:
        return Batch.from_groups(rows)
    return PreferenceBatch.from_groups(rows, ref_logprobs=noise[4] - 2)


def outputs() -> Outputs:
    """Leaves in the place of what a forward pass would give."""
    size = PROMPTS * COMPLETIONS
    noise = torch.randn(5, size, COMPLETION_TOKENS, generator=torch.Generator().manual_seed(2)) * 0.1
    logprobs, entropy, values, scores, token_scores = (row.clone().requires_grad_() for row in noise)
    return Outputs(
        logprobs=logprobs - 2, entropy=entropy + 1, values=values, scores=scores[:, 0], token_scores=token_scores
    )


def seconds(loss: Loss, batch: Batch) -> float:
    """Median seconds of the loss and of its gradient by the outputs."""
    times = []
    for _ in range(REPEATS + 3):
        leaves = outputs()
        start = time.perf_counter()
        made = loss(leaves, batch).loss
        (torch.as_tensor(made.total) / loss.count(batch)).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


class Losses:
    """Every loss beside the forward and backward pass of the same completions."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.facts: dict[str, Any] = {}
        self.policy = Policy(backbone=load_backbone(work["model"], device="cpu", say=lambda text: None))
        for parameter in self.policy.parameters().values():
            parameter.requires_grad_(True)

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        rows = groups(self.policy.backbone.config.vocab_size)
        batch, plain = Batch.from_groups(rows), CrossEntropy()

        def step() -> float:
            for parameter in self.policy.parameters().values():
                parameter.grad = None
            start = time.perf_counter()
            (torch.as_tensor(plain(self.policy(batch), batch).loss.total) / plain.count(batch)).backward()
            return time.perf_counter() - start

        step()
        whole = statistics.median(step() for _ in range(STEPS))
        shares = {name: seconds(loss, batch_for(name, loss, rows)) / whole for name, loss in losses().items()}
        what = f"a pass of {PROMPTS} prompts × {COMPLETIONS}, {PROMPT_TOKENS} + {COMPLETION_TOKENS} tokens"
        return {"shares": shares, "seconds": whole, "step": what, "limit": LIMIT}

    def steps(self, conversation: Conversation) -> None:
        """There are none: everything was said."""


if __name__ == "__main__":
    serve(Losses)
