"""A policy that is a table, and the sampler and learner that put it into the real loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.core.batches import Batch, Outputs
from tether.core.metrics import Mean, Metrics
from tether.core.protocols import Loss, SamplingSettings
from tether.core.text import Prompt, Rollout
from tether.methods.theory.world import (
    A,
    World,
    all_answers,
    prompt_numbers,
    prompt_tokens,
    read_table,
    spelled,
    states,
)


class TableLearner:
    """One row of logits, and one value, per prompt and prefix: softmax tables in float64, trained with Adam.

    ``critic_rate``: the critic's learning rate, as values are in the reward's units and logits in nats.
    """

    def __init__(self, world: World, rate: Callable[[int], float], critic_rate: float = 1.0) -> None:
        self.logits = world.reference.clone().requires_grad_()
        self.critic = torch.zeros(self.logits.shape[:2], dtype=self.logits.dtype, requires_grad=True)
        self.rate, self.step, self.tokens_seen, self.flops_seen = rate, 0, 0, 0.0
        groups = [{"params": [self.logits], "factor": 1.0}, {"params": [self.critic], "factor": critic_rate}]
        self.optimizer = torch.optim.Adam(groups, lr=rate(0))

    def _read(self, batch: Batch) -> Outputs:
        table = self.logits.log_softmax(-1)
        x, before = prompt_numbers(batch)[:, None], states(batch.tokens)
        here = table[x, before]
        return Outputs(
            logprobs=read_table(table, batch), entropy=-(here.exp() * here).sum(-1), values=self.critic[x, before]
        )

    def forward_backward(self, batch: Batch, loss: Loss, weight: float = 1.0) -> Metrics:
        made, count = loss(self._read(batch), batch), loss.count(batch)
        if count == 0:
            return {}
        total = torch.as_tensor(made.loss.total)
        (total * (weight / count)).backward()
        self.tokens_seen += int(batch.lengths.sum())
        return {"loss": Mean(float(total.detach()), count), **made.metrics}

    def optim_step(self) -> dict[str, float]:
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        norm = 0.0 if self.logits.grad is None else float(self.logits.grad.norm())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": 0.0}

    @torch.no_grad()
    def outputs(self, batch: Batch, *, entropy: bool = False) -> Outputs:
        return self._read(batch)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        return read_table(self.logits.log_softmax(-1), batch)

    def values(self, batch: Batch) -> Tensor:
        values = self.outputs(batch).values
        assert values is not None, "this table has no critic"
        return values

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"logits": self.logits.detach(), "critic": self.critic.detach()}, folder / "table.safetensors")

    def load(self, folder: Path) -> None:
        kept = load_file(folder / "table.safetensors")
        with torch.no_grad():
            self.logits.copy_(kept["logits"])
            self.critic.copy_(kept["critic"])


@dataclass(kw_only=True, eq=False)
class EnumeratedSampler:
    """Draws answers from their exact probabilities under ``logprobs``, and remembers each policy it drew from.

    ``seen``: π [X, S] at each step. ``temperature=0`` gives the greedy answer, token by token.
    """

    world: World
    logprobs: Callable[[Batch], Tensor]
    seen: list[Tensor] = field(default_factory=list)

    def policy(self) -> Tensor:
        """π [X, S] now."""
        return self.world.per_answer(self.logprobs(self.world.answers).double()).exp()

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        settings: SamplingSettings,
        seed: int,
        finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        per_token = self.logprobs(self.world.answers)
        policy = self.world.per_answer(per_token.double()).exp()
        x = torch.tensor([self._number(p) for p in prompts]).repeat_interleave(n)
        if settings.temperature == 0:
            chosen = greedy_answers(per_token.view(*policy.shape, -1))[x]
        else:
            self.seen.append(policy)
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.multinomial(policy[x], 1, generator=generator).squeeze(1)
        made = self._rollout_parts(per_token)
        pairs = zip(x.tolist(), chosen.tolist(), strict=True)
        rollouts = [Rollout(prompt=prompts[i // n], group=i // n, **made[x, s]) for i, (x, s) in enumerate(pairs)]
        if finished is not None:
            for rollout in rollouts:
                finished(rollout)
        return rollouts

    def _number(self, prompt: Prompt) -> int:
        return [p.text for p in self.world.prompts].index(prompt.text)

    def _rollout_parts(self, per_token: Tensor) -> dict[tuple[int, int], dict]:
        """What rollouts of the same answer share, made once a step."""
        answers, shape = all_answers(), self.world.gold.shape
        return {
            (x, s): {
                "prompt_tokens": prompt_tokens(x + A),
                "tokens": torch.tensor(answers[s]),
                "sampled": torch.ones(len(answers[s]), dtype=torch.bool),
                "logprobs": per_token[x * shape[1] + s, : len(answers[s])],
                "text": spelled(answers[s]),
                "finish_reason": "stop" if 0 in answers[s] else "length",
            }
            for x in range(shape[0])
            for s in range(shape[1])
        }


def greedy_answers(per_token: Tensor) -> Tensor:
    """[X, S, T] log-probs of all answers' tokens -> [X] the answer that takes the likeliest token every time."""
    rows = torch.tensor([(*a, *[-1] * (per_token.shape[2] - len(a))) for a in all_answers()])
    out = []
    for one in per_token:
        left = torch.arange(len(rows))
        for t in range(rows.shape[1]):
            best = left[one[left, t].argmax()]
            left = left[rows[left, t] == rows[best, t]]
        out.append(int(left[0]))
    return torch.tensor(out)
