"""Groups, batches and outputs: the unit that flows through the house, and the index convention.

Index convention: slot ``t`` of every per-token tensor speaks of completion token ``t``: ``logprobs[b, t]`` is the
log-prob of ``tokens[b, t]`` given its prompt and ``tokens[b, :t]``. No tensor holds a prompt token beside ``prompts``.
``True`` in a mask means "counts". B: completions, T: the longest completion, P: prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from tether.core.text import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One prompt, stored once, and its completions: what every objective of RLHF scores.

    ``prompt`` [P] int64; ``completions[i]`` [C_i] int64; ``loss_masks[i]`` [C_i] bool, False on tokens that are present
    but not trained (a user turn inside a multi-turn conversation, tool output). ``margin``: for pairs;
    ``desirable``: for one completion that was judged by itself; ``ranks``: one per completion, 0 the best, equal ranks
    are ties; ``labels`` [C] bool: for one completion made of steps, whether the step that ends at a token is right
    (``loss_masks`` says where steps end). ``draws``: how often each head of a reward model of several draws the group.
    """

    id: str
    prompt: Tensor
    completions: tuple[Tensor, ...]
    loss_masks: tuple[Tensor, ...]
    margin: float | None = None
    desirable: bool | None = None
    ranks: tuple[int, ...] | None = None
    labels: Tensor | None = None
    draws: tuple[int, ...] | None = None

    @property
    def token_count(self) -> int:
        """Tokens the packed forward computes: the prompt once, and every completion."""
        return len(self.prompt) + sum(len(c) for c in self.completions)


