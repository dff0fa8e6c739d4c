"""A user's own function as a reward, held to its contract: one finite number per completion."""

from __future__ import annotations

import copy
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tether.core.errors import RewardFailure
from tether.core.protocols import Scores
from tether.core.text import Rollout

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True, eq=False)
class FunctionReward:
    """function(prompts=[...], completions=[...], **columns) -> one number per completion; None or NaN: unscored.

    ``prompts`` are the questions, ``completions`` the texts; every metadata column that all rollouts carry is passed
    as a list too where the function takes it. The function gets copies, and finds and leaves the random generators of
    the run as they are. What raises, exits, or returns anything but such a list is a RewardFailure whatever the run
    was told to skip, never a score of 0; an unscored completion is NaN in the result, for the run to stop at or skip.
    """

    function: Callable[..., Any]
    name: str

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        columns = self._columns(rollouts)
        try:
            with _generators_kept():
                result = self.function(
                    prompts=[r.prompt.question for r in rollouts], completions=[r.text for r in rollouts], **columns
                )
        except (Exception, SystemExit) as error:
            raise RewardFailure(
                f"the reward {self.name} raised {type(error).__name__}: {error}\n"
                f"  on {len(rollouts)} completions; the first is of prompt {rollouts[0].prompt.id}: "
                f"{rollouts[0].text[:120]!r}"
            ) from error
        return Scores(total=torch.tensor(self._checked(result, rollouts), dtype=torch.float32))

    def _columns(self, rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
        try:
            accepted = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # some callables written in C do not say what they take
            return {}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        shared = set.intersection(*(set(r.prompt.metadata) for r in rollouts))
        return {
            name: [copy.deepcopy(r.prompt.metadata[name]) for r in rollouts]
            for name in sorted(shared)
            if (takes_all or name in accepted) and name not in ("prompts", "completions")
        }

    def _checked(self, result: Any, rollouts: Sequence[Rollout]) -> list[float]:
        """One float per rollout, NaN where unscored; everything else that is not a finite number is refused."""
        if hasattr(result, "tolist"):  # a tensor, or an array of NumPy
            result = result.tolist()
        if not isinstance(result, (list, tuple)) or len(result) != len(rollouts):
            got = f"{len(result)} values" if isinstance(result, (list, tuple)) else type(result).__name__
            raise RewardFailure(f"the reward {self.name} must return {len(rollouts)} numbers in a list, got {got}")
        return [self._number(value, rollout) for value, rollout in zip(result, rollouts, strict=True)]

    def _number(self, value: Any, rollout: Rollout) -> float:
        if value is None:
            return math.nan
        try:
            number = math.inf if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.inf
        if abs(number) > _LARGEST:
            raise RewardFailure(
                f"the reward {self.name} returned {repr(value)[:60]} for prompt {rollout.prompt.id}: "
                f"{rollout.text[:120]!r}\n  return a finite number, or None to leave the completion unscored"
            )
        return number


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Whatever happens inside, the generators of torch, Python and (where it is loaded) NumPy come out as they were."""
    numpy = sys.modules.get("numpy")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if numpy:
            numpy.random.set_state(before[2])
