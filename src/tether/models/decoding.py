"""How the sampler's passes run: by compiled kernels, from packed weights, or through the model's own layers.

The first of these that serves the network and this machine is taken, after its numbers were compared with the model's
own, once for each loaded model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tether.models import linear
from tether.models.adapters import active, adapted, folded
from tether.models.decoder import Decoder, llama_shaped
from tether.models.native import build
from tether.models.native.decoder import NativeDecoder, fits
from tether.models.packed import PackedLayout, PrefillLayout

if TYPE_CHECKING:
    from tether.models.backbone import Backbone

# Decoding steps from which packing the weights (0.1 s for 135 M parameters) costs less than it saves.
PACKING_PAYS = 16
# Largest difference of hidden states, relative to their size, at which a written-out pass counts as the model's own.
SAME = 2e-3


class Passes(Protocol):
    """Hidden states of prompts, of one new token a row, and what the head makes of them, without gradient."""

    def prefill(self, layout: PrefillLayout, input_ids: Tensor, position_ids: Tensor, /) -> Tensor: ...

    def step(self, held: Any, input_ids: Tensor, position_ids: Tensor, /) -> Tensor: ...

    def logits(self, hidden: Tensor, /) -> Tensor: ...


@contextlib.contextmanager
def decoding(backbone: Backbone, adapter: str | None, steps: int, rounded_to: torch.dtype | None) -> Iterator[Passes]:
    """Passes under ``adapter``, their matrix products in ``rounded_to`` where it is given. Inside, the weights must
    not change."""
    hf, kind = backbone.hf, rounded_to or backbone.dtype
    rounded = torch.autocast(backbone.device.type, dtype=rounded_to, enabled=rounded_to is not None)
    with rounded, torch.no_grad():
        own = folded(hf, adapter) if linear.SERVES else None
        if own is not None and (compiled := _compiled(backbone, adapter, own, kind)) is not None:
            with active(hf, adapter):
                yield compiled
        elif own is not None and _packs(backbone, adapter, steps):
            yield from _from_packed(backbone, adapter, lambda layer: own(layer).to(kind))
        else:
            with active(hf, adapter):
                yield _Plain(backbone)


class _Plain:
    """Through the model's own layers."""

    def __init__(self, backbone: Backbone) -> None:
        self.prefill = self.step = backbone.run_trunk
        self.logits = backbone.hf.get_output_embeddings()


def _llama_shaped(backbone: Backbone) -> bool:
    return backbone.mode == "packed" and llama_shaped(backbone.hf.base_model)


def _packs(backbone: Backbone, adapter: str | None, steps: int) -> bool:
    layers = adapted(backbone.hf, adapter)
    return steps >= PACKING_PAYS and linear.packing_fits(backbone.hf) and all(linear.packs(m) for m in layers)


def _from_packed(backbone: Backbone, adapter: str | None, weight_of: Callable[[nn.Linear], Tensor]) -> Iterator[Passes]:
    hf = backbone.hf
    if "packed" not in backbone.agreed:
        backbone.agreed["packed"] = _llama_shaped(backbone) and _packed_agrees(backbone, adapter)
    passes = _Plain(backbone)
    packing: nn.Module = hf
    if backbone.agreed["packed"]:
        passes.prefill = passes.step = Decoder(hf.base_model, weight_of)
        packing = hf.get_output_embeddings()
    with active(hf, None), linear.packed_weights(packing, weight_of):
        yield passes


def _packed_agrees(backbone: Backbone, adapter: str | None) -> bool:
    ids = torch.arange(12, device=backbone.device)[None] % backbone.config.vocab_size
    inputs = (PackedLayout(blocks=((5, (4, 3)),)), ids, torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]]))
    with torch.autocast(backbone.device.type, enabled=False), active(backbone.hf, adapter):
        found = Decoder(backbone.hf.base_model, folded(backbone.hf, adapter))(*inputs)
        return _same(found, backbone.run_trunk(*inputs))


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= SAME * expected.abs().mean())


def prepare(backbone: Backbone, say: Callable[[str], None]) -> None:
    """Have the kernels compiled, if they are of use to this network; ``say`` hears of it once."""
    if backbone.mode == "packed" and backbone.dtype == torch.float32 and backbone.device.type == "cpu":
        build.library(say)


def _kernels_fit(backbone: Backbone, kind: torch.dtype) -> bool:
    plain = backbone.dtype == torch.float32 and backbone.device.type == "cpu"
    return plain and _llama_shaped(backbone) and fits(backbone.hf.base_model, kind)


def _compiled(
    backbone: Backbone, adapter: str | None, weight_of: Callable[[nn.Linear], Tensor], kind: torch.dtype
) -> NativeDecoder | None:
    """The compiled passes, where they serve this network."""
    hf = backbone.hf
    if not _kernels_fit(backbone, kind) or (kernels := build.library()) is None:
        return None

    def passes(rounded: bool) -> NativeDecoder:
        return NativeDecoder(
            kernels, hf.base_model, hf.get_output_embeddings(), weight_of, backbone.run_trunk, rounded=rounded
        )

    if "compiled" not in backbone.agreed:
        with torch.autocast(backbone.device.type, enabled=False), active(hf, adapter):
            backbone.agreed["compiled"] = _compiled_agrees(backbone, passes(rounded=False))
    return passes(kind == torch.bfloat16) if backbone.agreed["compiled"] else None


def _compiled_agrees(backbone: Backbone, passes: NativeDecoder) -> bool:
    """Two rows that go on from one prompt, token by token and all at once."""
    ids = torch.arange(3, 12)[None] % backbone.config.vocab_size
    prompt = PrefillLayout(lengths=(5,))
    passes.prefill(prompt, ids[:, :5], torch.arange(5)[None])
    rows = [k.new_zeros(2, k.shape[1], 2, k.shape[3]) for k in prompt.keys]
    held: Any = SimpleNamespace(
        prompt_keys=[k.contiguous() for k in prompt.keys],
        prompt_values=[v.contiguous() for v in prompt.values],
        keys=rows,
        values=[r.clone() for r in rows],
        prompt_lengths=torch.tensor([5]),
        lengths=torch.tensor([0, 0]),
        members=torch.tensor([0, 1]),
        first=torch.tensor([0, 2]),
    )
    found = [passes.step(held, ids[0, [5, 7]][:, None], torch.tensor([[5], [5]]))]
    held.lengths = torch.tensor([1, 1])
    found.append(passes.step(held, ids[0, [6, 8]][:, None], torch.tensor([[6], [6]])))
    layout = PackedLayout(blocks=((5, (2, 2)),))
    expected = backbone.run_trunk(layout, ids, torch.tensor([[0, 1, 2, 3, 4, 5, 6, 5, 6]]))[0, 5:].view(2, 2, -1)
    logits = backbone.hf.get_output_embeddings()(expected[0])
    return _same(torch.cat(found, dim=1), expected) and _same(passes.logits(expected[0]), logits)
