"""What the machine can do at best: matrix products, and reading memory. Asked between the pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.arms.common import Conversation, serve
from tether.models.linear import product

SIDES = (2048,)
BYTES = 2**29


class Ceiling:
    """Best of two repetitions of each: a ceiling is what can be had."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.facts: dict[str, Any] = {}
        self.matrices = {n: torch.randn(n, n) for n in SIDES}
        self.wide = torch.ones(BYTES // 4)

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def steps(self, conversation: Conversation) -> None:
        while True:
            conversation.begin_step()
            flops = max(
                2 * n**3 / best(lambda m=m, f=multiply: f(m, m))
                for n, m in self.matrices.items()
                for multiply in (torch.matmul, product)  # PyTorch's choice of a library, and ours
            )
            conversation.end_step(flops=flops, bandwidth=BYTES / best(self.wide.sum))


def best(action: Callable[[], Any], repeats: int = 2) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    serve(Ceiling)
