"""The one attention function that every model of ours runs: a layout, passed along, decides who sees whom.

transformers lets a program register an attention function under a name. Ours takes the q, k, v of one packed row and
hands them to the ``Layout`` that came with the model call (``tether_layout=``); without one it is plain
scaled-dot-product attention. So the prompt is computed once for all its completions, nothing is padded, and no model
code is touched.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tether"


class Layout(Protocol):
    """Who sees whom in one packed row. q: [1, H, N, D]; k, v: [1, H_kv, N, D] -> [1, H, N, D]."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor: ...


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> Tensor:
    """Attention of one block. q: [b, H, n, D]; k, v: [b, H_kv, m, D]; ``allowed``: bool, broadcastable to [b, 1, n, m].

    Query heads that share a key head are served through grouped attention; a soft cap (Gemma 2) needs the scores in
    the open and takes the explicit path.
    """
    if softcap is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap)) * softcap
    if causal:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


def flash_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's fused attention for CPUs, which gives the log-sum-exp of the scores too, takes these."""
    return (
        q.device.type == "cpu"
        and q.shape[-1] == v.shape[-1]
        and q.dtype == k.dtype == v.dtype
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def join(out: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> Tensor:
    """Attention over both of two parts of the keys, from that over each (Milakov 2018)."""
    weight = torch.sigmoid(other_log_sum - log_sum)[..., None]
    return torch.lerp(out, other, weight.to(out.dtype))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tether_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if tether_layout is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out, None
    # Rotation is computed in float32; under autocast what it turned is rounded as the values are.
    query, key = query.to(value.dtype), key.to(value.dtype)
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    if getattr(module, "is_sliding", None) is False:
        window = None
    out = tether_layout.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=kwargs.get("softcap"),
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
