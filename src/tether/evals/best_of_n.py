"""Best-of-n sampling: the yardstick every optimised policy is held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """What picking the best of ``n`` by the proxy yields. ``kl_bound``: nats, an upper bound on the KL."""

    n: int
    kl_bound: float
    proxy: float
    gold: float


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n: bounds KL(best of n ‖ start) from above (Stiennon 2020; Beirami 2024), exact without ties."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Tensor, gold: Tensor, sizes: Sequence[int]) -> list[BestOfN]:
    """Expected scores of the proxy's favourite among n samples, unbiased from N >= n samples of each prompt.

    ``proxy``, ``gold`` [P, N]. Averages over all n-subsets at once: with samples in rising order of proxy, the k-th
    (from 1) is the favourite of C(k−1, n−1) of the C(N, n) subsets (Nakano 2021). Ties in the proxy are broken by
    position.
    """
    if proxy.shape != gold.shape or proxy.dim() != 2:
        raise UserError(f"best-of-n needs proxy and gold of one shape [P, N]; got {proxy.shape} and {gold.shape}")
    total = proxy.shape[1]
    order = proxy.argsort(dim=1, stable=True)
    ranked = [s.to(torch.float64).gather(1, order) for s in (proxy, gold)]
    points = []
    for n in sizes:
        if not 1 <= n <= total:
            raise UserError(f"best of {n} needs at least {n} samples of each prompt, got {total}")
        weights = [math.comb(k, n - 1) / math.comb(total, n) for k in range(total)]
        means = [float((r @ torch.tensor(weights, dtype=torch.float64)).mean()) for r in ranked]
        points.append(BestOfN(n=n, kl_bound=kl_bound(n), proxy=means[0], gold=means[1]))
    return points
