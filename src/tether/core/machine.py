"""What this machine is: its processor's name, its memory, its compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path


def processor() -> str:
    """The name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """All the memory there is; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


# What mallopt(3) calls two of its parameters.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for what comes next, and whether it does so now.

    A training step takes and frees gigabytes. By itself glibc hands large pieces back to the system, which clears them
    at the next step: an eighth of it. Where somebody has set the allocator by the environment, that stays.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if own or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions refuse more than 32 MiB.
    large = mallopt(_MMAP_THRESHOLD, 2**31 - 1) or mallopt(_MMAP_THRESHOLD, 2**25)
    return bool(large and mallopt(_TRIM_THRESHOLD, -1))


def cxx() -> str | None:
    """The C++ compiler: $CXX, else the first of g++ and clang++ on the path."""
    own = os.environ.get("CXX", "").split()
    return next((found for name in (*own[:1], "g++", "clang++") if (found := shutil.which(name))), None)


def cxx_version() -> str | None:
    """What the compiler says of itself in its first line; None without one."""
    compiler = cxx()
    if compiler is None:
        return None
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.partition("\n")[0]
