"""Directly from preferences: the DPO family.

``PairLoss`` gathers the per-side sums and reports; a member of the family says what a pair costs (``per_pair``) and
which reward it implies (``implied_rewards``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from tether.core.batches import Batch, Outputs, PreferenceBatch
from tether.core.metrics import Mean
from tether.core.protocols import LossOutput
from tether.losses.average import as_kind, check_range, given, where_kept
from tether.losses.pairs import mean, pair_count, sides


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of N pairs; sums run over loss tokens, each [N].

    ``logps``: log π(y|x); ``log_ratios``: log π(y|x) − log π_ref(y|x), equal to ``logps`` without a reference;
    ``lengths``: number of loss tokens.
    """

    logps: Tensor
    log_ratios: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class PairLoss(ABC):
    """Base of losses on pairs, averaged over pairs. Reads ``outputs.logprobs`` and ``batch.ref_logprobs`` [B, T].

    Metrics: ``rewards/chosen``, ``rewards/rejected`` (the implied rewards), ``rewards/margins`` (their difference),
    ``rewards/accuracies`` (share of pairs with a positive one; ties are wrong), ``logps/chosen``, ``logps/rejected``
    (log-probs summed over loss tokens, in nats).
    """

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]: ...

    @abstractmethod
    def implied_rewards(self, side: Side) -> Tensor:
        """[N] rewards that the policy implies for one side."""

    @abstractmethod
    def per_pair(self, chosen: Side, rejected: Side) -> Tensor:
        """[N] loss of each pair."""

    def count(self, batch: Batch) -> float:
        return pair_count(batch)

    def __call__(self, outputs: Outputs, batch: Batch) -> LossOutput:
        batch = as_kind(batch, PreferenceBatch, self)
        chosen, rejected = self._sides(outputs, batch)
        reward_w, reward_l = self.implied_rewards(chosen), self.implied_rewards(rejected)
        return LossOutput(
            loss=Mean(self.per_pair(chosen, rejected).sum(), self.count(batch)),
            metrics={
                "rewards/chosen": mean(reward_w),
                "rewards/rejected": mean(reward_l),
                "rewards/margins": mean(reward_w - reward_l),
                "rewards/accuracies": mean((reward_w > reward_l).float()),
                "logps/chosen": mean(chosen.logps),
                "logps/rejected": mean(rejected.logps),
            },
        )

    def _sides(self, outputs: Outputs, batch: PreferenceBatch) -> tuple[Side, Side]:
        mask = batch.loss_mask
        logprobs = where_kept(given(outputs.logprobs, "outputs.logprobs", self), mask)
        log_ratios = logprobs
        if "reference" in self.needs:
            # Token by token before the sum: exactly 0 where policy and reference agree.
            log_ratios = logprobs - where_kept(given(batch.ref_logprobs, "batch.ref_logprobs", self), mask)
        columns = [sides(column.sum(1)) for column in (logprobs, log_ratios, mask)]
        chosen, rejected = (Side(logps=a, log_ratios=b, lengths=c) for a, b, c in zip(*columns, strict=True))
        return chosen, rejected


@dataclass(frozen=True, kw_only=True)
class DPO(PairLoss):
    """L = −(1−ε)·log σ(βh) − ε·log σ(−βh),  h = [log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)].

    ε = 0: DPO (Rafailov 2023, eq. 7). ε > 0: ``label_smoothing``, conservative DPO (cDPO; Mitchell 2023): a share ε of
    the labels is taken to be flipped. It is not robust DPO, which divides by 1 − 2ε and subtracts the second term.
    ``beta``: the KL-regularised problem's temperature; larger holds closer to the reference. ``reference_free``: π_ref
    is taken as uniform, so h is the plain difference of log-probs.
    Implied reward: β·(log π − log π_ref).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False

    def __post_init__(self) -> None:
        check_range(beta=self.beta)
        if self.beta == 0:
            raise ValueError("beta must be > 0: with 0 no pair costs more than another")
        check_range(label_smoothing=self.label_smoothing, high=0.5)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.reference_free else frozenset({"reference"})

    def implied_rewards(self, side: Side) -> Tensor:
        return self.beta * side.log_ratios

    def per_pair(self, chosen: Side, rejected: Side) -> Tensor:
        logit = self.beta * (chosen.log_ratios - rejected.log_ratios)
        loss = -logsigmoid(logit)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * logsigmoid(-logit)
        return loss
