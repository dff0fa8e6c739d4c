"""LoRA adapters (Hu 2021) through peft: several roles on one backbone, each with an adapter of its own.

``active(model, name)`` decides which adapter the next forward pass runs; ``None`` is the bare backbone, which is what
makes the reference free.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tether.core.errors import UserError, nearest


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def add_adapter(
    model: Any,
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

    layers = None
    if last_layers is not None:
        total = int(model.config.num_hidden_layers)
        layers = list(range(max(0, total - last_layers), total))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets) or _linear_names(model.base_model),
        layers_to_transform=layers,
    )
    try:
        with warnings.catch_warnings():
            # A second adapter is what we mean; peft asks whether it is.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            model.add_adapter(config, adapter_name=name)
    except ValueError as error:
        raise UserError(
            f"LoRA can't be put on this model: {error}\n  name the layers with model.lora.targets"
        ) from error
    _check_places(model, name, targets)
    model.eval()  # the new layers come with their dropout switched on


def _check_places(model: Any, name: str, targets: Sequence[str]) -> None:
    """Raises UserError where a part of the adapter would be ignored, or could not be saved."""
    adapted = [path for path, layer in _layers(model) if name in layer.lora_A or name in layer.lora_embedding_A]
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in adapted):
            known = sorted({path.rsplit(".", 1)[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(
                f"LoRA can't be put on {target}: no layer that may be adapted has this name{nearest(target, known)}\n"
                "  take it out of model.lora.targets"
            )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    trunk = {id(module) for module in model.base_model.modules()}
    for path, layer in _layers(model):
        if name in layer.lora_embedding_A:
            why = "an embedding, and only linear layers can be adapted"
        elif name in layer.lora_A and layer is head and head.weight is embedding.weight:
            why = "the head of this model, which is its embedding too, so it can't have an adapter of its own"
        elif name in layer.lora_A and layer is not head and id(layer) not in trunk:
            why = "neither in the trunk nor the language-model head, so nothing would run it"
        else:
            continue
        raise UserError(f"LoRA can't be put on {path}: it is {why}\n  take it out of model.lora.targets")


def running(layer: Any) -> str | None:
    """The adapter under which a layer runs now; None: bare."""
    return None if getattr(layer, "_disable_adapters", True) else layer._active_adapter[0]


def bare(layer: Any) -> Any:
    """A layer, or what an adapter that does not act on it now was put on; None where one acts."""
    if not hasattr(layer, "base_layer"):
        return layer
    return None if running(layer) in layer.lora_A else layer.base_layer


def low_rank(layer: Any, name: str | None, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """What adapter ``name`` adds to a linear layer, as (alpha / rank · A h [K, r], B [out, r]); None where there is
    none."""
    if name is None or name not in getattr(layer, "lora_A", ()):
        return None
    a, b = layer.lora_A[name], layer.lora_B[name].weight
    return layer.scaling[name] * a(layer.lora_dropout[name](hidden.to(a.weight.dtype))), b


def _linear_names(trunk: nn.Module) -> list[str]:
    """The last parts of the names of the trunk's linear layers, those under other adapters included."""
    paths = [n.removesuffix(".base_layer") for n, m in trunk.named_modules() if isinstance(m, nn.Linear)]
    return sorted({path.rsplit(".", 1)[-1] for path in paths if ".lora_" not in path})


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
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (disabled, names) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, names


def as_now(model: nn.Module) -> AbstractContextManager[None]:
    """A context, to be entered later and once, in which the adapters of ``model`` and their dropout stand as they do at
    this moment: for what is computed a second time."""
    steered = [(layer, layer._disable_adapters, list(layer._active_adapter)) for _, layer in _layers(model)]
    dropouts = [(m, m.training) for layer, _, _ in steered for m in layer.lora_dropout.values()]

    @contextmanager
    def again() -> Iterator[None]:
        before = [(layer, layer._disable_adapters, layer._active_adapter) for layer, _, _ in steered]
        training = [(m, m.training) for m, _ in dropouts]
        _stand(steered, dropouts)
        try:
            yield
        finally:
            _stand(before, training)

    return again()


def _stand(layers: Iterable[tuple[Any, bool, list[str]]], dropouts: Iterable[tuple[nn.Module, bool]]) -> None:
    for layer, disabled, names in layers:
        layer._disable_adapters, layer._active_adapter = disabled, names
    for module, training in dropouts:
        module.train(training)


@contextmanager
def dropout_on(models: Sequence[nn.Module]) -> Iterator[None]:
    """The adapters' dropout works inside, in the gradient passes; sampling, scoring and references never see it."""
    modules = [m for model in models for _, layer in _layers(model) for m in layer.lora_dropout.values()]
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()


def adapted(model: nn.Module, name: str | None) -> list[nn.Module]:
    """The layers under adapter ``name``."""
    return [layer.base_layer for _, layer in _layers(model) if name in layer.lora_A] if name else []


def folded(model: nn.Module, name: str | None) -> Callable[[nn.Linear], Tensor]:
    """The weight of a linear layer with adapter ``name`` folded in: W + (alpha / rank) · B A."""
    over = {layer.base_layer: layer for _, layer in _layers(model) if name in layer.lora_A} if name else {}

    def weight(linear: nn.Linear) -> Tensor:
        if linear not in over:
            return linear.weight
        return linear.weight + over[linear].get_delta_weight(name).to(linear.weight.dtype)

    return weight


def merged_state(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The plain model's state with adapter ``name`` folded in: W + (alpha / rank) · B A. The model is not changed."""
    deltas = {n: layer.get_delta_weight(name) for n, layer in _layers(model) if name in layer.lora_A} if name else {}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            continue
        plain = key.replace(".base_layer.", ".")
        module = key.replace(".base_layer.weight", "")
        state[plain] = (value + deltas[module].to(value.dtype)) if module in deltas else value
    return {k: v.detach() if v.dtype == torch.bool else v.detach().contiguous() for k, v in state.items()}
