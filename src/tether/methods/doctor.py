"""`tether doctor`: what this machine has, and the exact command for what it lacks."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tether

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "pydantic", "typer", "rich")
FILES = ("pyyaml", "jinja2", "pyarrow", "gguf")
GIB = 2**30
# Rows and columns of the matrices that are multiplied to see how fast that goes.
SIDE = 1024
# The demo keeps three small models with their optimizer states, and a run folder.
DEMO_MEMORY_GIB = 8
DEMO_DISK_GIB = 5
# Instruction sets that matter to the speed of bfloat16 and float32 on a CPU.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line. ``remedy`` is set where something is missing; ``serious`` where Tether can't work without it."""

    name: str
    found: str
    remedy: str = ""
    serious: bool = False


def run() -> int:
    """Print every finding; 1 where something serious is missing, else 0."""
    serious = 0
    for finding in findings():
        mark = "MISSING" if finding.serious else "note" if finding.remedy else "ok"
        print(f"{mark:<8}{finding.name:<16}{finding.found}")
        if finding.remedy:
            print(f"{'':<24}-> {finding.remedy}")
        serious += finding.serious
    print(f"{serious} thing(s) missing" if serious else "ready: try `tether demo`")
    return 1 if serious else 0


def findings() -> Iterator[Finding]:
    """Everything the doctor looks at, in order."""
    yield Finding(name="tether", found=tether.__version__)
    yield Finding(name="python", found=f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _processor()
    yield _memory()
    yield from _storage()
    yield _embedded()
    yield _hub()


def _packages() -> Iterator[Finding]:
    for name in (*REQUIRED, *FILES):
        try:
            yield Finding(name=name, found=metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name=name, found="not installed", remedy=f"pip install {name}", serious=True)


def _processor() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding(name="torch", found=f"can't be loaded: {error}", remedy="pip install torch", serious=True)
        return
    flags = [flag for flag in CPU_FLAGS if flag in _cpu_flags()]
    has = f", has {' '.join(flags)}" if flags else ""
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        name="processor",
        found=f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads and {capability}{has}",
    )
    yield _products()
    yield _kernels()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            yield Finding(name=f"cuda:{i}", found=f"{facts.name}, {facts.total_memory / GIB:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield Finding(name="gpu", found="Apple (mps)")
    else:
        yield Finding(name="gpu", found="none; everything runs on the processor")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())


def _memory() -> Finding:
    """What this process may use: the machine's free memory, or less where a container sets a limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return Finding(name="memory", found="unknown on this system")
    limit = _container_limit()
    within = "" if limit is None or limit >= total else f", this container may use {limit / GIB:.1f} GiB"
    usable = free if limit is None else min(free, limit)
    short = usable < DEMO_MEMORY_GIB * GIB
    return Finding(
        name="memory",
        found=f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{within}",
        remedy=f"the demo wants {DEMO_MEMORY_GIB} GiB; close something first" if short else "",
    )


def _container_limit() -> int | None:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def _storage() -> Iterator[Finding]:
    from tether.models.embedded import cache_folder

    cache = cache_folder()
    for name, path in {"disk (here)": Path.cwd(), "cache folder": cache}.items():
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        found = f"{path}, {free / GIB:.1f} GiB free"
        if not os.access(there, os.W_OK):
            yield Finding(name=name, found=f"{found}, can't be written to", remedy=_elsewhere(name), serious=True)
        else:
            short = free < DEMO_DISK_GIB * GIB
            yield Finding(name=name, found=found, remedy=f"the demo wants {DEMO_DISK_GIB} GiB" if short else "")


def _elsewhere(name: str) -> str:
    return "set TETHER_CACHE to a folder of yours" if name == "cache folder" else "go to a folder of yours"


def _embedded() -> Finding:
    from tether.core.errors import MissingModel
    from tether.models.embedded import EMBEDDED, FETCH, cache_folder, embedded_gguf

    name = next(iter(EMBEDDED))
    if (cache_folder() / "models" / name / "model.safetensors").exists():
        return Finding(name="model", found=f"{name}, converted and in the cache")
    try:
        embedded_gguf(name)
    except MissingModel:
        return Finding(name="model", found=f"{name} is not installed", remedy=FETCH, serious=True)
    return Finding(name="model", found=f"{name}, installed; converted on first use (about 20 s)")


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    home = os.environ.get("HF_HOME")
    place = f"; HF_HOME={home}" if home else ""
    if offline:
        return Finding(name="hub", found=f"HF_HUB_OFFLINE is set: hub ids open from the local cache only{place}")
    return Finding(name="hub", found=f"HF_HUB_OFFLINE is not set: hub ids may be fetched{place}")


def _kernels() -> Finding:
    """Whether the compiled kernels can be had; compiles them if they are not there yet."""
    from tether.core.machine import cxx_version
    from tether.models.linear import SERVES
    from tether.models.native import build

    if not SERVES:
        return Finding(name="kernels", found="none for this processor: training and decoding go through PyTorch")
    said: list[str] = []
    if build.library(said.append) is not None:
        return Finding(name="kernels", found=f"compiled ({cxx_version()})")
    if not said:
        return Finding(
            name="kernels", found=f"switched off by {build.SWITCH}=0: training and decoding go through PyTorch"
        )
    return Finding(name="kernels", found=said[-1].splitlines()[0], remedy="install g++ or clang++, or set CXX")


def _products() -> Finding:
    """How fast matrix products are, and whose the linear layers use."""
    import torch

    from tether.backends.local.ceiling import product_rate
    from tether.models.linear import SERVES, product

    def rate(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], kind: torch.dtype) -> str:
        return f"{product_rate(multiply, (SIDE, SIDE, SIDE), torch.device('cpu'), kind) / 1e9:.0f}"

    found = f"{rate(torch.nn.functional.linear, torch.float32)} GFLOP/s in float32 by PyTorch"
    if SERVES:
        found += f", {rate(product, torch.float32)} by oneDNN, which linear layers use"
    return Finding(name="products", found=f"{found}; {rate(product, torch.bfloat16)} in bfloat16 (optim.autocast)")
