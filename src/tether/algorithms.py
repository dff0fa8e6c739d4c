"""THE TABLE: every on-policy algorithm is a row. They differ in the advantage, the loss, where the KL goes, how many
completions a prompt gets, and how often a rollout is used. The loop reads the row and has no ``if algorithm == ...``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tether.advantages import GAE, RLOO, BatchMean, Estimator, GroupNormalised
from tether.core.protocols import Loss
from tether.losses.average import check_range
from tether.losses.policy import PolicyGradient, PPOClip


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row of the table.

    ``group_size``: completions per prompt. A rollout round is gone through ``epochs_per_rollout`` times, each time cut
    into ``minibatches`` optimizer steps. ``kl_in_reward``: coefficient of the per-token k1 = log π − log π_ref that is
    taken off the reward (KL in the loss is the loss's own ``kl_weight``). ``source``: where it was published.
    """

    name: str
    advantage: Estimator
    loss: Loss
    group_size: int = 1
    epochs_per_rollout: int = 1
    minibatches: int = 1
    kl_in_reward: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("group_size", "epochs_per_rollout", "minibatches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        check_range(kl_in_reward=self.kl_in_reward)

    @property
    def needs(self) -> frozenset[str]:
        """What must exist before the first rollout: any of "reference", "critic", "entropy"."""
        reference = frozenset({"reference"}) if self.kl_in_reward else frozenset()
        return self.loss.needs | self.advantage.needs | reference

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollout rounds."""
        return self.epochs_per_rollout * self.minibatches


_ROWS = (
    Algorithm(
        name="reinforce",
        advantage=BatchMean(),
        loss=PolicyGradient(),
        kl_in_reward=0.05,
        source="Williams 1992",
    ),
    Algorithm(
        name="a2c",
        advantage=GAE(lam=1.0),
        loss=PolicyGradient(value_weight=0.5),
        kl_in_reward=0.05,
        source="Mnih 2016",
    ),
    Algorithm(
        name="ppo",
        advantage=GAE(lam=0.95, whiten=True),
        loss=PPOClip(value_weight=0.1, value_clip=0.2),
        epochs_per_rollout=4,
        kl_in_reward=0.05,
        source="Schulman 2017; with KL in the reward Ziegler 2019, Ouyang 2022",
    ),
    Algorithm(
        name="rloo",
        advantage=RLOO(),
        loss=PolicyGradient(),
        group_size=4,
        kl_in_reward=0.05,
        source="Kool 2019; Ahmadian 2024",
    ),
    Algorithm(
        name="grpo",
        advantage=GroupNormalised(),
        loss=PPOClip(average="sequence", kl_weight=0.04),
        group_size=8,
        source="Shao 2024, with the KL gradient put right (k3_corrected)",
    ),
)

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}
