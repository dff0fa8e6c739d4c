"""What the Tether adapter needs to run whole: one step of the online loop on stand-ins, and the methods on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from conformance import data
from tether import advantages
from tether.algorithms import Algorithm
from tether.backends.local.learner import LocalLearner
from tether.core.batches import Batch, Outputs, PolicyBatch
from tether.core.protocols import Scores
from tether.core.text import Prompt, Rollout
from tether.losses import POLICY
from tether.runs.clock import Split
from tether.training import online


def run_one_step(
    seen: list[PolicyBatch], scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, coefficient: float
) -> None:
    rollouts = [
        Rollout(
            prompt=Prompt(id=str(i), text="?"),
            group=i,
            prompt_tokens=torch.tensor([1]),
            tokens=torch.full((n,), 5),
            sampled=torch.ones(n, dtype=torch.bool),
            logprobs=logprobs[i, :n],
            text="",
            finish_reason="stop",
        )
        for i, n in enumerate(mask.sum(1).tolist())
    ]

    class Learner:
        tokens_seen = 0

        def outputs(self, batch: Batch, *, entropy: bool = False) -> Outputs:
            return Outputs(logprobs=logprobs, entropy=torch.zeros_like(logprobs))

        def forward_backward(self, batch: PolicyBatch, loss: object, weight: float = 1.0) -> dict[str, Any]:
            seen.append(batch)
            return {}

        def optim_step(self) -> dict[str, float]:
            return {"grad_norm": 0.0, "learning_rate": 0.0, "skipped_steps": 0.0}

    class Reference:
        def __call__(self, batch: Batch) -> Tensor:
            return ref

        def follow(self, step: int) -> None: ...

        def save(self, folder: Path) -> None: ...

        def load(self, folder: Path) -> None: ...

    algorithm = Algorithm(
        name="probe", advantage=advantages.RewardsToGo(), loss=POLICY["policy_gradient"](), kl_in_reward=coefficient
    )
    session: Any = SimpleNamespace(
        learner=Learner(),
        split=Split(),
        samples=SimpleNamespace(append=lambda *row: None),
        progress=SimpleNamespace(note=lambda text: None),
        total_steps=1,
        run=lambda step, *rest: step(1),
    )
    job = online.OnlineJob(
        algorithm=algorithm,
        group_size=1,
        prompts=lambda first, count: [r.prompt for r in rollouts],
        prompts_per_step=len(rollouts),
        sampler=SimpleNamespace(sample=lambda prompts, **how: rollouts),
        settings=SimpleNamespace(),  # type: ignore[arg-type]
        reward=lambda found: Scores(total=scores),
        watch=None,
        reference=Reference(),
        seed=0,
        max_logprob_gap=1e9,
    )
    online.train(session, job)


# -- whole runs -------------------------------------------------------------------------------------------------------


class Died(BaseException):
    """A process that is gone: nothing but the adapter catches it."""


@contextlib.contextmanager
def dying_at(nth: int) -> Iterator[None]:
    """The ``nth`` optimizer step of this process never comes back."""
    real, calls = LocalLearner.optim_step, [0]

    def step(self: LocalLearner) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == nth:
            raise Died
        return real(self)

    LocalLearner.optim_step = step
    try:
        yield
    finally:
        LocalLearner.optim_step = real


METHODS = {"sft": "sft", "dpo": "preference", "reward": "reward", "grpo": "rl"}
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {
        "steps": 4,
        "prompts_per_step": 2,
        "completions_per_prompt": 2,
        "sampling": {"max_new_tokens": 6},
        "reward": "target_length",
        "algorithm": "grpo",
    }
}


def train(method: str, folder: Path, run: str, *, resume: bool = False) -> Path:
    """Four optimizer steps through the method's front door, with a checkpoint after the second."""
    from tether.config.schema import METHODS as SCHEMA

    model, rows_file = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        data.text_model(model)
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in data.training_rows(method)), encoding="utf-8")
    name = METHODS[method]
    config = SCHEMA[name].model_validate(
        {
            "model": {"name": str(model)},
            "data": {"train": str(rows_file)},
            "optim": {"warmup": 0, "learning_rate": 1e-2},
            "run": {"folder": str(folder / run), "report": False, "checkpoint_every": 2},
            **SETTINGS.get(method, {"prompts_per_step": 2}),
        }
    )
    return import_module(f"tether.methods.{name}").run(config, quiet=True, resume=resume)


def final_weights(run: Path) -> Tensor:
    from safetensors.torch import load_file

    tensors = load_file(run / "final" / "model.safetensors")
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])
