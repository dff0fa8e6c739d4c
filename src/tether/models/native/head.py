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


def _call(name: str, *tensors: Tensor) -> None:
    kernels = build.library()
    assert kernels is not None, "serves() was not asked"
    sizes = (*tensors[0].shape, torch.get_num_threads())
    getattr(kernels, name)(*(_POINTER(t.data_ptr()) for t in tensors), *map(_INT, sizes))


def log_sums(logits: Tensor) -> Tensor:
    """log Σ exp of each row: [n, v] -> [n]."""
    out = logits.new_empty(len(logits))
    _call("tether_log_sums", logits, out)
    return out


def pulled(logits: Tensor, log_z: Tensor, toward: Tensor, *, over: bool) -> tuple[Tensor, Tensor]:
    """-toward · exp(logits - log Z), [n, v] and turned round [v, n]; ``log_z``, ``toward`` [n]. ``over``: in the place
    of the logits."""
    grad = logits if over else torch.empty_like(logits)
    turned = logits.new_empty(logits.shape[1], len(logits))
    _call("tether_pulled", logits, log_z, toward, grad, turned)
    return grad, turned
