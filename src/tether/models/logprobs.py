"""Log-probs of completion tokens from hidden states, block by block: the [B, T, V] tensor is never made.

A block is some rows and a part of the vocabulary. Forward, the parts' log-sum-exps are joined (Milakov 2018); backward,
log Z is known, so every part gives its share of the gradients by itself and that of the weight is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.models.linear import product
from tether.models.native import head

# Bytes of logits that exist at once: few enough to stay in the processor's cache, and in memory that the allocator uses
# again instead of giving it back.
BLOCK_BYTES = 24 * 2**20
# Rows of a block, and the fewest columns: enough for the matrix products to run at their full speed.
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 256
# Bytes of logits that a forward pass may keep for its backward, which otherwise makes them again: a quarter of the
# head's products. Of a vocabulary of 49,152 these are the logits of 1,365 tokens; a longer row has none kept, since
# memory is what most often ends a run.
KEEP_BYTES = 256 * 2**20


class HeadOutputs(NamedTuple):
    """What the language-model head says of K tokens.

    ``logprobs`` [K] and ``entropy`` [K] in nats; ``top_logprobs`` [K, k] and ``top_tokens`` [K, k] int64: the k most
    likely tokens at each position, most likely first; of equally likely ones, any. No gradient goes through these two.
    What was not asked for: zeros, and k = 0.
    """

    logprobs: Tensor
    entropy: Tensor
    top_logprobs: Tensor
    top_tokens: Tensor


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, total)) for at in range(0, total, step))


def _parts(rows: slice, vocabulary: int) -> Iterator[slice]:
    columns = max(BLOCK_COLUMNS, BLOCK_BYTES // (4 * (rows.stop - rows.start)))
    return _slices(vocabulary, columns - columns % BLOCK_COLUMNS)


def _cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """[n, v] logits of a block in float32 or better, divided by the temperature through ``scale``."""
    logits = product(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if low is not None and up is not None:
        logits += torch.nn.functional.linear(low, up)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits if scale == 1 else logits.mul_(scale)


def _inside(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target lies in ``part`` of the vocabulary, and where in it."""
    rows = ((targets >= part.start) & (targets < part.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - part.start


def _with_part(best: tuple[Tensor, Tensor], logits: Tensor, part: slice, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest logits [n, <= top_k] of the parts so far and their tokens -> those with ``part`` among them."""
    values, tokens = logits.topk(min(top_k, logits.shape[1]), dim=-1)
    values, tokens = torch.cat([best[0], values], dim=1), torch.cat([best[1], tokens + part.start], dim=1)
    values, at = values.topk(min(top_k, values.shape[1]), dim=-1)
    return values, tokens.gather(1, at)


def _sums(logits: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """log Z of each row, and where asked the entropy of its softmax: [n, v] -> [n], [n]."""
    if head.serves(logits):
        return head.log_sums(logits, entropy=entropy)
    log_z = logits.logsumexp(dim=-1)
    if not entropy:
        return log_z, None
    log_p = logits - log_z[:, None]
    return log_z, log_p.exp().mul_(log_p).sum(dim=-1).neg_()


def _pulled(logits: Tensor, log_z: Tensor, constant: Tensor, slope: Tensor | None, *, over: bool) -> Tensor:
    """p · (constant + slope · log p), [n, v]; ``over``: in the place of the logits."""
    log_p = logits.sub_(log_z[:, None]) if over else logits - log_z[:, None]
    if slope is None:
        return log_p.exp_().mul_(constant[:, None])
    pull = (log_p * slope[:, None]).add_(constant[:, None])
    return log_p.exp_().mul_(pull)


class _TokenLogProbs(torch.autograd.Function):
    """log p(y), entropy H and the most likely tokens of softmax(scale · cap(h Wᵀ + b + l Uᵀ)); the backward makes the
    logits again, or reads them where they were few enough to be kept."""

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
        top_k: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        chosen = torch.empty(len(hidden), dtype=kind, device=hidden.device)
        log_z, entropy = torch.empty_like(chosen), torch.zeros_like(chosen)
        top_logprobs = chosen.new_empty(len(hidden), top_k)
        top_tokens = torch.empty_like(top_logprobs, dtype=torch.long)
        size = len(hidden) * len(weight) * kind.itemsize
        kept: list[Tensor] | None = [] if any(ctx.needs_input_grad) and size <= KEEP_BYTES else None
        for rows in _slices(len(hidden), BLOCK_ROWS):
            sums, entropies = [], []
            best = top_logprobs[rows, :0], top_tokens[rows, :0]
            for part in _parts(rows, len(weight)):
                logits = _logits(
                    hidden[rows], weight[part], _cut(bias, part), _cut(low, rows), _cut(up, part), scale, softcap
                )
                found, at = _inside(targets[rows], part)
                chosen[rows][found] = logits[found, at]
                log_sum, spread = _sums(logits, entropy=want_entropy)
                sums.append(log_sum)
                entropies += [] if spread is None else [spread]
                if kept is not None:
                    kept.append(logits)
                if top_k:
                    best = _with_part(best, logits, part, top_k)
            by_part = torch.stack(sums)
            log_z[rows] = by_part.logsumexp(dim=0)
            top_logprobs[rows], top_tokens[rows] = best[0] - log_z[rows, None], best[1]
            if want_entropy:
                # Which part, and then which of its tokens: H = Σ P (H of the part - log P).
                log_p = by_part - log_z[rows]
                entropy[rows] = (log_p.exp() * (torch.stack(entropies) - log_p)).sum(dim=0)
        ctx.save_for_backward(hidden, weight, bias, low, up, targets, log_z, entropy)
        ctx.scale, ctx.softcap, ctx.kept = scale, softcap, kept
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(top_logprobs, top_tokens, *(() if want_entropy else (entropy,)))
        return chosen - log_z, entropy, top_logprobs, top_tokens

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, low, up, targets, log_z, entropy = ctx.saved_tensors
        inputs = (hidden, weight, bias, low, up)
        grads = [
            torch.zeros_like(t, dtype=log_z.dtype) if needed else None
            for t, needed in zip(inputs, ctx.needs_input_grad[:5], strict=True)
        ]
        of_hidden, of_weight, of_bias, of_low, of_up = grads
        kept = iter(ctx.kept or ())
        # None: nothing depends on it. Entropy is often looked at only.
        of_logprobs = torch.zeros_like(log_z) if grad_logprobs is None else grad_logprobs
        for rows in _slices(len(hidden), BLOCK_ROWS):
            h, a, toward = hidden[rows], _cut(low, rows), of_logprobs[rows] * ctx.scale
            # d log p(y) / d logits = 1[y] - p ;  dH / d logits = -p (log p + H)
            slope = None if grad_entropy is None else -grad_entropy[rows] * ctx.scale
            constant = -toward if slope is None else slope * entropy[rows] - toward
            for part in _parts(rows, len(weight)):
                w, u = weight[part], _cut(up, part)
                logits = next(kept, None)
                if logits is None:
                    logits = _logits(h, w, _cut(bias, part), a, u, ctx.scale, ctx.softcap)
                found, at = _inside(targets[rows], part)
                bend = None if ctx.softcap is None else 1 - (logits / (ctx.scale * ctx.softcap)) ** 2
                # What was kept is not overwritten: the graph may be run backward a second time.
                given, over = (logits, log_z[rows], constant, slope), not ctx.kept
                turned = None
                if bend is None and h.dtype == torch.float32 and head.serves(logits):
                    grad, turned = head.pulled(*given, over=over)
                    turned[at, found] += toward[found]
                else:
                    grad = _pulled(*given, over=over)
                grad[found, at] += toward[found]
                if bend is not None:
                    grad *= bend
                if of_bias is not None:
                    of_bias[part] += grad.sum(dim=0)
                grad = grad.to(hidden.dtype)
                if of_hidden is not None:
                    of_hidden[rows] += product(grad, w.t())
                if of_weight is not None:
                    of_weight[part] += product(h.t(), grad.t()).t() if turned is None else product(turned, h.t())
                if of_low is not None and u is not None:
                    of_low[rows] += grad.to(u.dtype) @ u
                if of_up is not None and a is not None:
                    of_up[part] += grad.t().to(a.dtype) @ a
        made = (None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))
        return (*made, None, None, None, None, None)


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
    top_k: int | None = None,
) -> HeadOutputs:
    """log p(targets | hidden) under softmax(logit_scale · hidden Wᵀ / temperature), its entropy, and its ``top_k``
    most likely tokens.

    ``hidden`` [K, d]; ``weight`` [V, d]; ``targets`` [K] -> nats in float32 (float64 of a float64 model). ``low_rank``:
    l [K, r] and U [V, r] of an adapter on the head, which adds l Uᵀ to the logits. Raises ValueError where ``top_k`` is
    not from 1 to V.
    """
    if top_k is not None and not 1 <= top_k <= len(weight):
        raise ValueError(f"top_k is {top_k}: give 1 to {len(weight)} (the whole vocabulary), or None for no such list")
    low, up = low_rank or (None, None)
    # Scale and soft cap don't commute; but families that cap (Gemma) don't scale, and those that scale don't cap.
    scale = logit_scale / temperature
    made = _TokenLogProbs.apply(hidden, weight, bias, low, up, targets, scale, softcap, entropy, top_k or 0)
    return HeadOutputs(*made)  # type: ignore[misc]
