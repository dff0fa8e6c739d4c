"""Best-of-n sampling: the yardstick every optimised policy is held against."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.errors import UserError
from tether.core.pass_at import pass_at_k as pass_at_k


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
    order = proxy.argsort(dim=1, stable=True)
    ranked = [s.to(torch.float64).gather(1, order) for s in (proxy, gold)]
    points = []
    for n in sizes:
        means = [float((r @ order_weights(proxy.shape[1], n)).mean()) for r in ranked]
        points.append(BestOfN(n=n, kl_bound=kl_bound(n), proxy=means[0], gold=means[1]))
    return points


def order_weights(total: int, n: int) -> Tensor:
    """C(k − 1, n − 1) / C(N, n) for k = 1 .. N, [N] float64: how often the k-th smallest of N is the largest of n drawn
    without replacement."""
    if not 1 <= n <= total:
        raise UserError(f"best of {n} needs at least {n} samples of each prompt, got {total}")
    return torch.tensor([math.comb(k, n - 1) / math.comb(total, n) for k in range(total)], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The reward of the best of ``n``: mean over ``prompts`` prompts and its standard error over them (NaN for one
    prompt). ``kl_bound``: nats, an upper bound."""

    n: int
    kl_bound: float
    reward: float
    error: float
    prompts: int


def reward_curve(pools: Sequence[Tensor], sizes: Sequence[int]) -> list[CurvePoint]:
    """E[max of n] for each n, from one pool of scored samples per prompt, [N_p] each and N_p >= n.

    Per prompt the exact mean over all n-subsets of its pool, so unbiased for n fresh samples (a U-statistic); with
    scores of 0 and 1 it is pass@n. The points share their samples: their errors are not independent.
    """
    if not pools:
        raise UserError("a reward curve needs the scores of one prompt or more, got none")
    if any(not bool(p.isfinite().all()) for p in pools):
        raise UserError("a reward curve needs finite scores; leave unscored samples out, and count them")
    points = []
    for n in sizes:
        means = torch.stack([p.to(torch.float64).sort().values @ order_weights(len(p), n) for p in pools])
        error = float(means.std() / math.sqrt(len(pools))) if len(pools) > 1 else math.nan
        points.append(
            CurvePoint(n=n, kl_bound=kl_bound(n), reward=float(means.mean()), error=error, prompts=len(pools))
        )
    return points


def doubling(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest`` itself."""
    return sorted({2**i for i in range(largest.bit_length()) if 2**i <= largest} | {largest})


def reached(counts: Sequence[int], share: float = 0.9) -> int:
    """The largest n that at least ``share`` of the prompts have samples for; 0 where none has any."""
    ordered = sorted(counts, reverse=True)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0


def majority_share(answers: Sequence[Hashable | None], right: Hashable) -> float:
    """The chance that the most frequent answer is ``right``, ties broken at random (Wang 2022, self-consistency). None
    is no answer and has no vote."""
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [a for a, count in votes.items() if count == most]
    return (right in winners) / len(winners)
