"""What holds for every estimator: order, padding and neighbours do not matter, dull groups teach nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.advantages import ADVANTAGES, GAE, RLOO, BatchMean, Estimator, GroupNormalised, RewardsToGo, whiten

CASES: dict[str, Estimator] = {
    "rewards_to_go": RewardsToGo(gamma=0.9),
    "batch_mean": BatchMean(),
    "batch_mean-whiten": BatchMean(gamma=0.9, whiten=True),
    "gae": GAE(gamma=0.9, lam=0.8),
    "gae-whiten": GAE(whiten=True),
    "rloo": RLOO(),
    "group_normalised": GroupNormalised(),
    "group_normalised-centred": GroupNormalised(std=False),
}
EVERY = pytest.mark.parametrize("estimator", list(CASES.values()), ids=list(CASES))
BY_GROUP = pytest.mark.parametrize("estimator", [RLOO(), GroupNormalised(), GroupNormalised(std=False)], ids=str)


def example(seed: int, rows: int = 9, width: int = 5) -> tuple[torch.Tensor, ...]:
    """rewards, mask, groups, values, bootstrap; float64, lengths from 1 to ``width``."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    mask = torch.arange(width) < lengths[:, None]
    numbers = torch.randn(2, rows, width, generator=g, dtype=torch.float64).masked_fill(~mask, 0.0)
    groups = torch.randint(-2, 2, (rows,), generator=g) * 1000
    return numbers[0], mask, groups, numbers[1], torch.randn(rows, generator=g, dtype=torch.float64)


def test_every_row_of_the_table_is_tried() -> None:
    assert {type(e) for e in CASES.values()} == set(ADVANTAGES.values())


@EVERY
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_order_of_rows_does_not_matter(estimator: Estimator, seed: int) -> None:
    tensors = example(seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    moved = estimator(*(x[order] for x in tensors))
    torch.testing.assert_close(moved, estimator(*tensors)[order], rtol=1e-9, atol=1e-9)


@EVERY
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 4))
@settings(max_examples=20)
def test_padding_does_not_matter(estimator: Estimator, seed: int, extra: int) -> None:
    rewards, mask, groups, values, bootstrap = example(seed)
    wide = torch.nn.functional.pad
    nan = float("nan")
    made = estimator(
        wide(rewards.masked_fill(~mask, nan), (0, extra), value=nan),
        wide(mask, (0, extra)),
        groups,
        wide(values.masked_fill(~mask, nan), (0, extra), value=nan),
        bootstrap,
    )
    torch.testing.assert_close(made[:, :-extra], estimator(rewards, mask, groups, values, bootstrap))
    assert not made[:, -extra:].any()


@EVERY
def test_a_nan_reward_on_a_chosen_token_is_not_hidden(estimator: Estimator) -> None:
    rewards, mask, groups, values, bootstrap = example(1)
    rewards[0, 0] = float("nan")
    assert estimator(rewards, mask, torch.zeros_like(groups), values, bootstrap).isnan().any()


@EVERY
def test_results_carry_no_gradient(estimator: Estimator) -> None:
    rewards, mask, groups, values, bootstrap = example(2)
    made = estimator(rewards.requires_grad_(), mask, groups, values.requires_grad_(), bootstrap)
    assert not made.requires_grad and not estimator.returns(rewards, mask, groups, values, bootstrap).requires_grad


@BY_GROUP
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_groups_do_not_see_each_other(estimator: Estimator, seed: int) -> None:
    """Numbers of one group alone, and with others around it; each sums to zero over its completions."""
    rewards, mask, groups, *_ = example(seed)
    together = estimator(rewards, mask, groups)
    for group in groups.unique():
        own = groups == group
        torch.testing.assert_close(estimator(rewards[own], mask[own], groups[own]), together[own])
        assert float(together[own, 0].sum()) == pytest.approx(0.0, abs=1e-9)
    renamed = estimator(rewards, mask, groups * 7 - 13)
    torch.testing.assert_close(renamed, together)


@BY_GROUP
@pytest.mark.parametrize("score", [0.1, 1 / 3, -7.7, 1e6])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_rewards_teach_nothing(estimator: Estimator, score: float, size: int, dtype: torch.dtype) -> None:
    """Groups without variance, and groups of one: nothing, not rounding noise over a tiny std."""
    rewards, mask = torch.full((size, 1), score, dtype=dtype), torch.ones(size, 1, dtype=torch.bool)
    made = estimator(rewards, mask, torch.zeros(size, dtype=torch.long))
    if isinstance(estimator, RLOO):
        assert made.abs().max() <= 1e-6 * abs(score)
    else:
        assert not made.any()
    assert not GroupNormalised(eps=0.0)(rewards, mask, torch.zeros(size, dtype=torch.long)).any()


def test_whitening_equal_advantages_gives_nothing() -> None:
    mask = torch.ones(7, 1, dtype=torch.bool)
    assert not whiten(torch.full((7, 1), 0.1), mask).any()
    assert not whiten(torch.ones(7, 1), ~mask).any()
    assert not whiten(torch.ones(1, 1), mask[:1]).any()


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.01, 10.0, 1e4]), shift=st.floats(-100, 100))
@settings(max_examples=20)
def test_group_normalised_forgets_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    """Per group, the size of the reward is lost; that is the point, and the bias (Liu 2025)."""
    rewards, mask, groups, *_ = example(seed)
    last = mask.sum(1, keepdim=True) - 1
    shifted = (rewards * scale).scatter_add(1, last, torch.full_like(last, 1, dtype=rewards.dtype) * shift)
    estimator = GroupNormalised(eps=0.0)
    torch.testing.assert_close(estimator(shifted, mask, groups), estimator(rewards, mask, groups), rtol=1e-6, atol=1e-6)


def test_rows_where_nothing_was_chosen() -> None:
    rewards, mask, groups, values, bootstrap = example(3)
    mask[2] = False
    for estimator in CASES.values():
        made = estimator(rewards, mask, groups, values, bootstrap)
        assert torch.isfinite(made).all() and not made[2].any()


WRONG = [
    (lambda: GAE(lam=1.5), "lam must be a number between 0 and 1"),
    (lambda: GAE(gamma=math.nan), "gamma must be a number between 0 and 1"),
    (lambda: RewardsToGo(gamma=-0.1), "gamma"),
    (lambda: BatchMean(gamma="x"), "gamma must be a number between 0 and 1, got 'x'"),
    (lambda: GroupNormalised(eps=-1.0), "eps must be >= 0"),
    (lambda: GroupNormalised(std=False, eps=0.1), "belong to the std"),
]


@pytest.mark.parametrize(("make", "says"), WRONG, ids=[says[:30] for _, says in WRONG])
def test_options_that_can_not_be_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_gae_without_a_critic_says_so() -> None:
    rewards, mask, groups, *_ = example(4)
    assert GAE().needs == {"critic"} and RLOO().needs == frozenset()
    with pytest.raises(ValueError, match="GAE needs the critic's values"):
        GAE()(rewards, mask, groups)
