"""How the rooms meet: five protocols. ``methods`` puts implementations together; nobody else knows them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tether.core.batches import Batch, Outputs
from tether.core.metrics import Mean, Metrics
from tether.core.text import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A sum and a count, never a mean; the learner divides once over the whole optimizer batch."""

    loss: Mean
    metrics: Metrics = field(default_factory=dict)


class Loss(Protocol):
    """(outputs, batch) -> sum and count. A frozen dataclass whose fields are its hyperparameters.

    ``needs`` names what must exist before the first step: any of "reference", "critic", "entropy", "kl_baseline",
    "sampler_logprobs".
    ``count(batch)`` is the denominator, from masks alone, so that it is known before the first micro-batch runs.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def count(self, batch: Batch) -> float: ...

    def __call__(self, outputs: Outputs, batch: Batch) -> LossOutput: ...


class Advantage(Protocol):
    """rewards [B, T], mask [B, T], groups [B], values [B, T] | None, bootstrap [B] | None -> advantages [B, T].

    ``bootstrap`` is the critic's value after the last token: 0 where the completion ended, V where it was cut.
    ``baselines`` [B]: what a return is compared with where that comes from outside the batch, as ``needs`` says:
    "greedy" (the reward of the prompt's greedy completion) or "history" (a running mean of earlier steps).
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(
        self,
        rewards: Tensor,
        mask: Tensor,
        groups: Tensor,
        values: Tensor | None = None,
        bootstrap: Tensor | None = None,
        baselines: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score per rollout, and what it is made of. ``total`` [N] float32; ``parts`` name -> [N]."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """rollouts -> one score each. Raises RewardFailure; a failure is never a score."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores: ...


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn. ``top_k=0`` and ``top_p=1`` switch the cut off; ``temperature=0`` is greedy.
    ``autocast``: the type of the matrix products, where it is not that of the weights ("bfloat16"; "off": it is)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    autocast: str = "off"


class Sampler(Protocol):
    """Draws ``n`` completions per prompt with the learner's live weights; group i belongs to prompt i.

    Deterministic per (seed, prompt id, sample index), whatever shares the batch. ``finished`` is told each rollout as
    soon as its last token is drawn, in the order in which they end, so that other work can go on beside the drawing.
    """

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        settings: SamplingSettings,
        seed: int,
        finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]: ...


class Learner(Protocol):
    """The machinery an algorithm drives: four verbs and a place to keep their state."""

    def forward_backward(self, batch: Batch, loss: Loss, weight: float = 1.0) -> Metrics:
        """Add weight · ∂(sum/count)/∂θ of the whole ``batch`` to the gradients, in micro-batches; return metrics."""
        ...

    def optim_step(self) -> dict[str, float]:
        """Clip, step, zero; returns grad_norm and learning_rate. Raises NumericStop after repeated non-finite."""
        ...

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] float32 without gradient, under the policy as it is now."""
        ...

    def values(self, batch: Batch) -> Tensor:
        """[B, T] float32 without gradient: the critic's, before each token."""
        ...

    def outputs(self, batch: Batch, *, entropy: bool = False) -> Outputs:
        """Log-probs, and values where there is a critic, without gradient."""
        ...

    @property
    def tokens_seen(self) -> int:
        """Useful tokens trained on so far."""
        ...

    @property
    def flops_seen(self) -> float:
        """Useful FLOPs of this process's training; stays 0 where they are not counted."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...
