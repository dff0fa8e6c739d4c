"""The softmax over a block of logits and its gradient by ``head.cpp``, on a CPU in float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tether.models.native import build

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


def serves(logits: Tensor) -> bool:
    """Whether the kernels take a block [n, v] of logits."""
    plain = logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous()
    return plain and logits.shape[1] % build.LANES == 0 and logits.numel() > 0 and build.library() is not None


def _call(name: str, *tensors: Tensor | None) -> None:
    kernels = build.library()
    assert kernels is not None and tensors[0] is not None, "serves() was not asked"
    sizes = (*tensors[0].shape, torch.get_num_threads())
    pointers = (_POINTER(None if t is None else t.data_ptr()) for t in tensors)
    getattr(kernels, name)(*pointers, *map(_INT, sizes))


def log_sums(logits: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """log Z = log Σ exp of each row, and where asked the entropy of its softmax: [n, v] -> [n], [n]."""
    log_z = logits.new_empty(len(logits))
    entropies = torch.empty_like(log_z) if entropy else None
    _call("tether_log_sums", logits, log_z, entropies)
    return log_z, entropies


def pulled(
    logits: Tensor, log_z: Tensor, constant: Tensor, slope: Tensor | None, *, over: bool
) -> tuple[Tensor, Tensor]:
    """p · (constant + slope · log p) with log p = logits - log Z, [n, v] and turned round [v, n]; the others [n], no
    ``slope``: zero. ``over``: in the place of the logits."""
    grad = logits if over else torch.empty_like(logits)
    turned = logits.new_empty(logits.shape[1], len(logits))
    slope = None if slope is None else slope.contiguous()
    _call("tether_pulled", logits, log_z, constant.contiguous(), slope, grad, turned)
    return grad, turned
