"""What an online run is checked for and put together from: the row of the table, the stream of prompts, the critic."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tether.advantages import ADVANTAGES
from tether.algorithms import ALGORITHMS, Algorithm
from tether.config.build import build, change, find
from tether.config.schema import CriticConfig, IterateConfig, PretrainingConfig, RLConfig
from tether.core.batches import Batch
from tether.core.errors import UserError
from tether.core.protocols import Reward
from tether.core.text import Prompt
from tether.data.batching import check_budget
from tether.data.chat import ChatTokenizer
from tether.data.groups import tokenise
from tether.data.readers import read
from tether.kl_control import KL_CONTROL
from tether.losses import POLICY, PolicyGradient
from tether.losses.average import TokenLoss
from tether.methods import parts
from tether.methods.evaluate_pass import check_counts, open_verifier
from tether.methods.judge_checks import check_no_memory
from tether.methods.judges import ENSEMBLE, open_reward, open_rule
from tether.methods.reference import check_reference
from tether.methods.sample import check_system
from tether.models.roles import Policy, Scorer
from tether.training.guards import Guards, HeldOut, Verify

T = TypeVar("T")
# Rounds of fresh prompts that dynamic sampling may add to a step, unless the config says otherwise.
RESAMPLE_ROUNDS = 3


# -- the row -----------------------------------------------------------------------------------------------------------


def choose_algorithm(name: str, overrides: Mapping[str, Any], max_new_tokens: int | None = None) -> Algorithm:
    """A row of the table, with some of its fields changed. An average over a fixed length is over ``max_new_tokens``,
    where the overrides name no other length."""
    row = find(ALGORITHMS, name, "algorithm")
    tables = {"loss": POLICY, "advantage": ADVANTAGES, "kl_control": KL_CONTROL}
    row = change(row, overrides, "overrides", tables)
    told = overrides.get("loss")
    named = isinstance(told, Mapping) and "fixed_length" in told
    if max_new_tokens and not named and isinstance(row.loss, TokenLoss) and row.loss.average == "fixed_length":
        row = replace(row, loss=replace(row.loss, fixed_length=max_new_tokens))
    return row


def check_sampling(config: RLConfig) -> None:
    """What is trained must be what was sampled: log-probs are scored with the temperature, but not with a cut tail."""
    sampling = config.sampling
    if sampling.temperature == 0:
        raise UserError("sampling.temperature=0 draws nothing to learn from; use a temperature above 0")
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise UserError(
            "sampling.top_p and sampling.top_k cut the tail of the distribution, and the learner scores the whole of "
            "it: the log-probs would not be those of the sampled distribution\n"
            "  use sampling.temperature alone in training"
        )


def choose_guards(config: RLConfig) -> Guards | None:
    """The guards of the config, where there are any; what only they would read is refused without them."""
    guards = build({"guards": Guards}, {**config.guards, "type": "guards"}, "guards") if config.guards else None
    judge = guards.judge if guards is not None else None
    if judge is not None:
        open_rule(judge, "guards.judge")
        check_no_memory(judge, "a held-out judge", "guards.judge")
    if config.verify is not None:
        check_counts(config.verify.pass_at, config.verify.samples, "verify.pass_at", "verify.samples")
        verifier = config.reward if config.verify.reward is None else config.verify.reward
        open_verifier(verifier, "verify.reward")
        check_no_memory(verifier, "pass@k", "verify.reward")
    readers = {"guards.judge": judge is not None, "verify": config.verify is not None}
    for name in [name for name, given in readers.items() if given and config.data.eval is None]:
        raise UserError(f"{name} needs prompts that are not trained on: give data.eval=FILE")
    for name, given in (("data.eval", config.data.eval is not None), ("run.eval_every", config.run.eval_every > 0)):
        if given and not any(readers.values()):
            raise UserError(f"{name} would be ignored: nothing is held out without guards.judge or verify; take it out")
    if config.data.eval_fraction:
        raise UserError("data.eval_fraction would be ignored: rl reads held-out prompts from data.eval; take it out")
    return guards


def check_parts(config: RLConfig, algorithm: Algorithm) -> None:
    """Every part that the algorithm asks for is there, and none is set that it would ignore."""
    _check_row(config, algorithm)
    _check_anchor(config, algorithm)
    _check_critic(config, algorithm)
    if config.share_backbone and config.model.lora is None:
        raise UserError(
            "share_backbone needs model.lora: a policy that trains all weights would change the reward model"
        )
    if config.share_backbone and open_rule(config.reward) is not None:
        raise UserError("share_backbone would be ignored: the reward is a rule, not a reward model; take it out")
    if not config.scale_reward and open_rule(config.reward) is not None:
        raise UserError("scale_reward=false would be ignored: the reward is a rule, not a reward model; take it out")
    if not config.scale_reward and isinstance(config.reward, Mapping) and config.reward.get("type") == ENSEMBLE:
        raise UserError(
            "scale_reward=false would be ignored: an ensemble scales its members one by one; use reward.scale=false"
        )
    if config.model.lora is not None and config.model.lora.dropout > 0:
        raise UserError(
            f"model.lora.dropout={config.model.lora.dropout:g}: with dropout in the update, the log-probs would not be "
            "those of the policy that sampled; set it to 0 for rl"
        )


def _check_row(config: RLConfig, algorithm: Algorithm) -> None:
    """Groups, minibatches, fresh prompts and pretraining text."""
    name = config.algorithm
    if config.completions_per_prompt is not None and "group_size" in config.overrides:
        raise UserError(
            "overrides.group_size would be ignored: completions_per_prompt says the same thing; keep one of the two"
        )
    if algorithm.minibatches > config.prompts_per_step:
        raise UserError(
            f"minibatches={algorithm.minibatches} is more than prompts_per_step={config.prompts_per_step}: a minibatch "
            "holds at least one prompt\n  raise prompts_per_step, or lower overrides.minibatches"
        )
    if isinstance(algorithm.loss, PolicyGradient) and algorithm.updates_per_rollout > 1:
        raise UserError(
            f"{algorithm.updates_per_rollout} updates per rollout: the policy gradient of {name} is right for the "
            "first alone\n  set overrides.epochs_per_rollout and overrides.minibatches to 1, or use "
            "overrides.loss=ppo_clip"
        )
    if group_size(config, algorithm) == 1:
        # One completion for each of two prompts, one good and one bad: does anything come of it? And of the good alone?
        if not bool(_advantages(algorithm, [1.0, 0.0]).any()) or algorithm.dynamic_sampling:
            raise UserError(
                f"completions_per_prompt=1: {name} compares the completions of one prompt, so it would learn nothing; "
                "use 2 or more"
            )
        if config.prompts_per_step == 1 and not bool(_advantages(algorithm, [1.0]).any()):
            raise UserError(
                f"one completion a step: {name} compares the completions of a step, so it would learn nothing; raise "
                "prompts_per_step or completions_per_prompt"
            )
    if algorithm.kl_in_reward or algorithm.overlong_cache:
        try:  # both can take a reward below 0, which not every advantage has a meaning for
            _advantages(algorithm, [0.0, -0.01])
        except ValueError as error:
            raise UserError(f"{name}: kl_in_reward and overlong_cache are taken off the reward; {error}") from error
    if config.resample_rounds is not None and not algorithm.dynamic_sampling:
        raise UserError(
            f"resample_rounds would be ignored: {name} does not replace prompts; take it out, or use "
            "overrides.dynamic_sampling=true"
        )
    if config.pretraining is not None and "pretraining" not in algorithm.needs:
        raise UserError(
            f"pretraining.* would be ignored: {name} has no pretraining term; take it out, or set overrides.ptx_weight "
            "above 0"
        )
    if config.pretraining is None and "pretraining" in algorithm.needs:
        raise UserError(
            f"{name} has a pretraining term (ptx_weight={algorithm.ptx_weight:g}), and there is no text for it: give "
            "pretraining.data=FILE, or set overrides.ptx_weight=0"
        )
    if config.pretraining is not None and config.sampling.temperature != 1:
        raise UserError(
            f"sampling.temperature={config.sampling.temperature:g}: the pretraining text would be scored at that "
            "temperature too; use 1 beside a pretraining term"
        )


def _advantages(algorithm: Algorithm, scores: Sequence[float]) -> Tensor:
    """[N, 1] advantages of completions of one token with these scores, each of a prompt of its own."""
    count = len(scores)
    outside = None if "greedy" not in algorithm.needs else torch.zeros(count)
    rewards, mask = torch.tensor(scores)[:, None], torch.ones(count, 1, dtype=torch.bool)
    return algorithm.advantage(rewards, mask, torch.arange(count), torch.zeros(count, 1), baselines=outside)


def _check_anchor(config: RLConfig, algorithm: Algorithm) -> None:
    """The reference, and the coefficient of the KL to it."""
    name = config.algorithm
    check_reference(config.reference, config.model)
    watched = config.guards.get("kl_max") is not None
    if "reference" not in algorithm.needs and not watched and config.reference != type(config.reference)():
        key = "name" if config.reference.name is not None else "update"
        raise UserError(
            f"reference.{key} would be ignored: with these coefficients {name} is not held to a reference; take it "
            "out, or set overrides.kl_in_reward above 0"
        )
    if algorithm.kl_in_reward:
        start, rollouts = algorithm.kl_in_reward, config.prompts_per_step * group_size(config, algorithm)
        try:  # a controller that can't go with this many rollouts says so now, not after the first step
            algorithm.kl_control.next(start, start, 0.0, rollouts, 0.0)
        except ValueError as error:
            raise UserError(f"overrides.kl_control: {error}") from error


def _check_critic(config: RLConfig, algorithm: Algorithm) -> None:
    """A critic is there where it is needed, is trained, and is read."""
    name = config.algorithm
    if "critic" not in algorithm.needs and config.critic != CriticConfig():
        raise UserError(f"critic.* would be ignored: {name} has no critic; take it out, or use ppo or a2c")
    if config.critic.kind == "adapter" and config.model.lora is None:
        raise UserError("critic.kind=adapter needs model.lora; or use critic.kind=head or separate")
    read, trained = "critic" in algorithm.advantage.needs, "critic" in algorithm.loss.needs
    if read and not trained:
        raise UserError(
            f"{type(algorithm.advantage).__name__} reads a critic that {name} never trains: set "
            "overrides.loss.value_weight above 0"
        )
    if trained and not read:
        raise UserError(
            f"overrides.loss.value_weight trains a critic that {type(algorithm.advantage).__name__} does not read: set "
            "it to 0 (and leave value_clip out), or use overrides.advantage=gae"
        )


def group_size(config: RLConfig, algorithm: Algorithm) -> int:
    """Completions per prompt."""
    return config.completions_per_prompt or algorithm.group_size


# -- streams -----------------------------------------------------------------------------------------------------------


class Endless(Generic[T]):
    """Items by position in an endless stream: epoch after epoch in seeded permutations. What stands at a position is a
    function of the position and the seed alone."""

    def __init__(self, items: Sequence[T], seed: int) -> None:
        self.items, self.seed = items, seed
        self._cached: tuple[int, list[int]] = (-1, [])

    def __call__(self, first: int, count: int) -> list[T]:
        """The ``count`` items from position ``first``."""
        size = len(self.items)
        return [self.items[self._order(at // size)[at % size]] for at in range(first, first + count)]

    def _order(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = (epoch, torch.randperm(len(self.items), generator=generator).tolist())
        return self._cached[1]


class PromptOrder(Endless[Prompt]):
    """The endless stream of prompts."""

    def __call__(self, first: int, count: int) -> list[Prompt]:
        chosen = super().__call__(first, count)
        # A draw depends on the prompt's id: where a prompt comes twice in a step, it is to be answered anew.
        seen: Counter[str] = Counter()
        for i, prompt in enumerate(chosen):
            seen[prompt.id] += 1
            if seen[prompt.id] > 1:
                chosen[i] = replace(prompt, id=f"{prompt.id}#{seen[prompt.id]}")
        return chosen


def open_prompts(config: RLConfig | IterateConfig, chat: ChatTokenizer, say: parts.Say) -> tuple[list[Prompt], str]:
    rows = read(config.data.train, "prompts", limit=config.data.limit, max_bad_rows=config.data.max_bad_rows)
    limit, overlong = config.data.max_prompt_tokens, config.data.overlong
    sizes = [len(chat.prompt(p)) for p in rows.records]
    kept = [p for p, size in zip(rows.records, sizes, strict=True) if size <= limit]
    too_long = len(rows.records) - len(kept)
    if too_long and overlong != "drop":
        raise UserError(
            f"{config.data.train}: {too_long} prompts have more than data.max_prompt_tokens={limit} tokens "
            f"(up to {max(sizes)})\n"
            "  raise the limit, or leave them out with data.overlong=drop; a prompt is never cut before it is answered"
        )
    counts = {f"prompt over data.max_prompt_tokens={limit}": too_long} if too_long else {}
    say(f"{config.data.train}: {len(kept)} prompts")
    for note in rows.notes:
        say(f"  {note}")
    for cause, count in {**rows.counts, **counts}.items():
        say(f"  {count} × {cause}")
    if not kept:
        raise UserError(
            f"{config.data.train}: no prompts are left"
            + (f"; the shortest has {min(sizes)} tokens: raise data.max_prompt_tokens" if sizes else "")
        )
    longest, optim = config.sampling.max_new_tokens, config.optim
    note = check_budget(
        [(p.id, size + longest) for p, size in zip(rows.records, sizes, strict=True) if size <= limit],
        optim.tokens_per_micro_batch,
        what=f"prompts, with answers of sampling.max_new_tokens={longest},",
        refuse=optim.oversize == "refuse",
    )
    if note is not None:
        say(f"  {note}")
    check_system(config.data.system, kept, "data.system")
    return list(kept), rows.fingerprint


def open_held_out(
    config: RLConfig, guards: Guards | None, prompts: Sequence[Prompt], reward: Reward, tokenizer: Any, say: parts.Say
) -> HeldOut | None:
    """Who judges the answers to the held-out ``prompts``; None where nobody does. ``reward``: that of the run."""

    def opened(spec: Mapping[str, Any] | str, what: str) -> Reward:
        return open_reward(spec, tokenizer, config.model, config.optim.tokens_per_micro_batch, say, what=what)[0]

    judge = opened(guards.judge, "guards.judge") if guards is not None and guards.judge is not None else None
    verify = None
    if (told := config.verify) is not None:
        ks, samples = check_counts(told.pass_at, told.samples, "verify.pass_at", "verify.samples")
        verifier = reward if told.reward is None else opened(told.reward, "verify.reward")
        verify = Verify(verifier=verifier, ks=ks, samples=samples)
    return HeldOut(prompts=prompts, judge=judge, verify=verify) if judge is not None or verify is not None else None


def open_pretraining(
    config: PretrainingConfig, chat: ChatTokenizer, seed: int, max_bad_rows: float, say: parts.Say
) -> tuple[Callable[[int], Batch], str]:
    """The text of an optimizer step (from 0), and the fingerprint of its source."""
    rows = read(config.data, "demonstrations", max_bad_rows=max_bad_rows)
    limit = config.max_tokens
    found = tokenise(rows.records, chat, max_prompt_tokens=limit, max_completion_tokens=limit, overlong="cut")
    say(f"{config.data}: {len(found.groups)} rows of pretraining text, {config.rows_per_update} an optimizer step")
    for cause, count in {**rows.counts, **found.counts}.items():
        say(f"  {count} × {cause}")
    stream, size = Endless(found.groups, seed), config.rows_per_update
    return lambda number: Batch.from_groups(stream(number * size, size)), rows.fingerprint


def both(first: str, second: str) -> str:
    """One fingerprint of two sources."""
    return hashlib.sha256(f"{first} {second}".encode()).hexdigest()


def open_critic(config: RLConfig, policy: Policy, scorer: Scorer | None, say: parts.Say) -> Scorer:
    """Values start at zero everywhere: the first advantages are the rewards themselves."""
    kind, lora = config.critic.kind, config.model.lora
    if kind == "head":
        backbone, adapter = policy.backbone, policy.adapter
    elif kind == "adapter":
        backbone, adapter = policy.backbone, parts.adapt(policy.backbone, lora, "critic")
    else:
        name = config.critic.name or (config.reward if scorer is not None else config.model.name)
        of_reward_model = config.critic.name is None and scorer is not None
        backbone = parts.open_backbone(config.model.model_copy(update={"name": name}), say, scorer=of_reward_model)
        backbone.autocast = policy.backbone.autocast
        adapter = parts.adapt(backbone, lora, "critic")
    say(f"critic: {kind}" + (f", from {backbone.name}" if kind == "separate" else ""))
    return Scorer(backbone=backbone, head=parts.new_head(backbone, zero=True), adapter=adapter)
