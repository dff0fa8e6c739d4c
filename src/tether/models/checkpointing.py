"""Activation checkpointing (Chen 2016): a layer keeps its input alone for the backward, and runs a second time there.

transformers' own switch works in training mode only, which our models are never in (their dropout stays off), so the
layers are wrapped here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tether.core.errors import UserError
from tether.models.adapters import as_now


def checkpoint_activations(model: nn.Module) -> None:
    """Every layer of ``model`` from now on. Gradients are the same; of a layer's activations only its input is held, at
    the price of one more forward pass. Passes without gradient are as they were.

    Raises UserError where the architecture's layers are not known.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"{type(model).__name__}: its layers can't be run again in the backward pass, so "
            "optim.checkpoint_activations would be ignored; take it out"
        )
    for layer in layers:
        if "forward" not in vars(layer):  # two roles may share one network
            layer.forward = partial(_run, layer, layer.forward)


def _run(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # By the time of the backward another adapter may be active, and dropout is off again.
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), as_now(layer)), **kwargs)