def pad_rows(rows: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Stack rows [C_i] or [C_i, k] of any lengths into [B, T] or [B, T, k], zeros (False) after the end of each."""
    width = max((len(r) for r in rows), default=0) if width is None else width
    out = torch.zeros(len(rows), width, *rows[0].shape[1:], dtype=rows[0].dtype, device=rows[0].device)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Completions of some prompts.

    ``prompts``: tuple of [P_i] int64, each stored once; ``prompt_of`` [B] int64 indexes it; ``tokens`` [B, T] int64;
    ``lengths`` [B] int64, tokens present in each row; ``loss_mask`` [B, T] bool, tokens that count. ``draws`` [B, K]
    int64: how often head k of a reward model's K learns from the row; None: each from every row, once.
    """

    prompts: tuple[Tensor, ...]
    prompt_of: Tensor
    tokens: Tensor
    lengths: Tensor
    loss_mask: Tensor
    draws: Tensor | None = None

    rows_per_unit = 1

    @classmethod
    def from_groups(cls, groups: Sequence[Group], **extra: object) -> Self:
        """Lay groups out as one batch, in order. ``extra``: the further fields of a subclass."""
        rows = [c for g in groups for c in g.completions]
        masks = [m for g in groups for m in g.loss_masks]
        draws = [g.draws for g in groups if g.draws is not None for _ in g.completions]
        return cls(
            prompts=tuple(g.prompt for g in groups),
            prompt_of=torch.tensor([i for i, g in enumerate(groups) for _ in g.completions]),
            tokens=pad_rows(rows),
            lengths=torch.tensor([len(r) for r in rows]),
            loss_mask=pad_rows(masks),
            draws=torch.tensor(draws) if draws and len(draws) == len(rows) else None,
            **extra,
        )

    @property
    def size(self) -> int:
        return len(self.lengths)

    @property
    def unit_of(self) -> Tensor:
        """[B] int64: rows of one number only make sense together (a chosen and its rejected, the completions of a
        ranking) and are never split between micro-batches."""
        return torch.arange(self.size) // self.rows_per_unit

    @property
    def present(self) -> Tensor:
        """[B, T] bool: slots that hold a token, trained or not."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def select(self, rows: Tensor) -> Self:
        """The batch of these rows (a 1-D index), trimmed to their longest completion, unused prompts dropped."""
        rows = rows.to(self.lengths.device)
        lengths = self.lengths[rows]
        width = int(lengths.max()) if len(rows) else 0
        used, prompt_of = torch.unique(self.prompt_of[rows], return_inverse=True)
        changed: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, Tensor):
                continue
            if f.name in PER_UNIT:
                changed[f.name] = value[rows[:: self.rows_per_unit] // self.rows_per_unit]
            elif value.dim() == 2 and f.name != "draws":
                changed[f.name] = value[rows, :width]
            else:
                changed[f.name] = value[rows]
        changed["prompts"] = tuple(self.prompts[i] for i in used.tolist())
        changed["prompt_of"] = prompt_of
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, prompts=tuple(p.to(device) for p in self.prompts), **moved)


# Fields with one entry per unit of ``rows_per_unit`` rows instead of one per row.
PER_UNIT = frozenset({"margin"})


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceBatch(Batch):
    """Row 2i is chosen, row 2i+1 rejected. ``ref_logprobs`` [B, T]; ``margin`` [B/2] or None."""

    ref_logprobs: Tensor | None = None
    margin: Tensor | None = None

    rows_per_unit = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingBatch(Batch):
    """K-wise rankings: the completions of one entry of ``prompts`` are one ranking, of any size.

    ``ranks`` [B] int64: 0 is best within its ranking, equal ranks are ties.
    """

    ranks: Tensor

    @property
    def unit_of(self) -> Tensor:
        return self.prompt_of


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch(Batch):
    """Solutions in steps. ``loss_mask`` is True at the last token of each step that somebody judged, and nowhere else;
    ``labels`` [B, T] bool says there whether the step is right.
    """

    labels: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgementBatch(Batch):
    """Completions that were found desirable or not, each by itself. ``desirable`` [B] bool; ``ref_logprobs`` [B, T].

    ``kl_baseline`` [B]: one number of the whole optimizer batch, the same in every row (KTO's reference point z_0).
    """

    desirable: Tensor
    ref_logprobs: Tensor | None = None
    kl_baseline: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyBatch(Batch):
    """Rollouts ready for an update; every tensor [B, T] float32 and without gradient.

    ``old_logprobs``: the policy at the start of the update; ``sampler_logprobs``: as the sampler reported them;
    ``values``: the critic at the start of the update; ``returns``: its targets.
    """

    old_logprobs: Tensor
    advantages: Tensor
    returns: Tensor | None = None
    values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """What a forward pass says about a batch, prompt-free: losses see this and nothing else of the model.

    ``logprobs`` [B, T] of the completion tokens; ``entropy`` [B, T] nats; ``top_logprobs`` [B, T, k] without gradient
    and ``top_tokens`` [B, T, k] int64: the k most likely tokens in each place, most likely first; ``values`` [B, T]
    (critic: the value of the state *before* token t); ``token_scores`` [B, T] (reward model: of the state *at* token
    t); ``scores`` [B] (reward model: one for the completion, at the last token present unless it reads otherwise);
    ``head_scores`` [B, K] (reward model of K heads, whose mean the others are). Absent parts are None.
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    token_scores: Tensor | None = None
    head_scores: Tensor | None = None


def states_at(before: Tensor, last: Tensor, lengths: Tensor) -> Tensor:
    """Of the state at each token, from those before each token [B, T] and at the last one [B] -> [B, T].

    The state at token t is the one before token t + 1; it has a slot of its own only at the end.
    """
    after = torch.nn.functional.pad(before[:, 1:], (0, 1))
    ends = torch.arange(before.shape[1], device=before.device) == lengths[:, None] - 1
    return torch.where(ends, last[:, None], after)


def rollout_batch(rollouts: Sequence[Rollout]) -> Batch:
    """Rollouts as one batch, prompts stored once; row i is rollout i."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return Batch.from_groups(
        [
            Group(
                id=rs[0].prompt.id,
                prompt=rs[0].prompt_tokens,
                completions=tuple(r.tokens for r in rs),
                loss_masks=tuple(r.sampled for r in rs),
            )
            for rs in groups.values()
        ]
    )
