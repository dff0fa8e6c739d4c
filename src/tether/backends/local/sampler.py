"""The in-process sampler: the learner's live weights, one prefill per prompt, finished rows replaced or dropped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.backends.local.cache import DecodeLayout
from tether.backends.local.draw import draw, scores, uniforms
from tether.core.protocols import SamplingSettings
from tether.core.text import Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.models.packed import PrefillLayout
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
class Running:
    """The rows that decode together (None: one that is finished) and what is held of them.

    ``ends``: by group, in the order of the cache's prompts, the hidden state [d] that a first token is drawn from.
    """

    cache: DecodeLayout
    rows: list[Row | None] = field(default_factory=list)
    ends: dict[int, Tensor] = field(default_factory=dict)

    def drop_finished(self) -> None:
        done = [i for i, row in enumerate(self.rows) if row is not None and row.finish_reason]
        for i in done:
            self.rows[i] = None
        if done:
            self.cache.rest(done)

    def compact(self) -> None:
        """Finished rows leave the batch."""
        if None not in self.rows:
            return
        kept = [i for i, row in enumerate(self.rows) if row is not None]
        groups = list(self.ends)
        self.ends = {groups[i]: self.ends[groups[i]] for i in self.cache.keep(kept)}
        self.rows = [self.rows[i] for i in kept]


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
        rounded_to = torch.bfloat16 if settings.autocast == "bfloat16" else None
        with self.policy.backbone.decoding(self.policy.adapter, steps, rounded_to):
            if self.policy.backbone.mode == "packed":
                self._run(rows, settings)
            else:
                from tether.backends.local.padded_sampler import run_padded

                run_padded(self, rows, settings)
        return [row.rollout for row in rows if row.rollout is not None]

    def _run(self, rows: list[Row], settings: SamplingSettings) -> None:
        waiting = deque(rows)
        width = min(self.width, len(rows))
        longest = max(len(row.uniforms) for row in rows)
        running = Running(cache=DecodeLayout(self.policy.backbone.device, longest))
        while waiting or any(running.rows):
            idle = width - sum(row is not None for row in running.rows)
            # A prefill costs a pass of its own, so wait until a quarter of the batch is free (or everything is).
            if waiting and idle >= max(1, width // 4):
                running.compact()
                self._admit([waiting.popleft() for _ in range(min(idle, len(waiting)))], running, settings)
                continue
            if not waiting and running.rows.count(None) >= max(1, len(running.rows) // 8):
                running.compact()
            self._step(running, settings)

    def _admit(self, taken: list[Row], running: Running, settings: SamplingSettings) -> None:
        """Prefill the prompts of ``taken`` that are not held yet, each once, and draw every row's first token."""
        backbone = self.policy.backbone
        prompts = {row.group: row.prompt_tokens for row in taken if row.group not in running.ends}
        layout = PrefillLayout(lengths=tuple(len(p) for p in prompts.values()))
        if prompts:
            ids = torch.cat(list(prompts.values()))[None].to(backbone.device)
            positions = torch.cat([torch.arange(n) for n in layout.lengths])[None].to(backbone.device)
            hidden = backbone.prefill(layout, ids, positions)[0]
            ends = torch.tensor(layout.lengths).cumsum(0) - 1
            running.ends.update(zip(prompts, hidden[ends.to(backbone.device)], strict=True))
        groups = list(running.ends)
        running.cache.add(layout, [groups.index(row.group) for row in taken])
        running.rows += taken
        logits = backbone.logits(torch.stack([running.ends[g] for g in groups]))
        self._append(taken, logits[running.cache.prompt_of[-len(taken) :]], settings)
        running.drop_finished()

    def _step(self, running: Running, settings: SamplingSettings) -> None:
        """One token for every running row; an idle one decodes a token that nobody reads."""
        backbone, cache = self.policy.backbone, running.cache
        ids = torch.tensor([row.tokens[-1] if row else 0 for row in running.rows], device=backbone.device)[:, None]
        cache.begin_step()
        hidden = backbone.step(cache, ids, cache.positions[:, None])[:, 0]
        cache.end_step()
        active = [i for i, row in enumerate(running.rows) if row is not None]
        if len(active) < len(running.rows):
            hidden = hidden[torch.tensor(active, device=backbone.device)]
        self._append([row for row in running.rows if row is not None], backbone.logits(hidden), settings)
        running.drop_finished()

    def _append(self, rows: list[Row], logits: Tensor, settings: SamplingSettings) -> None:
        """Draw the next token of each row and decide whether the row is finished."""
        u = torch.stack([row.uniforms[len(row.tokens)] for row in rows]).to(logits.device)
        tokens, logprobs = draw(scores(logits, settings), u)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
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
