"""Every policy of the demo on the held-out questions: gold, proxy, KL, length, win rate against the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.batches import Batch, rollout_batch
from tether.core.protocols import Reward
from tether.core.text import Prompt, Rollout
from tether.evals.diversity import distinct_n, unique_share
from tether.evals.statistics import length_controlled_win_rate, win_rate
from tether.reports.data import Policy as PolicyRow


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Answers of one policy, ``per_question`` to a question in the order of the questions, and what they scored [N]."""

    name: str
    rollouts: Sequence[Rollout]
    gold: Tensor
    proxy: Tensor
    kl: Tensor
    per_question: int


def measure(
    name: str,
    rollouts: Sequence[Rollout],
    per_question: int,
    *,
    gold: Reward,
    proxy: Reward,
    start_logprobs: Callable[[Batch], Tensor] | None,
) -> Measured:
    """Score ``rollouts``. KL(policy || start) by k1: what the sampler reported minus the start model's log-probs of the
    same tokens at the same temperature; ``start_logprobs=None`` for the start itself."""
    kl = torch.zeros(len(rollouts))
    if start_logprobs is not None:
        start = start_logprobs(rollout_batch(rollouts))
        kl = torch.stack([r.logprobs.sum() - start[i, : len(r.tokens)].sum() for i, r in enumerate(rollouts)])
    return Measured(
        name=name,
        rollouts=rollouts,
        gold=gold(rollouts).total,
        proxy=proxy(rollouts).total,
        kl=kl,
        per_question=per_question,
    )


def outcomes(ours: Measured, start: Measured, questions: Sequence[Prompt]) -> tuple[Tensor, Tensor, list[str]]:
    """Every answer of ours against every answer of the start to the same question, by gold: 1, ½ or 0; the difference
    in tokens; and the question of each comparison, so that the interval is over questions."""
    results, gaps, of = [], [], []
    for q, prompt in enumerate(questions):
        for i in range(q * ours.per_question, (q + 1) * ours.per_question):
            for j in range(q * start.per_question, (q + 1) * start.per_question):
                a, b = float(ours.gold[i]), float(start.gold[j])
                results.append(1.0 if a > b else 0.5 if a == b else 0.0)
                gaps.append(len(ours.rollouts[i].tokens) - len(start.rollouts[j].tokens))
                of.append(prompt.id)
    return torch.tensor(results, dtype=torch.float64), torch.tensor(gaps, dtype=torch.float64), of


def row(measured: Measured, start: Measured, questions: Sequence[Prompt], seed: int) -> PolicyRow:
    """The report's line of one policy."""
    n = len(measured.rollouts)
    texts = [r.text for r in measured.rollouts]
    compared = {}
    if measured is not start:
        wins, gaps, of = outcomes(measured, start, questions)
        compared = {
            "win_rate": win_rate(wins, clusters=of, seed=seed),
            "length_controlled": length_controlled_win_rate(wins, gaps, clusters=of),
            "kl": float(measured.kl.mean()),
            "kl_error": float(measured.kl.std() / n**0.5),
        }
    return PolicyRow(
        name=measured.name,
        gold=float(measured.gold.mean()),
        proxy=float(measured.proxy.mean()),
        length=sum(len(r.tokens) for r in measured.rollouts) / n,
        truncated=sum(r.finish_reason == "length" for r in measured.rollouts) / n,
        distinct_2=distinct_n(texts),
        unique=unique_share(texts),
        **compared,
    )
