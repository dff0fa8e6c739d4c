"""THE TABLE: every on-policy algorithm is a row. They differ in the advantage, the loss, where the KL goes, how many
completions a prompt gets, and how often a rollout is used. The loop reads the row and has no ``if algorithm == ...``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from tether.advantages import GAE, RLOO, BatchMean, Estimator, GroupNormalised
from tether.core.errors import UserError
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


def with_overrides(algorithm: Algorithm, overrides: Mapping[str, Any]) -> Algorithm:
    """A new row with some fields changed: ``{"kl_in_reward": 0.02, "loss.clip_high": 0.28}``; ``{"loss": {"clip_high":
    0.28}}`` says the same. A whole object replaces a whole part: ``{"advantage": RLOO()}``.

    Raises UserError for a field that does not exist, with the nearest one that does, and for a value that can't be.
    """
    known = dict(_paths(algorithm))
    nested: dict[str, Any] = {}
    for path, value in _flat(overrides):
        if path not in known:
            raise UserError(f'{algorithm.name} has no "{path}"{_meant(path, list(known))}; it has {", ".join(known)}')
        branch = nested
        *parents, last = path.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise UserError(f'"{path}" and "{parent}" are both given: leave one out')
        if last in branch:
            raise UserError(f'"{path}" is given twice, as a whole and in parts: leave one out')
        branch[last] = value
    try:
        # All fields of one part at once: they may only be right together (average and fixed_length).
        return _replaced(algorithm, nested)
    except (TypeError, ValueError) as error:
        raise UserError(f"{algorithm.name}: {error}") from error


def _paths(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of ``part`` and of the dataclasses in it, dotted."""
    for field in fields(part):
        value = getattr(part, field.name)
        yield prefix + field.name, value
        if is_dataclass(value) and not isinstance(value, type):
            yield from _paths(value, f"{prefix}{field.name}.")


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _replaced(part: Any, changes: Mapping[str, Any]) -> Any:
    values = {k: _replaced(getattr(part, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(part, **values)


def _meant(path: str, known: list[str]) -> str:
    """The same field elsewhere (clip_high -> loss.clip_high) before a field with a near name."""
    last = path.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    return f", did you mean {same[0]}?" if same else ""
