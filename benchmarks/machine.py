"""The machine: what else runs on it, what it is, and the settings that every arm is started with."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
# Load of others, in cores, at which nothing is timed.
BUSY = 0.10
# Freed memory is kept, and large pieces lie in huge pages: about 1.2 × faster, on either side.
ALLOCATOR = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}


def settings(threads: int, *, allocator: bool = True) -> dict[str, str]:
    """Environment variables of every arm."""
    same = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return {**same, "TOKENIZERS_PARALLELISM": "false", **(ALLOCATOR if allocator else {})}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Seconds of processor time that the whole machine, and our own processes, have used up to a moment."""

    at: float
    everybody: float
    ours: float


def read_load(own: Iterable[int], proc: Path = Path("/proc")) -> Reading:
    """``own``: ids of our processes beside this one; those of their children count with them."""
    fields = (proc / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = (int(x) for x in fields[:7])
    wanted = {os.getpid(), *own}
    parents, used = _processes(proc)
    ours = sum(seconds for pid, seconds in used.items() if _descends(pid, wanted, parents))
    return Reading(at=time.monotonic(), everybody=(user + nice + system + irq + softirq) / TICKS, ours=ours)


def _processes(proc: Path) -> tuple[dict[int, int], dict[int, float]]:
    """Parent, and processor seconds, of every process."""
    parents, used = {}, {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            said = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        fields = said.rsplit(")", 1)[1].split()  # the name before may hold anything
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    return parents, used


def _descends(pid: int, wanted: set[int], parents: dict[int, int]) -> bool:
    while pid > 1:
        if pid in wanted:
            return True
        pid = parents.get(pid, 0)
    return False


def other_load(before: Reading, after: Reading) -> float:
    """Cores that others kept busy between two readings."""
    spent = (after.everybody - before.everybody) - (after.ours - before.ours)
    return max(0.0, spent / (after.at - before.at))


def quiet(seconds: float = 3.0, proc: Path = Path("/proc")) -> float:
    """The load of others over the next ``seconds``, in cores."""
    before = read_load((), proc)
    time.sleep(seconds)
    return other_load(before, read_load((), proc))


def memory_total() -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))


def describe() -> str:
    """One line: processor, cores, memory, system."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    memory = memory_total() / 2**30
    cores = os.cpu_count()
    return f"{model} ({', '.join(known) or 'no AVX'}), {cores} cores, {memory:.0f} GiB, {platform.system()}"
