"""Tether's side: the loops, learner and sampler of every run, with the metrics that a run computes and writes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms.common import (
    LEARNING_RATE,
    Conversation,
    distinct_share,
    perturb,
    score_weight,
    serve,
    sketch,
)
from tether.algorithms import ALGORITHMS, Algorithm
from tether.backends.local.learner import AdamWSettings, LocalLearner
from tether.backends.local.sampler import LocalSampler
from tether.config.sections import OptimConfig
from tether.core.batches import Batch, Group, PolicyBatch, rollout_batch
from tether.core.protocols import Loss, Reward, SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.losses import BradleyTerry
from tether.losses.policy import PPOClip
from tether.losses.preference import DPO
from tether.losses.supervised import CrossEntropy
from tether.methods import parts
from tether.methods.preference import with_reference
from tether.methods.reference import FixedReference, OfflineReference
from tether.methods.reward import pairs
from tether.models.backbone import Backbone
from tether.models.load import clone_frozen, load_backbone
from tether.models.roles import ActorCritic, Policy, Role, Scorer, new_head
from tether.rewards.model import RewardModel
from tether.runs.folder import RunFolder
from tether.training import offline, online
from tether.training.rollouts import Scored
from tether.training.session import Session

BUDGET = OptimConfig().tokens_per_micro_batch
ENDLESS = 10**9


def silent(text: str) -> None:
    """Where remarks go."""


class EndlessChat(ChatTokenizer):
    """No token ends a completion: every arm draws the same number of tokens."""

    @property
    def stop_ids(self) -> frozenset[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset()


@dataclass(kw_only=True, eq=False)
class TimedSession(Session):
    """A run whose steps wait until they are asked for."""

    conversation: Conversation | None

    def _one(self, step: int, one_step: Callable[[int], Mapping[str, float]]) -> None:
        assert self.conversation is not None
        drawn: dict[str, float] = {}

        def watched(step: int) -> Mapping[str, float]:
            numbers = one_step(step)
            if "rollout/length" in numbers:
                drawn["drawn"] = numbers["rollout/length"]
                drawn["drawing"] = self.split.seconds["sample"]
            return numbers

        self.conversation.begin_step()
        super()._one(step, watched)
        self.conversation.end_step(**drawn)


class Always(Sequence[Sequence[Group]]):
    """The same groups at every step."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: Any) -> Any:
        return self.groups


def open_backbone(work: Mapping[str, Any]) -> Backbone:
    backbone = load_backbone(work["model"], device="cpu", say=silent)
    backbone.autocast = torch.bfloat16 if work.get("rounded") else None
    return backbone


def settings_of(work: Mapping[str, Any], new_tokens: int) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=new_tokens, autocast="bfloat16" if work.get("rounded") else "off")


def open_scorer(work: Mapping[str, Any], *, noise: bool = False) -> Scorer:
    backbone = open_backbone(work)
    head = new_head(backbone, zero=True)
    with torch.no_grad():
        head.weight.copy_(score_weight(head.in_features))
    if noise:
        perturb(backbone.hf.base_model.named_parameters())
    return Scorer(backbone=backbone, head=head)


def open_learner(role: Role) -> LocalLearner:
    settings = AdamWSettings(learning_rate=lambda step: LEARNING_RATE)
    return LocalLearner(role, settings, tokens_per_micro_batch=BUDGET)


def clear(learner: LocalLearner) -> None:
    learner.optimizer.zero_grad(set_to_none=True)


def agreement(learner: LocalLearner, batch: Batch, loss: Loss) -> dict[str, Any]:
    """Loss and gradient of ``batch``, through the learner itself."""
    metrics = learner.forward_backward(batch, loss)
    found = {"loss": metrics["loss"].value(), "gradient": sketch(learner.parameters.items())}
    clear(learner)
    return found


def facts_of(backbone: Backbone) -> dict[str, Any]:
    head = backbone.hf.get_output_embeddings()
    trunk = sum(p.numel() for n, p in backbone.hf.base_model.named_parameters() if "embed_tokens" not in n)
    config = backbone.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # A score and a weighted sum over the width of all heads, two operations a number each, in every layer.
    attention = 4 * config.num_hidden_layers * width
    size = head.weight.numel() if head is not None else 0
    return {"trunk": trunk, "head": size, "attention": attention, "layout": backbone.mode}


