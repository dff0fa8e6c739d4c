"""Log-probs before an update: the sampler's word is taken where the learner confirms it on a part of the step."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tether.core.batches import Batch, Group, Outputs
from tether.training.before import CHECKED, before_update

PROMPTS, SIZE = CHECKED, 4


class Learner:
    """Says -token / 10 of every token; remembers how many rows its policy and its critic were asked about."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.valued: list[int] = []

    def logprobs(self, batch: Batch) -> Tensor:
        self.asked.append(batch.size)
        return torch.where(batch.present, -batch.tokens / 10, 0.0)

    def values(self, batch: Batch) -> Tensor:
        self.valued.append(batch.size)
        return torch.where(batch.present, -batch.tokens / 10, 0.0) + 1

    def outputs(self, batch: Batch) -> Outputs:
        return Outputs(logprobs=self.logprobs(batch), values=self.values(batch))


def step() -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(0)
    groups = []
    for i in range(PROMPTS):
        completions = tuple(torch.randint(1, 30, (2 + (i + j) % 4,), generator=generator) for j in range(SIZE))
        masks = tuple(torch.ones(len(c), dtype=torch.bool) for c in completions)
        groups.append(Group(id=str(i), prompt=torch.tensor([1, 2]), completions=completions, loss_masks=masks))
    batch = Batch.from_groups(groups)
    return batch, torch.where(batch.present, -batch.tokens / 10, 0.0)


@pytest.mark.parametrize("turn", [0, 1, 3, 15, 16, 35])
def test_where_they_agree_the_learner_scores_a_part_only(turn: int):
    learner, (batch, sampled) = Learner(), step()
    sampled = sampled + 3e-5 * batch.present
    before = before_update(cast(Any, learner), batch, sampled, "sampler", turn=turn, critic=False)
    assert before.source == "sampler"
    assert learner.asked == [4] and not learner.valued
    torch.testing.assert_close(before.logprobs, sampled, atol=0, rtol=0)
    first = 4 * (turn % 16)
    assert before.known.any(1).nonzero().squeeze(1).tolist() == [first, first + 1, first + 2, first + 3]
    assert (before.known <= batch.loss_mask).all()
    torch.testing.assert_close(
        before.gap[before.known], torch.full_like(before.gap[before.known], 3e-5), atol=1e-6, rtol=0
    )
    assert before.values is None


def test_every_rollout_has_its_turn():
    learner, (batch, sampled) = Learner(), step()
    few, seen = batch.select(torch.arange(35)), torch.zeros(35, dtype=torch.bool)
    for turn in range(18):
        part = sampled[:35, : few.tokens.shape[1]]
        seen |= before_update(cast(Any, learner), few, part, "sampler", turn=turn, critic=False).known.any(1)
    assert seen.all() and set(learner.asked) == {2}


def test_the_critic_is_asked_about_all_of_it():
    learner, (batch, sampled) = Learner(), step()
    before = before_update(cast(Any, learner), batch, sampled, "sampler", turn=0, critic=True)
    assert before.source == "sampler" and before.values is not None
    assert learner.asked == [4] and learner.valued == [batch.size]
    torch.testing.assert_close(before.values, sampled + 1)


@pytest.mark.parametrize("off", [2e-3, float("nan")])
def test_where_they_differ_the_learner_scores_everything(off: float):
    learner, (batch, sampled) = Learner(), step()
    before = before_update(cast(Any, learner), batch, sampled + off * batch.present, "sampler", turn=2, critic=True)
    assert before.source == "learner"
    assert learner.asked[-1] == batch.size and learner.valued == [batch.size]
    torch.testing.assert_close(before.logprobs, sampled, atol=0, rtol=0)
    assert torch.equal(before.known, batch.loss_mask)


def test_the_learners_own_come_with_values():
    learner, (batch, sampled) = Learner(), step()
    before = before_update(cast(Any, learner), batch, sampled + 1, "learner", turn=2, critic=True)
    assert learner.asked == [batch.size]
    torch.testing.assert_close(before.logprobs, sampled)
    assert before.values is not None and before.values.shape == sampled.shape
    torch.testing.assert_close(before.gap[batch.loss_mask], torch.ones(int(batch.loss_mask.sum())), atol=1e-5, rtol=0)


def test_of_a_few_rollouts_one_is_checked():
    learner, (batch, sampled) = Learner(), step()
    few = batch.select(torch.arange(3))
    before = before_update(cast(Any, learner), few, sampled[:3, : few.tokens.shape[1]], "sampler", turn=4, critic=False)
    assert before.source == "sampler" and learner.asked == [1]
    assert torch.equal(before.known, few.loss_mask & torch.tensor([[False], [True], [False]]))
