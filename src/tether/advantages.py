"""rewards -> advantages: pure, one frozen object per estimator.

Every estimator takes rewards [B, T] (the score on the last token, KL penalties already in), mask [B, T] (tokens the
policy chose), groups [B] (which rows share a prompt), values [B, T] where there is a critic, and bootstrap [B], the
value after the last token: 0 where the completion ended, V where it was cut. Slots outside the mask give 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """(A - mean) / std over all tokens that count; the mean is subtracted, always."""
    counted = advantages[mask]
    if len(counted) < 2:
        return advantages
    centred = torch.where(mask, advantages - counted.mean(), 0.0)
    return centred / (counted.std() + 1e-8)


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float, bootstrap: Tensor | None = None) -> Tensor:
    """G_t = Σ_k γ^(k - t) r_k over the masked tokens, plus γ^(...) · bootstrap. [B, T]."""
    return _gae(rewards, mask, torch.zeros_like(rewards), gamma, 1.0, bootstrap)


def _gae(
    rewards: Tensor, mask: Tensor, values: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> Tensor:
    """Backward recursion; a token outside the mask (tool output, padding) hands everything through unchanged, and a
    reward on it is carried to the token of the policy before it."""
    rewards, values = torch.nan_to_num(rewards), torch.nan_to_num(values)
    out = torch.zeros_like(rewards)
    ahead = torch.zeros_like(rewards[:, 0])
    value_ahead = torch.zeros_like(ahead) if bootstrap is None else bootstrap.to(rewards)
    carried = torch.zeros_like(ahead)
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + carried + gamma * value_ahead - values[:, t]
        advantage = delta + gamma * lam * ahead
        out[:, t] = torch.where(counts, advantage, 0.0)
        ahead = torch.where(counts, advantage, ahead)
        value_ahead = torch.where(counts, values[:, t], value_ahead)
        carried = torch.where(counts, 0.0, carried + rewards[:, t])
    return out


def sequence_returns(rewards: Tensor) -> Tensor:
    """[B]: everything a completion earned."""
    return torch.nan_to_num(rewards).sum(dim=1)


def _group_sums(returns: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: its group's sum, its group's size, and the group's index."""
    _, index = torch.unique(groups, return_inverse=True)
    size = torch.zeros(int(index.max()) + 1, dtype=returns.dtype, device=returns.device)
    total = size.clone().index_add_(0, index, returns)
    size = size.index_add_(0, index, torch.ones_like(returns))
    return total[index], size[index], index


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """What the estimators share. ``whiten``: normalise over the whole batch at the end."""

    whiten: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def raw(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, values: Tensor | None, bootstrap: Tensor | None
    ) -> Tensor:
        """[B, T] before whitening."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def __call__(
        self,
        rewards: Tensor,
        mask: Tensor,
        groups: Tensor,
        values: Tensor | None = None,
        bootstrap: Tensor | None = None,
    ) -> Tensor:
        advantages = torch.where(mask, self.raw(rewards, mask, groups, values, bootstrap), 0.0)
        return whiten(advantages, mask) if self.whiten else advantages

    def returns(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, values: Tensor, bootstrap: Tensor | None = None
    ) -> Tensor:
        """The critic's targets A_t + V_t, from advantages that are not whitened. [B, T]."""
        raw = self.raw(rewards, mask, groups, values, bootstrap)
        return torch.where(mask, raw + torch.nan_to_num(values), 0.0)


@dataclass(frozen=True, kw_only=True)
class RewardsToGo(Estimator):
    """A_t = Σ_{k ≥ t} γ^(k-t) r_k (Williams 1992): no baseline."""

    gamma: float = 1.0

    def raw(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, values: Tensor | None, bootstrap: Tensor | None
    ) -> Tensor:
        return rewards_to_go(rewards, mask, self.gamma, bootstrap)


@dataclass(frozen=True, kw_only=True)
class BatchMean(Estimator):
    """A_t = G_t - b, b the mean return of the *other* rows of the batch: unbiased, because b does not depend on the
    row it is taken from. A batch of one has no baseline."""

    gamma: float = 1.0

    def raw(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, values: Tensor | None, bootstrap: Tensor | None
    ) -> Tensor:
        returns = sequence_returns(rewards)
        rows = len(returns)
        baseline = (returns.sum() - returns) / (rows - 1) if rows > 1 else torch.zeros_like(returns)
        return rewards_to_go(rewards, mask, self.gamma, bootstrap) - baseline[:, None]


@dataclass(frozen=True, kw_only=True)
class GAE(Estimator):
    """δ_t = r_t + γ V_{t+1} - V_t; Â_t = δ_t + γ λ Â_{t+1} (Schulman 2016, eq. 16). λ = 1: return minus V; λ = 0: the
    TD residual. V after the last token is ``bootstrap`` (0 where none is given)."""

    gamma: float = 1.0
    lam: float = 0.95

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"critic"})

    def raw(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, values: Tensor | None, bootstrap: Tensor | None
    ) -> Tensor:
        if values is None:
            raise ValueError("GAE needs a critic's values")
        return _gae(rewards, mask, values, self.gamma, self.lam, bootstrap)


@dataclass(frozen=True, kw_only=True)
class RLOO(Estimator):
    """A_i = r_i - mean of the other r_j of its group = K / (K - 1) · (r_i - mean) (Kool 2019; Ahmadian 2024, eq. 6).
    A group of one has no baseline to leave out, and gets 0."""

    def raw(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, values: Tensor | None, bootstrap: Tensor | None
    ) -> Tensor:
        returns = sequence_returns(rewards)
        total, size, _ = _group_sums(returns, groups)
        advantage = torch.where(size > 1, returns - (total - returns) / (size - 1).clamp(min=1), 0.0)
        return advantage[:, None].expand(mask.shape)


@dataclass(frozen=True, kw_only=True)
class GroupNormalised(Estimator):
    """A_i = (r_i - mean) / (std + ε) over its group (GRPO; Shao 2024, §4.1.2); std with Bessel's correction.

    ``divide_by_std=False`` leaves the std out (Dr. GRPO; Liu 2025), which makes the gradient unbiased up to the factor
    (K - 1) / K. A group whose rewards are all equal, or of one, gets 0.
    """

    divide_by_std: bool = True
    epsilon: float = 1e-4

    def raw(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, values: Tensor | None, bootstrap: Tensor | None
    ) -> Tensor:
        returns = sequence_returns(rewards)
        total, size, index = _group_sums(returns, groups)
        centred = returns - total / size
        if self.divide_by_std:
            squares = torch.zeros(int(index.max()) + 1, dtype=returns.dtype, device=returns.device)
            squares = squares.index_add_(0, index, centred**2)[index]
            std = (squares / (size - 1).clamp(min=1)).sqrt()
            # Equal rewards may differ by rounding of their mean; that is no signal to be divided by itself.
            equal = std <= 1e-6 * returns.abs().clamp(min=1e-30)
            centred = torch.where(equal, 0.0, centred / (std + self.epsilon))
        return centred[:, None].expand(mask.shape)


ADVANTAGES = {
    "rewards_to_go": RewardsToGo,
    "batch_mean": BatchMean,
    "gae": GAE,
    "rloo": RLOO,
    "group_normalised": GroupNormalised,
}
