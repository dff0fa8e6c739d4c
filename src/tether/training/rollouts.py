"""What a step learns from: prompts, sampled and scored. The first half of the online loop.

``Collector`` draws a step's rollouts and scores them; where the algorithm asks for it, it also replaces prompts that
teach nothing (dynamic sampling), punishes length softly, and scores a greedy completion of each prompt as a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tether.algorithms import Algorithm
from tether.core.errors import RewardFailure
from tether.core.protocols import Reward, Sampler, SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.rewards.beside import sample_beside
from tether.rewards.shaping import overlong_penalty
from tether.runs.clock import Split

# Rounds of one step draw with seeds this far apart, so that a prompt that comes again is answered anew.
ROUND_STRIDE = 10**12


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Rollouts, group by group, and their scores. ``baselines`` [N]: the score of the greedy completion of the same
    prompt, where it was asked for."""

    rollouts: list[Rollout]
    scores: Scores
    baselines: Tensor | None = None

    @property
    def groups(self) -> list[int]:
        """The groups in their order."""
        return list(dict.fromkeys(r.group for r in self.rollouts))

    def keep(self, flags: Sequence[bool]) -> Scored:
        """The flagged ones."""
        kept = torch.tensor(flags, dtype=torch.bool)
        return Scored(
            rollouts=[r for r, ok in zip(self.rollouts, flags, strict=True) if ok],
            scores=Scores(
                total=self.scores.total[kept], parts={name: part[kept] for name, part in self.scores.parts.items()}
            ),
            baselines=None if self.baselines is None else self.baselines[kept],
        )

    def of_groups(self, groups: Sequence[int]) -> Scored:
        return self.keep([r.group in set(groups) for r in self.rollouts])


def join(pieces: Sequence[Scored]) -> Scored:
    """Several rounds as one; groups are numbered anew, 0, 1, ..."""
    rollouts: list[Rollout] = []
    first = 0
    for piece in pieces:
        number = {group: first + i for i, group in enumerate(piece.groups)}
        rollouts += [replace(r, group=number[r.group]) for r in piece.rollouts]
        first += len(number)
    # A part that a round was not asked for (it stands behind a gate) is NaN there, as everywhere.
    names = dict.fromkeys(name for p in pieces for name in p.scores.parts)
    parts = {
        n: torch.cat([p.scores.parts.get(n, torch.full_like(p.scores.total, math.nan)) for p in pieces]) for n in names
    }
    return Scored(rollouts=rollouts, scores=Scores(total=torch.cat([p.scores.total for p in pieces]), parts=parts))


def overlong_cache(share: float, limit: int) -> int:
    """``share`` of the length limit in tokens, at least one."""
    return max(1, round(share * limit))


