"""How far a reward model can be trusted: accuracy, calibration, and how much of it is length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.errors import UserError
from tether.evals.statistics import Interval, wilson


@dataclass(frozen=True, kw_only=True)
class GapBin:
    """Pairs whose length gap (chosen − rejected, tokens) lies in [low, high]; ``longer_wins``: that rule's accuracy."""

    low: float
    high: float
    n: int
    accuracy: float
    longer_wins: float


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Pairs of like confidence: mean confidence σ(|s_1 − s_2|) and how often the model was right."""

    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True, kw_only=True)
class RewardQuality:
    """Accuracy on held-out pairs (equal scores count half) and its usual illusions.

    ``longer_wins``: accuracy of preferring the longer answer, the rule to beat. ``chosen_shorter``: accuracy where the
    better answer is the shorter one (NaN: none). ``ece``: expected calibration error. ``length_correlation``: Pearson,
    score against length over all answers (NaN where either is constant). ``margin``: mean of s_chosen − s_rejected.
    """

    accuracy: Interval
    longer_wins: float
    chosen_shorter: float
    by_gap: tuple[GapBin, ...]
    calibration: tuple[CalibrationBin, ...]
    ece: float
    length_correlation: float
    margin: float


def _right(difference: Tensor) -> Tensor:
    """1 where positive, 0 where negative, ½ at zero."""
    return 0.5 * (torch.sign(difference.to(torch.float64)) + 1)


def reward_quality(
    scores_chosen: Tensor, scores_rejected: Tensor, len_chosen: Tensor, len_rejected: Tensor, *, bins: int = 10
) -> RewardQuality:
    """All of the above from four tensors [N], row i one pair. Raises UserError on other shapes or non-finite scores."""
    columns = [t.detach().to("cpu", torch.float64) for t in (scores_chosen, scores_rejected, len_chosen, len_rejected)]
    n = len(columns[0])
    if n == 0 or any(c.shape != (n,) for c in columns):
        raise UserError(f"reward quality needs four tensors [N], N > 0; got {[tuple(c.shape) for c in columns]}")
    if not all(bool(c.isfinite().all()) for c in columns):
        raise UserError("a score is not finite; leave unscored pairs out, and count them")
    chosen, rejected, long_chosen, long_rejected = columns
    margin, gap = chosen - rejected, long_chosen - long_rejected
    right, longer = _right(margin), _right(gap)
    shorter = gap < 0
    calibration = calibration_curve(margin, bins)
    return RewardQuality(
        accuracy=wilson(float(right.sum()), n),
        longer_wins=float(longer.mean()),
        chosen_shorter=float(right[shorter].mean()) if bool(shorter.any()) else float("nan"),
        by_gap=_by_gap(gap, right, longer),
        calibration=calibration,
        ece=sum(b.n / n * abs(b.confidence - b.accuracy) for b in calibration),
        length_correlation=_pearson(torch.cat([chosen, rejected]), torch.cat([long_chosen, long_rejected])),
        margin=float(margin.mean()),
    )


def calibration_curve(margin: Tensor, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Confidence σ(|margin|) in ``bins`` equal steps of [0.5, 1] against the share of right answers (Guo 2017)."""
    confidence = torch.sigmoid(margin.to(torch.float64).abs())
    right = _right(margin)
    at = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return tuple(
        CalibrationBin(
            confidence=float(confidence[at == i].mean()), accuracy=float(right[at == i].mean()), n=int((at == i).sum())
        )
        for i in range(bins)
        if bool((at == i).any())
    )


def _by_gap(gap: Tensor, right: Tensor, longer: Tensor, most: int = 5) -> tuple[GapBin, ...]:
    """Up to ``most`` bins of about equal size by length gap; equal gaps are never split."""
    edges = torch.quantile(gap, torch.linspace(0, 1, min(most, len(gap)) + 1, dtype=torch.float64)[1:-1])
    at = torch.bucketize(gap, torch.unique(edges))
    return tuple(
        GapBin(
            low=float(gap[at == i].min()),
            high=float(gap[at == i].max()),
            n=int((at == i).sum()),
            accuracy=float(right[at == i].mean()),
            longer_wins=float(longer[at == i].mean()),
        )
        for i in sorted(set(at.tolist()))
    )


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else float("nan")
