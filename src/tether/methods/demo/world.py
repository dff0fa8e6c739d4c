"""The demo's little world: its questions, its prompts, and the simulated judge as a reward."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

from tether.core.batches import Batch, Group, pad_rows
from tether.core.protocols import Scores
from tether.core.text import Message, Prompt, Rollout
from tether.methods.demo.gold import GENERIC_QUESTION, SYSTEM_PROMPT, GoldJudge


def questions(split: str) -> list[Prompt]:
    """The project's own questions: "train" or "heldout"."""
    text = files("tether.methods.demo").joinpath("questions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [asked(row["id"], row["prompt"]) for row in rows if row["split"] == split]


def asked(id: str, question: str) -> Prompt:
    return Prompt(
        id=id, messages=(Message(role="system", content=SYSTEM_PROMPT), Message(role="user", content=question))
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldReward:
    """The judge's score of a rollout. ``logprobs``: batch -> [B, T] under the start model at temperature 1;
    ``generic``: tokens of the prompt that asks for nothing in particular."""

    judge: GoldJudge
    logprobs: Callable[[Batch], Tensor]
    generic: Tensor

    @classmethod
    def of(cls, logprobs: Callable[[Batch], Tensor], tokens_of: Callable[[Prompt], Tensor]) -> GoldReward:
        return cls(judge=GoldJudge(), logprobs=logprobs, generic=tokens_of(asked("generic", GENERIC_QUESTION)))

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        given_question = self._sums([r.prompt_tokens for r in rollouts], rollouts)
        given_generic = self._sums([self.generic] * len(rollouts), rollouts)
        scores = [
            self.judge.score(
                question=r.prompt.question,
                answer=r.text,
                finished=r.finish_reason == "stop",
                logprob_given_question=a,
                logprob_given_generic=b,
                tokens=len(r.tokens),
            )
            for r, a, b in zip(rollouts, given_question, given_generic, strict=True)
        ]
        return Scores(
            total=torch.tensor([s.total for s in scores]),
            parts={
                name: torch.tensor([getattr(s, name) for s in scores]) for name in ("style", "fluency", "relevance")
            },
        )

    def _sums(self, prompts: Sequence[Tensor], rollouts: Sequence[Rollout]) -> list[float]:
        """log p(completion | prompt) of each rollout; a prompt that several share is computed once."""
        distinct: list[Tensor] = []
        index: dict[tuple[int, ...], int] = {}
        of = []
        for prompt in prompts:
            key = tuple(prompt.tolist())
            if key not in index:
                index[key] = len(distinct)
                distinct.append(prompt)
            of.append(index[key])
        rows = [r.tokens for r in rollouts]
        batch = Batch(
            prompts=tuple(distinct),
            prompt_of=torch.tensor(of),
            tokens=pad_rows(rows),
            lengths=torch.tensor([len(r) for r in rows]),
            loss_mask=pad_rows([torch.ones(len(r), dtype=torch.bool) for r in rows]),
        )
        return torch.where(batch.loss_mask, self.logprobs(batch), 0.0).sum(dim=1).tolist()


def draw_pairs(rollouts: Sequence[Rollout], gold: Sequence[float], seed: int) -> list[Group]:
    """The judge ranks the samples of each question, with Bradley-Terry noise; the best is paired with the worst, the
    next best with the next worst, and so on. First chosen, then rejected; completions are the sampled tokens. A pair of
    equal answers teaches nothing and is left out.
    """
    judge, rng = GoldJudge(), random.Random(seed)
    by_group: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        by_group.setdefault(rollout.group, []).append(i)
    pairs: list[Group] = []
    for members in by_group.values():
        ranked = [members[i] for i in judge.rank([gold[i] for i in members], rng)]
        for k in range(len(ranked) // 2):
            chosen, rejected = rollouts[ranked[k]], rollouts[ranked[-1 - k]]
            if chosen.text == rejected.text:
                continue
            pairs.append(
                Group(
                    id=f"{chosen.prompt.id}:{k}",
                    prompt=chosen.prompt_tokens,
                    completions=(chosen.tokens, rejected.tokens),
                    loss_masks=(chosen.sampled, rejected.sampled),
                )
            )
    return pairs
