"""Several heads of one reward model, trained together: any loss on scores, once for each head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tether.core.batches import Batch, Outputs
from tether.core.metrics import Mean, Metrics, Spread
from tether.core.protocols import Loss, LossOutput
from tether.losses.average import given
from tether.losses.pairs import mean


@dataclass(frozen=True, kw_only=True)
class MultiHead:
    """L = (1/K) Σ_k Σ_g n_kg ℓ_g(r_k) / G: the mean over K heads of ``loss``, each on its own scores r_k.

    g of G are what ``loss`` averages over (pairs, rankings); ℓ_g is its part of the sum. n_kg: how often head k's draw
    of the data holds g (``batch.draws``: the bootstrapped heads of Osband 2016), 1 where nothing is drawn. G counts
    each once whatever the draws: over the whole data Σ_g n_kg is its size, and n_kg is 1 on average.

    Reads ``outputs.head_scores`` [B, K]. Metrics: those of ``loss`` on the mean of the heads, each row once;
    ``heads/accuracy_spread`` (largest less smallest accuracy of a head); ``heads/disagreement`` (mean over completions
    of the standard deviation over the heads, population, of the score less the head's mean score in the pair or
    ranking: what a head adds to all its scores says nothing).
    """

    loss: Loss

    @property
    def needs(self) -> frozenset[str]:
        return self.loss.needs

    def count(self, batch: Batch) -> float:
        return self.loss.count(batch)

    def __call__(self, outputs: Outputs, batch: Batch) -> LossOutput:
        scores = given(outputs.head_scores, "outputs.head_scores", self)
        heads = [replace(outputs, scores=one) for one in scores.unbind(1)]
        each = [self.loss(head, batch) for head in heads]
        if batch.draws is None:
            costs = [torch.as_tensor(one.loss.total) for one in each]
        elif batch.draws.shape[1] != len(heads):
            raise ValueError(f"batch.draws is of {batch.draws.shape[1]} heads, and outputs.head_scores of {len(heads)}")
        else:
            costs = [self._drawn(head, batch, n) for head, n in zip(heads, batch.draws.unbind(1), strict=True)]
        together = self.loss(replace(outputs, scores=scores.detach().mean(1)), batch).metrics
        return LossOutput(
            loss=Mean(torch.stack(costs).mean(), self.count(batch)),
            metrics={**together, **_spread([one.metrics for one in each]), "heads/disagreement": _apart(scores, batch)},
        )

    def _drawn(self, outputs: Outputs, batch: Batch, times: Tensor) -> Tensor:
        """Σ_g n_g ℓ_g of one head; ``times`` [B]: n_g of each row. The loss is a sum, so what is drawn equally often is
        one call."""
        assert outputs.scores is not None
        total = outputs.scores[:0].sum()  # 0, with a gradient to follow, where nothing is drawn
        for n in times.unique().tolist():
            if n:
                rows = (times == n).nonzero().flatten()
                part = batch.select(rows)
                total = total + n * torch.as_tensor(self.loss(_rows(outputs, rows, part), part).loss.total)
        return total


def _rows(outputs: Outputs, rows: Tensor, part: Batch) -> Outputs:
    """What ``outputs`` says of ``part``, which is these rows of its batch."""
    assert outputs.scores is not None
    logprobs = outputs.logprobs
    return Outputs(
        scores=outputs.scores[rows], logprobs=None if logprobs is None else logprobs[rows, : part.tokens.shape[1]]
    )


def _spread(metrics: list[Metrics]) -> Metrics:
    found = tuple(m for one in metrics if isinstance(m := one.get("accuracy"), Mean))
    return {"heads/accuracy_spread": Spread(found)} if found else {}


@torch.no_grad()
def _apart(scores: Tensor, batch: Batch) -> Mean:
    """σ over the heads of [B, K] scores, each less its head's mean over the rows of its unit; the mean over rows."""
    _, unit, sizes = torch.unique(batch.unit_of.to(scores.device), return_inverse=True, return_counts=True)
    sums = scores.new_zeros(len(sizes), scores.shape[1]).index_add(0, unit, scores)
    centred = scores - (sums / sizes[:, None])[unit]
    return mean(centred.std(dim=1, correction=0))
