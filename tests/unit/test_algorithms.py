"""The table: what each row is, what it needs, and how a row is changed."""

import dataclasses
from typing import Any

import pytest

from tether.advantages import GAE, RLOO, BatchMean, GroupNormalised
from tether.algorithms import ALGORITHMS, Algorithm
from tether.core.errors import UserError
from tether.losses import PolicyGradient, PPOClip
from tether.methods.rl import choose_algorithm

ROWS = {  # the literature's choices, and what must exist before the first rollout
    "reinforce": (BatchMean, PolicyGradient, {"reference"}),
    "a2c": (GAE, PolicyGradient, {"reference", "critic"}),
    "ppo": (GAE, PPOClip, {"reference", "critic"}),
    "rloo": (RLOO, PolicyGradient, {"reference"}),
    "grpo": (GroupNormalised, PPOClip, {"reference"}),
}


def test_the_rows() -> None:
    assert list(ALGORITHMS) == list(ROWS)
    for name, (advantage, loss, needs) in ROWS.items():
        row = ALGORITHMS[name]
        assert (row.name, type(row.advantage), type(row.loss), row.needs) == (name, advantage, loss, needs)
        assert row.source
        # The anchor stands in exactly one place.
        assert isinstance(row.loss, PPOClip | PolicyGradient)
        assert bool(row.kl_in_reward) != bool(row.loss.kl_weight)
        # Estimators that compare completions of one prompt get several.
        assert (row.group_size > 1) == isinstance(row.advantage, RLOO | GroupNormalised)
        # A plain policy gradient is right for one update only.
        assert row.updates_per_rollout == 1 or isinstance(row.loss, PPOClip)


def test_needs_follow_the_changes() -> None:
    assert choose_algorithm("rloo", {"kl_in_reward": 0}).needs == frozenset()
    assert choose_algorithm("rloo", {"loss": {"entropy_weight": 0.01}}).needs == {"entropy", "reference"}
    assert choose_algorithm("grpo", {"loss": {"kl_weight": 0, "kl_estimator": "k3_corrected"}}).needs == frozenset()


def test_fields_of_parts_are_changed_and_the_table_is_not() -> None:
    before = ALGORITHMS["ppo"]
    nested: dict[str, Any] = {"kl_in_reward": 0.02, "loss": {"clip_high": 0.28}, "advantage": {"lam": 0.9}}
    changed = choose_algorithm("ppo", nested)
    assert isinstance(changed.loss, PPOClip) and isinstance(changed.advantage, GAE)
    assert (changed.kl_in_reward, changed.loss.clip_high, changed.advantage.lam) == (0.02, 0.28, 0.9)
    assert (changed.loss.clip_low, changed.advantage.whiten, changed.name) == (0.2, True, "ppo")
    assert ALGORITHMS["ppo"] is before and isinstance(before.loss, PPOClip) and before.loss.clip_high == 0.2
    assert choose_algorithm("ppo", {}) == before
    assert choose_algorithm("ppo", {"advantage": {"type": "rloo"}}).needs == {"critic", "reference"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.kl_in_reward = 1.0  # type: ignore[misc]


def test_fields_that_go_together_are_changed_together() -> None:
    changed = choose_algorithm("grpo", {"loss": {"average": "fixed_length", "fixed_length": 256}})
    assert isinstance(changed.loss, PPOClip) and (changed.loss.average, changed.loss.fixed_length) == (
        "fixed_length",
        256,
    )


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kl_in_rewrad": 0.1}, "kl_in_reward"),
    ({"loss": {"clip_hihg": 0.1}}, "clip_high"),
    ({"advantage": {"lamda": 0.1}}, "lam"),
    ({"kl_in_reward": -1}, "kl_in_reward must be a number >= 0, got -1"),
    ({"group_size": 0}, "group_size must be a whole number >= 1, got 0"),
    ({"advantage": {"lam": 2}}, "lam must be a number between 0 and 1, got 2"),
    ({"loss": {"clip_low": "a"}}, "clip_low"),
    ({"loss": {"average": "fixed_length"}}, "give it"),
    ({"loss": {"kl_estimator": "k2"}}, "kl_estimator is not used while kl_weight is 0"),
    ({"advantage": {"type": "rlo"}}, "rloo"),
]


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[str(o) for o, _ in WRONG])
def test_what_can_not_be_is_refused(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        choose_algorithm("ppo", overrides)


def test_a_row_of_ones_own() -> None:
    mine = Algorithm(name="mine", advantage=RLOO(), loss=PPOClip(), group_size=2, epochs_per_rollout=3, minibatches=2)
    assert (mine.needs, mine.updates_per_rollout) == (frozenset(), 6)
