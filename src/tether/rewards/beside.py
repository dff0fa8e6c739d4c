"""Judging beside the sampling: a completion that is whole is judged in a thread while others are still being drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from tether.core.protocols import Reward, Sampler, SamplingSettings, Scores
from tether.core.text import Prompt, Rollout


@runtime_checkable
class OneByOne(Reward, Protocol):
    """A reward that judges each completion by itself: its Scores of several are those of each, in a row.

    ``beside``: how many it judges at once. What has it also promises that judging touches nothing of the run (random
    generators, working folder, torch's settings) and may happen in any thread.
    """

    @property
    def beside(self) -> int: ...


@runtime_checkable
class Beginning(Protocol):
    """A reward that can begin with a completion before it is asked for its score."""

    def begin(self, rollout: Rollout) -> None: ...

    def forget(self) -> None:
        """Drop what was begun and not asked for. Nothing of it runs any more when this returns."""
        ...


@dataclass(kw_only=True, eq=False)
class Beside:
    """``reward``, with the same Scores and the same failures, some of its work done before it is asked.

    What is begun is known by the rollout itself, not by its text, and is kept until the next call only.
    """

    reward: OneByOne
    _begun: dict[int, tuple[Rollout, Future[Scores]]] = field(default_factory=dict, init=False, repr=False)
    _threads: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # As many threads as the reward judges at once by itself, mostly one: what takes long (SymPy, a program in a
        # sandbox) goes on in a process of its own, for which a thread only waits; what takes microseconds holds
        # Python's lock, so a second thread would win nothing and more of them would be in the sampler's way.
        self._threads = ThreadPoolExecutor(self.reward.beside, thread_name_prefix="tether-reward")

    @property
    def name(self) -> str:
        return getattr(self.reward, "name", type(self.reward).__name__)

    def begin(self, rollout: Rollout, then: Callable[[Scores], None] | None = None) -> None:
        """Have ``rollout`` judged. ``then`` hears the scores, in the thread, before whoever waits for them."""
        self._begun[id(rollout)] = rollout, self._threads.submit(self._judge, rollout, then)

    def _judge(self, rollout: Rollout, then: Callable[[Scores], None] | None) -> Scores:
        scores = self.reward([rollout])
        if then is not None:
            then(scores)
        return scores

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        try:
            if not any(id(rollout) in self._begun for rollout in rollouts):
                return self.reward(rollouts)
            for rollout in rollouts:
                if id(rollout) not in self._begun:
                    self.begin(rollout)
            # In the order asked: of several failures it is the first of these that is raised.
            found = [self._begun[id(rollout)][1].result() for rollout in rollouts]
        finally:
            self.forget()
        parts = {name: torch.cat([scores.parts[name] for scores in found]) for name in found[0].parts}
        return Scores(total=torch.cat([scores.total for scores in found]), parts=parts)

    def forget(self) -> None:
        left = [future for _, future in self._begun.values() if not future.cancel()]
        self._begun.clear()
        wait(left)


def put_beside(reward: Reward) -> Reward:
    """``reward``, to be begun beside the sampling where it judges completions one by one."""
    return Beside(reward=reward) if isinstance(reward, OneByOne) else reward


def sample_beside(
    sampler: Sampler, reward: Reward, prompts: Sequence[Prompt], *, n: int, settings: SamplingSettings, seed: int
) -> list[Rollout]:
    """What ``sampler`` draws; ``reward`` has begun with each completion as soon as it was whole, where it can."""
    if not isinstance(reward, Beginning):
        return sampler.sample(prompts, n=n, settings=settings, seed=seed)
    try:
        return sampler.sample(prompts, n=n, settings=settings, seed=seed, finished=reward.begin)
    except BaseException:  # nobody will ask, and the end of the run must not wait for a queue of programs
        reward.forget()
        raise