class Training:
    """What both kinds of training share: a run folder that is thrown away."""

    learner: LocalLearner

    def session(self, conversation: Conversation | None, folder: str) -> TimedSession:
        run = RunFolder.create(Path(folder) / "run", config_yaml="", method="benchmark", resume=False)
        return TimedSession(
            folder=run,
            learner=self.learner,
            save_model=lambda folder: None,
            total_steps=ENDLESS,
            title="benchmark",
            quiet=True,
            conversation=conversation,
        )


class Offline(Training):
    """SFT, a reward model, DPO."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work = work
        self.groups = [as_group(i, row) for i, row in enumerate(work["rows"])]
        kind = work["kind"]
        if kind == "reward":
            role: Policy | Scorer = open_scorer(work)
        else:
            role = Policy(backbone=open_backbone(work))
        self.loss: Loss = {"sft": CrossEntropy(), "reward": BradleyTerry(), "dpo": DPO(beta=0.1)}[kind]
        self.prepare: Callable[[Sequence[Group]], Batch] = Batch.from_groups if kind == "sft" else pairs
        if kind == "dpo":
            assert isinstance(role, Policy)
            self._hold_to_reference(role)
        self.learner = open_learner(role)
        self.facts = facts_of(role.backbone)

    def _hold_to_reference(self, policy: Policy) -> None:
        """The reference is the model as it is; the policy has moved away from it."""
        frozen = Policy(backbone=clone_frozen(policy.backbone))
        if self.work["cached"]:
            known = OfflineReference(frozen=frozen, store=None)
            known(self.groups)
            known.frozen = None
            self.prepare = with_reference(pairs, known)
        else:
            # A fresh one at each step knows nothing yet.
            self.prepare = lambda groups: with_reference(pairs, OfflineReference(frozen=frozen, store=None))(groups)
        perturb(policy.parameters().items())

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return agreement(self.learner, self.prepare(self.groups), self.loss)

    def steps(self, conversation: Conversation) -> None:
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(conversation, folder)
            offline.train(session, self.learner, self.loss, Always(self.groups), self.prepare)


def as_group(number: int, row: Mapping[str, Any]) -> Group:
    completions = tuple(torch.tensor(c) for c in row["completions"])
    masks = tuple(torch.ones(len(c), dtype=torch.bool) for c in completions)
    return Group(id=str(number), prompt=torch.tensor(row["prompt"]), completions=completions, loss_masks=masks)


def as_prompts(work: Mapping[str, Any]) -> list[Prompt]:
    return [Prompt(id=str(i), text=text) for i, text in enumerate(work["prompts"])]


def distinct_reward(rollouts: Sequence[Rollout]) -> Scores:
    return Scores(total=torch.tensor([distinct_share(r.tokens.tolist()) for r in rollouts]))


class Online(Training):
    """GRPO with a reward that costs nothing; PPO with four networks of one size."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work = work
        policy = Policy(backbone=open_backbone(work))
        self.chat = EndlessChat(policy.backbone.tokenizer)
        self.prompts = as_prompts(work)
        role: Policy | ActorCritic = policy
        reference, reward = None, distinct_reward
        if work["kind"] == "ppo":
            frozen = Policy(backbone=clone_frozen(policy.backbone))
            reference = FixedReference(frozen=frozen, tokens_per_micro_batch=BUDGET)
            judge = open_scorer(work)
            reward = RewardModel(batch_of=rollout_batch, score=parts.scores_of(judge, BUDGET))
            perturb(policy.parameters().items())
            role = ActorCritic(policy=policy, critic=open_scorer(work, noise=True))
        self.learner = open_learner(role)
        self.policy, self.reward = policy, reward
        self.job = self._job(reference, reward)
        self.facts = {**facts_of(policy.backbone), "prompt_tokens": [len(self.chat.prompt(p)) for p in self.prompts]}

    def algorithm(self) -> Algorithm:
        """The row of the table; GRPO without the KL term, which TRL has switched off unless told otherwise."""
        if self.work["kind"] == "ppo":
            return replace(ALGORITHMS["ppo"], epochs_per_rollout=self.work["epochs"])
        return replace(ALGORITHMS["grpo"], loss=PPOClip(average="sequence"))

    def _job(self, reference: FixedReference | None, reward: Reward) -> online.OnlineJob:
        algorithm = self.algorithm()
        return online.OnlineJob(
            algorithm=algorithm,
            old_logprobs="sampler",
            group_size=self.work["group"],
            prompts=lambda first, count: self.prompts,
            prompts_per_step=len(self.prompts),
            sampler=LocalSampler(policy=self.policy, chat=self.chat, policy_version=lambda: self.learner.step),
            settings=settings_of(self.work, self.work["new_tokens"]),
            reward=reward,
            watch=None,
            reference=reference,
            seed=0,
            max_logprob_gap=1.0,
            critic=isinstance(self.learner.role, ActorCritic),
        )

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The update of completions that are given, each with the advantage (GRPO) or score (PPO) that follows."""
        rollouts = [
            as_rollout(self.prompts[i], i, self.chat, tokens)
            for i, group in enumerate(self.work["completions"])
            for tokens in group
        ]
        if self.work["kind"] == "ppo":
            batch = self._ppo_batch(rollouts)
        else:
            base = rollout_batch(rollouts)
            advantages = torch.tensor(self.work["advantages"])[:, None].expand(base.tokens.shape)
            named = {name: getattr(base, name) for name in ("prompts", "prompt_of", "tokens", "lengths", "loss_mask")}
            batch = PolicyBatch(**named, old_logprobs=self.learner.logprobs(base), advantages=advantages)
        return agreement(self.learner, batch, self.job.algorithm.loss)

    def _ppo_batch(self, rollouts: list[Rollout]) -> PolicyBatch:
        """Scores, KL, values, advantages and returns as the loop makes them; only the drawing is left out."""
        with tempfile.TemporaryDirectory() as folder:
            loop = online._Loop(self.session(None, folder), self.job)
            return loop._policy_batch(Scored(rollouts=rollouts, scores=self.reward(rollouts)), step=1)[0]

    def steps(self, conversation: Conversation) -> None:
        with tempfile.TemporaryDirectory() as folder:
            online.train(self.session(conversation, folder), self.job)


def as_rollout(prompt: Prompt, group: int, chat: ChatTokenizer, ids: list[int]) -> Rollout:
    tokens = torch.tensor(ids)
    return Rollout(
        prompt=prompt,
        group=group,
        prompt_tokens=chat.prompt(prompt),
        tokens=tokens,
        sampled=torch.ones(len(ids), dtype=torch.bool),
        logprobs=torch.zeros(len(ids)),
        text=chat.decode(tokens),
        finish_reason="length",
    )


class Sampling:
    """The sampler by itself."""

    def __init__(self, work: dict[str, Any]) -> None:
        policy = Policy(backbone=open_backbone(work))
        chat = EndlessChat(policy.backbone.tokenizer)
        self.work, self.prompts = work, as_prompts(work)
        self.sampler = LocalSampler(policy=policy, chat=chat)
        self.facts = {**facts_of(policy.backbone), "prompt_tokens": [len(chat.prompt(p)) for p in self.prompts]}

    def draw(self, new_tokens: int, seed: int) -> list[Rollout]:
        settings = settings_of(self.work, new_tokens)
        return self.sampler.sample(self.prompts, n=self.work["group"], settings=settings, seed=seed)

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Some tokens, and the log-probs that they were drawn with."""
        rollouts = self.draw(self.work["checked_tokens"], seed=0)
        return {"tokens": [r.tokens.tolist() for r in rollouts], "logprobs": [r.logprobs.tolist() for r in rollouts]}

    def steps(self, conversation: Conversation) -> None:
        for seed in range(ENDLESS):
            conversation.begin_step()
            rollouts = self.draw(self.work["new_tokens"], seed)
            conversation.end_step(drawn=sum(len(r.tokens) for r in rollouts) / len(rollouts))


KINDS = {"sft": Offline, "reward": Offline, "dpo": Offline, "grpo": Online, "ppo": Online, "sampling": Sampling}

if __name__ == "__main__":
    serve(lambda work: KINDS[work["kind"]](work))
