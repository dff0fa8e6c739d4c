"""A decode step of Llama-shaped networks by ``decode.cpp``: one call for all layers, over the learner's own weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tether.models.attention import Layout
from tether.models.fused import Norm
from tether.models.native import build
from tether.models.packed import PrefillLayout

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


# Largest head and most query heads to a key head that `decode.cpp` has room for.
_DEEPEST, _MOST_QUERIES = 512, 64


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("outputs", _INT))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("epsilon", _FLOAT))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, _Norm) for name in ("before_attention", "before_mlp", "q_norm", "k_norm")),
        *((name, _POINTER) for name in ("prompt_keys", "prompt_values", "keys", "values")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("layers", "width", "heads", "shared", "depth", "inner", "rounded", "threads")),
        ("scale", _FLOAT),
        ("last", _Norm),
        *((name, _INT) for name in ("rows", "prompts", "prompt_room", "room")),
        *((name, _POINTER) for name in ("members", "first", "prompt_lengths", "lengths")),
        *((name, _POINTER) for name in ("cosine", "sine", "x", "scratch")),
    )


class Held(Protocol):
    """What rows that decode together hold, per layer: ``prompt_keys``, ``prompt_values`` [G, H_kv, P, D] and ``keys``,
    ``values`` [W, H_kv, L, D], contiguous, with room for a new token. ``prompt_lengths`` [G], ``lengths`` [W]: tokens
    held; ``members`` [W]: rows, prompt after prompt, those of prompt g from ``first[g]`` on ([G + 1])."""

    prompt_keys: list[Tensor]
    prompt_values: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    prompt_lengths: Tensor
    lengths: Tensor
    members: Tensor
    first: Tensor


def _base(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _sizes(layer: Any) -> tuple[Any, ...]:
    """Depth of a head, then outputs and inputs of the seven products of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    products = [_base(getattr(attention, f"{n}_proj")) for n in "qkvo"]
    products += [_base(getattr(mlp, f"{n}_proj")) for n in ("gate", "up", "down")]
    return attention.head_dim, *((p.out_features, p.in_features) for p in products)


def fits(trunk: Any, kind: torch.dtype) -> bool:
    """Whether the kernels are written for the sizes of a Llama-shaped ``trunk`` and products in ``kind``."""
    # Their memory is laid out once for all layers; one that was pruned would write beyond it.
    sizes, *others = {_sizes(layer) for layer in trunk.layers}
    depth, (queries, width), (keys, _), (values, _), out, gate, up, down = sizes
    heads, shared = queries // depth, keys // depth
    plain = not others and keys == values and out == (width, queries) and gate == up == (down[1], width)
    # Numbers in bfloat16 are taken in pairs.
    even = all(size % 2 == 0 for size in (width, queries, down[1]))
    rounds = kind == torch.bfloat16 and even and torch.cpu._is_avx512_bf16_supported()
    depth_fits = depth % build.LANES == 0 and depth <= _DEEPEST
    return plain and (kind == torch.float32 or rounds) and depth_fits and heads // shared <= _MOST_QUERIES


class NativeDecoder:
    """One token a row through the trunk, and the head. The weights must not move while it is in use.

    ``weight_of``: the weight [o, i] that a linear layer is to have; ``rounded``: whether products are in bfloat16;
    ``prefill``: the pass over prompts, which is the model's own.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        trunk: Any,
        head: Any,
        weight_of: Callable[[nn.Linear], Tensor],
        prefill: Callable[[Layout, Tensor, Tensor], Tensor],
        *,
        rounded: bool,
    ) -> None:
        self.library = library
        self.trunk = trunk
        self._prefill = prefill
        self.rounded = rounded
        self._weight_of = weight_of
        # Whose memory the structures point into.
        self._kept: list[Tensor] = []
        first = trunk.layers[0]
        depth = int(first.self_attn.head_dim)
        self._step = _Step(
            layers=len(trunk.layers),
            width=trunk.embed_tokens.embedding_dim,
            heads=_base(first.self_attn.q_proj).out_features // depth,
            shared=_base(first.self_attn.k_proj).out_features // depth,
            depth=depth,
            inner=_base(first.mlp.gate_proj).out_features,
            rounded=rounded,
            scale=float(first.self_attn.scaling),
            last=self._norm(trunk.norm),
        )
        self.layers = (_Layer * len(trunk.layers))(*map(self._layer, trunk.layers))
        self.head = self._linear(head)

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, module: Any) -> _Linear:
        base = _base(module)
        kind = torch.bfloat16 if self.rounded else torch.float32
        bias = None if base.bias is None else self._pointer(base.bias.float())
        return _Linear(self._pointer(self._weight_of(base).to(kind)), bias, base.out_features)

    def _norm(self, norm: Any) -> _Norm:
        if not isinstance(norm, Norm):
            return _Norm(None, 0.0)
        return _Norm(self._pointer(norm.weight + norm.shift if norm.shift else norm.weight), norm.epsilon)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
        return _Layer(
            **{ours: self._linear(getattr(attention, name)) for ours, name in names.items()},
            **{name: self._linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")},
            before_attention=self._norm(layer.input_layernorm),
            before_mlp=self._norm(layer.post_attention_layernorm),
            q_norm=self._norm(getattr(attention, "q_norm", None)),
            k_norm=self._norm(getattr(attention, "k_norm", None)),
        )

    def prefill(self, layout: PrefillLayout, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Packed prompts -> hidden states [1, N, d]; their keys and values in the type that the kernels read."""
        hidden = self._prefill(layout, input_ids, position_ids).float()
        layout.keys, layout.values = ([t.float() for t in ts] for ts in (layout.keys, layout.values))
        return hidden

    def step(self, held: Held, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """A new token [W, 1] and its position for each row -> hidden states [W, 1, d]; its keys and values are
        written after what the row holds."""
        x = self.trunk.embed_tokens(input_ids).contiguous()
        cosine, sine = (t.contiguous() for t in self.trunk.rotary_emb(x, position_ids))
        step = self._step
        for number, layer in enumerate(self.layers):
            for name in ("prompt_keys", "prompt_values", "keys", "values"):
                setattr(layer, name, getattr(held, name)[number].data_ptr())
        step.rows, step.prompts = len(held.lengths), len(held.prompt_lengths)
        step.prompt_room, step.room = held.prompt_keys[0].shape[2], held.keys[0].shape[2]
        step.threads = torch.get_num_threads()
        for name in ("members", "first", "prompt_lengths", "lengths"):
            setattr(step, name, getattr(held, name).data_ptr())
        step.cosine, step.sine, step.x = cosine.data_ptr(), sine.data_ptr(), x.data_ptr()
        scratch = torch.empty(self.library.tether_decode_scratch(ctypes.byref(step)))
        step.scratch = scratch.data_ptr()
        self.library.tether_decode(self.layers, ctypes.byref(step))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [K, d] -> [K, V], as the head gives them."""
        hidden = hidden.contiguous()
        rows, width = hidden.shape
        out = hidden.new_empty(rows, self.head.outputs)
        threads = torch.get_num_threads()
        scratch = torch.empty((1 + threads) * width * (-(-rows // build.LANES) * build.LANES))
        self.library.tether_product(
            ctypes.byref(self.head),
            _INT(width),
            _POINTER(hidden.data_ptr()),
            _INT(rows),
            _POINTER(out.data_ptr()),
            _POINTER(scratch.data_ptr()),
            _INT(threads),
            _INT(self.rounded),
        )
        return out
