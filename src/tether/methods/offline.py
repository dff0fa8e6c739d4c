"""The front door that SFT, reward models and the DPO family share; they differ in role, data and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tether.config.schema import OfflineConfig
from tether.core.batches import Batch, Group
from tether.core.metrics import values
from tether.core.protocols import Loss
from tether.data.batching import OptimizerBatches, check_budget
from tether.data.chat import ChatTokenizer
from tether.data.readers import Kind
from tether.methods import parts
from tether.models.backbone import Backbone
from tether.models.roles import Policy, Scorer
from tether.training import offline
from tether.training.session import Session


@dataclass(frozen=True, kw_only=True)
class OfflineMethod:
    """What one offline method adds. ``role`` puts the trained role on the backbone; ``prepare`` lays groups out as a
    batch (given the role as it is before training, and the data, for the reference)."""

    name: str
    title: str
    kind: Kind
    loss: Loss
    role: Callable[[Backbone], Policy | Scorer]
    prepare: Callable[[Policy | Scorer, parts.Data], Callable[[Sequence[Group]], Batch]]
    last_turn_only: bool = False
    step_separator: str = "\n\n"
    # Every optimizer step sees all lengths of completions.
    by_length: bool = False
    # Whether the loss can learn from this data; raises UserError before anything is opened.
    check: Callable[[parts.Data], None] | None = None
    # What of the data this run trains on, where that is not all of it once.
    draw: Callable[[parts.Data], parts.Data] | None = None
    # What else is saved with the model, given the role and the data: writes into the model's folder.
    beside: Callable[[Policy | Scorer, parts.Data], Callable[[Path], None]] | None = None


def run(
    config: OfflineConfig,
    method: OfflineMethod,
    *,
    resume: bool,
    dry_run: bool,
    quiet: bool,
    data: parts.Data | None = None,
) -> Path:
    """Train, write the run folder, return its path. ``data``: groups that are in memory already, as tokens, instead of
    the file that the config names."""
    say = parts.speaker(quiet)
    parts.begin(config)
    chat = parts.open_chat(config.model, config.data, say)
    if data is None:
        data = parts.open_data(
            config.data,
            method.kind,
            chat,
            say,
            last_turn_only=method.last_turn_only,
            step_separator=method.step_separator,
        )
    if method.check is not None:
        method.check(data)
    if method.draw is not None:
        data = method.draw(data)
    batches = OptimizerBatches(
        data.train, config.prompts_per_step, config.epochs, config.run.seed, by_length=method.by_length
    )
    sizes, optim = [(g.id, g.token_count) for g in data.train], config.optim
    note = check_budget(sizes, optim.tokens_per_micro_batch, what="groups", refuse=optim.oversize == "refuse")
    if note is not None:
        say(note)
    if dry_run:
        parts.describe_dry_run(config, _schedule(config, batches, data), chat.token_table(data.train[0]))
        return Path(config.run.folder or ".")
    with parts.open_run(config, method.name, data.fingerprint, resume=resume) as folder:
        backbone = parts.open_backbone(config.model, say)
        parts.settle_autocast(backbone, config.optim, folder, say)
        _keep_template(backbone, chat)
        role = method.role(backbone)
        prepare = method.prepare(role, data)
        learner = parts.open_learner(role, config.optim, len(batches))
        session = Session(
            folder=folder,
            learner=learner,
            save_model=parts.saver(
                role, method.name, config.model.name, config, beside=method.beside and method.beside(role, data)
            ),
            total_steps=len(batches),
            title=method.title,
            checkpoint_every=config.run.checkpoint_every,
            keep=config.run.keep_checkpoints,
            quiet=quiet,
            ceiling=parts.machine_ceiling(role),
        )

        def held_out() -> Mapping[str, float]:
            batch = prepare(data.held_out)
            with torch.no_grad():
                outputs = learner.outputs(batch)
                result = method.loss(outputs, batch)
            return {"loss": result.loss.detach().value(), **values(result.metrics)}

        evaluate = held_out if data.held_out else None
        offline.train(
            session, learner, method.loss, batches, prepare, evaluate=evaluate, eval_every=config.run.eval_every
        )
        return parts.finish(folder, config, say)


def _keep_template(backbone: Backbone, chat: ChatTokenizer) -> None:
    """The template that was trained with is saved with the checkpoint."""
    backbone.tokenizer.chat_template = chat.tokenizer.chat_template


def _schedule(config: OfflineConfig, batches: OptimizerBatches, data: parts.Data) -> list[str]:
    tokens = sum(g.token_count for g in data.train)
    largest = max(g.token_count for g in data.train)
    return [
        f"{len(data.train)} groups to train on, {len(data.held_out)} held out; {tokens} tokens an epoch, "
        f"the largest group has {largest}",
        f"{len(batches)} optimizer steps: {config.prompts_per_step} groups a step, {config.epochs:g} epochs, "
        f"{config.optim.tokens_per_micro_batch} tokens computed at once",
    ]
