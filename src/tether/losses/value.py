"""The critic's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.batches import Batch, Outputs, PolicyBatch
from tether.core.metrics import Mean, Metrics, masked_mean
from tether.core.protocols import LossOutput
from tether.losses.average import TokenLoss, as_kind, check_range, given, share, where_kept


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None, mask: Tensor, clip: float | None
) -> tuple[Tensor, Metrics]:
    """½·max[(V − R)², (V_clip − R)²] with V_clip = V_old + clamp(V − V_old, −clip, clip), or ½(V − R)² without a clip
    (Dhariwal 2017, OpenAI baselines). All [B, T] -> [B, T].

    Metrics: ``value/loss`` (mean (V − R)²), ``value/clipped`` (share of values that moved by more than ``clip``).
    """
    error = (values - returns).square()
    metrics: Metrics = {"value/loss": masked_mean(error, mask)}
    if clip is None or old_values is None:
        return 0.5 * error, metrics
    moved = values - old_values
    clipped = (old_values + moved.clamp(-clip, clip) - returns).square()
    metrics["value/clipped"] = Mean(share(moved.abs() > clip, mask), float(mask.sum()))
    return 0.5 * torch.maximum(error, clipped), metrics


def value_term(loss: object, outputs: Outputs, batch: PolicyBatch, clip: float | None) -> tuple[Tensor, Metrics]:
    """``value_loss`` of a batch; ``loss`` is named where a tensor is missing."""
    mask = batch.loss_mask
    values = where_kept(given(outputs.values, "outputs.values (a critic)", loss), mask)
    returns = where_kept(given(batch.returns, "batch.returns", loss), mask)
    old = None if clip is None else where_kept(given(batch.values, "batch.values", loss), mask)
    return value_loss(values, returns, old, mask, clip)


@dataclass(frozen=True, kw_only=True)
class ValueLoss(TokenLoss):
    """The critic by itself, for a critic that is warmed up or trained apart: see ``value_loss`` for the equation.

    ``clip``: how far a value may move from ``batch.values`` and still be pulled on; None: any distance.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None:
            check_range(clip=self.clip)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"critic"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossOutput:
        batch = as_kind(batch, PolicyBatch, self)
        per_token, metrics = value_term(self, outputs, batch, self.clip)
        return LossOutput(loss=Mean(self.total(per_token, batch.loss_mask), self.count(batch)), metrics=metrics)
