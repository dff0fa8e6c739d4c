"""The loop over data that the policy makes. Which algorithm it is, only the row of the table knows.

sample -> reward -> score (old, reference, values) -> advantages -> update, once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.algorithms import Algorithm
from tether.core.batches import Batch, PolicyBatch, pad_rows, rollout_batch
from tether.core.errors import NumericStop, RewardFailure, UserError
from tether.core.metrics import Max, Mean, Metrics, masked_mean, merge, values
from tether.core.protocols import Reward, Sampler, SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.training.session import Session

# Rollouts of a step that the watching judge sees: enough for a curve, few enough to cost little.
WATCHED = 16


@dataclass(frozen=True, kw_only=True)
class OnlineJob:
    """What ``train`` needs, put together by ``methods``. ``reference`` scores a batch under the frozen policy;
    ``prompts`` gives the prompts of a step (from 0)."""

    algorithm: Algorithm
    group_size: int
    prompts: Callable[[int], Sequence[Prompt]]
    sampler: Sampler
    settings: SamplingSettings
    reward: Reward
    # A second judge, logged beside the reward and never trained on; it sees the first rollouts of a step only.
    watch: Reward | None
    reference: Callable[[Batch], Tensor] | None
    seed: int
    max_logprob_gap: float
    skip_failed_rewards: bool = False


def train(
    session: Session, job: OnlineJob, evaluate: Callable[[], dict[str, float]] | None = None, eval_every: int = 0
) -> None:
    """Run ``job`` for ``session.total_steps`` steps. Fails before the first rollout where a part is missing."""
    if "reference" in job.algorithm.needs and job.reference is None:
        raise UserError(f"{job.algorithm.name} holds the policy to a reference (KL), but none was given")
    loop = _Loop(session, job)
    session.run(loop.step, evaluate, eval_every)


class _Loop:
    def __init__(self, session: Session, job: OnlineJob) -> None:
        self.session, self.job, self.learner = session, job, session.learner

    def step(self, step: int) -> dict[str, float]:
        job, split = self.job, self.session.split
        with split("sample"):
            rollouts = job.sampler.sample(
                job.prompts(step - 1), n=job.group_size, settings=job.settings, seed=job.seed * 1_000_003 + step
            )
        with split("reward"):
            rollouts, scores, dropped = self._rewards(rollouts)
        with split("score"):
            batch, metrics = self._policy_batch(rollouts, scores)
        self._check(metrics, step)
        with split("update"):
            update, stepped = self._update(batch, step)
        for rollout, total in zip(rollouts, scores.total.tolist(), strict=True):
            self.session.samples.append(step, "train", sample_row(rollout, total))
        return {**values(metrics), **values(update), **stepped, "reward/dropped": float(dropped)}

    def _rewards(self, rollouts: list[Rollout]) -> tuple[list[Rollout], Scores, int]:
        """Scores; a rollout without a usable score (NaN marks it) is left out and counted, where that is allowed."""
        scores = self.job.reward(rollouts)
        name = getattr(self.job.reward, "name", type(self.job.reward).__name__)
        if scores.total.shape != (len(rollouts),):
            raise RewardFailure(
                f"the reward {name} gave scores of shape {tuple(scores.total.shape)} for {len(rollouts)} completions"
            )
        usable = torch.isfinite(scores.total)
        if bool(usable.all()):
            return rollouts, scores, 0
        if not self.job.skip_failed_rewards or not bool(usable.any()):
            first = rollouts[int((~usable).nonzero()[0])]
            raise RewardFailure(
                f"{int((~usable).sum())} of {len(rollouts)} completions were left unscored by the reward {name}; the "
                f"first is of prompt {first.prompt.id}: {first.text[:120]!r}\n"
                + (
                    "  no completion of the step is left"
                    if self.job.skip_failed_rewards
                    else "  mend the reward, or leave such completions out with on_reward_failure=skip"
                )
            )
        kept = [r for r, ok in zip(rollouts, usable.tolist(), strict=True) if ok]
        parts = {name: part[usable] for name, part in scores.parts.items()}
        return kept, Scores(total=scores.total[usable], parts=parts), int((~usable).sum())

    def _policy_batch(self, rollouts: list[Rollout], scores: Scores) -> tuple[PolicyBatch, Metrics]:
        job, algorithm = self.job, self.job.algorithm
        base = rollout_batch(rollouts)
        outputs = self.learner.outputs(base, entropy=True)
        old, entropy, critic = outputs.logprobs, outputs.entropy, outputs.values
        assert old is not None and entropy is not None
        sampler = pad_rows([r.logprobs for r in rollouts], base.tokens.shape[1])
        mask = base.loss_mask
        rewards = torch.zeros_like(old)
        # The score sits on the last token of the completion, EOS included: not one slot after it.
        rewards[torch.arange(base.size), base.lengths - 1] = scores.total.to(old)
        metrics: Metrics = {}
        reference = None
        if job.reference is not None:
            reference = job.reference(base)
            # k1 = log π - log π_ref of the sampled token: its sum over a completion is an unbiased KL estimate.
            log_ratio = torch.where(mask, old - reference, 0.0)
            rewards = rewards - algorithm.kl_in_reward * log_ratio
            metrics["kl/reference"] = Mean(log_ratio.sum(), base.size)
            metrics["kl/reference_per_token"] = masked_mean(log_ratio, mask)
        groups = base.prompt_of
        estimate = algorithm.advantage(rewards, mask, groups, critic)
        # A completion cut at the length limit was scored as it stands: the score is its last word, so nothing is
        # bootstrapped after it.
        returns = algorithm.advantage.returns(rewards, mask, groups, critic) if critic is not None else None
        batch = PolicyBatch(
            prompts=base.prompts,
            prompt_of=base.prompt_of,
            tokens=base.tokens,
            lengths=base.lengths,
            loss_mask=mask,
            old_logprobs=old,
            advantages=estimate,
            returns=returns,
            values=critic,
            ref_logprobs=reference,
            sampler_logprobs=sampler,
        )
        metrics |= self._describe(rollouts, scores, batch, entropy)
        return batch, metrics

    def _describe(self, rollouts: list[Rollout], scores: Scores, batch: PolicyBatch, entropy: Tensor) -> Metrics:
        mask, size = batch.loss_mask, batch.size
        total = scores.total
        assert batch.sampler_logprobs is not None
        gap = (batch.old_logprobs - batch.sampler_logprobs).abs()
        metrics: Metrics = {
            "reward/mean": Mean(total.sum(), size),
            "reward/std": Mean(total.std(correction=0) * size, size),
            "rollout/length": Mean(float(batch.lengths.sum()), size),
            "rollout/truncated": Mean(float(sum(r.finish_reason == "length" for r in rollouts)), size),
            "rollout/unique": Mean(float(len({(r.group, r.text) for r in rollouts})), size),
            "policy/entropy": masked_mean(entropy, mask),
            "sampler/gap": masked_mean(gap, mask),
            "sampler/gap_max": Max(float(torch.where(mask, gap, 0.0).max())),
        }
        spread = torch.stack([torch.stack([b.max(), b.min()]) for b in _by_group(total, batch.prompt_of)])
        if size > len(spread):
            metrics["groups/zero_variance"] = Mean(float((spread[:, 0] == spread[:, 1]).sum()), len(spread))
        if batch.values is not None and batch.returns is not None:
            metrics["value/explained_variance"] = Mean(explained_variance(batch.values, batch.returns, mask), 1)
        for name, part in scores.parts.items():
            metrics[f"reward/{name}"] = Mean(part.sum(), size)
        if self.job.watch is not None:
            with self.session.split("watch"):
                watched = self.job.watch(rollouts[:WATCHED]).total
            metrics["reward/watched"] = Mean(watched.sum(), len(watched))
        return metrics

    def _check(self, metrics: Metrics, step: int) -> None:
        """Cheap invariants: the learner scores what the sampler drew, and at step 1 the policy is the reference."""
        gap = metrics["sampler/gap"].value()
        if gap > self.job.max_logprob_gap:
            raise NumericStop(
                f"step {step}: log-probs of sampler and learner differ by {gap:.3g} nats a token on average "
                f"(limit max_logprob_gap={self.job.max_logprob_gap})\n"
                "  sampled and trained distribution are not the same"
            )
        if step == 1 and "kl/reference" in metrics and abs(metrics["kl/reference_per_token"].value()) > 1e-3:
            self.session.progress.note(
                f"at step 1 the KL to the reference is {metrics['kl/reference'].value():.3g} nats, not 0: "
                "the reference is another model than the policy at the start (or dropout is on)"
            )

    def _update(self, batch: PolicyBatch, step: int) -> tuple[Metrics, dict[str, float]]:
        """``epochs_per_rollout`` passes, each cut into ``minibatches`` optimizer steps of whole prompts."""
        algorithm = self.job.algorithm
        parts: list[Metrics] = []
        stepped: dict[str, float] = {}
        skipped = 0.0
        generator = torch.Generator().manual_seed(self.job.seed * 7_368_787 + step)
        for _ in range(algorithm.epochs_per_rollout):
            order = torch.randperm(len(batch.prompts), generator=generator)
            # tensor_split, as chunk may give fewer parts than it is asked for, and the schedule counts on them.
            for prompts in order.tensor_split(algorithm.minibatches):
                rows = torch.isin(batch.prompt_of, prompts).nonzero().squeeze(1)
                parts.append(self.learner.forward_backward(batch.select(rows), algorithm.loss))
                stepped = self.learner.optim_step()
                skipped += stepped["skipped_steps"]
        return merge(parts), {**stepped, "skipped_steps": skipped}


def _by_group(values_: Tensor, groups: Tensor) -> list[Tensor]:
    return [values_[groups == g] for g in groups.unique().tolist()]


def explained_variance(predicted: Tensor, target: Tensor, mask: Tensor) -> float:
    """1 - Var(target - predicted) / Var(target) over the masked slots; NaN where the target does not vary."""
    target, error = target[mask], (target - predicted)[mask]
    variance = target.var(correction=0)
    return float("nan") if variance == 0 else float(1 - error.var(correction=0) / variance)


def sample_row(rollout: Rollout, reward: float) -> dict[str, object]:
    """One line of samples.jsonl."""
    return {
        "prompt_id": rollout.prompt.id,
        "question": rollout.prompt.question,
        "completion": rollout.text,
        "reward": reward,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.tokens),
        "policy_version": rollout.policy_version,
    }
