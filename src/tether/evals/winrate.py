"""Which of two policies answers better, by a score of each answer or by a judge who sees both."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Reward
from tether.core.text import Prompt, Rollout
from tether.evals.statistics import Interval, length_controlled_win_rate, paired_difference, win_rate


@dataclass(frozen=True, kw_only=True)
class PairwiseJudge:
    """``ask(prompt, first, second)``: 1 where the first answer is better, 0 where the second is, 0.5 for a tie.

    Asked in both orders; where the answers disagree, the pair is a tie.
    """

    ask: Callable[[Prompt, str, str], float]


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Ours against the baseline. A tie is half a win. Lengths are tokens.

    ``length_controlled``: at equal lengths. ``score_difference``: mean score, ours − baseline (pointwise only).
    ``first_share``: how often a pairwise judge chose the first answer, ties half: 0.5 has no position bias;
    ``disagreement``: share of pairs where the two orders disagree. ``unpaired``, ``unscored``: left out, by cause.
    """

    rate: Interval
    wins: int
    ties: int
    losses: int
    length_controlled: Interval
    score_difference: Interval | None
    our_score: float | None
    baseline_score: float | None
    our_length: float
    baseline_length: float
    first_share: float | None = None
    disagreement: float | None = None
    unpaired: int = 0
    unscored: int = 0

    def sentence(self) -> str:
        """One line for a person."""
        r = self.rate
        return (
            f"win rate {100 * r.estimate:.1f} % [{100 * r.low:.1f}, {100 * r.high:.1f}] over {r.n} prompts "
            f"({self.wins} won, {self.ties} tied, {self.losses} lost)"
        )


def pair_up(ours: Sequence[Rollout], baseline: Sequence[Rollout]) -> tuple[list[tuple[Rollout, Rollout]], int]:
    """The k-th answer of ours to a prompt with the k-th of the baseline to it; and how many have no partner."""
    waiting: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in baseline:
        waiting[rollout.prompt.id].append(rollout)
    taken: Counter[str] = Counter()
    pairs = []
    for rollout in ours:
        name = rollout.prompt.id
        if taken[name] < len(waiting[name]):
            pairs.append((rollout, waiting[name][taken[name]]))
            taken[name] += 1
    return pairs, len(ours) + len(baseline) - 2 * len(pairs)


def compare(
    ours: Sequence[Rollout],
    baseline: Sequence[Rollout],
    judge: Reward | PairwiseJudge,
    *,
    tie_margin: float = 0.0,
    seed: int = 0,
) -> WinRate:
    """Win rate of ``ours`` over ``baseline``, answers paired by prompt id.

    ``judge``: a Reward scores every answer (a difference up to ``tie_margin`` is a tie; NaN: unscored, left out and
    counted), a PairwiseJudge sees two at a time. Raises UserError where nothing can be compared, RewardFailure where
    the judge's answer is not a score.
    """
    pairs, unpaired = pair_up(ours, baseline)
    if not pairs:
        raise UserError("the two sides answered no prompt in common (prompts are matched by id)")
    if isinstance(judge, PairwiseJudge):
        outcomes, first_share, disagreement = _ask(pairs, judge)
        scores, kept = None, pairs
    else:
        first_share = disagreement = None
        scores = _score(pairs, judge)
        whole = ~scores.isnan().any(dim=1)
        scores, kept = scores[whole], [p for p, keep in zip(pairs, whole.tolist(), strict=True) if keep]
        if not kept:
            raise UserError(f"the judge scored none of the {len(pairs)} pairs (all NaN)")
        gap = scores[:, 0] - scores[:, 1]
        outcomes = torch.where(gap.abs() <= tie_margin, 0.5, (gap > 0).to(torch.float64))
    lengths = torch.tensor([(len(a.tokens), len(b.tokens)) for a, b in kept], dtype=torch.float64)
    prompts = [a.prompt.id for a, _ in kept]
    return WinRate(
        rate=win_rate(outcomes, clusters=prompts, seed=seed),
        wins=int((outcomes == 1).sum()),
        ties=int((outcomes == 0.5).sum()),
        losses=int((outcomes == 0).sum()),
        length_controlled=length_controlled_win_rate(outcomes, lengths[:, 0] - lengths[:, 1], clusters=prompts),
        score_difference=None
        if scores is None
        else paired_difference(scores[:, 0], scores[:, 1], clusters=prompts, seed=seed),
        our_score=None if scores is None else float(scores[:, 0].mean()),
        baseline_score=None if scores is None else float(scores[:, 1].mean()),
        our_length=float(lengths[:, 0].mean()),
        baseline_length=float(lengths[:, 1].mean()),
        first_share=first_share,
        disagreement=disagreement,
        unpaired=unpaired,
        unscored=len(pairs) - len(kept),
    )


def _score(pairs: Sequence[tuple[Rollout, Rollout]], reward: Reward) -> Tensor:
    """[N, 2] float64: ours, baseline."""
    sides = [reward([pair[side] for pair in pairs]).total.detach().to("cpu", torch.float64) for side in (0, 1)]
    for scores in sides:
        if scores.shape != (len(pairs),):
            raise RewardFailure(f"the judge returned scores of shape {tuple(scores.shape)} for {len(pairs)} answers")
        if scores.isinf().any():
            raise RewardFailure("the judge returned an infinite score")
    return torch.stack(sides, dim=1)


def _ask(pairs: Sequence[tuple[Rollout, Rollout]], judge: PairwiseJudge) -> tuple[Tensor, float, float]:
    """Outcomes [N] for ours, share of asks in which the first answer was chosen, share of disagreeing pairs."""
    outcomes, firsts, disagreeing = [], [], 0
    for a, b in pairs:
        ahead, behind = (_answer(judge, a.prompt, *texts) for texts in ((a.text, b.text), (b.text, a.text)))
        firsts += [ahead, behind]
        agree = ahead == 1 - behind
        disagreeing += not agree
        outcomes.append(ahead if agree else 0.5)
    return torch.tensor(outcomes, dtype=torch.float64), sum(firsts) / len(firsts), disagreeing / len(pairs)


def _answer(judge: PairwiseJudge, prompt: Prompt, first: str, second: str) -> float:
    value = float(judge.ask(prompt, first, second))
    if math.isnan(value) or value not in (0.0, 0.5, 1.0):
        raise RewardFailure(f"a pairwise judge answers 1, 0.5 or 0; for prompt {prompt.id!r} it answered {value}")
    return value
