"""What a reward model's scores cost beside the packed forward pass that they need: 1,000 completions, 100 prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.arms.common import Conversation, serve
from tether.core.batches import rollout_batch
from tether.core.text import Prompt, Rollout
from tether.data.batching import micro_batches
from tether.methods.parts import rollouts_for, scores_of
from tether.models.load import load_backbone
from tether.models.roles import Scorer, new_head
from tether.rewards.model import RewardModel

PROMPTS, COMPLETIONS, PROMPT_TOKENS, COMPLETION_TOKENS = 100, 10, 48, 16
TOKENS_PER_MICRO_BATCH = 4096
PAIRS = 3
# Of the forward pass alone.
LIMIT = 1.1


def rollouts(vocabulary: int) -> list[Rollout]:
    """Random tokens; lengths differ, as they do."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (count,), generator=generator)

    made = []
    for group in range(PROMPTS):
        prompt, asked = tokens(PROMPT_TOKENS), Prompt(id=str(group), text="")
        for index in range(COMPLETIONS):
            answer = tokens(COMPLETION_TOKENS - index % 5)
            made.append(
                Rollout(
                    prompt=asked,
                    group=group,
                    prompt_tokens=prompt,
                    tokens=answer,
                    sampled=torch.ones(len(answer), dtype=torch.bool),
                    logprobs=torch.zeros(len(answer)),
                    text="",
                    finish_reason="length",
                    policy_version=0,
                )
            )
    return made


class Scoring:
    """A reward model as a run asks it, beside the trunk alone over the same micro-batches."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.facts: dict[str, Any] = {}
        backbone = load_backbone(work["model"], device="cpu", say=lambda text: None)
        self.scorer = Scorer(backbone=backbone, head=new_head(backbone, zero=False))

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        backbone, asked = self.scorer.backbone, rollouts(self.scorer.backbone.config.vocab_size)
        reward = RewardModel(
            batch_of=rollouts_for(self.scorer, backbone.tokenizer),
            score=scores_of(self.scorer, TOKENS_PER_MICRO_BATCH),
        )
        batch = rollout_batch(asked)
        parts = [batch.select(rows) for rows in micro_batches(batch, TOKENS_PER_MICRO_BATCH)]

        @torch.no_grad()
        def forward() -> None:
            for part in parts:
                backbone.hidden(part, None)

        ratios, alone = [], []
        for pair in range(PAIRS):
            order = [forward, lambda: reward(asked)] if pair % 2 else [lambda: reward(asked), forward]
            times = {action is forward: seconds(action) for action in order}
            ratios.append(times[False] / times[True])
            alone.append(times[True])
        tokens = sum(len(p) for p in batch.prompts) + int(batch.lengths.sum())
        return {"ratios": ratios, "seconds": statistics.median(alone), "tokens": tokens, "limit": LIMIT}

    def steps(self, conversation: Conversation) -> None:
        """There are none: everything was said."""


def seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    serve(Scoring)
