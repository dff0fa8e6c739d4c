"""Log-probs of completion tokens from hidden states, in chunks: the [B, T, V] tensor is never made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tether.models.linear import product

# Bytes of logits that exist at once in a chunk, forward or backward.
CHUNK_BYTES = 96 * 2**20


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """[n, V] logits of a chunk in float32 or better, divided by the temperature through ``scale``."""
    logits = product(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if low is not None and up is not None:
        logits += torch.nn.functional.linear(low, up)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits * scale


class _TokenLogProbs(torch.autograd.Function):
    """log p(y) and entropy H of softmax(scale · cap(h Wᵀ + b + l Uᵀ)), logits recomputed chunk by chunk in the
    backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        logprobs = torch.empty(rows, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        log_z = torch.empty_like(logprobs)
        entropy = torch.zeros_like(logprobs)
        for part in _chunks(rows, weight.shape[0]):
            logits = _logits(hidden[part], weight, bias, None if low is None else low[part], up, scale, softcap)
            log_z[part] = logits.logsumexp(dim=-1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - log_z[part]
            if want_entropy:
                # H = log Z - E[logit]
                probs = (logits - log_z[part, None]).exp_()
                entropy[part] = log_z[part] - probs.mul_(logits).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, low, up, targets, log_z, entropy)
        ctx.scale, ctx.softcap, ctx.want_entropy = scale, softcap, want_entropy
        if not want_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, low, up, targets, log_z, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias, need_low, need_up = ctx.needs_input_grad[:5]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=log_z.dtype) if need_bias else None
        grad_low = torch.empty_like(low) if need_low else None
        grad_up = torch.zeros_like(up, dtype=log_z.dtype) if need_up else None
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits = _logits(hidden[part], weight, bias, None if low is None else low[part], up, ctx.scale, ctx.softcap)
            log_p = logits - log_z[part, None]
            probs = log_p.exp()
            # d log p(y) / d logits = 1[y] - p ;  dH / d logits = -p (log p + H)
            grad = probs * -grad_logprobs[part, None]
            if ctx.want_entropy:
                grad -= probs * (log_p + entropy[part, None]) * grad_entropy[part, None]
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            grad *= ctx.scale
            if ctx.softcap is not None:
                grad *= 1 - (logits / (ctx.scale * ctx.softcap)) ** 2
            if grad_low is not None:
                grad_low[part] = grad.to(up.dtype) @ up
            if grad_up is not None and low is not None:
                grad_up += grad.T.to(low.dtype) @ low[part]
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(grad, weight.t())
            if grad_weight is not None:
                grad_weight += product(grad.t(), hidden[part].t())
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            grad_low,
            None if grad_up is None else grad_up.to(up.dtype),
            None,
            None,
            None,
            None,
        )


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(targets | hidden) under softmax(logit_scale · hidden Wᵀ / temperature), and its entropy.

    ``hidden`` [K, d]; ``weight`` [V, d]; ``targets`` [K] -> ([K], [K]) nats, float32 (float64 of a
    float64 model). Entropies are zeros where they were not asked for. ``low_rank``: l [K, r] and U [V, r] of an adapter
    on the head, which adds l Uᵀ to the logits.
    """
    low, up = low_rank or (None, None)
    # Scale and soft cap don't commute; but families that cap (Gemma) don't scale, and those that scale don't cap.
    scale = logit_scale / temperature
    return _TokenLogProbs.apply(hidden, weight, bias, low, up, targets, scale, softcap, entropy)  # type: ignore[return-value]