def spread(totals: Tensor, groups: Sequence[int]) -> dict[int, float]:
    """group -> the largest minus the smallest of its totals [N]; 0 where the group can't be told apart."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return {group: float(totals[of].max() - totals[of].min()) for group, of in rows.items()}


@dataclass(kw_only=True, eq=False)
class Collector:
    """A step number -> its scored rollouts. ``prompts(first, count)`` gives prompts of an endless stream, by position;
    ``resample_rounds``: rounds of fresh prompts that dynamic sampling may add to a step.

    ``taken``, the prompts taken so far, is all that a resumed run needs to be told.
    """

    algorithm: Algorithm
    prompts: Callable[[int, int], Sequence[Prompt]]
    prompts_per_step: int
    group_size: int
    sampler: Sampler
    settings: SamplingSettings
    reward: Reward
    seed: int
    split: Split
    skip_failed_rewards: bool = False
    resample_rounds: int = 0
    taken: int = 0

    def __call__(self, step: int) -> tuple[Scored, dict[str, float]]:
        """The rollouts of ``step`` (from 1), and what was left out or drawn anew on the way to them."""
        found, counts = self._gather(step) if self.algorithm.dynamic_sampling else self._draw(step, 0)
        if "greedy" in self.algorithm.needs and found.rollouts:
            found, described = self._with_greedy(found, step)
            counts["reward/dropped"] += described.pop("reward/dropped")
            counts |= described
        if not found.rollouts:
            raise RewardFailure(
                f"step {step}: the reward left all {counts['reward/dropped']:g} completions unscored, so "
                "no completion of the step is left\n  mend the reward"
            )
        return self._shaped(found), counts

    def _draw(self, step: int, round_: int, count: int | None = None) -> tuple[Scored, dict[str, float]]:
        """The next ``count`` prompts of the stream (by default those of a step), answered and scored."""
        prompts = self.prompts(self.taken, self.prompts_per_step if count is None else count)
        self.taken += len(prompts)
        with self.split("sample"):
            rollouts = self._sampled(prompts, self.group_size, self.settings, self._seed(step, round_))
            self.split.tokens["sample"] += sum(len(r.tokens) for r in rollouts)
        with self.split("reward"):  # what was not judged beside the sampling, and the waiting for what was
            return self._scored(rollouts)

    def _sampled(self, prompts: Sequence[Prompt], n: int, settings: SamplingSettings, seed: int) -> list[Rollout]:
        return sample_beside(self.sampler, self.reward, prompts, n=n, settings=settings, seed=seed)

    def _seed(self, step: int, round_: int) -> int:
        return self.seed * 1_000_003 + step + round_ * ROUND_STRIDE

    def _scored(self, rollouts: list[Rollout]) -> tuple[Scored, dict[str, float]]:
        """Scores; a rollout without a usable score (NaN marks it) is left out and counted, where that is allowed."""
        scores = self.reward(rollouts)
        name = getattr(self.reward, "name", type(self.reward).__name__)
        if scores.total.shape != (len(rollouts),):
            raise RewardFailure(
                f"the reward {name} gave scores of shape {tuple(scores.total.shape)} for {len(rollouts)} completions"
            )
        found = Scored(rollouts=rollouts, scores=scores)
        usable = torch.isfinite(scores.total)
        unusable = int((~usable).sum())
        if unusable and not self.skip_failed_rewards:
            first = rollouts[int((~usable).nonzero()[0])]
            raise RewardFailure(
                f"{unusable} of {len(rollouts)} completions were left unscored by the reward {name}; the first is of "
                f"prompt {first.prompt.id}: {first.text[:120]!r}\n"
                "  mend the reward, or leave such completions out with on_reward_failure=skip"
            )
        return found.keep(usable.tolist()) if unusable else found, {"reward/dropped": float(unusable)}

    def _gather(self, step: int) -> tuple[Scored, dict[str, float]]:
        """Dynamic sampling (Yu 2025, DAPO, eq. 11): groups whose rewards are all equal are replaced by fresh prompts,
        until the step has all its prompts or the rounds are used up; it is then filled up with such groups."""
        found, counts = self._draw(step, 0)
        useful, dull = _parted(found)
        rounds = replaced = 0
        while (missing := self.prompts_per_step - len(useful.groups)) and rounds < self.resample_rounds:
            rounds, replaced = rounds + 1, replaced + missing
            fresh, more = self._draw(step, rounds, missing)
            counts["reward/dropped"] += more["reward/dropped"]
            fresh_useful, fresh_dull = _parted(fresh)
            useful, dull = join([useful, fresh_useful]), join([dull, fresh_dull])
        counts |= {"groups/replaced": float(replaced), "groups/rounds": float(rounds)}
        return join([useful, dull.of_groups(dull.groups[:missing])]), counts

    def _with_greedy(self, found: Scored, step: int) -> tuple[Scored, dict[str, float]]:
        """The score of each prompt's greedy completion, drawn under the same limits (Li 2023, ReMax)."""
        prompts = list({r.group: r.prompt for r in found.rollouts}.values())
        settings = replace(self.settings, temperature=0.0, top_p=1.0, top_k=0)
        with self.split("baseline"):
            drawn = self._sampled(prompts, 1, settings, self._seed(step, 0))
            greedy, counts = self._scored(drawn)
        # Group i of the greedy completions answers the i-th group of the rollouts.
        totals = self._shaped(greedy).scores.total.tolist()
        order = found.groups
        score_of = {order[r.group]: total for r, total in zip(greedy.rollouts, totals, strict=True)}
        kept = found.keep([r.group in score_of for r in found.rollouts])
        counts["reward/dropped"] = float(len(found.rollouts) - len(kept.rollouts))
        counts["reward/greedy"] = sum(totals) / max(len(totals), 1)
        counts["rollout/greedy_length"] = sum(len(r.tokens) for r in drawn) / max(len(drawn), 1)
        return replace(kept, baselines=torch.tensor([score_of[r.group] for r in kept.rollouts])), counts

    def _shaped(self, found: Scored) -> Scored:
        """The soft punishment of length is a part of the reward, where the algorithm has one."""
        if not self.algorithm.overlong_cache:
            return found
        limit = self.settings.max_new_tokens
        lengths = torch.tensor([len(r.tokens) for r in found.rollouts])
        penalty = overlong_penalty(lengths, limit, overlong_cache(self.algorithm.overlong_cache, limit))
        scores = found.scores
        return replace(found, scores=Scores(total=scores.total + penalty, parts={**scores.parts, "overlong": penalty}))


def _parted(found: Scored) -> tuple[Scored, Scored]:
    """Groups whose rewards differ, and groups whose rewards are all equal."""
    widths = spread(found.scores.total, [r.group for r in found.rollouts])
    return found.of_groups([g for g in widths if widths[g]]), found.of_groups([g for g in widths if not widths[g]])
