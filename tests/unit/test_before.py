"""Log-probs before an update: the sampler's word is taken where the learner confirms it on a part of the step."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tether.core.batches import Batch, Group, Outputs
from tether.training.before import CHECKED, before_update

PROMPTS, SIZE = 2 * CHECKED, 3


class Learner:
    """Says -token / 10 of every token; remembers how many rows it was asked about."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def outputs(self, batch: Batch, *, entropy: bool = False) -> Outputs:
        self.asked.append(batch.size)
        logprobs = torch.where(batch.present, -batch.tokens / 10, 0.0)
        return Outputs(logprobs=logprobs, entropy=2 * logprobs.abs(), values=logprobs + 1)


def step() -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(0)
    groups = []
    for i in range(PROMPTS):
        completions = tuple(torch.randint(1, 30, (2 + (i + j) % 4,), generator=generator) for j in range(SIZE))
        masks = tuple(torch.ones(len(c), dtype=torch.bool) for c in completions)
        groups.append(Group(id=str(i), prompt=torch.tensor([1, 2]), completions=completions, loss_masks=masks))
    batch = Batch.from_groups(groups)
    return batch, torch.where(batch.present, -batch.tokens / 10, 0.0)


def test_where_they_agree_the_learner_scores_a_part_only():
    learner, (batch, sampled) = Learner(), step()
    sampled = sampled + 3e-5 * batch.present
    before = before_update(cast(Any, learner), batch, sampled, "sampler")
    assert before.source == "sampler"
    assert learner.asked == [PROMPTS // CHECKED * SIZE]
    torch.testing.assert_close(before.logprobs, sampled, atol=0, rtol=0)
    assert before.known.any(1).tolist() == [True] * learner.asked[0] + [False] * (batch.size - learner.asked[0])
    assert (before.known <= batch.loss_mask).all()
    torch.testing.assert_close(
        before.gap[before.known], torch.full_like(before.gap[before.known], 3e-5), atol=1e-6, rtol=0
    )
    assert before.values is None


@pytest.mark.parametrize("off", [2e-3, float("nan")])
def test_where_they_differ_the_learner_scores_everything(off: float):
    learner, (batch, sampled) = Learner(), step()
    before = before_update(cast(Any, learner), batch, sampled + off * batch.present, "sampler")
    assert before.source == "learner"
    assert learner.asked[-1] == batch.size
    torch.testing.assert_close(before.logprobs, sampled, atol=0, rtol=0)
    assert torch.equal(before.known, batch.loss_mask)


def test_the_learners_own_come_with_values_and_entropy():
    learner, (batch, sampled) = Learner(), step()
    before = before_update(cast(Any, learner), batch, sampled + 1, "learner")
    assert learner.asked == [batch.size]
    torch.testing.assert_close(before.logprobs, sampled)
    torch.testing.assert_close(before.entropy, 2 * sampled.abs())
    assert before.values is not None and before.values.shape == sampled.shape
    torch.testing.assert_close(before.gap[batch.loss_mask], torch.ones(int(batch.loss_mask.sum())), atol=1e-5, rtol=0)


def test_a_single_prompt_is_checked_whole():
    learner, (batch, sampled) = Learner(), step()
    one = batch.select(torch.arange(SIZE))
    before = before_update(cast(Any, learner), one, sampled[:SIZE, : one.tokens.shape[1]], "sampler")
    assert before.source == "sampler" and learner.asked == [SIZE]
    assert torch.equal(before.known, one.loss_mask)
