"""LoRA adapters (Hu 2021) through peft: several roles on one backbone, each with an adapter of its own.

``active(model, name)`` decides which adapter the next forward pass runs; ``None`` is the bare backbone, which is what
makes the reference free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tether.core.errors import UserError


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def add_adapter(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    last_layers: int | None = None,
) -> None:
    """Put a fresh adapter on every linear layer of the trunk (or on ``targets``); it starts as the identity."""
    from peft import LoraConfig

    trunk = model.base_model
    linear = {n.rsplit(".", 1)[-1] for n, m in trunk.named_modules() if isinstance(m, nn.Linear)}
    linear |= {
        n.rsplit(".", 2)[-2] for n, m in trunk.named_modules() if n.endswith("base_layer") and isinstance(m, nn.Linear)
    }
    linear -= {"base_layer", "default"} | {n for n in linear if n.startswith("lora_")}
    chosen = list(targets) or sorted(linear - {"lm_head", "score"} - set(_adapter_names(model)))
    layers = None
    if last_layers is not None:
        total = int(model.config.num_hidden_layers)
        layers = list(range(max(0, total - last_layers), total))
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, layers_to_transform=layers
    )
    try:
        model.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    except ValueError as error:
        raise UserError(
            f"LoRA can't be put on this model: {error}\n  name the layers with model.lora.targets"
        ) from error


def _adapter_names(model: nn.Module) -> set[str]:
    return {name for _, layer in _layers(model) for name in layer.lora_A}  # type: ignore[attr-defined]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The trainable tensors of one adapter, by their full names."""
    return {n: p for n, p in model.named_parameters() if f".{name}." in n and ".lora_" in n}


@contextmanager
def active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run the forward passes inside with adapter ``name``, or with none.

    peft's own ``set_adapter`` also switches ``requires_grad``; that belongs to the learner alone, so the two fields
    that steer the forward are set here directly and put back afterwards.
    """
    layers = [layer for _, layer in _layers(model)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]  # type: ignore[attr-defined]
    for layer in layers:
        layer._disable_adapters = name is None  # type: ignore[attr-defined]
        if name is not None:
            layer._active_adapter = [name]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for layer, (disabled, names) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, names  # type: ignore[attr-defined]


def merged_state(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The plain model's state with adapter ``name`` folded in: W + (alpha / rank) · B A. The model is not changed."""
    deltas = {n: layer.get_delta_weight(name) for n, layer in _layers(model) if name in layer.lora_A} if name else {}  # type: ignore[attr-defined,operator]
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            continue
        plain = key.replace(".base_layer.", ".")
        module = key.replace(".base_layer.weight", "")
        state[plain] = (value + deltas[module].to(value.dtype)) if module in deltas else value
    return {k: v.detach() if v.dtype == torch.bool else v.detach().contiguous() for k, v in state.items()}
