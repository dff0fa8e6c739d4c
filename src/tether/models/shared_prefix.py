"""Attention of a packed row on a CPU, with its gradient: the prompt's keys are read once for all its completions.

A completion attends to its prompt and, causally, to itself; the two parts are joined by the log-sum-exps of their
scores (Milakov 2018). The backward needs the joined output and log-sum-exp alone: with them, each part's share of the
gradient is that of plain fused attention (Dao 2022, algorithm 4). So nothing is padded or repeated, and of a row only
q, k, v, the output and one number per query and head are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tether.models import cpu_attention
from tether.models.attention import join
from tether.models.native import attention as native
from tether.models.native.attention import Blocks


def _spans(blocks: Blocks) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Per prompt: where it stands in the row, where its completions do, and where each does. A prompt and its only
    completion are one causal piece."""
    at = 0
    for prompt, completions in blocks:
        if len(completions) == 1:
            prompt, completions = prompt + completions[0], ()
        end = at + prompt
        each = []
        for length in completions:
            each.append(slice(end, end + length))
            end += length
        yield slice(at, at + prompt), slice(at + prompt, end), each
        at = end


class _SharedPrefix(torch.autograd.Function):
    """softmax(scale · q kᵀ) v over what each token of a packed row sees."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:  # type: ignore[override]
        # Tokens before heads in memory: what follows reads [N, H · D].
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        log_sum = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for prompt, completions, each in _spans(blocks):
            kp, vp = k[:, :, prompt], v[:, :, prompt]
            out[:, :, prompt], log_sum[:, :, prompt] = cpu_attention.forward(q[:, :, prompt], kp, vp, True, scale)
            if not each:
                continue
            seen, seen_sum = cpu_attention.forward(q[:, :, completions], kp, vp, False, scale)
            start = completions.start
            for piece in each:
                own, own_sum = cpu_attention.forward(q[:, :, piece], k[:, :, piece], v[:, :, piece], True, scale)
                there = slice(piece.start - start, piece.stop - start)
                out[:, :, piece] = join(own, own_sum, seen[:, :, there], seen_sum[:, :, there])
                log_sum[:, :, piece] = torch.logaddexp(own_sum, seen_sum[:, :, there])
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, log_sum = ctx.saved_tensors
        of_q, of_k, of_v = (torch.empty_like(t) for t in (q, k, v))

        def part(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            return cpu_attention.backward(
                grad[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                log_sum[:, :, queries],
                causal,
                ctx.scale,
            )

        for prompt, completions, each in _spans(ctx.blocks):
            of_q[:, :, prompt], of_k[:, :, prompt], of_v[:, :, prompt] = part(prompt, prompt, True)
            for piece in each:
                of_q[:, :, piece], of_k[:, :, piece], of_v[:, :, piece] = part(piece, piece, True)
            if each:
                dq, dk, dv = part(completions, prompt, False)
                of_q[:, :, completions] += dq
                of_k[:, :, prompt] += dk
                of_v[:, :, prompt] += dv
        return of_q, of_k, of_v, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """q [1, H, N, D]; k, v [1, H_kv, N, D] -> [1, H, N, D]. ``blocks``: as ``PackedLayout`` has them."""
    if native.serves(q, k, v):
        return native.attend(q, k, v, blocks, scale)
    return _SharedPrefix.apply(q, k, v, blocks, scale)  # type: ignore[return-value]
