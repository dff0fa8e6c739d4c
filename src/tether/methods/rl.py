"""Optimising against a reward: REINFORCE, PPO, RLOO, GRPO, ... Which one is a row of the algorithm table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from tether.algorithms import Algorithm
from tether.backends.local.sampler import LocalSampler
from tether.config.schema import RLConfig
from tether.core.batches import Batch
from tether.core.protocols import Reward
from tether.core.text import Prompt
from tether.data.chat import ChatTokenizer
from tether.methods import parts
from tether.methods.judges import open_reward, open_rule
from tether.methods.reference import open_reference
from tether.methods.rl_parts import (
    RESAMPLE_ROUNDS,
    PromptOrder,
    both,
    check_parts,
    check_sampling,
    choose_algorithm,
    choose_guards,
    group_size,
    open_critic,
    open_held_out,
    open_pretraining,
    open_prompts,
)
from tether.models.roles import ActorCritic, Policy
from tether.reports.before_after import changes
from tether.reports.run import read_run
from tether.runs.folder import RunFolder
from tether.training import online
from tether.training.guards import Guards
from tether.training.rollouts import overlong_cache
from tether.training.session import Session


def run(
    config: RLConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    watch: Reward | None = None,
) -> Path:
    """Train the policy against the reward; returns the run folder. ``watch``: a second judge whose scores are logged
    as reward/watched and never trained on."""
    say = parts.speaker(quiet)
    parts.begin(config)
    algorithm = choose_algorithm(config.algorithm, config.overrides, config.sampling.max_new_tokens)
    check_sampling(config)
    check_parts(config, algorithm)
    open_rule(config.reward)
    guards = choose_guards(config)
    chat = parts.open_chat(config.model, config.data, say)
    prompts, mark = open_prompts(config, chat, say)
    held_out: list[Prompt] = []
    if config.data.eval is not None:
        limit = config.verify.prompts if config.verify is not None else None
        theirs = config.data.model_copy(update={"train": config.data.eval, "limit": limit})
        held_out, other = open_prompts(config.model_copy(update={"data": theirs}), chat, say)
        mark = both(mark, other)
        if limit is not None and guards is not None and guards.judge is not None:
            say(f"guards.judge, too, sees the {len(held_out)} prompts of verify.prompts alone")
    pretraining = None
    if config.pretraining is not None:
        bad = config.data.max_bad_rows
        pretraining, other = open_pretraining(config.pretraining, chat, config.run.seed, bad, say)
        mark = both(mark, other)
    lines = _schedule(config, algorithm, len(prompts))
    if dry_run:
        parts.describe_dry_run(config, lines, chat.prompt_text(prompts[0]))
        return Path(config.run.folder or ".")
    for line in lines:
        say(line)
    with parts.open_run(config, "rl", mark, resume=resume) as folder:
        _train(config, algorithm, folder, chat, prompts, pretraining, watch, guards, held_out, quiet)
        for change in changes(read_run(folder.path).held_out):
            say(change.sentence)
        return parts.finish(folder, config, say)


def _train(
    config: RLConfig,
    algorithm: Algorithm,
    folder: RunFolder,
    chat: ChatTokenizer,
    prompts: Sequence[Prompt],
    pretraining: Callable[[int], Batch] | None,
    watch: Reward | None,
    guards: Guards | None,
    held_out: Sequence[Prompt],
    quiet: bool,
) -> None:
    """Open the models and run the loop."""
    say = parts.speaker(quiet)
    backbone = parts.open_backbone(config.model, say)
    parts.settle_autocast(backbone, config.optim, folder, say)
    backbone.tokenizer.chat_template = chat.tokenizer.chat_template
    policy = Policy(
        backbone=backbone,
        adapter=parts.adapt(backbone, config.model.lora, "policy"),
        temperature=config.sampling.temperature,
    )
    budget = config.optim.tokens_per_micro_batch
    reward, scorer = open_reward(
        config.reward,
        backbone.tokenizer,
        config.model,
        budget,
        say,
        shared=backbone if config.share_backbone else None,
        scaled=config.scale_reward,
        skip=config.on_reward_failure == "skip",
    )
    judged = open_held_out(config, guards, held_out, reward, backbone.tokenizer, say)
    reference = None
    # Whoever watches a run wants its KL too, also where nothing is held to it.
    watches_kl = watch is not None or (guards is not None and guards.kl_max is not None)
    if "reference" in algorithm.needs or watches_kl:
        reference = open_reference(policy, config.reference, config.model, budget, say)
    role: Policy | ActorCritic = policy
    if "critic" in algorithm.needs:
        role = ActorCritic(policy=policy, critic=open_critic(config, policy, scorer, say))
    updates = config.steps * algorithm.updates_per_rollout
    rate = config.critic.learning_rate
    factors = {"critic.": rate / config.optim.learning_rate} if rate else None
    learner = parts.open_learner(role, config.optim, updates, factors=factors)
    job = online.OnlineJob(
        algorithm=algorithm,
        group_size=group_size(config, algorithm),
        prompts=PromptOrder(prompts, config.run.seed),
        prompts_per_step=config.prompts_per_step,
        sampler=LocalSampler(policy=policy, chat=chat, policy_version=lambda: learner.step),
        settings=config.sampling.settings(),
        reward=reward,
        watch=watch,
        reference=reference,
        seed=config.run.seed,
        max_logprob_gap=config.max_logprob_gap,
        old_logprobs=_old_logprobs(config, algorithm),
        critic=isinstance(role, ActorCritic),
        pretraining=pretraining,
        resample_rounds=(config.resample_rounds or RESAMPLE_ROUNDS) if algorithm.dynamic_sampling else 0,
        skip_failed_rewards=config.on_reward_failure == "skip",
        guards=guards,
        held_out=judged,
    )
    session = Session(
        folder=folder,
        learner=learner,
        save_model=parts.saver(policy, config.algorithm, config.model.name, config),
        total_steps=config.steps,
        title=config.algorithm.upper(),
        checkpoint_every=config.run.checkpoint_every,
        keep=config.run.keep_checkpoints,
        quiet=quiet,
        ceiling=parts.machine_ceiling(role),
    )
    online.train(session, job, eval_every=config.run.eval_every)


def _old_logprobs(config: RLConfig, algorithm: Algorithm) -> Literal["sampler", "learner"]:
    """A critic on the policy's trunk makes the pass anyway; a correction for the sampler compares the two."""
    shares = "critic" in algorithm.needs and config.critic.kind == "head"
    needs_pass = shares or "sampler_logprobs" in algorithm.needs
    return "sampler" if config.old_logprobs == "auto" and not needs_pass else "learner"


