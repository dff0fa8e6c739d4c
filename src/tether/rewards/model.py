"""A reward model as a reward: the score at a completion's last token, in units that a KL weight can be set for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.core.batches import Batch
from tether.core.protocols import Scores
from tether.core.text import Rollout

FILE = "score_scale.json"


@dataclass(frozen=True, kw_only=True)
class ScoreScale:
    """(s − mean) / std: scores with mean 0 and standard deviation 1 on the completions that they were measured on.

    Bradley-Terry fixes differences of scores only, and how large they grow depends on data, seed and epochs: one KL
    weight in the reward would hold one policy fast and let another run away. Ouyang 2022 (section 3.5) sets the mean.
    ``completions``: how many the numbers were measured on. Of a model of several heads: the scale of their mean, and
    that of each in ``heads``, as heads have no common unit.
    """

    mean: float = 0.0
    std: float = 1.0
    completions: int = 0
    heads: tuple[ScoreScale, ...] = ()

    @classmethod
    def of(cls, scores: Tensor) -> ScoreScale:
        """Measured on ``scores``, [N] or those of K heads [N, K]. Scores that are all
        equal, up to the rounding of their type, keep their unit."""
        if not len(scores):
            return cls()
        if scores.dim() == 2:
            return replace(cls.of(scores.mean(1)), heads=tuple(cls.of(one) for one in scores.unbind(1)))
        exact = scores.double()
        std = float(exact.std(correction=0))
        rounding = 4 * torch.finfo(scores.dtype).eps * float(exact.abs().max())
        return cls(mean=float(exact.mean()), std=std if std > rounding else 1.0, completions=len(scores))

    @classmethod
    def load(cls, folder: Path) -> ScoreScale | None:
        """The scale that was saved with a reward model; None where there is none."""
        path = folder / FILE
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**found, "heads": tuple(cls(**one) for one in found.get("heads", ()))})

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self._as_data(), indent=1), encoding="utf-8")

    def _as_data(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "heads"}
        return own | ({"heads": [one._as_data() for one in self.heads]} if self.heads else {})

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardModel:
    """``batch_of`` lays rollouts out in the reward model's own tokens; ``score`` gives [N] scores of a batch.

    With a ``scale`` the reward is the scaled score, and the score as the model gives it is its part "unscaled".
    """

    batch_of: Callable[[Sequence[Rollout]], Batch]
    score: Callable[[Batch], Tensor]
    scale: ScoreScale | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        scores = self.score(self.batch_of(rollouts)).float().cpu()
        if self.scale is None:
            return Scores(total=scores)
        return Scores(total=self.scale(scores), parts={"unscaled": scores})
