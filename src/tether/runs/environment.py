"""What a run ran on: versions and machine facts. No command line, no host name, few environment variables."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from tether.core.machine import cxx_version, memory_bytes, processor

PACKAGES = ("tether-rlhf", "torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
# They change speed or bits, and never hold a secret.
VARIABLES = ("TETHER_NATIVE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")


def facts() -> dict[str, Any]:
    """Time (UTC), Python, packages, processor, memory (bytes), compiler, accelerators; JSON-able."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "compiler": cxx_version(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **_torch_facts(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_facts() -> dict[str, Any]:
    # Asked only where torch is loaded already: it takes seconds to import, and this must not be the reason.
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {"threads": torch.get_num_threads(), "accelerators": names}
