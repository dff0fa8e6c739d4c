"""pass@k: how often one of k answers to a prompt is right, from several answers that a verifier has seen. float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.errors import UserError
from tether.core.intervals import Interval, share_interval


def pass_at_k(n: int, right: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one (Chen 2021, eq. 1).
    Unbiased for k fresh samples."""
    if not 0 <= right <= n:
        raise UserError(f"pass@k: {right} right of {n} samples can't be")
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs at least {k} samples of each prompt, got {n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


@dataclass(frozen=True, kw_only=True)
class PassAt:
    """pass@``k``: the mean over prompts with its 95 % interval, and ``rates``, group -> its own pass@k, of those that
    have ``k`` scored answers or more."""

    k: int
    interval: Interval
    rates: Mapping[int, float]

    def __str__(self) -> str:
        """As it is printed: ``pass@4 12.5 % [3.5, 36.0]``."""
        i = self.interval
        return f"pass@{self.k} {100 * i.estimate:.1f} % [{100 * i.low:.1f}, {100 * i.high:.1f}]"


def pass_at(scores: Tensor, groups: Sequence[int], ks: Sequence[int], what: str = "judge") -> list[PassAt]:
    """pass@k for each of ``ks``. ``scores`` [N]: 1 right, 0 wrong, NaN unscored (left out); ``groups`` [N]: the prompt.

    The interval is Wilson's at the effective sample size of the prompts' own rates (``share_interval``): answers to one
    prompt are not independent, and where no answer is right it still has a width. A prompt counts for at most as many
    observations as k-subsets of its answers that share none (or 2). ``what`` named the verifier, for messages.
    Raises UserError for any other score, and where no prompt has k scored answers.
    """
    values = scores.to(torch.float64)
    scored = values.isfinite()
    wrong = values[scored & (values != 0) & (values != 1)]
    if len(wrong):
        raise UserError(
            f"{what}: pass@k counts right and wrong answers, scores of 1 and 0; {len(wrong)} of {int(scored.sum())} "
            f"scores are others, the first is {float(wrong[0]):.6g}\n"
            "  name a verifier (exact_number, mathematics, code_tests, ...) by itself, without weights and penalties"
        )
    counts: dict[int, tuple[int, int]] = {}
    for group, value, known in zip(groups, values.tolist(), scored.tolist(), strict=True):
        n, right = counts.get(group, (0, 0))
        counts[group] = (n + known, right + (int(value) if known else 0))
    return [_pass_at(counts, k) for k in ks]


def _pass_at(counts: Mapping[int, tuple[int, int]], k: int) -> PassAt:
    enough = {group: found for group, found in counts.items() if found[0] >= k}
    if not enough:
        raise UserError(f"pass@{k}: none of the {len(counts)} prompts has {k} scored answers; draw more of each")
    rates = {group: pass_at_k(n, right, k) for group, (n, right) in enough.items()}
    # Rows of a prompt are one cluster and narrow nothing; their number only bounds the effective sample size.
    rows = max(2, min(n for n, _ in enough.values()) // k)
    repeated = torch.tensor(list(rates.values()), dtype=torch.float64).repeat_interleave(rows)
    clusters = [group for group in rates for _ in range(rows)]
    return PassAt(k=k, interval=share_interval(repeated, clusters), rates=rates)
