"""The loop over data that the policy makes. Which algorithm it is, only the row of the table knows.

sample -> reward (training/rollouts.py) -> score (old, reference, values) -> advantages -> update, once per step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from tether.advantages import completion_returns
from tether.algorithms import Algorithm
from tether.core.batches import Batch, PolicyBatch, pad_rows, rollout_batch
from tether.core.errors import NumericStop, UserError
from tether.core.metrics import Max, Mean, Metrics, masked_mean, merge, values
from tether.core.protocols import Reward, Sampler, SamplingSettings
from tether.core.text import Prompt, Rollout
from tether.losses.supervised import CrossEntropy
from tether.rewards.compose import Remembering, bring_back
from tether.rewards.meter import Meter
from tether.rewards.penalties import distinct
from tether.runs.log import plain
from tether.runs.storage import write_folder, write_text
from tether.training.before import Before, Source, before_update
from tether.training.guards import Guards, HeldOut, Watch, has_ensemble
from tether.training.rollouts import Collector, Scored, spread
from tether.training.session import Session

# Rollouts of a step that the watching judge sees: enough for a curve, few enough to cost little.
WATCHED = 8
# What the loop itself can give an algorithm; the rest must be handed in.
ALWAYS = frozenset({"entropy", "sampler_logprobs", "greedy", "history"})


class Reference(Protocol):
    """What the policy is held to. It may follow the policy, and then has tensors of its own to keep."""

    def __call__(self, batch: Batch) -> Tensor:
        """[B, T] log-probs without gradient."""
        ...

    def follow(self, step: int) -> None:
        """Move towards the policy after ``step``, where and when it is meant to."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class RunningMean(Protocol):
    """An advantage whose ``needs`` name "history": the loop keeps the running mean for it."""

    def next(self, previous: float | None, returns: Tensor) -> float: ...


@dataclass(frozen=True, kw_only=True)
class OnlineJob:
    """What ``train`` needs, put together by ``methods``. ``prompts(first, count)`` gives prompts of an endless stream,
    by position; ``pretraining`` the text of an optimizer step (from 0)."""

    algorithm: Algorithm
    group_size: int
    prompts: Callable[[int, int], Sequence[Prompt]]
    prompts_per_step: int
    sampler: Sampler
    settings: SamplingSettings
    reward: Reward
    # A second judge, logged beside the reward and never trained on; it sees the first rollouts of a step only.
    watch: Reward | None
    reference: Reference | None
    seed: int
    max_logprob_gap: float
    # Whose log-probs an update starts from: the learner's, or the sampler's where the two agree.
    old_logprobs: Source = "learner"
    critic: bool = False
    pretraining: Callable[[int], Batch] | None = None
    skip_failed_rewards: bool = False
    resample_rounds: int = 0
    guards: Guards | None = None
    # Answered and judged at every evaluation; the policy that the judge likes best is kept as ``best``. What it
    # verifies is measured before the first step, too.
    held_out: HeldOut | None = None

    def check(self) -> None:
        """Raises UserError where the algorithm needs a part that is not there."""
        parts = {"reference": self.reference, "critic": self.critic or None, "pretraining": self.pretraining}
        given = ALWAYS | {name for name, part in parts.items() if part is not None}
        if missing := sorted(self.algorithm.needs - given):
            raise UserError(f"{self.algorithm.name} needs {', '.join(missing)}, and none was given")
        if self.old_logprobs == "sampler" and "sampler_logprobs" in self.algorithm.needs:
            raise UserError(f"{self.algorithm.name} compares the two, so old_logprobs must be the learner's")
        if self.guards is not None and self.guards.kl_max is not None and self.reference is None:
            raise UserError("guards.kl_max needs a reference, and none was given")
        if "history" in self.algorithm.needs and not callable(getattr(self.algorithm.advantage, "next", None)):
            kind = type(self.algorithm.advantage).__name__
            raise UserError(f"{kind} needs history: give it a method next(previous, returns) -> the running mean")


