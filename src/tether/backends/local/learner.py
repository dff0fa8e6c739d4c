"""The in-process learner: gradients of a whole optimizer batch in micro-batches, and AdamW."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.core.batches import Batch, Outputs, PolicyBatch, pad_rows
from tether.core.errors import NumericStop
from tether.core.metrics import Mean, Metrics, merge
from tether.core.protocols import Loss
from tether.data.batching import micro_batches
from tether.models.adapters import dropout_on
from tether.models.fused import dense_gradients, use_sparse_embedding
from tether.models.roles import ActorCritic, Policy, Role
from tether.models.work import training_work


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """AdamW (Loshchilov 2019) and what surrounds a step. ``learning_rate`` maps the step number to a rate."""

    learning_rate: Callable[[int], float]
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    nonfinite_limit: int = 3
    # Learning-rate factor of the tensors whose name starts with the key (a critic may learn faster than its policy).
    factors: Mapping[str, float] | None = None


class LocalLearner:
    """Trains one role (a policy, a scorer, or both) and nothing else of the backbone."""

    def __init__(self, role: Role, settings: AdamWSettings, *, tokens_per_micro_batch: int) -> None:
        self.role = role
        self.settings = settings
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.step = 0
        self.tokens_seen = 0
        self.flops_seen = 0.0
        self.work = training_work(role)
        self.nonfinite_in_a_row = 0
        self._nonfinite_loss = False
        roles = (role.policy, role.critic) if isinstance(role, ActorCritic) else (role,)
        self._networks = [r.backbone.hf for r in roles]
        self.parameters = role.parameters()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        for network in self._networks:
            use_sparse_embedding(network)
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=settings.learning_rate(0),
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )

    def _groups(self) -> list[dict[str, object]]:
        """Parameter groups by learning-rate factor and decay; vectors (norms, biases) are not decayed."""
        buckets: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            factor = next((f for p, f in (self.settings.factors or {}).items() if name.startswith(p)), 1.0)
            decay = self.settings.weight_decay if parameter.dim() > 1 else 0.0
            buckets.setdefault((factor, decay), []).append(parameter)
        return [{"params": ps, "weight_decay": decay, "factor": factor} for (factor, decay), ps in buckets.items()]

    def forward_backward(self, batch: Batch, loss: Loss, weight: float = 1.0) -> Metrics:
        """Add weight · ∂(sum / count)/∂θ of the whole ``batch``: the count is known before the first micro-batch, so
        any division into micro-batches gives the same gradient. A batch that counts nothing adds nothing."""
        count = loss.count(batch)
        parts: list[Metrics] = []
        if count == 0:
            return {}
        # A policy's entropy is worth knowing whether the loss asks for it or not.
        entropy = "entropy" in loss.needs or isinstance(batch, PolicyBatch)
        for rows in micro_batches(batch, self.tokens_per_micro_batch):
            part = batch.select(rows).to(self.role.device)
            with dropout_on(self._networks):
                outputs = self.role(part, entropy=entropy)
            output = loss(outputs, part)
            total = torch.as_tensor(output.loss.total)
            if not math.isfinite(float(total.detach())):
                self._nonfinite_loss = True
                continue
            (total * (weight / count)).backward()
            dense_gradients(self.parameters.values())
            parts.append({"loss": Mean(float(total.detach()), output.loss.count), **output.metrics})
        # A prompt that several micro-batches computed was of use once.
        self.tokens_seen += packed_tokens(batch)
        if self.work is not None:
            self.flops_seen += self.work.of(packed_tokens(batch), int(batch.lengths.sum()))
        return merge(parts)

    def optim_step(self) -> dict[str, float]:
        """Clip to the global norm, step, zero. A non-finite loss or gradient skips the step; several in a row stop."""
        rate = self.settings.learning_rate(self.step)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if self._nonfinite_loss or not math.isfinite(norm):
            self._skip()
        else:
            self.nonfinite_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            if norm > self.settings.clip_norm:
                for grad in grads:
                    grad.mul_(self.settings.clip_norm / (norm + 1e-6))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": float(self.nonfinite_in_a_row > 0)}

    def _skip(self) -> None:
        self._nonfinite_loss = False
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row >= self.settings.nonfinite_limit:
            raise NumericStop(
                f"loss or gradient was not finite {self.nonfinite_in_a_row} steps in a row (at step {self.step})\n"
                "  lower optim.learning_rate, or look at the batch: the last checkpoint is whole"
            )

    @torch.no_grad()
    def outputs(self, batch: Batch, *, entropy: bool = False) -> Outputs:
        """What the role says of ``batch`` now, without gradient."""
        return evaluate(self.role, batch, self.tokens_per_micro_batch, entropy=entropy)

    def logprobs(self, batch: Batch) -> Tensor:
        logprobs = self._alone("policy", batch).logprobs
        assert logprobs is not None, "this role has no language-model head"
        return logprobs

    def values(self, batch: Batch) -> Tensor:
        values = self._alone("critic", batch).values
        assert values is not None, "this role has no critic"
        return values

    @torch.no_grad()
    def _alone(self, part: str, batch: Batch) -> Outputs:
        """What one of two networks says; of one that both share, what both say costs no more."""
        split = isinstance(self.role, ActorCritic) and not self.role.shares_trunk
        return evaluate(getattr(self.role, part) if split else self.role, batch, self.tokens_per_micro_batch)

    def save(self, folder: Path) -> None:
        """Optimizer state and counters (weights are the role's to save as a model folder; exact ones go here)."""
        folder.mkdir(parents=True, exist_ok=True)
        names = {id(p): n for n, p in self.parameters.items()}
        tensors = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                tensors[f"{key}.{names[id(parameter)]}"] = value
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "learner.safetensors")
        counters = {"step": self.step, "tokens_seen": self.tokens_seen, "nonfinite_in_a_row": self.nonfinite_in_a_row}
        (folder / "learner.json").write_text(json.dumps(counters))

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "learner.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                state = {
                    key: tensors[f"{key}.{name}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if state:
                    self.optimizer.state[parameter] = state
        for key, value in json.loads((folder / "learner.json").read_text()).items():
            setattr(self, key, value)


@torch.no_grad()
def evaluate(
    role: Role, batch: Batch, tokens_per_micro_batch: int, *, entropy: bool = False, top_k: int | None = None
) -> Outputs:
    """Outputs of ``role`` on ``batch`` in micro-batches, in the batch's own order, without gradient.

    Raises ValueError where ``top_k``, the most likely tokens in each place, is asked of another role than a policy.
    """

    def read(part: Batch) -> Outputs:
        if top_k is None:
            return role(part, entropy=entropy)
        if not isinstance(role, Policy):
            raise ValueError(f"top_k: a {type(role).__name__} has no most likely tokens; give a Policy")
        return role(part, entropy=entropy, top_k=top_k)

    parts = [(rows, read(batch.select(rows).to(role.device))) for rows in micro_batches(batch, tokens_per_micro_batch)]
    width = batch.tokens.shape[1]

    def gather(name: str) -> Tensor | None:
        if not parts or getattr(parts[0][1], name) is None:
            return None
        out: list[Tensor] = [torch.empty(0)] * batch.size
        for rows, outputs in parts:
            for row, value in zip(rows.tolist(), getattr(outputs, name).cpu(), strict=True):
                out[row] = value
        return torch.stack(out) if name in ("scores", "head_scores") else pad_rows(out, width)

    return Outputs(**{f.name: gather(f.name) for f in fields(Outputs)})


def packed_tokens(batch: Batch) -> int:
    """Useful tokens: every prompt that has completions once, and every completion."""
    return sum(len(batch.prompts[p]) for p in set(batch.prompt_of.tolist())) + int(batch.lengths.sum())
