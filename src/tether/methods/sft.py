"""Instruction tuning (SFT): cross-entropy on the assistant's tokens."""

from __future__ import annotations

from pathlib import Path

from tether.config.schema import SFTConfig
from tether.core.batches import Batch
from tether.losses.supervised import CrossEntropy
from tether.methods import offline, parts
from tether.models.roles import Policy


def run(config: SFTConfig, *, resume: bool = False, dry_run: bool = False, quiet: bool = False) -> Path:
    """Train on demonstrations; returns the run folder."""
    method = offline.OfflineMethod(
        name="sft",
        title="SFT",
        kind="demonstrations",
        loss=CrossEntropy(),
        role=lambda backbone: Policy(backbone=backbone, adapter=parts.adapt(backbone, config.model.lora, "policy")),
        prepare=lambda role, data: Batch.from_groups,
        last_turn_only=config.data.last_turn_only,
    )
    return offline.run(config, method, resume=resume, dry_run=dry_run, quiet=quiet)
