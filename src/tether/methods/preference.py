"""Directly from preferences: DPO and its family, held to a frozen reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tether.config.build import build
from tether.config.schema import PreferenceConfig
from tether.core.batches import Batch, Group, PreferenceBatch, pad_rows
from tether.losses import PREFERENCE
from tether.methods import offline, parts
from tether.methods.reward import pairs
from tether.models.roles import Policy, Scorer


def run(
    config: PreferenceConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    data: parts.Data | None = None,
) -> Path:
    """Train the policy on pairs; returns the run folder."""
    loss = build(PREFERENCE, config.loss, "loss")
    say = parts.speaker(quiet)

    def prepare(role: Policy | Scorer) -> Callable[[Sequence[Group]], Batch]:
        assert isinstance(role, Policy)
        if "reference" not in loss.needs:
            return pairs
        reference = parts.frozen_reference(role, config.reference.name, config.model, say)
        return with_reference(parts.logprobs_of(reference, config.optim.tokens_per_micro_batch))

    method = offline.OfflineMethod(
        name="preference",
        title=str(config.loss.get("type", "preference")).upper(),
        kind="preferences",
        loss=loss,
        role=lambda backbone: Policy(backbone=backbone, adapter=parts.adapt(backbone, config.model.lora, "policy")),
        prepare=prepare,
    )
    return offline.run(config, method, resume=resume, dry_run=dry_run, quiet=quiet, data=data)


def with_reference(logprobs: Callable[[Batch], Tensor]) -> Callable[[Sequence[Group]], Batch]:
    """Lay pairs out with their reference log-probs, each computed once and kept for later epochs."""
    # By the pair itself, not by its id: rows of two files, or pairs of one prompt, may share an id.
    known: dict[Group, list[Tensor]] = {}

    def prepare(groups: Sequence[Group]) -> Batch:
        batch = pairs(groups)
        assert isinstance(batch, PreferenceBatch)
        new = [g for g in groups if g not in known]
        if new:
            fresh = pairs(new)
            rows = logprobs(fresh)
            for i, group in enumerate(new):
                known[group] = [rows[2 * i + k, : len(group.completions[k])] for k in (0, 1)]
        reference = pad_rows([row for g in groups for row in known[g]], batch.tokens.shape[1])
        return replace(batch, ref_logprobs=reference)

    return prepare
