"""A decode step of Llama-shaped networks, written out.

One token for a few rows is little arithmetic: calling forty operations a layer through a dozen modules then takes as
long as half of the matrix products. Here a layer is five products, with what follows them (gate, residual) done inside
them by oneDNN, over weights that are packed once a call. A network is served if numbers say that it has this shape:
Llama, Mistral, Qwen 2 and 3, SmolLM and their kin. All others decode through transformers' own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tether.models.attention import Layout
from tether.models.fused import Norm, inverse_rms
from tether.models.linear import Linear, pack, product_onto

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """The packed weights of one layer; query, key and value are one product."""

    number: int
    before_attention: Norm
    before_mlp: Norm
    head_norms: tuple[Norm, Norm] | None
    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


def _linear(x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
    """x Wᵀ + b in the type of the weight."""
    return torch.ops.mkldnn._linear_pointwise(x.to(packed[0].dtype), *packed, "none", [], "")


def _added(x: Tensor, other: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
    """x Wᵀ + b + ``other``, in the type of ``other``."""
    if other.dtype != packed[0].dtype:
        return other + _linear(x, packed)
    return product_onto(other, x, *packed)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    weight = norm.weight + norm.shift if norm.shift else norm.weight
    return (x * inverse_rms(x, norm.epsilon)).mul_(weight)


def llama_shaped(trunk: Any) -> bool:
    """Whether a trunk has the parts of ``Decoder``; that it puts them together in the same way, ``Decoder.agrees``
    says."""
    layers = getattr(trunk, "layers", None)
    parts = (getattr(trunk, "embed_tokens", None), getattr(trunk, "rotary_emb", None))
    if not isinstance(layers, nn.ModuleList) or None in parts or not isinstance(getattr(trunk, "norm", None), Norm):
        return False
    return all(has_parts(layer) for layer in layers)


def has_parts(layer: Any) -> bool:
    """Whether a layer has the parts of a Llama's, under their names, and no window or cap."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    norms = [getattr(layer, n, None) for n in ("input_layernorm", "post_attention_layernorm")]
    products = [getattr(attention, n, None) for n in (*_PROJECTIONS, "o_proj")]
    products += [getattr(mlp, f"{n}_proj", None) for n in ("gate", "up", "down")]
    products = [getattr(p, "base_layer", p) for p in products]
    # Where a layer has no window of its own to say, the network's is everybody's (Mistral, Phi 3).
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    plain = not (window or getattr(attention, "attn_logit_softcapping", None))
    return plain and all(isinstance(n, Norm) for n in norms) and all(isinstance(p, Linear) for p in products)


class Decoder:
    """The trunk of a Llama-shaped network from packed weights. They must not change while it is in use.

    ``weight_of``: the weight [o, i] that a linear layer is to have.
    """

    def __init__(self, trunk: Any, weight_of: Callable[[Linear], Tensor]) -> None:
        self.trunk = trunk
        first = trunk.layers[0].self_attn
        self.depth = int(first.head_dim)
        self.scale = float(first.scaling)
        self.layers = [self._layer(number, layer, weight_of) for number, layer in enumerate(trunk.layers)]

    def _layer(self, number: int, layer: Any, weight_of: Callable[[Linear], Tensor]) -> _Layer:
        def packed(*modules: Any) -> tuple[Tensor, Tensor | None]:
            linears = [getattr(m, "base_layer", m) for m in modules]
            biases = [m.bias for m in linears]
            weight = torch.cat([weight_of(m).detach() for m in linears])
            bias = None if biases[0] is None else torch.cat(biases).detach().to(weight.dtype)
            return pack(weight), bias

        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.shared = (
            getattr(p, "base_layer", p).out_features // self.depth for p in (attention.q_proj, attention.k_proj)
        )
        has_norms = isinstance(getattr(attention, "q_norm", None), Norm)
        return _Layer(
            number=number,
            before_attention=layer.input_layernorm,
            before_mlp=layer.post_attention_layernorm,
            head_norms=(attention.q_norm, attention.k_norm) if has_norms else None,
            qkv=packed(*(getattr(attention, name) for name in _PROJECTIONS)),
            out=packed(attention.o_proj),
            gate_up=packed(mlp.gate_proj, mlp.up_proj),
            down=packed(mlp.down_proj),
        )

    def __call__(self, layout: Layout, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[b, N] token ids and positions -> hidden states [b, N, d]; without gradient."""
        x = self.trunk.embed_tokens(input_ids)
        cos, sin = (t[:, :, None] for t in self.trunk.rotary_emb(x, position_ids))
        # (a, b) -> (-b, a), the quarter turn, is a roll by half and a change of sign, which the sine takes over.
        half = self.depth // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for layer in self.layers:
            x = self._run(layer, layout, x, cos, sin)
        return _normed(x, self.trunk.norm)

    def _run(self, layer: _Layer, layout: Layout, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, _ = x.shape
        # Attention, like the sum over the layers, is computed in the type of the network, whatever the weights have.
        heads = _linear(_normed(x, layer.before_attention), layer.qkv).to(x.dtype).view(b, n, -1, self.depth)
        turning, v = heads.split((self.heads + self.shared, self.shared), dim=2)
        if layer.head_norms is not None:
            parts = turning.split((self.heads, self.shared), dim=2)
            turning = torch.cat([_normed(p, norm) for p, norm in zip(parts, layer.head_norms, strict=True)], dim=2)
        turned = (turning * cos).addcmul_(turning.roll(self.depth // 2, dims=-1), sin)
        q, k = turned.transpose(1, 2).split((self.heads, self.shared), dim=1)
        seen = layout.attend(layer.number, q, k, v.transpose(1, 2), scale=self.scale, window=None, softcap=None)
        x = _added(seen.transpose(1, 2).reshape(b, n, -1), x, layer.out)
        gate, up = _linear(_normed(x, layer.before_mlp), layer.gate_up).chunk(2, dim=-1)
        return _added(silu(gate).mul_(up), x, layer.down)
