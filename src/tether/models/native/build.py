"""From the C++ beside this file to a loaded library: compiled once for a source and a compiler, then kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tether.core.machine import cxx, cxx_version
from tether.models.embedded import cache_folder
from tether.models.linear import SERVES

# Numbers in a vector: `LANES` of kernels.h.
LANES = 16
_HERE = Path(__file__).parent
# For any CPU with AVX-512: the flags say no more than what `SERVES` has asked.
_FLAGS = ("-std=c++17", "-O3", "-march=x86-64-v4", "-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC", "-w")
# "0" leaves the kernels alone: no compiler is called.
SWITCH = "TETHER_NATIVE"


def _flags() -> list[str]:
    return [*_FLAGS, *(["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else [])]


def _openmp() -> list[str]:
    """The OpenMP that PyTorch brings along, if it does: a second one's threads would fight for the same cores."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]


def _digest(command: list[str]) -> str:
    """What the result depends on: the sources, the flags, and which compiler it is."""
    found = hashlib.sha256("\0".join([str(cxx_version()), *command]).encode())
    for path in sorted(_HERE.glob("*.[ch]*")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _compiled(say: Callable[[str], None]) -> Path:
    command = [str(cxx()), *_flags()]
    folder = cache_folder() / "native"
    path = folder / f"kernels-{_digest(command)}.so"
    if path.exists():
        return path
    say(f"compiling the kernels once (about 10 s): {command[0]} -> {path}")
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Built beside its place and renamed: another process never loads half a file.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as work:
        made = Path(work) / path.name
        sources = map(str, sorted(_HERE.glob("*.cpp")))
        build = [*command, *sources, *_openmp(), "-o", str(made)]
        done = subprocess.run(build, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise OSError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0])
        # Nobody else's to write, whatever the umask says: see _check_own.
        made.chmod(0o755)
        made.rename(path)
    return path


def _check_own(path: Path) -> None:
    """A library runs code: OSError if somebody else could have written it."""
    for place in (path, path.parent):
        found = place.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
            raise OSError(f"{place} can be written by other users: make it yours alone, or set TETHER_CACHE")


_loaded: list[ctypes.CDLL | None] = []


def library(say: Callable[[str], None] = lambda line: None) -> ctypes.CDLL | None:
    """The kernels, or None where they can't be had, which ``say`` hears of. Looked for once in a process."""
    if not SERVES or os.environ.get(SWITCH) == "0":
        return None
    if not _loaded:
        _loaded.append(_load(say))
    return _loaded[0]


def _load(say: Callable[[str], None]) -> ctypes.CDLL | None:
    if cxx() is None:
        say("no C++ compiler was found: training and decoding go through PyTorch (slower, same numbers to rounding)")
        return None
    try:
        path = _compiled(say)
        _check_own(path)
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as problem:
        say(f"the kernels can't be had: training and decoding go through PyTorch (slower)\n  {problem}")
        return None
    kernels.tether_decode_scratch.restype = ctypes.c_int64
    for name in ("decode", "product", "attention", "attention_backward", "log_sums", "pulled"):
        getattr(kernels, f"tether_{name}").restype = None
    return kernels
