"""What this machine's matrix products reach: the ceiling that a run's arithmetic is measured against, and whether
bfloat16 is the faster type. Measured in a second, because processors differ in both and no table has them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from tether.models.linear import product, use_fast_linear

# Seconds that one measurement may take, and the least number of tries in it; the best one counts.
SECONDS = 0.1
TRIES = 2
ROWS = 1024


def matmul_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of the best of two products: [1024, d] · [d, 4d] with the model's ``width`` d, and a large square one;
    each by the library that our linear layers use and by PyTorch's own choice.

    Measured once per process and number of threads. Whatever else runs on the machine meanwhile lowers it.
    """
    return _matmul_rate(device, dtype, width, torch.get_num_threads())


@cache
def _matmul_rate(device: torch.device, dtype: torch.dtype, width: int, threads: int) -> float:
    side = 2048 if device.type == "cpu" else 8192
    shapes = ((ROWS, width, 4 * width), (side, side, side))
    libraries = (product, nn.functional.linear)
    return max(product_rate(multiply, shape, device, dtype) for shape in shapes for multiply in libraries)


def product_rate(
    multiply: Callable[[Tensor, Tensor], object], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> float:
    """FLOP/s of ``multiply`` on x [n, i] and W [o, i], for ``shape`` (n, i, o)."""
    rows, inner, columns = shape
    x = torch.ones(rows, inner, device=device, dtype=dtype)
    weight = torch.ones(columns, inner, device=device, dtype=dtype)
    return 2 * rows * inner * columns / _best(device, lambda: multiply(x, weight))


def bfloat16_gain(device: torch.device, width: int) -> float:
    """Seconds in float32 over seconds under bfloat16 autocast, of forward and backward of two blocks d -> 4d -> d of
    the model's ``width`` d. Above 1: bfloat16 is the faster type here."""
    with torch.random.fork_rng(devices=[]):
        shapes = 2 * ((width, 4 * width), (4 * width, width))
        blocks = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes)).to(device)
    use_fast_linear(blocks)
    rows = torch.ones(ROWS, width, device=device)

    def step(enabled: bool) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            out = blocks(rows)
        out.float().sum().backward()

    return _best(device, lambda: step(False)) / _best(device, lambda: step(True))


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several tries, after one that warms up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    tries: list[float] = []
    while len(tries) < TRIES or sum(tries) < SECONDS:
        start = time.perf_counter()
        work()
        wait()
        tries.append(time.perf_counter() - start)
    return min(tries)
