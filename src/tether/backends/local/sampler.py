"""The in-process sampler: the learner's live weights, one prefill per prompt, finished rows replaced or dropped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.backends.local.cache import DecodeLayout, PrefillLayout
from tether.backends.local.draw import draw, log_distribution, uniforms
from tether.core.protocols import SamplingSettings
from tether.core.text import Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.models.roles import Policy


@dataclass(kw_only=True, eq=False)
class Row:
    """One completion that is to be drawn, or is being drawn."""

    prompt: Prompt
    group: int
    prompt_tokens: Tensor
    uniforms: Tensor
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    text: str | None = None
    rollout: Rollout | None = None
    # Who hears of the rollout as soon as it is whole.
    told: Callable[[Rollout], None] | None = None


@dataclass(kw_only=True, eq=False)
class LocalSampler:
    """Draws completions under ``policy``; ``width`` rows decode at once."""

    policy: Policy
    chat: ChatTokenizer
    width: int = 64
    policy_version: Callable[[], int] = lambda: 0

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        settings: SamplingSettings,
        seed: int,
        finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """``n`` completions of each prompt, group by group. The draw of sample i of a prompt depends on
        (seed, prompt id, i) and the weights alone."""
        rows: list[Row] = []
        limit = self.policy.backbone.context
        for group, prompt in enumerate(prompts):
            tokens = self.chat.prompt(prompt)
            room = min(settings.max_new_tokens, limit - len(tokens))
            if room < 1:
                from tether.core.errors import UserError

                raise UserError(
                    f"prompt {prompt.id}: {len(tokens)} tokens leave no room in the model's context of {limit}\n"
                    "  drop it with data.max_prompt_tokens"
                )
            for index in range(n):
                rows.append(
                    Row(
                        prompt=prompt,
                        group=group,
                        prompt_tokens=tokens,
                        uniforms=uniforms(seed, prompt.id, index, room),
                        told=finished,
                    )
                )
        if not rows:
            return []
        steps = max(len(row.uniforms) for row in rows)
        with self.policy.backbone.decoding(self.policy.adapter, steps):
            if self.policy.backbone.mode == "packed":
                self._run(rows, settings)
            else:
                from tether.backends.local.padded_sampler import run_padded

                run_padded(self, rows, settings)
        return [row.rollout for row in rows if row.rollout is not None]

    def _run(self, rows: list[Row], settings: SamplingSettings) -> None:
        waiting = deque(rows)
        capacity = max(len(r.prompt_tokens) + len(r.uniforms) for r in rows) + 1
        width = min(self.width, len(rows))
        cache = DecodeLayout(width)
        slots: list[Row | None] = [None] * width
        while waiting or any(slots):
            free = [i for i, row in enumerate(slots) if row is None]
            # A prefill costs a pass of its own, so wait until a quarter of the batch is free (or everything is).
            if waiting and len(free) >= max(1, width // 4):
                self._admit(waiting, free, slots, cache, capacity, settings)
                continue
            if not waiting and len(free) >= max(1, len(slots) // 8):
                kept = [i for i, row in enumerate(slots) if row is not None]
                cache.keep(kept)
                slots = [slots[i] for i in kept]
            self._step(slots, cache, settings)

    def _admit(
        self,
        waiting: deque[Row],
        free: list[int],
        slots: list[Row | None],
        cache: DecodeLayout,
        capacity: int,
        settings: SamplingSettings,
    ) -> None:
        """Prefill the prompts of the next rows, each prompt once, and draw every row's first token."""
        taken = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
        groups = sorted({row.group for row in taken})
        prompts = {row.group: row.prompt_tokens for row in taken}
        device = self.policy.backbone.device
        ids = torch.cat([prompts[g] for g in groups])[None].to(device)
        positions = torch.cat([torch.arange(len(prompts[g])) for g in groups])[None].to(device)
        layout = PrefillLayout(lengths=tuple(len(prompts[g]) for g in groups))
        hidden = self.policy.backbone.run_trunk(layout, ids, positions)[0]
        ends = torch.tensor(layout.lengths).cumsum(0).tolist()
        span = {g: (end - len(prompts[g]), end) for g, end in zip(groups, ends, strict=True)}
        used = free[: len(taken)]
        cache.fill(used, layout, [span[row.group] for row in taken], capacity)
        logits = self.policy.backbone.logits(hidden[torch.tensor([e - 1 for e in ends], device=device)])
        of = torch.tensor([groups.index(row.group) for row in taken], device=device)
        for slot, row in zip(used, taken, strict=True):
            slots[slot] = row
        self._append(taken, logits[of], settings)
        for slot, row in zip(used, taken, strict=True):
            if row.finish_reason:
                slots[slot] = None

    def _step(self, slots: list[Row | None], cache: DecodeLayout, settings: SamplingSettings) -> None:
        """One token for every running row; an idle slot decodes a token that nobody reads."""
        device = self.policy.backbone.device
        ids = torch.tensor([row.tokens[-1] if row else 0 for row in slots], device=device)[:, None]
        idle = [i for i, row in enumerate(slots) if row is None]
        if idle:
            cache.lengths[idle] = 0
        cache.begin_step()
        hidden = self.policy.backbone.run_trunk(cache, ids, cache.lengths[:, None])[:, 0]
        cache.end_step()
        running = [(i, row) for i, row in enumerate(slots) if row is not None]
        index = torch.tensor([i for i, _ in running], device=device)
        self._append([row for _, row in running], self.policy.backbone.logits(hidden[index]), settings)
        for i, row in running:
            if row.finish_reason:
                slots[i] = None

    def _append(self, rows: list[Row], logits: Tensor, settings: SamplingSettings) -> None:
        """Draw the next token of each row and decide whether the row is finished."""
        logprobs = log_distribution(logits, settings)
        u = torch.stack([row.uniforms[len(row.tokens)] for row in rows]).to(logits.device)
        tokens = draw(logprobs, u)
        chosen = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
        for row, token, logprob in zip(rows, tokens.tolist(), chosen, strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in self.chat.stop_ids:
                row.finish_reason = "stop"
            elif settings.stop and (text := self._stopped(row, settings.stop)) is not None:
                row.finish_reason, row.text = "stop", text
            elif len(row.tokens) == len(row.uniforms):
                row.finish_reason = "length"
            if row.finish_reason:
                row.rollout = self._rollout(row)
                if row.told is not None:
                    row.told(row.rollout)

    def _stopped(self, row: Row, stops: tuple[str, ...]) -> str | None:
        """The text before the first stop string, once one has appeared."""
        # The newest token completed it, so it lies in the last tokens: at most one a byte, and a few for a cut sign.
        reach = max(len(stop.encode()) for stop in stops) + 4
        tail = self.chat.decode(torch.tensor(row.tokens[-reach:]))
        if not any(stop in tail for stop in stops):
            return None
        text = self.chat.decode(torch.tensor(row.tokens))
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else None

    def _rollout(self, row: Row) -> Rollout:
        tokens = torch.tensor(row.tokens)
        return Rollout(
            prompt=row.prompt,
            group=row.group,
            prompt_tokens=row.prompt_tokens,
            tokens=tokens,
            sampled=torch.ones(len(tokens), dtype=torch.bool),
            logprobs=torch.tensor(row.logprobs, dtype=torch.float32),
            text=self.chat.decode(tokens) if row.text is None else row.text,
            finish_reason=row.finish_reason,
            policy_version=self.policy_version(),
        )
