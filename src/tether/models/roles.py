"""Roles on a backbone: a policy has the language-model head, a scorer (reward model or critic) a scalar head.

Several roles may share one backbone, each with its own adapter; a role without an adapter trains the backbone itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tether.core.batches import Batch, Outputs, states_at
from tether.models.adapters import adapter_parameters
from tether.models.backbone import Backbone, Hidden
from tether.models.reading import LAST, Reading


def _per_token(flat: Tensor, batch: Batch) -> Tensor:
    """[K] or [K, k] values of the present tokens -> [B, T] or [B, T, k], zeros elsewhere."""
    each = flat.shape[1:]
    present = batch.present.view(*batch.tokens.shape, *(1 for _ in each))
    return torch.zeros(*batch.tokens.shape, *each, dtype=flat.dtype, device=flat.device).masked_scatter(present, flat)


@dataclass(kw_only=True, eq=False)
class Policy:
    """Log-probs of completion tokens under softmax(logits / temperature)."""

    backbone: Backbone
    adapter: str | None = None
    temperature: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def parameters(self) -> dict[str, nn.Parameter]:
        """What training this role changes, by name."""
        if self.adapter is not None:
            return adapter_parameters(self.backbone.hf, self.adapter)
        return {n: p for n, p in self.backbone.hf.named_parameters() if ".lora_" not in n}

    def read(self, hidden: Hidden, batch: Batch, *, entropy: bool, top_k: int | None = None) -> Outputs:
        found = self.backbone.head(
            hidden.predicts,
            batch.tokens[batch.present],
            temperature=self.temperature,
            entropy=entropy,
            adapter=self.adapter,
            top_k=top_k,
        )
        return Outputs(
            logprobs=_per_token(found.logprobs, batch),
            entropy=_per_token(found.entropy, batch) if entropy else None,
            top_logprobs=_per_token(found.top_logprobs, batch) if top_k else None,
            top_tokens=_per_token(found.top_tokens, batch) if top_k else None,
        )

    def __call__(self, batch: Batch, *, entropy: bool = False, top_k: int | None = None) -> Outputs:
        """``top_k``: with the k most likely tokens in each place, and their log-probs (without gradient)."""
        return self.read(self.backbone.hidden(batch, self.adapter), batch, entropy=entropy, top_k=top_k)


@dataclass(kw_only=True, eq=False)
class Scorer:
    """A scalar head w · h. As a reward model it reads the state at each token (``token_scores`` [B, T]) and makes one
    score of them as ``reading`` says (``scores`` [B], unless told otherwise at the last token); as a critic, the state
    before each completion token (``values`` [B, T]) and after the last one (``scores``, the bootstrap of a cut
    completion). ``language``: log-probs under the language-model head come with them, from the same pass.

    ``head`` may hold K of them: each gives a score of its own (``head_scores`` [B, K]), and the rest is their mean.
    """

    backbone: Backbone
    head: nn.Linear
    adapter: str | None = None
    reading: Reading = LAST
    language: bool = False

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def heads(self) -> int:
        return self.head.out_features

    def parameters(self) -> dict[str, nn.Parameter]:
        own = {f"score.{n}": p for n, p in self.head.named_parameters()}
        if self.adapter is not None:
            return {**adapter_parameters(self.backbone.hf, self.adapter), **own}
        trunk = self.backbone.hf.base_model
        return {**{n: p for n, p in trunk.named_parameters() if ".lora_" not in n}, **own}

    def _project(self, states: Tensor) -> Tensor:
        """[N, d] -> [N, K]."""
        return self.head(states.to(self.head.weight.dtype)).float()

    def read(self, hidden: Hidden, batch: Batch) -> Outputs:
        predicts, last = self._project(hidden.predicts), self._project(hidden.last)
        before, at, scores = self._read(predicts.mean(1), last.mean(1), batch)
        heads = None
        if self.heads > 1:
            each = zip(predicts.unbind(1), last.unbind(1), strict=True)
            heads = torch.stack([self._read(*one, batch)[2] for one in each], dim=1)
            scores = heads.mean(1)
        logprobs = None
        if self.language:
            targets = batch.tokens[batch.present]
            found = self.backbone.head(hidden.predicts, targets, temperature=1.0, entropy=False, adapter=self.adapter)
            logprobs = _per_token(found.logprobs, batch)
        return Outputs(logprobs=logprobs, values=before, scores=scores, token_scores=at, head_scores=heads)

    def _read(self, predicts: Tensor, last: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of one head: before each token [B, T], at each token [B, T], of the completion [B]."""
        before = _per_token(predicts, batch)
        at = states_at(before, last, batch.lengths)
        return before, at, self.reading(at, last, batch)

    def __call__(self, batch: Batch, *, entropy: bool = False) -> Outputs:
        return self.read(self.backbone.hidden(batch, self.adapter), batch)


@dataclass(kw_only=True, eq=False)
class ActorCritic:
    """A policy and its critic in one call; one pass of the trunk serves both where they share backbone and adapter."""

    policy: Policy
    critic: Scorer

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def shares_trunk(self) -> bool:
        return self.policy.backbone is self.critic.backbone and self.policy.adapter == self.critic.adapter

    def parameters(self) -> dict[str, nn.Parameter]:
        mine = self.policy.parameters()
        known = {id(p) for p in mine.values()}
        return {**mine, **{f"critic.{n}": p for n, p in self.critic.parameters().items() if id(p) not in known}}

    def __call__(self, batch: Batch, *, entropy: bool = False) -> Outputs:
        hidden = self.policy.backbone.hidden(batch, self.policy.adapter)
        theirs = hidden if self.shares_trunk else self.critic.backbone.hidden(batch, self.critic.adapter)
        actor, critic = self.policy.read(hidden, batch, entropy=entropy), self.critic.read(theirs, batch)
        return Outputs(logprobs=actor.logprobs, entropy=actor.entropy, values=critic.values, scores=critic.scores)


Role = Policy | Scorer | ActorCritic


def new_head(backbone: Backbone, *, zero: bool, bias: bool = False, heads: int = 1) -> nn.Linear:
    """A scalar head for ``backbone``, or several, each with numbers of its own: 0 everywhere (``zero``, a critic) or
    small and random (a reward model). ``bias`` starts at 0."""
    size = backbone.config.hidden_size
    head = nn.Linear(size, heads, bias=bias, device=backbone.device, dtype=torch.float32)
    with torch.no_grad():
        if bias:
            head.bias.zero_()
        head.weight.zero_() if zero else head.weight.normal_(0.0, 1.0 / (size + 1) ** 0.5)
    return head
