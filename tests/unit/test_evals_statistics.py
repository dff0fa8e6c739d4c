"""Intervals, win rates and strengths against closed forms, brute force and coverage by simulation."""

import itertools
import math

import pytest
import torch

from tether.core.errors import UserError
from tether.evals.best_of_n import best_of_n, kl_bound
from tether.evals.statistics import (
    bootstrap,
    bradley_terry,
    length_controlled_win_rate,
    mean_interval,
    paired_difference,
    strengths,
    wilson,
    win_rate,
)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_wilson_known_values(wins, n, low, high):
    made = wilson(wins, n)
    assert made.low == pytest.approx(low, abs=5e-5) and made.high == pytest.approx(high, abs=5e-5)


def test_wilson_ends_solve_the_score_equation():
    made = wilson(13.5, 37)
    for end in (made.low, made.high):
        assert (made.estimate - end) ** 2 == pytest.approx(1.959963985**2 * end * (1 - end) / 37)


@pytest.mark.parametrize(("wins", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_nonsense(wins, n):
    with pytest.raises(UserError):
        wilson(wins, n)


def test_bootstrap_of_a_mean_is_the_normal_interval_and_repeats_by_seed():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 3
    made = mean_interval(values, seed=5)
    error = float(values.std() / math.sqrt(400))
    assert made.low == pytest.approx(made.estimate - 1.96 * error, abs=0.12 * error)
    assert made.high == pytest.approx(made.estimate + 1.96 * error, abs=0.12 * error)
    assert made == mean_interval(values, seed=5) and made != mean_interval(values, seed=6)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(100):
        made = bootstrap(torch.rand(40, generator=generator), torch.mean, resamples=300)
        hits += made.low <= 0.5 <= made.high
    assert 86 <= hits <= 100


def test_rows_of_one_prompt_are_drawn_together():
    values = torch.randn(30, generator=torch.Generator().manual_seed(2))
    alone = mean_interval(values)
    repeated = mean_interval(values.repeat_interleave(10), clusters=[i for i in range(30) for _ in range(10)])
    ignored = mean_interval(values.repeat_interleave(10))
    assert repeated.n == 30
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=1e-9)
    assert ignored.high - ignored.low < 0.5 * (alone.high - alone.low)


def test_pairing_cancels_what_prompts_differ_by():
    generator = torch.Generator().manual_seed(3)
    hard = 10 * torch.randn(50, generator=generator)
    made = paired_difference(hard + 1 + 0.1 * torch.randn(50, generator=generator), hard)
    assert 0.9 < made.low < made.high < 1.1
    with pytest.raises(UserError, match="row by row"):
        paired_difference(hard, hard[1:])


def test_ties_are_half_a_win():
    made = win_rate(torch.tensor([1, 0.5, 0.5, 0]))
    assert made.estimate == 0.5 and made == wilson(2, 4)
    assert win_rate(torch.tensor([1.0, 1, 0, 0]), clusters=["a", "a", "b", "b"]).n == 2


def test_length_control_without_length_differences_is_the_win_rate():
    outcomes = torch.tensor([1.0] * 30 + [0.0] * 10)
    assert length_controlled_win_rate(outcomes, torch.zeros(40)).estimate == pytest.approx(0.75, abs=1e-4)


def test_length_control_takes_away_what_length_alone_won():
    generator = torch.Generator().manual_seed(4)
    gap = 20 + 30 * torch.randn(3000, generator=generator)
    share = torch.sigmoid(3 * torch.tanh(gap / gap.std()))
    outcomes = (torch.rand(3000, generator=generator) < share).double()
    made = length_controlled_win_rate(outcomes[:600], gap[:600])
    assert outcomes.mean() > 0.65 and made.low < 0.5 < made.high
    better = (torch.rand(600, generator=generator) < torch.sigmoid(1 + 3 * torch.tanh(gap / gap.std()))[:600]).double()
    assert length_controlled_win_rate(better, gap[:600]).estimate == pytest.approx(0.731, abs=0.06)


def test_length_control_stays_finite_when_one_side_wins_all():
    made = length_controlled_win_rate(torch.ones(20), torch.arange(20.0))
    assert 0.9 < made.estimate <= 1.0


def test_two_players_have_a_closed_form():
    theta = bradley_terry(torch.tensor([[0.0, 30], [10, 0]]))
    assert float(theta[0] - theta[1]) == pytest.approx(math.log(3)) and float(theta.sum()) == pytest.approx(0, abs=1e-9)


def test_strengths_are_found_again_from_exact_shares():
    truth = torch.tensor([0.8, -0.1, -0.7, 0.0], dtype=torch.float64)
    wins = torch.sigmoid(truth[:, None] - truth[None, :]) * torch.tensor(
        [[0, 3, 5, 1], [3, 0, 2, 4], [5, 2, 0, 6], [1, 4, 6, 0]]
    )
    assert torch.allclose(bradley_terry(wins), truth - truth.mean(), atol=1e-8)


def test_mm_is_at_the_maximum_of_the_likelihood():
    wins = torch.tensor([[0.0, 4, 1], [2, 0, 3.5], [5, 1.5, 0]], dtype=torch.float64)
    theta = bradley_terry(wins).requires_grad_()
    (wins * torch.nn.functional.logsigmoid(theta[:, None] - theta[None, :])).sum().backward()
    assert theta.grad is not None and float(theta.grad.abs().max()) < 1e-9


def test_players_that_cannot_be_ordered_are_refused_unless_a_prior_says_so():
    wins = torch.tensor([[0.0, 5], [0, 0]])
    with pytest.raises(UserError, match="prior"):
        bradley_terry(wins)
    theta = bradley_terry(wins, prior=1.0)
    assert float(theta[0] - theta[1]) == pytest.approx(math.log(5.5 / 0.5))


def test_elo_scale_and_intervals():
    made = strengths([("a", "b", 1.0)] * 100 + [("a", "b", 0.0)] * 10, prior=0.0)
    assert [s.name for s in made] == ["a", "b"] and made[0].elo - made[1].elo == pytest.approx(400)
    assert made[0].low < made[0].elo < made[0].high and made[0].games == 110
    tied = strengths([("a", "b", 0.5)] * 10)
    assert tied[0].elo == pytest.approx(1000) and tied[1].elo == pytest.approx(1000)


def test_best_of_n_against_all_subsets():
    generator = torch.Generator().manual_seed(6)
    proxy, gold = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    for point in best_of_n(proxy, gold, [1, 2, 4, 6]):
        picks = [
            (proxy[p, max(s, key=lambda i: float(proxy[p, i]))], gold[p, max(s, key=lambda i: float(proxy[p, i]))])
            for p in range(3)
            for s in itertools.combinations(range(6), point.n)
        ]
        assert point.proxy == pytest.approx(float(sum(a for a, _ in picks)) / len(picks), abs=1e-5)
        assert point.gold == pytest.approx(float(sum(b for _, b in picks)) / len(picks), abs=1e-5)


def test_the_kl_bound_is_exact_without_ties():
    # Best of n over a continuous score: density n F^(n-1), so the KL is ∫ log(n u^(n-1)) n u^(n-1) du.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (1, 2, 8, 64):
        density = n * u ** (n - 1)
        assert float((density * density.clamp(min=1e-300).log()).mean()) == pytest.approx(kl_bound(n), abs=1e-4)
    with pytest.raises(UserError, match="at least 7"):
        best_of_n(torch.zeros(1, 6), torch.zeros(1, 6), [7])
