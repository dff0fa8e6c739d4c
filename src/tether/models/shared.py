"""A reward model as an adapter of another role's backbone: one network in memory instead of two."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tether.core.errors import UserError
from tether.models.adapters import adapter_parameters, add_adapter
from tether.models.backbone import Backbone
from tether.models.load import fingerprint
from tether.models.reading import Reading
from tether.models.roles import Policy, Scorer, new_head

FOLDER = "adapter"


def save_adapter(scorer: Scorer, folder: Path) -> None:
    """``folder/adapter``: the adapter, the head or heads, how they are read, and the weights that they belong to."""
    name = scorer.adapter
    assert name is not None
    config = scorer.backbone.hf.peft_config[name]
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    tensors = {
        n.replace(f".{name}.", "."): p.detach().contiguous()
        for n, p in adapter_parameters(scorer.backbone.hf, name).items()
    }
    head = {f"score.{n}": p.detach() for n, p in scorer.head.named_parameters()}
    save_file({**tensors, **head}, place / "adapter.safetensors")
    layers = config.layers_to_transform
    facts = {
        "base": fingerprint(Policy(backbone=scorer.backbone)),
        "lora": {
            "rank": config.r,
            "alpha": config.lora_alpha,
            "targets": sorted(config.target_modules),
            "last_layers": len(layers) if layers else None,
        },
        "reading": scorer.reading.as_config(),
    }
    (place / "adapter.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load_shared_scorer(folder: Path, backbone: Backbone, name: str) -> Scorer:
    """Put the reward model in ``folder`` on ``backbone`` as adapter ``name``.

    Raises UserError where it was not trained with LoRA, or on other weights than the backbone's.
    """
    place = folder / FOLDER
    if not (place / "adapter.json").exists():
        raise UserError(
            f"{folder}: can't share the policy's backbone: it was not trained with LoRA\n"
            "  train it with model.lora, or leave share_backbone off"
        )
    facts = json.loads((place / "adapter.json").read_text(encoding="utf-8"))
    found = fingerprint(Policy(backbone=backbone))
    if facts["base"] != found:
        raise UserError(
            f"{folder}: can't share the policy's backbone: it was trained on weights {facts['base']}, and "
            f"{backbone.name} has {found}\n  start both from one model, or leave share_backbone off"
        )
    add_adapter(backbone.hf, name, **facts["lora"])
    tensors = load_file(place / "adapter.safetensors")
    head = new_head(backbone, zero=True, bias="score.bias" in tensors, heads=len(tensors["score.weight"]))
    head.load_state_dict({n: tensors[f"score.{n}"] for n in head.state_dict()})
    with torch.no_grad():
        for full, parameter in adapter_parameters(backbone.hf, name).items():
            parameter.requires_grad_(False).copy_(tensors[full.replace(f".{name}.", ".")])
    # Adapters of before there were readings have none: they read the last token.
    return Scorer(backbone=backbone, head=head, adapter=name, reading=Reading(**facts.get("reading", {})))