def _schedule(config: RLConfig, algorithm: Algorithm, n_prompts: int) -> list[str]:
    """What the run is about to do, with the numbers that follow from the config."""
    completions, updates = group_size(config, algorithm), algorithm.updates_per_rollout
    rollouts = config.prompts_per_step * completions
    control = type(algorithm.kl_control).__name__
    lines = [
        f"{config.algorithm}: {config.steps} steps of {config.prompts_per_step} prompts × {completions} completions = "
        f"{rollouts} rollouts, {updates} optimizer steps each",
        f"{config.steps * config.prompts_per_step / n_prompts:.2f} epochs of {n_prompts} prompts; "
        f"KL in the reward {algorithm.kl_in_reward:g}" + ("" if control == "FixedKL" else f" at first ({control})"),
        f"loss: {algorithm.loss}",
    ]
    if algorithm.overlong_cache:
        limit = config.sampling.max_new_tokens
        first = limit - overlong_cache(algorithm.overlong_cache, limit)
        lines.append(f"length: the reward falls by up to 1 from {first} tokens to the limit of {limit}")
    if algorithm.dynamic_sampling:
        rounds = config.resample_rounds or RESAMPLE_ROUNDS
        lines.append(f"dynamic sampling: up to {rounds} rounds of fresh prompts a step")
    return lines
