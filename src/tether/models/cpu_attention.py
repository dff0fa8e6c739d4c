"""Attention of one block of queries to one block of keys on a CPU, and its gradient: two ways, one result. Both are
for what the compiled kernels do not take (``native/attention.py``).

PyTorch's fused kernel holds no scores, and is the faster one in float32. In bfloat16 it takes three times as long as
batched products by oneDNN with the scores in the open, which are used while there are few enough of them.

q, ``grad``, ``out``: [1, H, n, D]; k, v: [1, H_kv, m, D]; ``log_sum``: [1, H, n], the log-sum-exp of the scores
scale · q kᵀ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tether.models.linear import serves

# Bytes of the scores of a block that may stand in memory at once.
SCORE_BYTES = 32 * 2**20


def _open(q: Tensor, k: Tensor) -> bool:
    """Whether the scores are computed in the open."""
    return q.dtype == torch.bfloat16 and serves(q, k) and 4 * q.shape[1] * q.shape[2] * k.shape[2] <= SCORE_BYTES


def _by_key_head(t: Tensor, shared: int) -> Tensor:
    """[1, H, n, D] -> [H_kv, n · H / H_kv, D]: the query heads that share a key head are rows of one product."""
    return t.reshape(shared, -1, t.shape[3])


def _per_head(scores: Tensor, n: int) -> Tensor:
    """[H_kv, n · H / H_kv, m] -> [H_kv, H / H_kv, n, m], the same memory."""
    return scores.view(scores.shape[0], -1, n, scores.shape[2])


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, and ``log_sum``. ``causal``: n = m, and a query sees no later key."""
    if not _open(q, k):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    n = q.shape[2]
    scores = torch.bmm(_by_key_head(q, k.shape[1]) * scale, k[0].mT).float()
    if causal:
        _per_head(scores, n).add_(torch.full((n, n), float("-inf")).triu_(1))
    weights = scores.softmax(dim=-1)
    # At the largest score s the weight is exp(s - log Z).
    log_sum = scores.amax(dim=-1).sub_(weights.amax(dim=-1).log_())
    out = torch.bmm(weights.to(v.dtype), v[0])
    return out.view(1, -1, n, out.shape[2]), log_sum.view(1, -1, n)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of the gradients of q, k and v. ``out`` and ``log_sum`` may be those of more keys than the
    block's (Dao 2022, algorithm 4)."""
    way: Callable[..., tuple[Tensor, Tensor, Tensor]] = _open_backward if _open(q, k) else _fused_backward
    return way(grad, q, k, v, out, log_sum, causal, scale)


def _open_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = exp(s - log Z): dv = pᵀ g, ds = p (g vᵀ - Σ g o), dq = scale · ds k, dk = scale · dsᵀ q."""
    n, shared = q.shape[2], k.shape[1]
    rows, pull = _by_key_head(q, shared) * scale, _by_key_head(grad, shared)
    pulled = (grad * out).sum(dim=-1, dtype=torch.float32).reshape(shared, -1, 1)
    weights = torch.bmm(rows, k[0].mT).float().sub_(log_sum.reshape(shared, -1, 1)).exp_()
    if causal:
        _per_head(weights, n).tril_()
    of_v = torch.bmm(weights.to(v.dtype).mT, pull)
    of_scores = torch.bmm(pull, v[0].mT).float().sub_(pulled).mul_(weights).to(q.dtype)
    of_q = torch.bmm(of_scores, k[0]).mul_(scale)
    of_k = torch.bmm(of_scores.mT, rows)
    return of_q.view(1, -1, n, of_q.shape[2]), of_k[None], of_v[None]


def _fused_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    shared = k.shape[1]
    repeat = q.shape[1] // shared

    def apart(t: Tensor) -> Tensor:
        """[1, H, ...] -> [H / H_kv, H_kv, ...]: query heads that share a key head as a batch, which the kernel spreads
        over more threads than one piece of work for each key head."""
        return t.unflatten(1, (shared, repeat))[0].transpose(0, 1)

    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        apart(grad),
        apart(q),
        k.expand(repeat, -1, -1, -1),
        v.expand(repeat, -1, -1, -1),
        apart(out),
        apart(log_sum),
        0.0,
        causal,
        scale=scale,
    )
    return dq.transpose(0, 1).flatten(0, 1)[None], dk.sum(0, keepdim=True), dv.sum(0, keepdim=True)
