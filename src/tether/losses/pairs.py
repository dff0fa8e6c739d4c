"""What losses on pairs share: row 2i is chosen, row 2i+1 rejected."""

from __future__ import annotations

from torch import Tensor

from tether.core.batches import Batch
from tether.core.metrics import Mean


def sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[B, ...] -> chosen [B/2, ...], rejected [B/2, ...]."""
    if len(rows) % 2:
        raise ValueError(f"pairs need an even number of rows (chosen, rejected, chosen, ...), got {len(rows)}")
    return rows[0::2], rows[1::2]


def pair_count(batch: Batch) -> float:
    return batch.size / 2


def mean(values: Tensor) -> Mean:
    """A metric: the mean over [N]."""
    return Mean(values.detach().sum(), len(values))
