"""Attention of a packed row and its gradient by ``attention.cpp``, on a CPU; in float32, also of bfloat16.

Blocks are those of ``PackedLayout``: per prompt, its length and the lengths of its completions. Of a row only q, k, v,
the output and one number per query and head are kept for the backward (Dao 2022, algorithm 4).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from tether.models.native import build

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_TYPES = (torch.float32, torch.bfloat16)
Blocks = tuple[tuple[int, tuple[int, ...]], ...]


class _Heads(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("by_head", _INT), ("by_token", _INT))


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "out", "grad", "of_q", "of_k", "of_v")),
        *((name, _POINTER) for name in ("log_sum", "queries", "group")),
        *((name, _INT) for name in ("groups", "heads", "shared", "depth", "tokens", "threads")),
        ("scale", ctypes.c_float),
    )


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these: q [1, H, N, D]; k, v [1, H_kv, N, D]."""
    plain = all(t.dtype in _TYPES and t.device.type == "cpu" and t.stride(3) == 1 for t in (q, k, v))
    return plain and q.shape[3] % build.LANES == 0 and q.shape[3] == v.shape[3] and build.library() is not None


@functools.lru_cache(maxsize=64)
def _plan(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """[C, 5]: start of a causal piece, first of up to 16 queries in it, how many, the prompt that they see all of, its
    length; and where each group's begin in it [G + 1]. A prompt and its only completion are one causal piece."""
    queries: list[tuple[int, int, int, int, int]] = []
    group = [0]
    at = 0
    for prompt, completions in blocks:
        if len(completions) == 1:
            prompt, completions = prompt + completions[0], ()
        start = at
        for i, length in enumerate((prompt, *completions)):
            seen = prompt if i else 0
            for first in range(start, start + length, build.LANES):
                queries.append((start, first, min(build.LANES, start + length - first), at, seen))
            start += length
        at = start
        group.append(len(queries))
    return torch.tensor(queries, dtype=torch.long).view(-1, 5), torch.tensor(group)


def _heads(t: Tensor) -> _Heads:
    return _Heads(t.data_ptr(), t.stride(1), t.stride(2))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, blocks: Blocks, scale: float
) -> _Attention:
    queries, group = _plan(blocks)
    return _Attention(
        q=_heads(q),
        k=_heads(k),
        v=_heads(v),
        out=_heads(out),
        log_sum=log_sum.data_ptr(),
        queries=queries.data_ptr(),
        group=group.data_ptr(),
        groups=len(blocks),
        heads=q.shape[1],
        shared=k.shape[1],
        depth=q.shape[3],
        tokens=q.shape[2],
        threads=torch.get_num_threads(),
        scale=scale,
    )


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over what each token of a packed row sees, and the log-sum-exp of its scores [H, N]."""
    out = _by_token(q)
    log_sum = q.new_empty(q.shape[1:3])
    _kernels().tether_attention(ctypes.byref(_attention(q, k, v, out, log_sum, blocks, scale)))
    return out, log_sum


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from that of ``out``."""
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    of_q, of_k, of_v = _by_token(q), _by_token(k).zero_(), _by_token(v).zero_()
    given = _attention(q, k, v, out, log_sum, blocks, scale)
    given.grad, given.of_q, given.of_k, given.of_v = map(_heads, (grad, of_q, of_k, of_v))
    _kernels().tether_attention_backward(ctypes.byref(given))
    return of_q, of_k, of_v


class _Attend(torch.autograd.Function):
    """``forward`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:  # type: ignore[override]
        out, log_sum = forward(q, k, v, blocks, scale)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, log_sum = ctx.saved_tensors
        return *backward(grad, q, k, v, out, log_sum, ctx.blocks, ctx.scale), None, None


def _by_token(like: Tensor) -> Tensor:
    """[1, H, N, D] with tokens before heads in memory: what comes before and after has [N, H · D]."""
    return like.new_empty(1, like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)


def _kernels() -> ctypes.CDLL:
    kernels = build.library()
    assert kernels is not None, "serves() was not asked"
    return kernels


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """q [1, H, N, D]; k, v [1, H_kv, N, D] -> [1, H, N, D], of what ``serves`` takes."""
    return _Attend.apply(q.float(), k.float(), v.float(), blocks, scale).to(q.dtype)  # type: ignore[return-value]
