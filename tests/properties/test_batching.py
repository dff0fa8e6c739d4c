"""Batches: every group and row exactly once, within the budget, the same in every run."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tether.core.batches import Batch, Group, PreferenceBatch, RankingBatch
from tether.core.errors import UserError
from tether.data.batching import OptimizerBatches, check_budget, micro_batches


def group(name: str, prompt: int, completions: list[int]) -> Group:
    rows = tuple(torch.arange(n) for n in completions)
    return Group(
        id=name,
        prompt=torch.arange(prompt),
        completions=rows,
        loss_masks=tuple(torch.ones(n, dtype=torch.bool) for n in completions),
    )


def groups_of(sizes: list[tuple[int, list[int]]]) -> list[Group]:
    return [group(str(i), prompt, completions) for i, (prompt, completions) in enumerate(sizes)]


def packed_cost(batch: Batch, rows: list[int]) -> int:
    """Written from the definition, apart from the code under test."""
    prompts = {int(batch.prompt_of[r]) for r in rows}
    return sum(len(batch.prompts[p]) for p in prompts) + sum(int(batch.lengths[r]) for r in rows)


lengths = st.integers(1, 40)
ragged = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=6)), min_size=1, max_size=12)
paired = st.lists(st.tuples(lengths, st.lists(lengths, min_size=2, max_size=2)), min_size=1, max_size=12)


@given(sizes=ragged, budget=st.integers(1, 200))
def test_micro_batches_cover_every_row_once_within_the_budget(sizes, budget):
    batch = Batch.from_groups(groups_of(sizes))
    found = micro_batches(batch, budget)
    assert Counter(r for rows in found for r in rows.tolist()) == Counter(range(batch.size))
    for rows in found:
        assert len(rows) == 1 or packed_cost(batch, rows.tolist()) <= budget


@given(sizes=paired, budget=st.integers(1, 200))
def test_pairs_are_never_split(sizes, budget):
    batch = PreferenceBatch.from_groups(groups_of(sizes))
    found = micro_batches(batch, budget)
    assert Counter(r for rows in found for r in rows.tolist()) == Counter(range(batch.size))
    for rows in found:
        pairs = rows.view(-1, 2)
        assert (pairs[:, 0] % 2 == 0).all() and (pairs[:, 1] == pairs[:, 0] + 1).all()
        assert len(pairs) == 1 or packed_cost(batch, rows.tolist()) <= budget


@given(sizes=ragged, budget=st.integers(1, 200))
def test_rankings_are_never_split(sizes, budget):
    groups = groups_of(sizes)
    ranks = torch.tensor([rank for g in groups for rank in range(len(g.completions))])
    batch = RankingBatch.from_groups(groups, ranks=ranks)
    found = micro_batches(batch, budget)
    assert Counter(r for rows in found for r in rows.tolist()) == Counter(range(batch.size))
    for rows in found:
        part = batch.select(rows)
        for unit in part.unit_of.unique():
            mine = part.ranks[part.unit_of == unit].tolist()
            assert mine == list(range(len(mine)))
        assert Counter(part.prompt_of.tolist()) == Counter(
            batch.prompt_of[rows].unique(return_inverse=True)[1].tolist()
        )
        assert len(part.prompts) == 1 or packed_cost(batch, rows.tolist()) <= budget


@given(n=st.integers(1, 40), per_step=st.integers(1, 12), epochs=st.floats(0.3, 2.5), seed=st.integers(0, 3))
def test_steps_of_all_lengths(n, per_step, epochs, seed):
    """Every group once an epoch as without it; the i-th shortest of a step comes from about that quantile of all."""
    groups = groups_of([(1, [size + 1]) for size in range(n)])
    batches = OptimizerBatches(groups, per_step, epochs, seed, by_length=True)
    plain = OptimizerBatches(groups, per_step, epochs, seed)
    assert [len(b) for b in batches] == [len(b) for b in plain]
    for epoch in range(math.ceil(epochs)):
        assert sorted(batches.order(epoch)) == list(range(n))
        slices = [batches.order(epoch)[at : at + per_step] for at in range(0, n, per_step)]
        for step in slices:
            for i, length in enumerate(sorted(step)):
                low, high = i / len(step) * n, (i + 1) / len(step) * n
                # Off by one place at most for every other step that competes for it.
                assert low - len(slices) <= length <= high + len(slices)


@given(sizes=ragged, budget=st.integers(1, 300))
def test_a_prompt_is_split_only_where_it_does_not_fit(sizes, budget):
    batch = Batch.from_groups(groups_of(sizes))
    found = micro_batches(batch, budget)
    for i, (prompt, completions) in enumerate(sizes):
        homes = [k for k, rows in enumerate(found) if i in batch.prompt_of[rows].tolist()]
        if prompt + sum(completions) <= budget:
            assert len(homes) == 1


def test_packing_counts_a_shared_prompt_once():
    batch = Batch.from_groups([group("a", 100, [10, 10, 10])])
    assert [rows.tolist() for rows in micro_batches(batch, 130)] == [[0, 1, 2]]
    assert sorted(len(rows) for rows in micro_batches(batch, 129)) == [1, 2]


def test_small_groups_share_a_micro_batch():
    batch = Batch.from_groups(groups_of([(5, [5])] * 10))
    assert [len(rows) for rows in micro_batches(batch, 50)] == [5, 5]


def test_a_unit_over_the_budget_runs_alone():
    batch = PreferenceBatch.from_groups(groups_of([(50, [50, 50]), (1, [1, 1]), (1, [1, 1])]))
    assert sorted(rows.tolist() for rows in micro_batches(batch, 10)) == [[0, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize("refuse", [False, True])
def test_groups_over_the_budget_are_named_with_the_knob(refuse: bool):
    sizes = [("a", 10), ("b", 31), ("c", 30), ("d", 40)]
    assert check_budget(sizes, 40, what="groups", refuse=refuse) is None
    said = r"2 of 4 groups .* optim\.tokens_per_micro_batch=30; the longest, d, has 40"
    if refuse:
        with pytest.raises(UserError, match=said + r"\n(.|\n)*optim\.oversize=run"):
            check_budget(sizes, 30, what="groups", refuse=True)
    else:
        assert re.match(said + ".*runs alone", check_budget(sizes, 30, what="groups", refuse=False) or "")


@given(n=st.integers(1, 30), per_step=st.integers(1, 12), whole=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_epoch_sees_every_group_once(n, per_step, whole, seed):
    batches = OptimizerBatches(groups_of([(1, [1])] * n), per_step, float(whole), seed)
    per_epoch = math.ceil(n / per_step)
    assert len(batches) == whole * per_epoch
    for epoch in range(whole):
        ids = [g.id for s in range(per_epoch) for g in batches[epoch * per_epoch + s]]
        assert sorted(ids, key=int) == [str(i) for i in range(n)]


@given(n=st.integers(1, 30), per_step=st.integers(1, 12), epochs=st.floats(0.05, 3.5), seed=st.integers(0, 5))
def test_a_step_number_is_the_whole_position(n, per_step, epochs, seed):
    groups = groups_of([(1, [1])] * n)
    batches = OptimizerBatches(groups, per_step, epochs, seed)
    straight = [[g.id for g in batch] for batch in batches]
    backwards = OptimizerBatches(groups, per_step, epochs, seed)
    resumed = [[g.id for g in backwards[s]] for s in reversed(range(len(backwards)))]
    assert straight == resumed[::-1]
    assert all(1 <= len(batch) <= per_step for batch in straight)
    assert sum(map(len, straight)) == max(int(epochs) * n + round((epochs - int(epochs)) * n), 1)


def test_epochs_and_seeds_give_different_orders():
    groups = groups_of([(1, [1])] * 50)
    batches = OptimizerBatches(groups, 50, 2.0, 0)
    first, second = ([g.id for g in batches[s]] for s in (0, 1))
    other = [g.id for g in OptimizerBatches(groups, 50, 1.0, 1)[0]]
    assert len({tuple(first), tuple(second), tuple(other), tuple(g.id for g in groups)}) == 4


def test_outside_the_schedule_is_an_index_error():
    batches = OptimizerBatches(groups_of([(1, [1])] * 3), 2, 1.0, 0)
    for step in (-1, 2):
        with pytest.raises(IndexError):
            batches[step]


def test_no_groups_is_said():
    with pytest.raises(UserError, match="no groups"):
        OptimizerBatches([], 2, 1.0, 0)
