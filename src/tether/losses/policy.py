"""Policy losses: a surrogate for the policy, and beside it, under the same average, the value, KL and entropy terms.

One average over the sum of all terms keeps one exact sum and count. A member of the family says only what its
surrogate is.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from tether.core.batches import Batch, Outputs, PolicyBatch
from tether.core.metrics import Max, Mean, Metrics, masked_mean
from tether.core.protocols import LossOutput
from tether.losses.average import TokenLoss, as_kind, check_choice, check_range, given, share, where_kept
from tether.losses.kl import KLEstimator, k3, kl_penalty
from tether.losses.value import value_term


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(TokenLoss):
    """L = surrogate + value_weight·value + kl_weight·KL(π || π_ref) − entropy_weight·H(π), per token, then ``average``.

    A term of weight 0 is off and needs nothing. ``value_clip``: see losses/value.py; ``kl_estimator``: see
    ``kl_penalty`` (KL in the loss; KL in the reward is the algorithm's ``kl_in_reward``).

    Metrics: ``policy/ratio``, ``policy/ratio_max`` (π/π_old), ``kl/step`` (k3 of old -> new, nats per token),
    ``policy/entropy`` where it is computed, ``kl/penalty`` (the KL that is penalised, nats per token), and the value
    term's own.
    """

    value_weight: float = 0.0
    value_clip: float | None = None
    kl_weight: float = 0.0
    kl_estimator: KLEstimator = "k3_corrected"
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(value_weight=self.value_weight, kl_weight=self.kl_weight, entropy_weight=self.entropy_weight)
        check_choice("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        if self.value_clip is not None:
            check_range(value_clip=self.value_clip)
            if not self.value_weight:
                raise ValueError("value_clip is not used while value_weight is 0: set value_weight, or leave it out")
        if not self.kl_weight and self.kl_estimator != PolicyLoss.kl_estimator:
            raise ValueError("kl_estimator is not used while kl_weight is 0: set kl_weight, or leave it out")

    @property
    def needs(self) -> frozenset[str]:
        parts = {"critic": self.value_weight, "reference": self.kl_weight, "entropy": self.entropy_weight}
        return frozenset(name for name, weight in parts.items() if weight)

    @abstractmethod
    def surrogate(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The policy's loss per token, and metrics of its own. All [B, T], 0 where ``mask`` is False."""

    def __call__(self, outputs: Outputs, batch: Batch) -> LossOutput:
        batch = as_kind(batch, PolicyBatch, self)
        mask = batch.loss_mask
        # Cleaned before any arithmetic: padded slots may hold anything.
        logprobs = where_kept(given(outputs.logprobs, "outputs.logprobs", self), mask)
        old = where_kept(batch.old_logprobs, mask)
        per_token, metrics = self.surrogate(logprobs, old, where_kept(batch.advantages, mask), mask)
        metrics = {**metrics, **_movement(logprobs, old, mask)}
        if self.value_weight:
            value, described = value_term(self, outputs, batch, self.value_clip)
            per_token = per_token + self.value_weight * value
            metrics |= described
        if self.kl_weight:
            reference = where_kept(given(batch.ref_logprobs, "batch.ref_logprobs", self), mask)
            penalty = kl_penalty(self.kl_estimator, logprobs, old, reference)
            per_token = per_token + self.kl_weight * penalty
            metrics["kl/penalty"] = masked_mean(penalty, mask)
        if outputs.entropy is not None or self.entropy_weight:
            entropy = where_kept(given(outputs.entropy, "outputs.entropy", self), mask)
            per_token = per_token - self.entropy_weight * entropy
            metrics["policy/entropy"] = masked_mean(entropy, mask)
        return LossOutput(loss=Mean(self.total(per_token, mask), self.count(batch)), metrics=metrics)


def _movement(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Metrics:
    """How far the policy has moved from where the update began."""
    logprobs = logprobs.detach()
    ratio = torch.exp(logprobs - old_logprobs)
    metrics: Metrics = {
        "policy/ratio": masked_mean(ratio, mask),
        # Samples are of the old policy, so k3 of (old, new) estimates KL(π_old || π).
        "kl/step": masked_mean(k3(old_logprobs, logprobs), mask),
    }
    if bool(mask.any()):
        metrics["policy/ratio_max"] = Max(float(ratio[mask].max()))
    return metrics


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(PolicyLoss):
    """L = −A_t·log π(y_t | x, y_<t)  (Williams 1992): REINFORCE; with a critic's advantages A2C (Mnih 2016).

    Its gradient is that of the expected return on the first update after a rollout only: one update per rollout.
    """

    def surrogate(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        return -advantages * logprobs, {}


@dataclass(frozen=True, kw_only=True)
class PPOClip(PolicyLoss):
    """L = −min(ρ_t·A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high)·A_t),  ρ_t = π/π_old  (Schulman 2017, eq. 7).

    clip_low ≠ clip_high: the asymmetric clip of DAPO (Yu 2025, section 3.1).
    Metrics beside the family's: ``policy/clip_low``, ``policy/clip_high``: share of tokens whose ratio left the range
    on that side in the direction the advantage pushes, so that they give no gradient.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(clip_low=self.clip_low, high=1.0)
        check_range(clip_high=self.clip_high)

    def surrogate(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        ratio = torch.exp(logprobs - old_logprobs)
        low, high = 1 - self.clip_low, 1 + self.clip_high
        per_token = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        tokens = float(mask.sum())
        return per_token, {
            "policy/clip_low": Mean(share((ratio < low) & (advantages < 0), mask), tokens),
            "policy/clip_high": Mean(share((ratio > high) & (advantages > 0), mask), tokens),
        }
