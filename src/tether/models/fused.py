"""Norms and gated layers in fewer passes over memory, their gradients written out.

Beside the matrix products, a step on a CPU is spent reading and writing activations. What transformers writes as five
or six operations is here one function, that keeps its inputs alone for the backward. A module is served when numbers
say that it is what its name says: our function gives what its own forward gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tether.models.linear import Linear, product, rounded_to

# Largest relative difference to a module's own forward at which ours takes its place: rounding.
SAME = 1e-5


def _fits(*tensors: Tensor) -> bool:
    """Whether these are what our functions were written for; everything else takes the module's own way."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean x² + ε) of each row: [..., d] -> [..., 1]."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = w x̂ with x̂ = x / r, r = sqrt(mean x² + ε) (Zhang 2019, eq. 4); dx = (w g - x̂ mean(w g x̂)) / r, dw = Σ g x̂."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, kind: torch.dtype) -> Tensor:  # type: ignore[override]
        inverse = inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        grad = grad.to(x.dtype)
        unit = x * inverse
        pull = grad * unit
        of_weight = pull.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        mean = (pull @ weight).div_(x.shape[-1])[..., None]
        of_x = torch.mul(grad, weight, out=pull).addcmul_(unit, mean, value=-1).mul_(inverse)
        return of_x, of_weight, None, None


class _GatedDown(torch.autograd.Function):
    """y = h Wᵀ + b with h = silu(a) ⊙ u (Shazeer 2020, eq. 6), from gate a and up u; h is computed again in the
    backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up, weight)
        return product(silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        opened = silu(gate)
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = product(flat.t(), (opened * up).flatten(0, -2).t())
        of_bias = flat.sum(dim=0) if ctx.needs_input_grad[3] else None
        of_hidden = product(grad, weight.t())
        of_up = opened.mul_(of_hidden)
        return torch.ops.aten.silu_backward(of_hidden.mul_(up), gate), of_up, of_weight, of_bias


class Norm:
    """Mixed into the class of a root-mean-square norm. ``shift``: what its weight is held less of (Gemma: 1); ``last``:
    no matrix product follows, so its output is never rounded for one."""

    weight: nn.Parameter
    shift: float
    epsilon: float
    last: bool

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        if rest or more or not _fits(x, self.weight):
            return super().forward(x, *rest, **more)  # type: ignore[misc]
        # With and without gradient alike: a policy that has not moved is its reference to the last bit.
        weight = self.weight + self.shift if self.shift else self.weight
        kind = x.dtype if self.last else rounded_to() or x.dtype
        return _RMSNorm.apply(x, weight, self.epsilon, kind)  # type: ignore[return-value]


class GatedMLP:
    """Mixed into the class of a feed-forward layer down(silu(gate(x)) ⊙ up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        # An adapter on the way down has to see h itself.
        down = self.down_proj
        if not (type(down) is Linear and torch.is_grad_enabled() and _fits(down.weight)):
            return super().forward(x)  # type: ignore[misc]
        gate, up = self.gate_proj(x), self.up_proj(x)
        weight, bias = down.weight.to(gate.dtype), None if down.bias is None else down.bias.to(gate.dtype)
        return _GatedDown.apply(gate, up, weight, bias)  # type: ignore[return-value]


def use_fused(model: nn.Module) -> None:
    """Every norm and gated layer of ``model`` that is served: the same parameters under the same names."""
    trunk = getattr(model, "base_model", model)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _serve_norm(module, last=module is getattr(trunk, "norm", None))
        elif all(isinstance(getattr(module, f"{name}_proj", None), Linear) for name in ("gate", "up", "down")):
            _serve(module, GatedMLP, int(module.gate_proj.in_features))  # type: ignore[union-attr]


def use_sparse_embedding(model: nn.Module) -> None:
    """A tied embedding on a CPU gives its gradient as the rows that were looked up: added to the head's own, that is
    a thousand rows instead of a second [V, d] and a third for the sum (0.14 s of SmolLM2-135M's step on two cores).
    Where there is no head's, ``dense_gradients`` has to follow the backward pass."""
    embedding, head = (getattr(model, f"get_{name}_embeddings", lambda: None)() for name in ("input", "output"))
    if type(embedding) is nn.Embedding and head is not None and head.weight is embedding.weight:
        embedding.sparse = embedding.weight.device.type == "cpu"


def dense_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """After a backward pass: every gradient is a plain tensor."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


def _serve_norm(module: nn.Module, *, last: bool) -> None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(epsilon, float) or weight is None or weight.dim() != 1:
        return
    for shift in (0.0, 1.0):
        module.shift, module.epsilon, module.last = shift, epsilon, last  # type: ignore[assignment]
        if _serve(module, Norm, len(weight)):
            return


def _serve(module: nn.Module, kind: type, width: int) -> bool:
    """Mix ``kind`` into the class of ``module`` if that changes no number."""
    own = type(module)
    x = torch.linspace(-2, 3, 4 * width).view(1, 4, width)
    if not _fits(x, *module.parameters()):
        return False
    try:
        expected = own.forward(module, x).detach()
        module.__class__ = type(own.__name__, (kind, own), {})
        found = module(x).detach()
    except (TypeError, ValueError, RuntimeError):
        module.__class__ = own
        return False
    if (found - expected).abs().max() <= SAME * expected.abs().max():
        return True
    module.__class__ = own
    return False
