"""Is the expected gradient that of the expected reward? All sequences of a tiny vocabulary, every expectation a sum.

Token 0 ends a completion; at most two tokens: 0 · 10 11 12 · 20 21 22. Rewards fall on both tokens. The policy is
tabular: logits of the first token, and of the second given the first.
"""

import itertools

import pytest
import torch
from torch import Tensor

from tether.advantages import GAE, RLOO, BatchMean, Estimator, GroupNormalised, RewardsToGo
from tether.core.batches import Outputs, PolicyBatch, pad_rows
from tether.losses import PolicyGradient, PPOClip
from tether.losses.policy import PolicyLoss

SEQUENCES = [(0,), *((a, b) for a in (1, 2) for b in (0, 1, 2))]
G = torch.Generator().manual_seed(0)
THETA = torch.randn(
    4, 3, generator=G, dtype=torch.float64
)  # row 0: first token; row a: second token after a (row 3 unused)
REWARD = torch.randn(4, 3, generator=G, dtype=torch.float64) * 2
BASELINE = torch.randn(4, generator=G, dtype=torch.float64) * 3  # V of the states "nothing yet", "1", "2"
SUM = {"average": "fixed_length", "fixed_length": 1}  # token sums, divided by the number of completions


def states(y: tuple[int, ...]) -> list[tuple[int, int]]:
    """(state, token) of each step."""
    return [(0, y[0])] if len(y) == 1 else [(0, y[0]), (y[0], y[1])]


def table(numbers: Tensor, which: list[tuple[int, ...]]) -> Tensor:
    """numbers[state, token] of every step of every sequence, [B, 2]."""
    return pad_rows([torch.stack([numbers[s] for s in states(y)]) for y in which], 2)


def exact_gradient() -> Tensor:
    """∇ Σ_y π(y) R(y)."""
    theta = THETA.clone().requires_grad_()
    pi = theta.log_softmax(1)
    value = sum(
        torch.stack([pi[s] for s in states(y)]).sum().exp() * sum(REWARD[s] for s in states(y)) for y in SEQUENCES
    )
    return torch.autograd.grad(value, theta)[0]


def expected_gradient(estimator: Estimator, loss: PolicyLoss, draws: int, values: Tensor | None = None) -> Tensor:
    """−Σ over all tuples of ``draws`` independent completions of π(tuple) · ∇loss(batch = that tuple)."""
    theta = THETA.clone().requires_grad_()
    pi = theta.log_softmax(1)
    probability = {y: float(torch.stack([pi[s] for s in states(y)]).sum().exp().detach()) for y in SEQUENCES}
    total = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(SEQUENCES, repeat=draws):
        which = list(drawn)
        lengths = torch.tensor([len(y) for y in which])
        mask = torch.arange(2) < lengths[:, None]
        logprobs = table(pi, which)
        state_values = None
        if values is not None:
            state_values = pad_rows([torch.stack([values[s] for s, _ in states(y)]) for y in which], 2)
        batch = PolicyBatch(
            prompts=(torch.tensor([9]),),
            prompt_of=torch.zeros(draws, dtype=torch.long),
            tokens=pad_rows([torch.tensor(y) for y in which], 2),
            lengths=lengths,
            loss_mask=mask,
            old_logprobs=logprobs.detach(),
            advantages=estimator(table(REWARD, which), mask, torch.zeros(draws, dtype=torch.long), state_values),
        )
        made = loss(Outputs(logprobs=logprobs), batch).loss
        weight = 1.0
        for y in which:
            weight *= probability[y]
        total = total - weight * made.total / made.count
    return torch.autograd.grad(total, theta)[0]


def close(made: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)


def exact_values() -> Tensor:
    """V^π of the three states."""
    pi = THETA.softmax(1)
    later = (pi * REWARD).sum(1)
    later[0] = (pi[0] * (REWARD[0] + torch.tensor([0.0, later[1], later[2]]))).sum()
    return later


@pytest.mark.parametrize("loss", [PolicyGradient(**SUM), PPOClip(**SUM)], ids=["policy_gradient", "ppo_clip"])
def test_reinforce_is_unbiased(loss: PolicyLoss) -> None:
    close(expected_gradient(RewardsToGo(), loss, 1), exact_gradient())


@pytest.mark.parametrize("values", [BASELINE, exact_values()], ids=["any baseline", "exact critic"])
def test_any_baseline_of_the_state_leaves_it_unbiased(values: Tensor) -> None:
    close(expected_gradient(GAE(lam=1.0), PolicyGradient(**SUM), 1, values), exact_gradient())


def test_gae_below_one_is_unbiased_with_an_exact_critic_only() -> None:
    for lam in (0.0, 0.6):
        close(expected_gradient(GAE(lam=lam), PolicyGradient(**SUM), 1, exact_values()), exact_gradient())
        wrong = expected_gradient(GAE(lam=lam), PolicyGradient(**SUM), 1, BASELINE)
        assert (wrong - exact_gradient()).norm() > 0.1 * exact_gradient().norm()


@pytest.mark.parametrize("draws", [2, 3])
def test_rloo_is_unbiased(draws: int) -> None:
    close(expected_gradient(RLOO(), PolicyGradient(**SUM), draws), exact_gradient())


@pytest.mark.parametrize("draws", [2, 3])
def test_a_mean_that_holds_oneself_only_shrinks(draws: int) -> None:
    """BatchMean, and GRPO without std (Dr. GRPO): (K − 1)/K of the gradient, in its direction."""
    wanted = exact_gradient() * (draws - 1) / draws
    close(expected_gradient(BatchMean(), PolicyGradient(**SUM), draws), wanted)
    close(expected_gradient(GroupNormalised(std=False), PolicyGradient(**SUM), draws), wanted)


def turned(made: Tensor) -> float:
    """Sine of the angle to the exact gradient: what no learning rate can put right."""
    wanted = exact_gradient()
    return float((made - (made * wanted).sum() / wanted.square().sum() * wanted).norm() / made.norm())


def test_the_std_of_grpo_turns_the_gradient() -> None:
    """Liu 2025: dividing by the group's std is no rescaling of the expected gradient. By how much, here, at K = 3: 4 %,
    and for one prompt only; between prompts of different spread it is the spread itself."""
    assert 0.02 < turned(expected_gradient(GroupNormalised(), PolicyGradient(**SUM), 3)) < 0.06
    assert turned(expected_gradient(GroupNormalised(std=False), PolicyGradient(**SUM), 3)) < 1e-12


def test_the_sequence_mean_turns_it_too() -> None:
    """Dividing each completion by its own length (GRPO as published) weighs short ones more: 3 % here."""
    assert 0.02 < turned(expected_gradient(RLOO(), PolicyGradient(average="sequence"), 2)) < 0.06
