"""Which numbers a model gives, exactly: a digest to keep them under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tether import __version__
from tether.core.machine import processor
from tether.models import linear
from tether.models.adapters import merged_state
from tether.models.roles import Policy

# What a config says of how it was saved: the same model from another folder gives the same numbers.
ABOUT_THE_FILE = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})


def exact_digest(policy: Policy) -> str:
    """32 hex digits over all that the log-probs of given tokens under ``policy`` hang on, to the last bit.

    Every byte of the weights (``load.fingerprint`` takes a sample, which tells a person which model it is, and would
    miss a change of a few rows), the architecture's settings, the temperature, and what decides in which order sums
    are taken: layout, device, threads, versions of what computes. An adapter that is switched off changes nothing.
    About a second for each 800 MB and thread.
    """
    import transformers

    weights = merged_state(policy.backbone.hf, policy.adapter)
    facts = {
        "config": _settings(policy.backbone.hf.config.to_dict()),
        "temperature": policy.temperature,
        "layout": policy.backbone.mode,
        "autocast": str(policy.backbone.autocast),
        "device": _device(policy.device),
        "matmul": torch.get_float32_matmul_precision(),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    # hashlib lets other threads run.
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for part in pool.map(_of_tensor, *zip(*sorted(weights.items()), strict=True)):
            digest.update(part)
    return digest.hexdigest()[:32]


def _of_tensor(name: str, value: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.digest()


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of its file, in the configs inside it too."""
    kept = {k: v for k, v in config.items() if k not in ABOUT_THE_FILE}
    return {k: _settings(v) if isinstance(v, Mapping) else v for k, v in kept.items()}


def _device(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device)]
    # Libraries choose their kernels by the make of the processor, too.
    return [device.type, processor(), str(linear.SERVES), str(torch.get_num_threads())]
