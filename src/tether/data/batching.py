"""The only place that forms batches: which groups share an optimizer step, and which rows are computed at once.

An optimizer step takes ``prompts_per_step`` groups from a permutation that depends on (seed, epoch) alone, so the step
number is the whole position in the data. A micro-batch only bounds memory: sums and counts make its size invisible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.core.batches import Batch, Group
from tether.core.errors import UserError


class OptimizerBatches(Sequence[tuple[Group, ...]]):
    """The groups of every optimizer step, by step number.

    ``epochs`` may be a fraction: 1.5 epochs see every group once and half of them twice. The last batch of an epoch is
    smaller when ``prompts_per_step`` does not divide the groups; no group is left out and none crosses an epoch.
    ``by_length``: every step sees short and long completions in the proportions of the whole, one group from each
    quantile of length, so that no step is pulled to one side by the lengths it happens to hold.
    """

    def __init__(
        self, groups: Sequence[Group], prompts_per_step: int, epochs: float, seed: int, *, by_length: bool = False
    ) -> None:
        if not groups:
            raise UserError("no groups to train on: every row was left out; the counts above say why")
        self.groups = tuple(groups)
        self.by_length = by_length
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        whole = int(epochs)
        rest = min(round((epochs - whole) * len(groups)), len(groups))
        if whole == 0:
            rest = max(rest, 1)
        self.steps_per_epoch = math.ceil(len(groups) / prompts_per_step)
        self._seen_in_last = rest
        self._whole_epochs = whole
        self._length = whole * self.steps_per_epoch + math.ceil(rest / prompts_per_step)
        self._cached: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    def order(self, epoch: int) -> list[int]:
        """The permutation of ``epoch``: a function of (seed, epoch) and the number of groups, nothing else."""
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.groups), generator=generator)
            self._cached = (epoch, (self._spread(order, generator) if self.by_length else order).tolist())
        return self._cached[1]

    def _spread(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """``order`` [N] with lengths spread over the steps: place i of a step of n places takes a group whose length
        is between the quantiles i/n and (i + 1)/n of all lengths."""
        lengths = torch.tensor([sum(map(len, g.completions)) for g in self.groups])[order]
        places = torch.arange(len(order))
        first = places // self.prompts_per_step * self.prompts_per_step
        sizes = (len(order) - first).clamp(max=self.prompts_per_step)
        quantiles = (places - first + torch.rand(len(order), generator=generator)) / sizes
        spread = torch.empty_like(order)
        spread[quantiles.argsort()] = order[lengths.argsort(stable=True)]
        return spread

    def __getitem__(self, step: int) -> tuple[Group, ...]:  # type: ignore[override]
        if not 0 <= step < self._length:
            raise IndexError(f"step {step} is outside 0..{self._length - 1}")
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.prompts_per_step
        last = first + self.prompts_per_step
        if epoch == self._whole_epochs:
            last = min(last, self._seen_in_last)
        return tuple(self.groups[i] for i in self.order(epoch)[first:last])

    def __iter__(self) -> Iterator[tuple[Group, ...]]:
        return (self[step] for step in range(self._length))


def check_budget(sizes: Sequence[tuple[str, int]], token_budget: int, *, what: str, refuse: bool) -> str | None:
    """What to say of groups (or rollouts) that exceed ``token_budget`` by themselves. ``sizes``: names and tokens.

    They are computed alone all the same; UserError where they are to be refused.
    """
    over = [(size, name) for name, size in sizes if size > token_budget]
    if not over:
        return None
    longest, name = max(over)
    found = (
        f"{len(over)} of {len(sizes)} {what} have more tokens than optim.tokens_per_micro_batch={token_budget}; "
        f"the longest, {name}, has {longest}"
    )
    if refuse:
        raise UserError(f"{found}\n  raise optim.tokens_per_micro_batch, leave long rows out, or optim.oversize=run")
    return f"{found}: each of them runs alone, in more memory than the rest"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Units of one prompt that stay together, and the tokens they compute (the prompt counted once)."""

    rows: tuple[int, ...]
    cost: int


def micro_batches(batch: Batch, token_budget: int) -> list[Tensor]:
    """Split ``batch`` into row indices [b_i] int64 whose packed cost is at most ``token_budget`` tokens each.

    Packed cost: each distinct prompt once, plus the lengths of its completions. Rows of one prompt stay together
    where they fit, else the prompt is computed again for each share. Units (``batch.unit_of``) are never split; a unit
    over the budget runs alone. Every row is in exactly one micro-batch.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    # First fit, longest first: within 11/9 of the fewest micro-batches (Johnson 1973).
    for piece in sorted(_pieces(batch, token_budget), key=lambda p: (-p.cost, p.rows)):
        slot = next((i for i, free in enumerate(room) if piece.cost <= free), None)
        if slot is None:
            bins.append(list(piece.rows))
            room.append(token_budget - piece.cost)
        else:
            bins[slot].extend(piece.rows)
            room[slot] -= piece.cost
    return [torch.tensor(sorted(rows)) for rows in bins]


def _pieces(batch: Batch, token_budget: int) -> list[_Piece]:
    """Units gathered by the prompts they use, cut into shares of at most ``token_budget`` tokens."""
    lengths, prompt_of = batch.lengths.tolist(), batch.prompt_of.tolist()
    rows_of: dict[int, list[int]] = {}
    for row, unit in enumerate(batch.unit_of.tolist()):
        rows_of.setdefault(unit, []).append(row)
    by_prompts: dict[tuple[int, ...], list[list[int]]] = {}
    for unit in rows_of.values():
        by_prompts.setdefault(tuple(sorted({prompt_of[r] for r in unit})), []).append(unit)

    pieces: list[_Piece] = []
    for prompts, units in by_prompts.items():
        shared = sum(len(batch.prompts[p]) for p in prompts)
        rows: list[int] = []
        cost = shared
        for unit in units:
            added = sum(lengths[r] for r in unit)
            if rows and cost + added > token_budget:
                pieces.append(_Piece(rows=tuple(rows), cost=cost))
                rows, cost = [], shared
            rows.extend(unit)
            cost += added
        pieces.append(_Piece(rows=tuple(rows), cost=cost))
    return pieces
