"""THE TABLE: an algorithm is a row. REINFORCE, A2C, PPO, RLOO and GRPO differ in the columns below and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tether.advantages import GAE, RLOO, BatchMean, Estimator, GroupNormalised
from tether.losses.policy import PolicyGradient, PolicyLoss, PPOClip


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way to learn from rewards.

    ``group_size``: completions per prompt; ``epochs_per_rollout`` passes over each round of rollouts, each cut into
    ``minibatches`` optimizer steps; ``kl_in_reward``: weight of the per-token penalty log π - log π_ref in the reward.
    """

    name: str
    advantage: Estimator
    loss: PolicyLoss
    group_size: int
    epochs_per_rollout: int = 1
    minibatches: int = 1
    kl_in_reward: float = 0.05
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("group_size", "epochs_per_rollout", "minibatches"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.kl_in_reward < 0:
            raise ValueError(f"kl_in_reward must not be negative, got {self.kl_in_reward}")

    @property
    def needs(self) -> frozenset[str]:
        """Which parts must exist before the first rollout: "reference", "critic"."""
        held = frozenset({"reference"}) if self.kl_in_reward else frozenset()
        return (self.advantage.needs | self.loss.needs | held) - {"entropy"}


_ROWS = (
    Algorithm(
        name="reinforce",
        advantage=BatchMean(),
        loss=PolicyGradient(average="sequence_sum"),
        group_size=1,
        source="Williams 1992",
    ),
    Algorithm(
        name="a2c",
        advantage=GAE(lam=1.0),
        loss=PolicyGradient(value_weight=0.5),
        group_size=1,
        source="Mnih 2016",
    ),
    Algorithm(
        name="ppo",
        advantage=GAE(lam=0.95, whiten=True),
        loss=PPOClip(value_weight=0.5, value_clip=0.2),
        group_size=1,
        epochs_per_rollout=4,
        source="Schulman 2017; Ziegler 2019; Ouyang 2022",
    ),
    Algorithm(
        name="rloo",
        advantage=RLOO(),
        loss=PolicyGradient(average="sequence_sum"),
        group_size=4,
        source="Kool 2019; Ahmadian 2024",
    ),
    Algorithm(
        name="grpo",
        advantage=GroupNormalised(),
        loss=PPOClip(average="sequence", kl_weight=0.04, kl="k3_corrected"),
        group_size=8,
        kl_in_reward=0.0,
        source="Shao 2024",
    ),
)

ALGORITHMS: Mapping[str, Algorithm] = {row.name: row for row in _ROWS}
