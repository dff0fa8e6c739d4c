"""A model on this machine that is asked: texts through the sampler, or the log-probs of a few possible replies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tether.backends.local.sampler import LocalSampler
from tether.config.sections import ModelConfig
from tether.core.batches import Batch
from tether.core.protocols import SamplingSettings
from tether.core.text import Message, Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.methods import parts
from tether.models.load import fingerprint
from tether.models.roles import Policy
from tether.rewards.judges.ask import Conversation
from tether.rewards.judges.cache import Reply, key_of

# Conversations that are answered together; what is answered is kept before the next begin.
AT_ONCE = 16
TOKENS_PER_MICRO_BATCH = 8192


@dataclass(kw_only=True, eq=False)
class LocalSource:
    """A model on this machine, asked through the sampler. A draw depends on conversation, seed and weights alone."""

    sampler: LocalSampler
    name: str
    settings: SamplingSettings
    seed: int = 0

    @classmethod
    def open(cls, model: ModelConfig, settings: SamplingSettings, seed: int = 0) -> LocalSource:
        # A run's random numbers do not depend on whether its judge is opened early or late.
        with torch.random.fork_rng(devices=[]):
            backbone = parts.open_backbone(model, parts.speaker(True))
        policy = Policy(backbone=backbone, temperature=settings.temperature or 1.0)
        chat = ChatTokenizer(backbone.tokenizer)
        return cls(sampler=LocalSampler(policy=policy, chat=chat), name=model.name, settings=settings, seed=seed)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": self.name, "weights": self.weights, **asdict(self.settings), "seed": self.seed}

    @cached_property
    def weights(self) -> str:
        """A fingerprint: the same name may stand for other weights tomorrow."""
        return fingerprint(self.sampler.policy)

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        waiting: list[tuple[int, Prompt]] = []
        for position, conversation in enumerate(conversations):
            prompt = self._prompt(conversation)
            if self._fits(prompt, 1):
                waiting.append((position, prompt))
            else:
                yield position, Reply(text=None)
        for first in range(0, len(waiting), AT_ONCE):
            part = waiting[first : first + AT_ONCE]
            drawn = self.sampler.sample([p for _, p in part], n=1, settings=self.settings, seed=self.seed)
            for (position, _), rollout in zip(part, drawn, strict=True):
                yield position, _reply(rollout)

    def choose(self, conversations: Sequence[Conversation], choices: Sequence[str], *, whole: bool) -> Tensor:
        """log p of each of the ``choices`` as the reply, [N, K] float64; NaN where the question does not fit.

        ``whole``: the reply is the choice and ends there; else it begins with the choice, which needs choices of which
        none begins another.
        """
        found = torch.full((len(conversations), len(choices)), math.nan, dtype=torch.float64)
        score = parts.logprobs_of(Policy(backbone=self.sampler.policy.backbone), TOKENS_PER_MICRO_BATCH)
        for first in range(0, len(conversations), AT_ONCE):
            rows, groups = [], []
            for position in range(first, min(first + AT_ONCE, len(conversations))):
                prompt = self._prompt(conversations[position])
                if self._fits(prompt, 8):
                    rows.append(position)
                    groups.append(self.sampler.chat.group(prompt, choices, id=prompt.id))
            if not groups:
                continue
            batch = Batch.from_groups(groups)
            counts = batch.loss_mask.clone()
            if not whole:
                last = batch.lengths - 1
                counts[torch.arange(batch.size), last] &= ~_in(batch.tokens[torch.arange(batch.size), last], self._ends)
            total = score(batch).cpu().double().masked_fill(~counts, 0.0).sum(dim=1)
            found[rows] = total.reshape(len(rows), len(choices))
        return found

    @property
    def _ends(self) -> list[int]:
        return sorted(self.sampler.chat.stop_ids)

    def _prompt(self, conversation: Conversation) -> Prompt:
        """The conversation with nothing in it that this tokenizer reads as a token of its own."""
        messages = tuple(Message(role=m.role, content=self._plain(m.content)) for m in conversation)
        return Prompt(id=key_of({}, messages)[:16], messages=messages)

    def _plain(self, text: str) -> str:
        for mark in self._marks:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text

    @cached_property
    def _marks(self) -> list[str]:
        """Special tokens of two characters and more, the longest first."""
        tokenizer = self.sampler.chat.tokenizer
        added = [str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special]
        marks = {*added, *tokenizer.all_special_tokens}
        return sorted((m for m in marks if len(m) > 1), key=lambda m: (-len(m), m))

    def _fits(self, prompt: Prompt, room: int) -> bool:
        limit = getattr(self.sampler.policy.backbone.config, "max_position_embeddings", None) or 10**9
        return len(self.sampler.chat.prompt(prompt)) + room <= limit


def _in(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype))


def _reply(rollout: Rollout) -> Reply:
    cut = rollout.finish_reason == "length"
    return Reply(
        text=rollout.text, prompt_tokens=len(rollout.prompt_tokens), completion_tokens=len(rollout.tokens), cut=cut
    )
