"""Matrix products of linear layers, by the library that is the faster one on this CPU.

PyTorch gives float32 products on a CPU to MKL, whose kernels leave half of some machines' speed unused; oneDNN, which
every x86 build of PyTorch carries too, has others. Measured on an AMD EPYC with AVX-512, two cores: 200 GFLOP/s and 450
(``tether doctor`` measures both here). Which one is used depends on the machine's instruction set alone and not on a
timing, so a resumed run computes what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tether.core.machine import memory_bytes

# What packing is laid out for; one layout serves every number of rows about as well.
_ROWS = 16


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_serves() -> bool:
    """Whether float32 products on this CPU go to oneDNN."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


SERVES = onednn_serves()
# Types that oneDNN computes in by instructions of their own: bfloat16 where the processor has its dot product.
_TYPES = (torch.float32, torch.bfloat16) if torch.cpu._is_avx512_bf16_supported() else (torch.float32,)


def rounded_to() -> torch.dtype | None:
    """The type that autocast gives matrix products on a CPU at this moment; None outside of it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def serves(*tensors: Tensor | None) -> bool:
    """Whether products of these go to oneDNN."""
    given = [t for t in tensors if t is not None]
    kind = given[0].dtype
    plain = all(t.dtype == kind and t.device.type == "cpu" for t in given)
    return SERVES and kind in _TYPES and plain and all(t.numel() for t in given)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: [..., i], [o, i], [o] -> [..., o] in the type that they have; outside of autograd where it is
    oneDNN's."""
    if serves(x, weight, bias):
        return _onednn(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def product_onto(beside: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``beside`` + x Wᵀ + b, in one pass over what comes out, of what ``serves`` takes."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, beside, weight, bias, "add")


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; dx = dy W, dW = dyᵀ x, db = Σ dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        # As PyTorch's own does: what no gradient needs is not kept.
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            product(grad, weight.t()) if need_x else None,
            product(flat.t(), x.reshape(-1, x.shape[-1]).t()) if need_weight else None,
            flat.sum(dim=0) if need_bias else None,
        )


class Linear(nn.Linear):
    """``nn.Linear`` whose products are ``product``'s. ``packed``: its weight in oneDNN's own order, for passes without
    gradient (``packed_weights``)."""

    packed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is not None and not torch.is_grad_enabled() and serves(input):
            x = input.to(self.packed.dtype)
            return _onednn(x, self.packed, None if self.bias is None else self.bias.to(x.dtype))
        kind = rounded_to() or input.dtype
        x, weight, bias = input.to(kind), self.weight.to(kind), None if self.bias is None else self.bias.to(kind)
        if serves(x, weight, bias):
            return _Linear.apply(x, weight, bias)  # type: ignore[return-value]
        return super().forward(input)


def use_fast_linear(model: nn.Module) -> None:
    """Every plain ``nn.Linear`` of ``model`` becomes a ``Linear``: the same parameters under the same names."""
    if not SERVES:
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def packs(layer: nn.Module) -> bool:
    """Whether ``packed_weights`` reaches a layer."""
    return isinstance(layer, Linear) and serves(layer.weight)


def packing_fits(model: nn.Module) -> bool:
    """Whether packed copies of the weights take at most a quarter of this machine's memory: a rule that a resumed run
    finds unchanged, unlike the memory that happens to be free."""
    size = sum(m.weight.numel() * m.weight.element_size() for m in model.modules() if isinstance(m, Linear))
    return 4 * size <= (memory_bytes() or 0)


def pack(weight: Tensor) -> Tensor:
    """A weight [o, i] in oneDNN's own order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


@contextmanager
def packed_weights(
    model: nn.Module, weight_of: Callable[[Linear], Tensor] = lambda layer: layer.weight
) -> Iterator[None]:
    """Inside, passes without gradient read packed copies of the weights of every ``Linear`` of ``model``: a third less
    time for a few rows, for as much memory again as the weights take. ``weight_of``: the weight [o, i] that a layer is
    to have inside.

    The weights must not change inside, and nothing else may run the model.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear) and packs(m)]
    if any(layer.packed is not None for layer in layers):
        raise RuntimeError("this model's weights are packed already: it is being sampled from; wait until that is done")
    try:
        for layer in layers:
            layer.packed = pack(weight_of(layer).detach())
        yield
    finally:
        for layer in layers:
            layer.packed = None
