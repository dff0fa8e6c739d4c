"""A layer of Llama-shaped networks and its gradient, written out around oneDNN's products.

Between the products a step on a CPU reads and writes activations. Here norm, rotation, gate and residual are one pass
over memory each (``layer.cpp``), and gradients that a product wants turned round are written that way. Of a token only
the layer's input, q, k, v, what attention and its residual give, gate and up are kept: norms and h are computed again.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.models.adapters import bare
from tether.models.decoder import has_parts
from tether.models.fused import SAME
from tether.models.linear import Linear, product, product_onto, rounded_to
from tether.models.native import attention, build
from tether.models.native.attention import Blocks
from tether.models.packed import PackedLayout, PrefillLayout

# Rows that share one partial sum of a norm's weight gradient: `ROWS` of layer.cpp.
_ROWS = 64
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Parameters(NamedTuple):
    """Of one layer; or what is said of each of them."""

    norm1: Any
    q: Any
    q_bias: Any
    k: Any
    k_bias: Any
    v: Any
    v_bias: Any
    out: Any
    out_bias: Any
    norm2: Any
    gate: Any
    gate_bias: Any
    up: Any
    up_bias: Any
    down: Any
    down_bias: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pass:
    """What a pass of a layer depends on, beside its parameters. ``cosine``, ``sine`` [N, D]; ``epsilons`` of the norms
    before attention and before the feed-forward part."""

    blocks: Blocks
    cosine: Tensor
    sine: Tensor
    depth: int
    scale: float
    epsilons: tuple[float, float]


@functools.lru_cache(maxsize=1)
def _kernels() -> ctypes.CDLL:
    kernels = build.library()
    assert kernels is not None, "a layer is only served where there are kernels"
    tensors = {"norm": 5, "norm_backward": 8, "rotate": 3, "gate": 3, "gate_backward": 7, "turn": 2}
    for name, count in tensors.items():
        function = getattr(kernels, f"tether_{name}")
        function.restype = None
        pointers: list[Any] = [_POINTER] * count
        if name == "norm":
            pointers[2] = _FLOAT
        function.argtypes = [*pointers, *[_INT] * (5 if name == "rotate" else 3)]
    return kernels


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """w x / r and 1 / r, r = sqrt(mean x² + ε): [N, d] -> [N, d], [N] (Zhang 2019, eq. 4)."""
    out, inverse = torch.empty_like(x), x.new_empty(len(x))
    _kernels().tether_norm(*_pointers(x, weight), epsilon, *_pointers(out, inverse), *x.shape, torch.get_num_threads())
    return out, inverse


def _norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, with that of the residual ``beside`` it, and of the weight."""
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
    partial = x.new_empty(-(-len(x) // _ROWS), len(weight))
    given = _pointers(x, weight, inverse, grad, beside, of_x, of_weight, partial)
    _kernels().tether_norm_backward(*given, *x.shape, torch.get_num_threads())
    return of_x, of_weight


def _rotate(t: Tensor, given: _Pass, *, back: bool = False) -> Tensor:
    """t [N, H · D] in place, by each token's angles (Su 2021); ``back``: the gradient's way."""
    sizes = (len(t), t.shape[1] // given.depth, given.depth, back, torch.get_num_threads())
    _kernels().tether_rotate(*_pointers(t, given.cosine, given.sine), *sizes)
    return t


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    """h = silu(a) ⊙ u (Shazeer 2020, eq. 6)."""
    h = torch.empty_like(gate)
    _kernels().tether_gate(*_pointers(gate, up, h), *gate.shape, torch.get_num_threads())
    return h


def _gate_backward(gate: Tensor, up: Tensor, of_h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [N, F], the gradients of gate and up [N, F], and both turned round [F, N]. Overwrites ``of_h``."""
    of_gate, h = torch.empty_like(gate), torch.empty_like(gate)
    turned = [gate.new_empty(gate.shape[1], len(gate)) for _ in range(2)]
    given = _pointers(gate, up, of_h, of_gate, h, *turned)
    _kernels().tether_gate_backward(*given, *gate.shape, torch.get_num_threads())
    return h, of_gate, of_h, turned[0], turned[1]


def _turned(x: Tensor) -> Tensor:
    """[N, d] -> [d, N], contiguous."""
    out = x.new_empty(x.shape[1], len(x))
    _kernels().tether_turn(*_pointers(x, out), *x.shape, torch.get_num_threads())
    return out


def _heads(t: Tensor, depth: int) -> Tensor:
    """[N, H · D] -> [1, H, N, D], the same memory."""
    return t.view(1, len(t), -1, depth).transpose(1, 2)


def _rows(t: Tensor) -> Tensor:
    """[1, H, N, D] with tokens before heads in memory -> [N, H · D]."""
    return t.transpose(1, 2).reshape(t.shape[2], -1)


def _of_product(
    grad: Tensor, x: Tensor, wanted: tuple[bool, bool], turned: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight and the bias of a product, from its own [N, o] (and that ``turned`` round) and its input
    [N, i]."""
    weight, bias = wanted
    of_weight = product(_turned(grad) if turned is None else turned, x.t()) if weight else None
    return of_weight, grad.sum(dim=0) if bias else None


class _Kept(NamedTuple):
    """What a backward needs of a pass, beside its input: ``inverse`` root mean squares [N] of what was normed; q, k and
    v as [N, H · D]; what attention gave, [1, H, N, D], and the log-sum of its scores; the states after it."""

    inverse1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    log_sum: Tensor
    z: Tensor
    inverse2: Tensor
    gate: Tensor
    up: Tensor


def _run(x: Tensor, given: _Pass, p: _Parameters) -> tuple[Tensor, _Kept]:
    """y = z + down(silu(gate(n)) ⊙ up(n)), n = norm2(z); z = x + out(attention(q(m), k(m), v(m))), m = norm1(x); all of
    one packed row [N, d]."""
    normed, inverse1 = _norm(x, p.norm1, given.epsilons[0])
    q, k = (_rotate(product(normed, *w), given) for w in ((p.q, p.q_bias), (p.k, p.k_bias)))
    v = product(normed, p.v, p.v_bias)
    del normed  # what comes next takes its place: nothing that is kept for the backward leaves a hole
    heads = (_heads(q, given.depth), _heads(k, given.depth), _heads(v, given.depth))
    out, log_sum = attention.forward(*heads, given.blocks, given.scale)
    z = product_onto(x, _rows(out), p.out, p.out_bias)
    normed, inverse2 = _norm(z, p.norm2, given.epsilons[1])
    gate, up = product(normed, p.gate, p.gate_bias), product(normed, p.up, p.up_bias)
    del normed
    y = product_onto(z, _gate(gate, up), p.down, p.down_bias)
    return y, _Kept(inverse1, q, k, v, out, log_sum, z, inverse2, gate, up)


class _Layer(torch.autograd.Function):
    """``_run`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: _Pass, *parameters: Tensor | None) -> Tensor:  # type: ignore[override]
        y, kept = _run(x, given, _Parameters(*parameters))
        ctx.save_for_backward(x, *kept, *parameters)
        ctx.given = given
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        kept, parameters = saved[: len(_Kept._fields)], saved[len(_Kept._fields) :]
        inverse1, q, k, v, out, log_sum, z, inverse2, gate, up = kept
        del saved, kept
        given: _Pass = ctx.given
        p, wanted = _Parameters(*parameters), _Parameters(*ctx.needs_input_grad[2:])
        grad = grad.contiguous()

        h, of_gate, of_up, gate_turned, up_turned = _gate_backward(gate, up, product(grad, p.down.t()))
        downs = _of_product(grad, h, (wanted.down, wanted.down_bias))
        del h
        normed, _ = _norm(z, p.norm2, given.epsilons[1])
        gates = _of_product(of_gate, normed, (wanted.gate, wanted.gate_bias), gate_turned)
        ups = _of_product(of_up, normed, (wanted.up, wanted.up_bias), up_turned)
        del gate_turned, up_turned
        of_normed = product_onto(product(of_gate, p.gate.t()), of_up, p.up.t())
        del of_gate, of_up
        of_z, of_norm2 = _norm_backward(z, p.norm2, inverse2, of_normed, grad)

        outs = _of_product(of_z, _rows(out), (wanted.out, wanted.out_bias))
        heads = (_heads(q, given.depth), _heads(k, given.depth), _heads(v, given.depth))
        of_out = _heads(product(of_z, p.out.t()), given.depth)
        pulled = attention.backward(of_out, *heads, out, log_sum, given.blocks, given.scale)
        of_q, of_k, of_v = map(_rows, pulled)
        of_q, of_k = _rotate(of_q, given, back=True), _rotate(of_k, given, back=True)
        normed, _ = _norm(x, p.norm1, given.epsilons[0])
        queries = _of_product(of_q, normed, (wanted.q, wanted.q_bias))
        keys = _of_product(of_k, normed, (wanted.k, wanted.k_bias))
        values = _of_product(of_v, normed, (wanted.v, wanted.v_bias))
        of_normed = product_onto(product_onto(product(of_q, p.q.t()), of_k, p.k.t()), of_v, p.v.t())
        of_x, of_norm1 = _norm_backward(x, p.norm1, inverse1, of_normed, of_z)
        return of_x, None, of_norm1, *queries, *keys, *values, *outs, of_norm2, *gates, *ups, *downs


class NativeLayer:
    """Mixed into the class of a decoder layer of a Llama-shaped network."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(self, hidden_states: Tensor, *rest: Any, **more: Any) -> Tensor:
        parameters = None if rest else self._plain_parameters()
        if parameters is None or not _takes(hidden_states, self.self_attn.head_dim, more):
            return super().forward(hidden_states, *rest, **more)  # type: ignore[misc]
        cosine, sine = (t[0].contiguous() for t in more["position_embeddings"])
        layout = more["tether_layout"]
        given = _Pass(
            blocks=layout.blocks,
            cosine=cosine,
            sine=sine,
            depth=cosine.shape[1],
            scale=float(self.self_attn.scaling),
            epsilons=(self.input_layernorm.epsilon, self.post_attention_layernorm.epsilon),
        )
        x = hidden_states[0].contiguous()
        if not isinstance(layout, PrefillLayout):
            return _Layer.apply(x, given, *parameters)[None]  # type: ignore[index]
        y, kept = _run(x, given, parameters)
        layout.keep(_heads(kept.k, given.depth), _heads(kept.v, given.depth))
        return y[None]

    def _plain_parameters(self) -> _Parameters | None:
        """None where a product is not a plain one: an adapter acts on it."""
        attention, mlp = self.self_attn, self.mlp
        before = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        after = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        parts = [[bare(layer) for layer in part] for part in (before, after)]
        if any(type(layer) is not Linear for part in parts for layer in part):
            return None
        first, second = ([t for layer in part for t in (layer.weight, layer.bias)] for part in parts)
        return _Parameters._make((self.input_layernorm.weight, *first, self.post_attention_layernorm.weight, *second))


def _takes(x: Tensor, depth: int, more: Mapping[str, Any]) -> bool:
    """Whether a pass is one of a packed row in float32."""
    places, layout = more.get("position_embeddings"), more.get("tether_layout")
    # Prompts that will be continued: their keys and values leave the layer, which no gradient follows.
    prefills = isinstance(layout, PrefillLayout) and not torch.is_grad_enabled()
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] == 1
        and x.shape[1] > 0
        and isinstance(places, tuple)
        and places[0].shape[-1] == depth
        and (isinstance(layout, PackedLayout) or prefills)
        and more.get("past_key_values") is None
        and rounded_to() is None
        and build.library() is not None
    )


def _fits(layer: Any) -> bool:
    """Whether a layer has the parts and sizes that the kernels are written for."""
    if not has_parts(layer):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    products = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    sizes = {size for p in (*products, mlp.gate_proj) for size in (p.out_features, p.in_features)}
    tensors = list(layer.parameters())
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return plain and all(n % build.LANES == 0 for n in (*sizes, attention.head_dim))


@torch.no_grad()
def _agrees(layer: nn.Module) -> bool:
    """Whether a layer gives what its own forward gives: two completions of one prompt."""
    own: Any = type(layer).__mro__[2]
    width, depth = layer.input_layernorm.weight.numel(), int(layer.self_attn.head_dim)  # type: ignore[union-attr]
    x = torch.linspace(-2, 3, 5 * width).sin().view(1, 5, width)
    angles = torch.tensor([0, 1, 2, 2, 3.0])[:, None] * torch.linspace(1, 0.1, depth // 2)
    places = torch.cat([angles, angles], dim=1)[None]
    more: dict[str, Any] = {
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        "position_embeddings": (places.cos(), places.sin()),
        "tether_layout": PackedLayout(blocks=((2, (1, 2)),)),
    }
    expected, found = own.forward(layer, x, **more), layer(x, **more)
    return bool((found - expected).abs().max() <= SAME * expected.abs().max())


def use_native_layers(model: nn.Module) -> None:
    """Every layer of ``model`` that is served and gives the same numbers: the same parameters under the same names.
    The model has to run our attention already."""
    layers = getattr(model, "layers", None)
    if build.library() is None or not isinstance(layers, nn.ModuleList):
        return
    for layer in filter(_fits, layers):
        own = type(layer)
        layer.__class__ = type(own.__name__, (NativeLayer, own), {})
        try:
            same = _agrees(layer)
        except (TypeError, ValueError, RuntimeError):  # its own forward is called in another way
            same = False
        if not same:
            layer.__class__ = own
