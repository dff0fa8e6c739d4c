"""The loop over data that exists: SFT, reward models, and the DPO family. The loss is the only difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tether.core.batches import Batch, Group
from tether.core.metrics import values
from tether.core.protocols import Learner, Loss
from tether.training.session import Session


class Batches(Protocol):
    """The groups of every optimizer step, by step number from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Sequence[Group]: ...


def train(
    session: Session,
    learner: Learner,
    loss: Loss,
    batches: Batches,
    prepare: Callable[[Sequence[Group]], Batch],
    *,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_every: int = 0,
) -> None:
    """One optimizer step per element of ``batches``. ``prepare`` lays groups out, and adds reference log-probs."""

    def one_step(step: int) -> dict[str, float]:
        with session.split("score"):
            batch = prepare(batches[step - 1])
        with session.split("update"):
            metrics = learner.forward_backward(batch, loss)
            stepped = learner.optim_step()
        return {**values(metrics), **stepped}

    session.run(one_step, evaluate, eval_every)
