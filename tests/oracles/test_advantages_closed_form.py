"""Every estimator against its equation, row by row in plain Python (float64)."""

import statistics

import pytest
import torch
from torch import Tensor

from loss_cases import LENGTHS, base, noise
from tether.advantages import GAE, RLOO, BatchMean, GroupNormalised, RewardsToGo, whiten

MASK = base()["loss_mask"]
PRESENT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
# Garbage after each row's end; tokens that are present but not chosen (a tool's) carry rewards too.
REWARDS = noise(21).masked_fill(~PRESENT, float("nan"))
VALUES = noise(22).masked_fill(~MASK, float("nan"))
BOOTSTRAP = noise(23)[:, 0]
GROUPS = torch.tensor([7, 7, -3, 7, 900, -3, -3, -3, 900, 5, 7, -3, 5, 7, 900, 12])  # unequal sizes, 12 stands alone


def steps(row: int) -> tuple[list[int], list[float]]:
    """The chosen slots of a row, and for each its reward with those of the tool tokens that follow it."""
    slots, rewards = [], []
    for t in range(LENGTHS[row]):
        if MASK[row, t]:
            slots.append(t)
            rewards.append(0.0)
        if slots:
            rewards[-1] += float(REWARDS[row, t])
    return slots, rewards


def gae(rewards: list[float], values: list[float], after: float, gamma: float, lam: float) -> list[float]:
    """Schulman 2016, eq. 16 as the sum it is: Â_t = Σ_l (γλ)^l δ_{t+l}."""
    following = [*values[1:], after]
    deltas = [r + gamma * nxt - v for r, nxt, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def returns_of_rows() -> list[float]:
    return [sum(float(REWARDS[b, t]) for t in range(n)) for b, n in enumerate(LENGTHS)]


def check(made: Tensor, expected: dict[int, list[float]]) -> None:
    """``expected``: row -> numbers on its chosen slots."""
    assert not made[~MASK].any() and torch.isfinite(made).all()
    for row, numbers in expected.items():
        slots, _ = steps(row)
        assert made[row, slots].tolist() == pytest.approx(numbers, rel=1e-9, abs=1e-12), row


@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 0.0), (0.8, 1.0), (1.0, 1.0), (0.0, 1.0)])
def test_gae(gamma: float, lam: float, cut: bool) -> None:
    estimator = GAE(gamma=gamma, lam=lam)
    bootstrap = BOOTSTRAP if cut else None
    expected, targets = {}, {}
    for row in range(16):
        slots, rewards = steps(row)
        values = [float(VALUES[row, t]) for t in slots]
        if slots:
            expected[row] = gae(rewards, values, float(BOOTSTRAP[row]) if cut else 0.0, gamma, lam)
            targets[row] = [a + v for a, v in zip(expected[row], values, strict=True)]
    check(estimator(REWARDS, MASK, GROUPS, VALUES, bootstrap), expected)
    check(estimator.returns(REWARDS, MASK, GROUPS, VALUES, bootstrap), targets)


def test_gae_at_its_ends() -> None:
    """λ = 1: return to go minus V. λ = 0: r + γV' − V."""
    for row in range(16):
        slots, rewards = steps(row)
        if not slots:
            continue
        values = [float(VALUES[row, t]) for t in slots]
        gamma, after = 0.9, float(BOOTSTRAP[row])
        to_go = [
            sum(gamma ** (k - t) * rewards[k] for k in range(t, len(slots))) + gamma ** (len(slots) - t) * after
            for t in range(len(slots))
        ]
        residual = [r + gamma * n - v for r, n, v in zip(rewards, [*values[1:], after], values, strict=True)]
        tensors = (REWARDS, MASK, GROUPS, VALUES, BOOTSTRAP)
        monte_carlo = {row: [g - v for g, v in zip(to_go, values, strict=True)]}
        check(GAE(gamma=gamma, lam=1.0)(*tensors), monte_carlo)
        check(GAE(gamma=gamma, lam=0.0)(*tensors), {row: residual})
        check(RewardsToGo(gamma=gamma)(*tensors), {row: to_go})


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_batch_mean(gamma: float) -> None:
    to_go = {}
    for row in range(16):
        slots, rewards = steps(row)
        to_go[row] = [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(slots))) for t in range(len(slots))]
    baseline = statistics.fmean(numbers[0] for numbers in to_go.values() if numbers)
    check(BatchMean(gamma=gamma)(REWARDS, MASK, GROUPS), {r: [x - baseline for x in n] for r, n in to_go.items()})
    flat = [x for numbers in to_go.values() for x in numbers]
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    whitened = {r: [(x - mean) / (std + 1e-8) for x in n] for r, n in to_go.items()}
    check(BatchMean(gamma=gamma, whiten=True)(REWARDS, MASK, GROUPS), whitened)


def test_rloo() -> None:
    """R_i minus the mean of the others, and the identity K/(K−1)·(R_i − mean)."""
    returns, groups = returns_of_rows(), GROUPS.tolist()
    expected = {}
    for i, r in enumerate(returns):
        others = [returns[j] for j in range(16) if groups[j] == groups[i] and j != i]
        advantage = r - statistics.fmean(others) if others else 0.0
        k = len(others) + 1
        if others:
            assert advantage == pytest.approx(k / (k - 1) * (r - statistics.fmean([*others, r])))
        expected[i] = [advantage] * len(steps(i)[0])
    check(RLOO()(REWARDS, MASK, GROUPS), expected)
    assert not RLOO()(REWARDS, MASK, GROUPS)[15].any(), "a group of one has no baseline"


@pytest.mark.parametrize("options", [{}, {"unbiased": False}, {"eps": 0.0}, {"std": False}], ids=str)
def test_group_normalised(options: dict) -> None:
    returns, groups = returns_of_rows(), GROUPS.tolist()
    expected = {}
    for i, r in enumerate(returns):
        own = [returns[j] for j in range(16) if groups[j] == groups[i]]
        advantage = r - statistics.fmean(own)
        if len(own) > 1 and options.get("std", True):
            std = statistics.stdev(own) if options.get("unbiased", True) else statistics.pstdev(own)
            advantage /= std + options.get("eps", 1e-4)
        expected[i] = [advantage if len(own) > 1 else 0.0] * len(steps(i)[0])
    check(GroupNormalised(**options)(REWARDS, MASK, GROUPS), expected)


def test_whitening() -> None:
    """Mean 0 and population std 1 over chosen tokens; the mean is not added back."""
    made = whiten(noise(24) * 3 + 5, MASK)
    assert float(made[MASK].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(made[MASK].std(correction=0)) == pytest.approx(1.0, rel=1e-6)
    assert not made[~MASK].any()
    raw = GAE(lam=0.9)(REWARDS, MASK, GROUPS, VALUES)
    torch.testing.assert_close(GAE(lam=0.9, whiten=True)(REWARDS, MASK, GROUPS, VALUES), whiten(raw, MASK))
    plain, whitened = GAE(lam=0.9), GAE(lam=0.9, whiten=True)
    tensors = (REWARDS, MASK, GROUPS, VALUES)
    assert torch.equal(plain.returns(*tensors), whitened.returns(*tensors)), "the critic's target is not whitened"