def train(
    session: Session, job: OnlineJob, evaluate: Callable[[], dict[str, float]] | None = None, eval_every: int = 0
) -> None:
    """Run ``job`` for ``session.total_steps`` steps. Fails before the first rollout where a part is missing."""
    job.check()
    loop = _Loop(session, job)
    session.state, session.restore = loop.state, loop.restore
    if job.reference is not None:
        session.save_more, session.load_more = job.reference.save, job.reference.load
    at_start = None
    if job.held_out is not None:
        evaluate = loop.evaluate
        at_start = loop.verify if job.held_out.verify is not None else None
    session.run(loop.step, evaluate, eval_every, at_start)


class _Loop:
    def __init__(self, session: Session, job: OnlineJob) -> None:
        self.session, self.job, self.learner = session, job, session.learner
        self.kl_coefficient = job.algorithm.kl_in_reward
        self.history: float | None = None
        self.guards = None
        if job.guards is not None:
            ensemble = has_ensemble(job.reward)
            self.guards = Watch(job.guards, lambda text: session.progress.note(text), ensemble=ensemble)
        self.at = 0
        self.meter = Meter([job.reward, job.watch, *(job.held_out.rewards if job.held_out is not None else ())])
        self.collect = Collector(
            algorithm=job.algorithm,
            prompts=job.prompts,
            prompts_per_step=job.prompts_per_step,
            group_size=job.group_size,
            sampler=job.sampler,
            settings=job.settings,
            reward=job.reward,
            seed=job.seed,
            split=session.split,
            skip_failed_rewards=job.skip_failed_rewards,
            resample_rounds=job.resample_rounds,
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run could not know otherwise."""
        return {
            "prompts_taken": self.collect.taken,
            "kl_coefficient": self.kl_coefficient,
            "history": self.history,
            "reward": self.job.reward.state() if isinstance(self.job.reward, Remembering) else None,
            "guards": self.guards.state() if self.guards is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.collect.taken = state["prompts_taken"]
        self.kl_coefficient, self.history = state["kl_coefficient"], state["history"]
        bring_back(self.job.reward, state.get("reward"), "it")
        if self.guards is not None:
            self.guards.restore(state["guards"])

    def step(self, step: int) -> dict[str, float]:
        split = self.session.split
        found, counts = self.collect(step)
        with split("score"):
            batch, metrics = self._policy_batch(found, step)
        self._check(metrics, step)
        with split("update"):
            update, stepped = self._update(batch, step)
        if self.job.reference is not None:
            with split("reference"):
                self.job.reference.follow(step)
        self._steer(metrics, batch.size, step)
        for rollout, total in zip(found.rollouts, found.scores.total.tolist(), strict=True):
            self.session.samples.append(step, "train", sample_row(rollout, total))
        if isinstance(self.job.reward, Remembering):
            self.job.reward.advance(found.scores.parts)
        self.at = step
        numbers = {**values(metrics), **values(update), **stepped, **counts, **self.meter()}
        if self.guards is not None:
            numbers |= self.guards.step(step, numbers)
            self.session.enough = self.guards.stop
        return numbers

    def verify(self) -> dict[str, float]:
        """How often the start is right on the held-out prompts."""
        held_out = self.job.held_out
        assert held_out is not None and held_out.verify is not None
        return held_out.verify.rates(self._answers(held_out)) | self.meter()

    def evaluate(self) -> dict[str, float]:
        """Answers to the held-out prompts, by the judge and the reward, by the verifier, or by both."""
        held_out = self.job.held_out
        assert held_out is not None
        rollouts = self._answers(held_out)
        numbers: dict[str, float] = {}
        if held_out.judge is not None:
            numbers |= self._judged(held_out, list({r.group: r for r in reversed(rollouts)}.values())[::-1])
        if held_out.verify is not None:
            numbers |= held_out.verify.rates(rollouts)
        return numbers | self.meter()

    def _answers(self, held_out: HeldOut) -> list[Rollout]:
        """The same draws every time: only the policy changes from one evaluation to the next."""
        job = self.job
        return job.sampler.sample(held_out.prompts, n=held_out.samples, settings=job.settings, seed=job.seed)

    def _judged(self, held_out: HeldOut, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """What the held-out judge says of one answer to each prompt; the policy that it likes best is kept."""
        session = self.session
        assert self.guards is not None
        numbers = held_out.scores(rollouts, self.job.reward)
        better, more = self.guards.judged(self.at, numbers)
        session.enough = self.guards.stop
        if better:

            def write(folder: Path) -> None:
                session.save_model(folder)
                write_text(folder / "best.json", json.dumps(plain({"step": self.at, **numbers}), indent=1))

            write_folder(session.folder.path / "best", write)
            session.progress.say(f"the held-out judge likes step {self.at} best so far: {session.folder.path / 'best'}")
        return numbers | more

    def _policy_batch(self, found: Scored, step: int) -> tuple[PolicyBatch, Metrics]:
        job, algorithm = self.job, self.job.algorithm
        base = rollout_batch(found.rollouts)
        sampled = pad_rows([r.logprobs for r in found.rollouts], base.tokens.shape[1])
        before = before_update(self.learner, base, sampled, job.old_logprobs, turn=step, critic=job.critic)
        old, critic = before.logprobs, before.values
        mask = base.loss_mask
        rewards = torch.zeros_like(old)
        # The score sits on the last token of the completion, EOS included: not one slot after it.
        rewards[torch.arange(base.size), base.lengths - 1] = found.scores.total.to(old)
        metrics: Metrics = {}
        reference = None
        if job.reference is not None:
            reference = job.reference(base)
            # k1 = log π - log π_ref of the sampled token: its sum over a completion is an unbiased KL estimate.
            log_ratio = torch.where(mask, old - reference, 0.0)
            if not bool(log_ratio.isfinite().all()):
                raise NumericStop(
                    "the log-probs of policy and reference are not all finite, so the KL has no value\n"
                    "  name another reference, or lower optim.learning_rate"
                )
            rewards = rewards - self.kl_coefficient * log_ratio
            metrics["kl/reference"] = Mean(log_ratio.sum(), base.size)
            metrics["kl/reference_per_token"] = masked_mean(log_ratio, mask)
            metrics["kl/reference_gap"] = masked_mean(log_ratio.abs(), mask)
        if algorithm.kl_in_reward:
            metrics["kl/coefficient"] = Mean(self.kl_coefficient, 1)
        # A completion cut at the length limit was scored as it stands: the score is its last word, so nothing is
        # bootstrapped after it.
        bootstrap = None
        try:
            baselines = self._baselines(found, rewards, mask, metrics)
            evidence = (rewards, mask, base.prompt_of, critic, bootstrap, baselines)
            advantages = algorithm.advantage(*evidence)
            returns = algorithm.advantage.returns(*evidence) if critic is not None else None
        except ValueError as error:
            raise UserError(f"{algorithm.name}: {error}") from error
        batch = PolicyBatch(
            prompts=base.prompts,
            prompt_of=base.prompt_of,
            tokens=base.tokens,
            lengths=base.lengths,
            loss_mask=mask,
            old_logprobs=old,
            advantages=advantages,
            returns=returns,
            values=critic,
            ref_logprobs=reference,
            sampler_logprobs=sampled,
        )
        return batch, metrics | self._describe(found, batch, before)

    def _baselines(self, found: Scored, rewards: Tensor, mask: Tensor, metrics: Metrics) -> Tensor | None:
        """[B] what a return is compared with, where that comes from outside the batch; None where it does not."""
        if "history" not in self.job.algorithm.needs:
            return found.baselines
        before = self.history
        # Of earlier steps only: a completion must not be a part of its own baseline.
        self.history = cast(RunningMean, self.job.algorithm.advantage).next(before, completion_returns(rewards, mask))
        if before is None:
            return None
        metrics["reward/baseline"] = Mean(before, 1)
        return torch.full_like(rewards[:, 0], before)

    def _steer(self, metrics: Metrics, rollouts: int, step: int) -> None:
        """The coefficient of the KL in the reward for the next step."""
        start = self.job.algorithm.kl_in_reward
        if start:
            kl, progress = metrics["kl/reference"].value(), step / self.session.total_steps
            if not math.isfinite(kl):
                raise NumericStop(f"step {step}: the KL to the reference is {kl}; lower optim.learning_rate")
            self.kl_coefficient = self.job.algorithm.kl_control.next(self.kl_coefficient, start, kl, rollouts, progress)

    def _describe(self, found: Scored, batch: PolicyBatch, before: Before) -> Metrics:
        mask, size = batch.loss_mask, batch.size
        rollouts, total = found.rollouts, found.scores.total
        metrics: Metrics = {
            "reward/mean": Mean(total.sum(), size),
            "reward/std": Mean(total.std(correction=0) * size, size),
            "rollout/length": Mean(float(batch.lengths.sum()), size),
            "rollout/truncated": Mean(float(sum(r.finish_reason == "length" for r in rollouts)), size),
            "rollout/unique": Mean(float(len({(r.group, r.text) for r in rollouts})), size),
            "rollout/distinct_2": Mean(distinct([r.tokens.tolist() for r in rollouts], 2), 1),
            "sampler/gap": masked_mean(before.gap, before.known),
            "sampler/gap_max": Max(float(torch.where(before.known, before.gap, 0.0).max())),
            "sampler/trusted": Mean(float(before.source == "sampler"), 1),
        }
        widths = spread(total, [r.group for r in rollouts])
        if size > len(widths):
            metrics["groups/zero_variance"] = Mean(float(sum(w == 0 for w in widths.values())), len(widths))
        if batch.values is not None and batch.returns is not None:
            metrics["value/explained_variance"] = Mean(explained_variance(batch.values, batch.returns, mask), 1)
        for name, part in found.scores.parts.items():
            if len(known := part[~part.isnan()]):  # a part that stands behind a gate may not have been asked
                metrics[f"reward/{name}"] = Mean(known.sum(), len(known))
        if self.job.watch is not None:
            with self.session.split("watch"):
                watched = self.job.watch(rollouts[:WATCHED]).total
            if len(known := watched[watched.isfinite()]):  # what the judge left unscored is in no mean
                metrics["reward/watched"] = Mean(known.sum(), len(known))
        return metrics

    def _check(self, metrics: Metrics, step: int) -> None:
        """Cheap invariants: the learner scores what the sampler drew, and at step 1 the policy is the reference."""
        gap = metrics["sampler/gap"].value()
        if not gap <= self.job.max_logprob_gap:  # a NaN is no agreement
            raise NumericStop(
                f"step {step}: log-probs of sampler and learner differ by {gap:.3g} nats a token on average "
                f"(limit max_logprob_gap={self.job.max_logprob_gap})\n"
                "  sampled and trained distribution are not the same"
            )
        if step == 1 and "kl/reference_gap" in metrics and metrics["kl/reference_gap"].value() > 1e-3:
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
        number = (step - 1) * algorithm.updates_per_rollout
        generator = torch.Generator().manual_seed(self.job.seed * 7_368_787 + step)
        for _ in range(algorithm.epochs_per_rollout):
            order = torch.randperm(len(batch.prompts), generator=generator)
            # tensor_split, as chunk may give fewer parts than it is asked for, and the schedule counts on them.
            for prompts in order.tensor_split(algorithm.minibatches):
                rows = torch.isin(batch.prompt_of, prompts).nonzero().squeeze(1)
                parts.append(self.learner.forward_backward(batch.select(rows), algorithm.loss))
                parts.append(self._pretrain(number))
                stepped = self.learner.optim_step()
                skipped += stepped["skipped_steps"]
                number += 1
        return merge(parts), {**stepped, "skipped_steps": skipped}

    def _pretrain(self, number: int) -> Metrics:
        """The pretraining term of optimizer step ``number``, added to its gradients (Ouyang 2022, eq. 2)."""
        weight = self.job.algorithm.ptx_weight
        if not weight:
            return {}
        assert self.job.pretraining is not None, "checked by OnlineJob.check"
        metrics = self.learner.forward_backward(self.job.pretraining(number), CrossEntropy(), weight=weight)
        return {"ptx/nll": metrics["nll"]} if "nll" in metrics else {}


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
