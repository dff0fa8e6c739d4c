"""Reward models: from pairs (Bradley-Terry), rankings (Plackett-Luce, Davidson, Rao-Kupper), judged answers (outcome)
and judged steps (process)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tether.config.build import build
from tether.config.schema import RewardModelConfig, StepsConfig
from tether.config.sections import DataConfig
from tether.core.batches import (
    Batch,
    Group,
    JudgementBatch,
    Outputs,
    PreferenceBatch,
    RankingBatch,
    StepBatch,
    pad_rows,
)
from tether.core.errors import UserError
from tether.core.protocols import Loss
from tether.core.text import Demonstration, Prompt
from tether.data.chat import ChatTokenizer
from tether.data.groups import step_group, tokenise
from tether.data.readers import Kind, read
from tether.losses import REWARD, MultiHead, Outcome, Process, RankingLoss
from tether.methods import ensembles, offline, parts
from tether.models.backbone import Backbone
from tether.models.load import check_can_be_saved
from tether.models.reading import Reading
from tether.models.roles import Policy, Scorer
from tether.rewards.model import ScoreScale

# The scale of the scores is measured on the completions of this many groups (64 of pairs): their std to within a tenth,
# in a few seconds.
SCALE_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a loss learns from, and what its model's scores are read off."""

    kind: Kind
    lay_out: Callable[[Sequence[Group]], Batch]
    reading: Reading


def run(
    config: RewardModelConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    data: parts.Data | None = None,
) -> Path:
    """Train a scalar head (and trunk), or ``heads`` on one trunk, or ``members`` of their own; returns the run folder.
    The loss says what data it reads."""
    if config.heads is not None and config.members is not None:
        raise UserError("heads and members: several heads on one trunk, or several models; take one of them out")
    if config.members is not None:
        return ensembles.train(
            config,
            lambda member: run(member, resume=resume, dry_run=dry_run, quiet=quiet, data=data),
            resume=resume,
            dry_run=dry_run,
            say=parts.speaker(quiet),
        )
    loss = build(REWARD, config.loss, "loss")
    plan = plan_for(loss, config)

    def role(backbone: Backbone) -> Scorer:
        # Probabilities start at one half; differences of scores need a head to reach the trunk through.
        language = "language_head" in loss.needs
        lora = config.model.lora
        scorer = parts.open_scorer(
            backbone,
            lora,
            "reward",
            zero=plan.reading.has_bias,
            reading=plan.reading,
            language=language,
            heads=config.heads or 1,
        )
        check_can_be_saved(scorer)
        return scorer

    parts.speaker(quiet)(f"loss {config.loss.get('type')}: reads {plan.kind}")
    method = offline.OfflineMethod(
        name="reward",
        title="reward model",
        kind=plan.kind,
        loss=loss if config.heads is None else MultiHead(loss=loss),
        role=role,
        prepare=lambda role, data: plan.lay_out,
        step_separator=(config.steps or StepsConfig()).separator,
        by_length=config.stratify_lengths,
        check=lambda data: _check_data(loss, data),
        draw=(lambda data: _draw(config, data)) if config.bootstrap else None,
        beside=lambda role, data: _scale(role, plan, data, config, parts.speaker(quiet)),
    )
    return offline.run(config, method, resume=resume, dry_run=dry_run, quiet=quiet, data=data)


def _draw(config: RewardModelConfig, data: parts.Data) -> parts.Data:
    if config.heads is not None:
        return ensembles.bootstrap_heads(data, config.heads, config.run.seed)
    return ensembles.bootstrap(data, config.run.seed)


def plan_for(loss: Loss, config: RewardModelConfig) -> Plan:
    """Raises UserError where the config sets what this loss would ignore."""
    name = config.loss.get("type")
    per_token = isinstance(loss, Outcome | Process)
    if config.heads is not None and per_token:
        raise UserError(
            f"heads={config.heads}: {name} is read at single tokens and has one head; several learn from pairs and "
            "rankings\n  for several models of this loss: members"
        )
    if config.pool == "mean" and per_token:
        raise UserError(f"pool=mean would be ignored: {name} is read at single tokens; take it out")
    if config.steps is not None and not isinstance(loss, Process):
        raise UserError(f"steps.* would be ignored: {name} knows no steps; take it out, or use loss.type=process")
    pooled = Reading(kind=config.pool)
    match loss:
        case Process():
            steps = config.steps or StepsConfig()
            reading = Reading(kind="process", aggregate=steps.aggregate, separator=steps.separator)
            return Plan(kind="steps", lay_out=steps_of, reading=reading)
        case Outcome():
            return Plan(kind="judgements", lay_out=judgements, reading=Reading(kind="outcome"))
        case RankingLoss():
            return Plan(kind="rankings", lay_out=rankings, reading=pooled)
        case _:
            return Plan(kind="preferences", lay_out=pairs, reading=pooled)


# -- groups -> batches -------------------------------------------------------------------------------------------------


