"""Reward models: what makes the scores of a pair differ as people said they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.nn.functional import logsigmoid

from tether.core.batches import Batch, Outputs, PreferenceBatch
from tether.core.metrics import Mean
from tether.core.protocols import LossOutput
from tether.losses.average import as_kind, check_choice, check_range, given
from tether.losses.pairs import mean, pair_count, sides


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """L = −log σ(r_w − r_l − m) + c·(r_w + r_l)², averaged over pairs (Bradley & Terry 1952; Ouyang 2022, eq. 1).

    Reads ``outputs.scores`` [B]. m: ``batch.margin`` [B/2] where the pairs carry one and ``margin`` is "use"
    (Touvron 2023, eq. 2), else 0. c: ``center``, which pins the mean score to 0 (Eisenstein 2023): differences
    alone leave it free.

    Metrics: ``accuracy`` (share of pairs with r_w > r_l; ties are wrong), ``margin`` (mean r_w − r_l),
    ``scores/chosen``, ``scores/rejected``.
    """

    center: float = 0.0
    margin: Literal["use", "ignore"] = "use"

    def __post_init__(self) -> None:
        check_range(center=self.center)
        check_choice("margin", self.margin, ("use", "ignore"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def count(self, batch: Batch) -> float:
        return pair_count(batch)

    def __call__(self, outputs: Outputs, batch: Batch) -> LossOutput:
        batch = as_kind(batch, PreferenceBatch, self)
        chosen, rejected = sides(given(outputs.scores, "outputs.scores", self))
        difference = chosen - rejected
        wanted = batch.margin if batch.margin is not None and self.margin == "use" else 0.0
        # No overflow at either end, and exact past 20, where softplus becomes linear.
        per_pair = -logsigmoid(difference - wanted)
        if self.center:
            per_pair = per_pair + self.center * (chosen + rejected).square()
        return LossOutput(
            loss=Mean(per_pair.sum(), self.count(batch)),
            metrics={
                "accuracy": mean((difference > 0).float()),
                "margin": mean(difference),
                "scores/chosen": mean(chosen),
                "scores/rejected": mean(rejected),
            },
        )
