"""Reward-model quality and diversity against hand counts and brute force."""

import math

import pytest
import torch

from tether.core.errors import UserError
from tether.evals.diversity import bleu, distinct_n, self_bleu, unique_share, words
from tether.evals.reward_quality import calibration_curve, reward_quality


def test_accuracy_counts_equal_scores_half():
    made = reward_quality(
        torch.tensor([2.0, 1, 0, 3]),
        torch.tensor([1.0, 1, 5, 0]),
        torch.tensor([5, 5, 9, 2]),
        torch.tensor([1, 7, 3, 2]),
    )
    assert made.accuracy.estimate == pytest.approx(2.5 / 4) and made.accuracy.n == 4
    assert made.longer_wins == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert made.chosen_shorter == 0.5 and made.margin == pytest.approx((1 + 0 - 5 + 3) / 4)


def test_a_reward_model_that_is_length_is_unmasked():
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(1, 100, (500,), generator=generator) for _ in range(2))
    made = reward_quality(long.float(), short.float(), long, short)
    assert made.length_correlation == pytest.approx(1.0) and made.accuracy.estimate == pytest.approx(made.longer_wins)
    assert made.chosen_shorter == 0.0
    assert all(b.accuracy == pytest.approx(b.longer_wins) for b in made.by_gap)
    assert sum(b.n for b in made.by_gap) == 500 and len(made.by_gap) == 5
    assert all(a.high < b.low for a, b in zip(made.by_gap, made.by_gap[1:], strict=False))


def test_pearson_matches_torch():
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randn(50, generator=generator) for _ in range(4)]
    made = reward_quality(*columns)
    both = torch.stack([torch.cat(columns[:2]), torch.cat(columns[2:])])
    assert made.length_correlation == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-6)
    flat = reward_quality(torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3))
    assert math.isnan(flat.length_correlation) and len(flat.by_gap) == 1 and flat.by_gap[0].n == 3


def test_calibration_by_hand():
    # Two pairs at confidence 0.9 (one right), two at 0.6 (both right): ECE = ½·0.4 + ½·0.4.
    margin = torch.tensor([math.log(9), -math.log(9), math.log(1.5), math.log(1.5)])
    low, high = calibration_curve(margin)
    assert (low.n, high.n) == (2, 2) and low.accuracy == 1.0 and high.accuracy == 0.5
    assert low.confidence == pytest.approx(0.6) and high.confidence == pytest.approx(0.9)
    made = reward_quality(margin, torch.zeros(4), torch.ones(4), torch.ones(4))
    assert made.ece == pytest.approx(0.4, abs=1e-6)


def test_a_bradley_terry_world_is_calibrated():
    generator = torch.Generator().manual_seed(2)
    margin = 2 * torch.randn(20_000, generator=generator)
    margin = torch.where(torch.rand(20_000, generator=generator) < torch.sigmoid(margin), margin, -margin)
    zeros = torch.zeros(20_000)
    assert reward_quality(margin, zeros, zeros, zeros).ece < 0.015
    assert reward_quality(4 * margin, zeros, zeros, zeros).ece > 0.05


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="four tensors"):
        reward_quality(torch.ones(2), torch.ones(3), torch.ones(2), torch.ones(2))
    with pytest.raises(UserError, match="not finite"):
        reward_quality(torch.tensor([math.nan]), torch.ones(1), torch.ones(1), torch.ones(1))


def test_distinct_and_unique():
    assert distinct_n(["a b a b"], 1) == 0.5 and distinct_n(["a b", "a b"], 2) == 0.5
    assert distinct_n(["a b c"], 2) == 1.0 and math.isnan(distinct_n(["a"], 2))
    assert unique_share(["A b", "a  b ", "c"]) == pytest.approx(2 / 3) and math.isnan(unique_share([]))
    assert words("Don't, ok!") == ["don", "'", "t", ",", "ok", "!"]


def test_bleu_by_hand():
    # Papineni's own example of clipping: 2 of 7.
    the = words("the the the the the the the")
    assert bleu(the, [words("the cat is on the mat"), words("there is a cat on the mat")], 1) == pytest.approx(2 / 7)
    assert bleu(words("a b c"), [words("a b c d e")], 1) == pytest.approx(math.exp(1 - 5 / 3))
    made = bleu(words("a b d"), [words("a b c")], 2)
    assert made == pytest.approx(math.sqrt(2 / 3 * 1 / 2))


def test_self_bleu_ends():
    assert self_bleu(["the cat sat on the mat"] * 4) == pytest.approx(1.0)
    assert self_bleu(["a b c d e", "f g h i j", "k l m n o"]) < 0.05
    assert math.isnan(self_bleu(["alone"])) and self_bleu(["", "a b"]) < 0.5


def test_calibration_bins_are_a_twentieth_wide():
    confidence = torch.tensor([0.52, 0.92, 0.99])
    assert [b.n for b in calibration_curve(torch.logit(confidence))] == [1, 1, 1]