def pairs(groups: Sequence[Group]) -> PreferenceBatch:
    """Row 2i chosen, row 2i+1 rejected, with margins where every pair has one (of a data set: all, or none)."""
    _check(groups, lambda g: len(g.completions) == 2, "preferences: groups of two completions, the chosen one first")
    margins = [g.margin for g in groups if g.margin is not None]
    return PreferenceBatch.from_groups(groups, margin=torch.tensor(margins) if len(margins) == len(groups) else None)


def rankings(groups: Sequence[Group]) -> RankingBatch:
    """One ranking a group, with ranks for its completions."""
    _check(groups, lambda g: g.ranks is not None, "rankings: groups whose completions have ranks")
    return RankingBatch.from_groups(groups, ranks=torch.tensor([rank for g in groups for rank in g.ranks or ()]))


def judgements(groups: Sequence[Group]) -> JudgementBatch:
    """One row a judgement."""
    what = "judgements: groups of one completion that say whether it is desirable"
    _check(groups, lambda g: g.desirable is not None and len(g.completions) == 1, what)
    return JudgementBatch.from_groups(groups, desirable=torch.tensor([g.desirable for g in groups], dtype=torch.bool))


def steps_of(groups: Sequence[Group]) -> StepBatch:
    """One row a solution, its mask and labels at the ends of its steps."""
    _check(groups, lambda g: g.labels is not None and len(g.completions) == 1, "steps: groups of one labelled solution")
    return StepBatch.from_groups(groups, labels=pad_rows([g.labels for g in groups if g.labels is not None]))


def _check(groups: Sequence[Group], fits: Callable[[Group], Any], what: str) -> None:
    other = next((g for g in groups if not fits(g)), None)
    if other is not None:
        raise UserError(f"this loss reads {what}; {other.id} is none")


def _check_data(loss: Loss, data: parts.Data) -> None:
    _check_margins(loss, data)
    _check_ties(loss, data)


def _check_margins(loss: Loss, data: parts.Data) -> None:
    """A set of pairs has margins or has none: in a mix, the loss of a pair would hang on the batch it is drawn into."""
    if getattr(loss, "margin", None) != "use":
        return
    for name, groups in (("train", data.train), ("eval", data.held_out)):
        without = sum(g.margin is None for g in groups)
        if 0 < without < len(groups):
            raise UserError(
                f"data.{name}: {len(groups) - without} pairs have a margin and {without} have none; give every pair "
                "one (0: no margin), take the column out, or set loss.margin=ignore"
            )


def _check_ties(loss: Loss, data: parts.Data) -> None:
    """Ties that the loss has no probability or no room for are said before training, not at the step they come up."""
    if not isinstance(loss, RankingLoss):
        return
    for group in (*data.train, *data.held_out):
        batch = rankings([group])
        try:
            loss(Outputs(scores=torch.zeros(batch.size)), batch)
        except ValueError as error:
            raise UserError(f"{group.id}: {error}") from error


def _scale(
    role: Policy | Scorer, plan: Plan, data: parts.Data, config: RewardModelConfig, say: parts.Say
) -> Callable[[Path], None]:
    """Measures the scale of the scores and saves it: on ``scale_on``, or on completions nobody trained on, where there
    are any."""
    several = isinstance(role, Scorer) and role.heads > 1
    scores = (parts.head_scores_of if several else parts.scores_of)(role, config.optim.tokens_per_micro_batch)
    answers = None if config.scale_on is None else _answers(config.scale_on, role, config.data, say)

    def save(folder: Path) -> None:
        batch = answers or plan.lay_out((data.held_out or data.train)[:SCALE_GROUPS])
        ScoreScale.of(scores(batch)).save(folder)

    return save


def _answers(path: str, role: Policy | Scorer, data: DataConfig, say: parts.Say) -> Batch:
    """Answers of an SFT file, as many as of pairs, from all parts of it: the scale has mean 0 where the policy begins
    (Ouyang 2022, section 3.5)."""
    rows = read(path, "demonstrations", max_bad_rows=data.max_bad_rows).records
    count = min(len(rows), 2 * SCALE_GROUPS)
    chat = ChatTokenizer(role.backbone.tokenizer)
    found = tokenise(
        [rows[i * len(rows) // count] for i in range(count)],
        chat,
        max_prompt_tokens=data.max_prompt_tokens,
        max_completion_tokens=data.max_completion_tokens,
        overlong=data.overlong,
        last_turn_only=True,
    )
    say(f"scale_on: {path}: {len(found.groups)} of {len(rows)} answers")
    for cause, count in found.counts.items():
        say(f"  {count} × {cause}")
    separator = role.reading.separator if isinstance(role, Scorer) else None
    if separator is None:
        return Batch.from_groups(found.groups)
    texts = [_last_turn(r) for r in found.records if isinstance(r, Demonstration)]
    return Batch.from_groups([step_group(chat, prompt, text, separator) for prompt, text in texts])


def _last_turn(record: Demonstration) -> tuple[Prompt, str]:
    """What the assistant said last, and what it answered."""
    if not record.messages:
        return Prompt(id=record.id, text=record.prompt), record.completion
    last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
    return Prompt(id=record.id, messages=record.messages[:last]), record.messages[last].content
