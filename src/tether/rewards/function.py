"""A user's own function or class as a reward, held to its contract: one finite number per completion."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import random
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from tether.core.errors import RewardFailure, TetherError, UserError
from tether.core.protocols import Reward, Scores
from tether.core.text import Rollout
from tether.rewards.asking import Reply, ask
from tether.rewards.worker import Workers

# What a reward with a memory has (compose.Remembering).
MEMORY = ("advance", "state", "restore")
# Threads that a function may leave behind before it is stopped.
_MOST_THREADS = 200


@dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """How a function is asked.

    ``each``: it takes one ``prompt`` and one ``completion`` and gives one number, instead of lists of all.
    ``seconds``: a call that takes longer is stopped. ``workers``: calls at the same time, with ``each``.
    ``retries``: how often a failing call is made again before it counts as failed.
    With seconds or workers the function runs in processes of its own (``rewards/worker.py``), else in that of the run.
    """

    each: bool = False
    workers: int = 1
    seconds: float | None = None
    retries: int = 0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.retries < 0:
            raise ValueError(f"workers is 1 or more and retries 0 or more, got {self.workers} and {self.retries}")
        if self.workers > 1 and not self.each:
            raise ValueError("workers would be ignored: the function takes all completions at once; set each: true")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is a time above 0, got {self.seconds}")

    @property
    def apart(self) -> bool:
        return self.workers > 1 or self.seconds is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class FunctionReward:
    """function(prompts=[...], completions=[...], **columns) -> one number per completion; None or NaN: unscored.

    ``prompts`` are the questions, ``completions`` the texts; every metadata column that all rollouts carry is passed
    as a list too where the function takes it. The function gets copies, and finds and leaves the random generators of
    the run as they are. What raises, exits, hangs, or returns anything but such numbers is a RewardFailure that names
    the function and a sample, never a score of 0. With ``skip`` a failure that belongs to one completion leaves that
    completion unscored (NaN) and is told to ``say``; one of a whole call stops nonetheless, as nothing is left.
    """

    function: Callable[..., Any]
    name: str
    options: FunctionOptions = FunctionOptions()
    skip: bool = False
    say: Callable[[str], None] = lambda text: None
    _threads: set[int] = field(default_factory=set, repr=False)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        each = self.options.each
        together = [rollouts] if rollouts else []
        batches = [[rollout] for rollout in rollouts] if each else together
        calls = [(self._arguments(b), None if each else len(b)) for b in batches]
        replies, retried = self._replies(calls, _seed_of(rollouts))
        found = [n for batch, reply in zip(batches, replies, strict=True) for n in self._of_each(batch, reply)]
        numbers = self._without_failures(rollouts, found)
        parts = {}
        if self.options.retries:
            counts = [float(n) for batch, n in zip(batches, retried, strict=True) for _ in batch]
            parts["retried"] = torch.tensor(counts)
        return Scores(total=torch.tensor(numbers, dtype=torch.float32), parts=parts)

    def _replies(self, calls: list[tuple[dict[str, Any], int | None]], seed: int) -> tuple[list[Reply], list[int]]:
        """The last reply to each call, and how often it was made again."""
        replies: list[Reply] = [""] * len(calls)
        again = [0] * len(calls)
        pending = list(range(len(calls)))
        for attempt in range(self.options.retries + 1):
            made = [(*calls[i], (seed + i + 7919 * attempt) % 2**32) for i in pending]
            found = self._workers.run(made) if self.options.apart else self._here(made)
            for i, reply in zip(pending, found, strict=True):
                replies[i], again[i] = reply, attempt
            pending = [i for i in pending if _failed(replies[i])]
        return replies, again

    @cached_property
    def _workers(self) -> Workers:
        return Workers(self.name, self.options.workers, self.options.seconds)

    def _here(self, calls: Sequence[tuple[dict[str, Any], int | None, int]]) -> list[Reply]:
        """In this process. Arguments are copied for every call: a function may change what it gets."""
        with run_untouched():
            found: list[Reply] = []
            for arguments, count, seed in calls:
                _seed(seed)
                found.append(ask(self.function, copy.deepcopy(arguments), count))
        self._count_threads()
        return found

    def _count_threads(self) -> None:
        """A thread that is left running can't be stopped, only named; too many of them are a failure."""
        known = bool(self._threads)
        left = {t.ident or 0 for t in threading.enumerate()} - self._threads
        if not known:
            self._threads.update(left)
        elif len(left) > _MOST_THREADS:
            raise RewardFailure(
                f"the reward {self.name} leaves threads running: {len(left)} more than after its first call\n"
                "  join them, or give it a process of its own (seconds in its config)"
            )

    def _arguments(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        columns = self._columns(rollouts)
        if self.options.each:
            (rollout,) = rollouts
            one = {name: values[0] for name, values in columns.items()}
            return {"prompt": rollout.prompt.question, "completion": rollout.text, **one}
        return {"prompts": [r.prompt.question for r in rollouts], "completions": [r.text for r in rollouts], **columns}

    def _columns(self, rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
        try:
            accepted = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # some callables written in C do not say what they take
            return {}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        shared = set.intersection(*(set(r.prompt.metadata) for r in rollouts))
        given = ("prompt", "completion") if self.options.each else ("prompts", "completions")
        return {
            name: [r.prompt.metadata[name] for r in rollouts]
            for name in sorted(shared)
            if (takes_all or name in accepted) and name not in given
        }

    def _of_each(self, rollouts: Sequence[Rollout], reply: Reply) -> list[float | str]:
        """Of each rollout its number, or what is wrong; the end where a whole call failed."""
        if not isinstance(reply, str):
            return reply
        if self.options.each:
            return [reply]
        raise RewardFailure(f"the reward {self.name} {reply}\n  {among(rollouts)}")

    def _without_failures(self, rollouts: Sequence[Rollout], found: Sequence[float | str]) -> list[float]:
        """NaN for what failed, where that is allowed."""
        failed = [(r, n) for r, n in zip(rollouts, found, strict=True) if isinstance(n, str)]
        if failed:
            rollout, reason = failed[0]
            words = f"the reward {self.name} {reason}\n  for {sample(rollout)}"
            more = f" ({len(failed) - 1} more of {len(rollouts)} failed)" if len(failed) > 1 else ""
            if not self.skip:
                raise RewardFailure(f"{words}{more}\n  return a finite number, or None to leave it unscored")
            self.say(f"left out: {words}{more}")
        return [math.nan if isinstance(n, str) else n for n in found]


def sample(rollout: Rollout) -> str:
    """A rollout, named."""
    return f"prompt {rollout.prompt.id}: {rollout.text[:120]!r}"


def among(rollouts: Sequence[Rollout]) -> str:
    """Some rollouts, one of them named."""
    return f"on {len(rollouts)} completions" + (f"; the first is of {sample(rollouts[0])}" if rollouts else "")


def _failed(reply: Reply) -> bool:
    return isinstance(reply, str) or any(isinstance(number, str) for number in reply)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnReward:
    """A reward class of the user's own, which sees rollouts and gives Scores; what it gets is a copy.

    What raises, exits or gives anything but one number per rollout is a RewardFailure that names the class. A class
    with a memory (``advance``, ``state`` and ``restore``: ``compose.Remembering``) keeps it: this has the three then.
    """

    reward: Reward
    name: str

    def __post_init__(self) -> None:
        # Only where the class has all three: a reward without them must not look as if it remembered.
        if remembers(self.reward):
            for method in MEMORY:
                object.__setattr__(self, method, partial(self._remember, method))
        elif callable(getattr(self.reward, "advance", None)):
            raise UserError(
                f"the reward {self.name} has advance, which would be ignored: a memory needs advance, state and "
                "restore, so that a checkpoint can hold it; give all three, or another name"
            )

    def _remember(self, method: str, *arguments: Any) -> Any:
        try:
            with run_untouched():
                made = copy.deepcopy(getattr(self.reward, method)(*copy.deepcopy(arguments)))
                if method == "state":
                    json.dumps(made, allow_nan=False)  # or the checkpoint that it goes into could not be written
                return made
        except (KeyboardInterrupt, TetherError):
            raise
        except BaseException as error:
            words = f"{type(error).__name__}: {error} in its {method}"
            raise RewardFailure(f"the reward {self.name} raised {words}") from error

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        try:
            with run_untouched():
                _seed(_seed_of(rollouts))
                scores = self.reward(copy.deepcopy(list(rollouts)))
        except (KeyboardInterrupt, TetherError):
            raise
        except BaseException as error:
            raise RewardFailure(
                f"the reward {self.name} raised {type(error).__name__}: {error}\n  {among(rollouts)}"
            ) from error
        return checked(scores, rollouts, self.name)


def remembers(reward: object) -> bool:
    """Whether a reward, or a class of rewards, has a memory."""
    return all(callable(getattr(reward, method, None)) for method in MEMORY)


def checked(scores: Any, rollouts: Sequence[Rollout], name: str) -> Scores:
    """``scores`` as float32 on the CPU and without gradient, where they are scores of these rollouts.

    Raises RewardFailure; NaN is unscored and passes.
    """
    if not isinstance(scores, Scores):
        raise RewardFailure(f"the reward {name} must give Scores(total=..., parts=...), got {type(scores).__name__}")
    for part, values in {"total": scores.total, **scores.parts}.items():
        if not isinstance(values, torch.Tensor) or values.is_complex():
            kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            raise RewardFailure(f"the reward {name} must give tensors of real numbers, its {part} is {kind}")
        if values.shape != (len(rollouts),):
            what = "scores" if part == "total" else f"a part {part}"
            raise RewardFailure(
                f"the reward {name} gave {what} of shape {tuple(values.shape)} for {len(rollouts)} completions"
            )
    total = scores.total.detach().to("cpu", torch.float32)
    if bool(total.isinf().any()):
        row = int(total.isinf().nonzero()[0])
        raise RewardFailure(
            f"the reward {name} gave {float(scores.total[row]):g}\n  for {sample(rollouts[row])}\n"
            "  give a finite number, or NaN to leave the completion unscored"
        )
    parts = {part: values.detach().to("cpu", torch.float32) for part, values in scores.parts.items()}
    return Scores(total=total, parts=parts)


def _seed_of(rollouts: Sequence[Rollout]) -> int:
    """What a reward draws from: another seed in every step, and after a resume the same as without it."""
    told = [(r.policy_version, r.prompt.id, r.text) for r in rollouts]
    return zlib.crc32(repr((random.getstate(), told)).encode())


def _seed(seed: int) -> None:
    """Every generator that there is; not ``torch.manual_seed``, which would also reach a GPU that is opened later."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


@contextmanager
def run_untouched() -> Iterator[None]:
    """Whatever happens inside, the run finds its generators (torch, Python and, where it is loaded, NumPy), its working
    folder and torch's own settings as they were."""
    numpy = sys.modules.get("numpy")
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    settings = os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        yield
    finally:
        os.chdir(settings[0])
        torch.set_grad_enabled(settings[1])
        torch.set_default_dtype(settings[2])
        if torch.get_num_threads() != settings[3]:
            torch.set_num_threads(settings[3])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        if numpy:
            numpy.random.set_state(generators[2])
