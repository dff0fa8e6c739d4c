"""What every verifier shares: where the right answer is, which part of a completion is judged, and what a failure is.

A wrong answer is 0. What keeps a verifier from judging is a RewardFailure that names prompt and sample, never a 0.
``beside`` is the word by which a verifier says that it judges completions one by one, and how many at once: it is then
begun while others are still being sampled (``rewards/beside.py``).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tether.core.errors import RewardFailure, UserError
from tether.core.text import Rollout

Undecided = Literal["stop", "unscored"]


class CannotJudge(Exception):
    """Raised by a verifier about one completion: it is neither right nor wrong as far as can be told; says why."""


def score_each(
    name: str, rollouts: Sequence[Rollout], judge: Callable[[Rollout], float], undecided: Undecided = "stop"
) -> Tensor:
    """``judge`` of every rollout, [N] float32. ``undecided``: what a CannotJudge becomes, a RewardFailure ("stop") or
    NaN ("unscored", for the run to stop at or skip). Every other exception is a RewardFailure that names the sample."""
    return torch.tensor([judge_one(name, r, judge, undecided) for r in rollouts], dtype=torch.float32)


def judge_one(name: str, rollout: Rollout, judge: Callable[[Rollout], float], undecided: Undecided = "stop") -> float:
    """One row of ``score_each``."""
    try:
        return float(judge(rollout))
    except CannotJudge as reason:
        if undecided == "unscored":
            return math.nan
        hint = "reward.undecided=unscored leaves such completions unscored, for on_reward_failure to skip"
        raise RewardFailure(f"{_sample(name, rollout)}: {reason}\n  {hint}") from reason
    except (RewardFailure, UserError) as error:
        raise RewardFailure(f"{_sample(name, rollout)}: {error}") from error
    except Exception as error:
        raise RewardFailure(f"{_sample(name, rollout)}: {type(error).__name__}: {error}") from error


def _sample(name: str, rollout: Rollout) -> str:
    return f"{name} can't judge the completion {rollout.text[:120]!r} of prompt {rollout.prompt.id}"


def column(rollout: Rollout, name: str, knob: str = "column") -> Any:
    """The value that the prompt carries under ``name``; ``knob`` is the option that names another."""
    metadata = rollout.prompt.metadata
    if name not in metadata or metadata[name] is None:
        raise RewardFailure(
            f"prompt {rollout.prompt.id} has no column {name!r} to compare with; "
            f"it has {sorted(metadata) or 'none'}: name it with reward.{knob}"
        )
    return metadata[name]


def inside(text: str, tag: str) -> str:
    """What the last ``<tag>…</tag>`` of ``text`` holds, "" where there is none; the whole text for an empty ``tag``."""
    if not tag:
        return text
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else ""


_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def last_block(text: str, languages: tuple[str, ...]) -> str | None:
    """The last fenced block of ``text`` that is of one of the ``languages`` or says none; an open fence runs to the
    end. None where there is no such block."""
    found = [body for language, body in _FENCE.findall(text) if language.lower() in ("", *languages)]
    return found[-1] if found else None


def needs_package(verifier: str, module: str, extra: str) -> None:
    """UserError where ``module`` is not installed: it says what to install."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{verifier} needs the package {module}: pip install 'tether-rlhf[{extra}]'")
