"""Sampling for an architecture the packed pass can't serve: left-padded batches and transformers' own cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tether.core.protocols import SamplingSettings

if TYPE_CHECKING:
    from tether.backends.local.sampler import LocalSampler, Row


def run_padded(sampler: LocalSampler, rows: list[Row], settings: SamplingSettings) -> None:
    """Draw every row, ``sampler.width`` at a time; a batch runs until its last row has finished."""
    for start in range(0, len(rows), sampler.width):
        _run_batch(sampler, rows[start : start + sampler.width], settings)


def _run_batch(sampler: LocalSampler, rows: list[Row], settings: SamplingSettings) -> None:
    backbone = sampler.policy.backbone
    longest = max(len(row.prompt_tokens) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row.prompt_tokens) :] = row.prompt_tokens
        mask[i, longest - len(row.prompt_tokens) :] = 1
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    past = None
    while True:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = backbone.hf.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
        past = out.past_key_values
        running = [i for i, row in enumerate(rows) if not row.finish_reason]
        logits = backbone.logits(out.last_hidden_state[torch.tensor(running, device=ids.device), -1])
        sampler._append([rows[i] for i in running], logits, settings)
        if all(row.finish_reason for row in rows):
            return
        ids = torch.tensor([[row.tokens[-1]] for row in rows], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
