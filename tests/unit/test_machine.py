"""What Tether asks of the machine's allocator: in a process of its own, since it stays that way."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
# Says whether memory is kept now, and of 200 MiB that were taken and freed how much the process still holds.
PROGRAM = """
import ctypes
from tether.core.machine import keep_freed_memory

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
kept, before = keep_freed_memory(), held()
pieces = [libc.malloc(50 * 2**20) for _ in range(4)]
for piece in pieces:
    ctypes.memset(piece, 1, 50 * 2**20)
for piece in pieces:
    libc.free(piece)
print(kept, held() - before)
"""


@pytest.mark.parametrize(
    ("own", "kept"),
    [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, False)],
    ids=["nothing set", "a variable", "a tunable"],
)
def test_freed_memory_is_kept_unless_somebody_has_set_the_allocator(own: dict[str, str], kept: bool):
    bare = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**bare, **own}, capture_output=True, text=True)
    said, megabytes = done.stdout.split()
    assert said == str(kept)
    assert int(megabytes) >= 190 if kept else int(megabytes) < 60
