"""What a comparison report is made of. Plain numbers and text; the caller measures, the report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tether.evals.best_of_n import BestOfN
    from tether.evals.reward_quality import RewardQuality
    from tether.evals.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One policy on the held-out prompts.

    ``win_rate``: against the start by the gold score (None for the start itself). ``kl``: KL(policy ‖ start), nats per
    completion, ``kl_error`` its standard error. ``length``: mean tokens; ``truncated``, ``unique``: shares in [0, 1].
    """

    name: str
    gold: float
    length: float
    truncated: float
    distinct_2: float
    unique: float
    proxy: float | None = None
    win_rate: Interval | None = None
    length_controlled: Interval | None = None
    kl: float | None = None
    kl_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class RLPoint:
    """A step of an RL run; means over its rollouts. ``kl`` in nats per completion; ``gold`` where it was measured."""

    step: int
    proxy: float
    kl: float
    length: float
    gold: float | None = None


@dataclass(frozen=True, kw_only=True)
class RLCurve:
    """One RL run, e.g. "PPO"."""

    name: str
    points: tuple[RLPoint, ...]


@dataclass(frozen=True, kw_only=True)
class PreferencePoint:
    """A step of DPO or its kin. ``logps_*``: log π(completion), nats, chosen and rejected apart."""

    step: int
    margin: float
    logps_chosen: float
    logps_rejected: float
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class PreferenceCurve:
    """One preference run, e.g. "DPO"."""

    name: str
    points: tuple[PreferencePoint, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a policy said; ``policy`` is the name of one of the report's policies."""

    policy: str
    text: str
    gold: float
    proxy: float | None = None
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out question and every policy's answer to it, the start's first."""

    prompt_id: str
    question: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the run and its seconds, by phase where known."""

    name: str
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Several policies held against the one they started from.

    ``start``: name of that policy among ``policies``. ``judge``: paragraphs that disclose who judged, with the formula
    in words. ``disclosures``: limits a reader must know. ``environment``: label -> fact. ``next_steps``: commands.
    """

    title: str
    verdict: str
    start: str
    judge: tuple[str, ...]
    policies: tuple[Policy, ...]
    samples: tuple[Sample, ...]
    stages: tuple[Stage, ...]
    peak_memory_bytes: int
    rl: tuple[RLCurve, ...] = ()
    preference: tuple[PreferenceCurve, ...] = ()
    best_of_n: tuple[BestOfN, ...] = ()
    reward_quality: RewardQuality | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    disclosures: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()
    created: str = ""
