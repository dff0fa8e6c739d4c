"""Directly from preferences: DPO and its family on pairs, KTO on judgements; held to a frozen reference where the loss
has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tether.config.build import build
from tether.config.schema import PreferenceConfig
from tether.core.batches import Batch, Group, JudgementBatch, PreferenceBatch, pad_rows
from tether.core.errors import UserError
from tether.losses import PREFERENCE, UNPAIRED, UnpairedLoss, kl_baseline, mismatched
from tether.methods import offline, parts
from tether.methods.reference import open_offline_reference
from tether.methods.reward import judgements, pairs
from tether.models.roles import Policy, Scorer

LogProbs = Callable[[Batch], Tensor]
# [C_i] of every completion, group after group.
Reference = Callable[[Sequence[Group]], Sequence[Tensor]]
LayOut = Callable[[Sequence[Group]], Batch]


def run(
    config: PreferenceConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    data: parts.Data | None = None,
) -> Path:
    """Train the policy on pairs or judgements, as the loss reads them; returns the run folder."""
    loss = build({**PREFERENCE, **UNPAIRED}, config.loss, "loss")
    unpaired = isinstance(loss, UnpairedLoss)
    lay_out = judgements if unpaired else pairs
    say = parts.speaker(quiet)

    if "reference" not in loss.needs:
        _check_no_reference(config)

    def prepare(role: Policy | Scorer, data: parts.Data) -> LayOut:
        assert isinstance(role, Policy)
        if "reference" not in loss.needs:
            return lay_out
        baseline = "kl_baseline" in loss.needs
        groups = (*data.train, *data.held_out)
        reference = open_offline_reference(role, config.reference, config.model, groups, say, only=not baseline)
        laid_out = with_reference(lay_out, reference)
        if not baseline:
            return laid_out
        return with_baseline(laid_out, parts.logprobs_of(role, config.optim.tokens_per_micro_batch), reference, say)

    method = offline.OfflineMethod(
        name="preference",
        title=str(config.loss.get("type", "preference")).upper(),
        kind="judgements" if unpaired else "preferences",
        loss=loss,
        role=lambda backbone: Policy(backbone=backbone, adapter=parts.adapt(backbone, config.model.lora, "policy")),
        prepare=prepare,
    )
    return offline.run(config, method, resume=resume, dry_run=dry_run, quiet=quiet, data=data)


def _check_no_reference(config: PreferenceConfig) -> None:
    """Raises UserError where the section would be ignored."""
    for key, given in {"name": config.reference.name is not None, "cache": not config.reference.cache}.items():
        if given:
            raise UserError(
                f"reference.{key} would be ignored: {config.loss.get('type')} has no reference; take it out"
            )


def with_reference(lay_out: LayOut, reference: Reference) -> LayOut:
    """``lay_out`` with reference log-probs."""

    def prepare(groups: Sequence[Group]) -> Batch:
        batch = lay_out(groups)
        assert isinstance(batch, PreferenceBatch | JudgementBatch)
        return replace(batch, ref_logprobs=pad_rows(reference(groups), batch.tokens.shape[1]))

    return prepare


def with_baseline(lay_out: LayOut, policy: LogProbs, reference: Reference, say: parts.Say) -> LayOut:
    """``lay_out`` with KTO's KL baseline, of the whole batch and under the policy as it is when the batch is laid out,
    which is just before its update."""
    told = False

    def prepare(groups: Sequence[Group]) -> Batch:
        nonlocal told
        batch = lay_out(groups)
        assert isinstance(batch, JudgementBatch)
        others = mismatched(batch)
        baseline = 0.0
        if others.size:
            theirs = pad_rows(reference(_rows(others)), others.tokens.shape[1])
            baseline = kl_baseline(policy(others), theirs, others.loss_mask)
        elif not told:
            told = True
            say("note: a step whose judgements share one prompt has no mismatched pair; its KL baseline is taken as 0")
        return replace(batch, kl_baseline=torch.full((batch.size,), baseline))

    return prepare


def _rows(batch: Batch) -> list[Group]:
    """Every row as a group of its own."""
    return [
        Group(
            id=str(i), prompt=batch.prompts[p], completions=(batch.tokens[i, :n],), loss_masks=(batch.loss_mask[i, :n],)
        )
        for i, (p, n) in enumerate(zip(batch.prompt_of.tolist(), batch.lengths.tolist(), strict=True))
    ]
