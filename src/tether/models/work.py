"""How much arithmetic a trained token is: the matrix products of a role's forward and backward that are needed.

A weight matrix of n numbers costs 2n FLOPs a token in each of three products: the forward, the gradient of its input,
the gradient of itself. Of a fully trained model that makes 6n; a frozen matrix has no third product, and one below
everything trained no second either. Left out: attention's scores and sums, norms, the scalar head of a scorer, and what
is computed twice (a head's logits, checkpointed activations): a share of the ceiling tells of useful work only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from tether.models.roles import ActorCritic, Policy, Role, Scorer

LAYER = re.compile(r"\.(\d+)\.")
ABOVE_ALL_LAYERS = 10**9


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of forward and backward: ``token`` of every token in the trunk, ``predicted`` of each completion token in
    the language-model head besides."""

    token: float
    predicted: float

    def of(self, tokens: int, completion_tokens: int) -> float:
        """FLOPs of ``tokens``, prompts and completions, of which ``completion_tokens`` are completions'."""
        return self.token * tokens + self.predicted * completion_tokens


def training_work(role: Role) -> Work | None:
    """What a token costs to train ``role`` on; None where it can't be told from the shapes of the weights (mixtures of
    experts, convolutions) or the role is no language model's."""
    if not isinstance(role, Policy | Scorer | ActorCritic):
        return None
    trained = {id(p) for p in role.parameters().values()}
    parts: tuple[Policy | Scorer, ...]
    if isinstance(role, ActorCritic):
        parts = (role.policy,) if role.shares_trunk else (role.policy, role.critic)
    else:
        parts = (role,)
    trunks = [_trunk(part.backbone.hf.base_model, part.adapter, trained) for part in parts]
    counted = [trunk for trunk in trunks if trunk is not None]
    if len(counted) < len(trunks):
        return None
    return Work(token=sum(counted), predicted=_head(role, trained))


def _trunk(trunk: nn.Module, adapter: str | None, trained: set[int]) -> float | None:
    tables = {id(m.weight) for m in trunk.modules() if isinstance(m, nn.Embedding)}
    parameters = [(n, p) for n, p in trunk.named_parameters() if ".lora_" not in n or f".{adapter}." in n]
    lowest = min((_layer(n, id(p) in tables) for n, p in parameters if id(p) in trained), default=ABOVE_ALL_LAYERS)
    total = 0.0
    for name, parameter in parameters:
        if id(parameter) in tables or parameter.dim() == 1:
            continue
        if parameter.dim() > 2:
            return None
        # The lowest trained layer's own input gradients are left out: some of its matrices need them, some do not.
        products = 1 + (_layer(name, False) > lowest) + (id(parameter) in trained)
        total += 2 * products * parameter.numel()
    return total


def _layer(name: str, table: bool) -> int:
    """Where a tensor stands in the order of the forward pass: embeddings, layers, and what comes after them."""
    found = LAYER.search(f".{name}")
    return -1 if table else int(found[1]) if found else ABOVE_ALL_LAYERS


def _head(role: Role, trained: set[int]) -> float:
    if isinstance(role, Scorer) and not role.language:
        return 0.0
    backbone = role.policy.backbone if isinstance(role, ActorCritic) else role.backbone
    weight = backbone.hf.get_output_embeddings().weight
    return 2.0 * (2 + (id(weight) in trained)) * weight.numel()
