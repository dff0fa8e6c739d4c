"""A user's own function as a reward, held to its contract: one finite number per completion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tether.core.errors import RewardFailure
from tether.core.protocols import Scores
from tether.core.text import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class FunctionReward:
    """function(prompts=[...], completions=[...], **columns) -> one number (or None: unscored) per completion.

    ``prompts`` are the questions, ``completions`` the texts; every metadata column that all rollouts carry is passed
    as a list too where the function takes it. What raises or returns anything else is a RewardFailure, never 0.0.
    """

    function: Callable[..., Any]
    name: str

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        before = torch.get_rng_state()
        try:
            result = self.function(
                prompts=[r.prompt.question for r in rollouts],
                completions=[r.text for r in rollouts],
                **self._columns(rollouts),
            )
        except Exception as error:
            raise RewardFailure(
                f"the reward {self.name} raised {type(error).__name__}: {error}\n"
                f"  on {len(rollouts)} completions; the first: {rollouts[0].text[:120]!r}"
            ) from error
        finally:
            torch.set_rng_state(before)
        return Scores(total=torch.tensor(self._checked(result, rollouts), dtype=torch.float32))

    def _columns(self, rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
        import inspect

        accepted = inspect.signature(self.function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        shared = set.intersection(*(set(r.prompt.metadata) for r in rollouts))
        return {
            name: [r.prompt.metadata[name] for r in rollouts]
            for name in sorted(shared)
            if (takes_all or name in accepted) and name not in ("prompts", "completions")
        }

    def _checked(self, result: Any, rollouts: Sequence[Rollout]) -> list[float]:
        """NaN marks "unscored" (None was returned); everything else must be a finite number."""
        if isinstance(result, torch.Tensor):
            result = result.tolist()
        if not isinstance(result, (list, tuple)) or len(result) != len(rollouts):
            got = f"{len(result)} values" if isinstance(result, (list, tuple)) else type(result).__name__
            raise RewardFailure(f"the reward {self.name} must return {len(rollouts)} numbers in a list, got {got}")
        scores: list[float] = []
        for value, rollout in zip(result, rollouts, strict=True):
            if value is None:
                scores.append(math.nan)
                continue
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if not math.isfinite(number):
                raise RewardFailure(
                    f"the reward {self.name} returned {str(value)[:60]!r} for prompt {rollout.prompt.id}: "
                    f"{rollout.text[:120]!r}\n  return a finite number, or None to leave the completion unscored"
                )
            scores.append(number)
        return scores
