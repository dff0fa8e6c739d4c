"""The packed row: where the layout of a batch is decided.

A batch of groups becomes one row ``prompt 0, its completions, prompt 1, its completions, ...``. A prompt is causal to
itself; a completion sees its prompt and itself, and its positions go on from the prompt's end. Nothing is computed
twice and nothing is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from tether.core.batches import Batch
from tether.models import shared_prefix
from tether.models.attention import attend_block, flash_serves


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: the last query sees every key; a query sees ``window`` keys, itself included."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLayout:
    """``blocks``: per prompt, its length and the lengths of its completions, in the order of the row."""

    blocks: tuple[tuple[int, tuple[int, ...]], ...]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        longest = max(p + max(cs, default=0) for p, cs in self.blocks)
        if softcap is None and (window is None or window >= longest) and flash_serves(q, k, v):
            return shared_prefix.attend(q, k, v, self.blocks, scale)
        lengths = [n for p, cs in self.blocks for n in (p, *cs)]
        # One split each: its backward is one concatenation, where slices would each fill a row of zeros.
        qs, ks, vs = (t.split(lengths, dim=2) for t in (q, k, v))
        out: list[Tensor] = []
        at = 0
        for prompt, completions in self.blocks:
            out.append(self._prompt(qs[at], ks[at], vs[at], scale=scale, window=window, softcap=softcap))
            if completions:
                end = at + 1 + len(completions)
                out += self._completions(
                    qs[at + 1 : end], ks[at:end], vs[at:end], prompt, scale=scale, window=window, softcap=softcap
                )
            at += 1 + len(completions)
        return torch.cat(out, dim=2)

    def _prompt(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        length = q.shape[2]
        allowed = causal_mask(length, length, window, q.device) if window is not None and window < length else None
        return attend_block(q, k, v, allowed=allowed, causal=allowed is None, scale=scale, softcap=softcap)

    def _completions(
        self,
        qs: tuple[Tensor, ...],
        ks: tuple[Tensor, ...],
        vs: tuple[Tensor, ...],
        prompt: int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> list[Tensor]:
        """Every completion of one prompt in one call: padded at the end to the longest, where causality hides it.

        ``ks``, ``vs`` begin with the prompt's own.
        """
        longest = max(t.shape[2] for t in qs)
        stacked = torch.cat([pad(t, (0, 0, 0, longest - t.shape[2])) for t in qs])
        keys, values = (
            torch.cat(
                [
                    ts[0].expand(len(qs), -1, -1, -1),
                    torch.cat([pad(t, (0, 0, 0, longest - t.shape[2])) for t in ts[1:]]),
                ],
                dim=2,
            )
            for ts in (ks, vs)
        )
        allowed = causal_mask(longest, prompt + longest, window, stacked.device)
        out = attend_block(stacked, keys, values, allowed=allowed, causal=False, scale=scale, softcap=softcap)
        return [row[None, :, : t.shape[2]] for row, t in zip(out.unbind(0), qs, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRow:
    """A batch as one row, and where to find its completions in it.

    ``input_ids``, ``position_ids`` [1, N]; ``predicts`` [K]: row positions whose hidden state predicts the K present
    completion tokens, completion after completion in the order of the batch's rows; ``last`` [B]: position of each
    completion's last token (of the prompt's last token where the completion is empty).
    """

    layout: PackedLayout
    input_ids: Tensor
    position_ids: Tensor
    predicts: Tensor
    last: Tensor


def pack(batch: Batch) -> PackedRow:
    """Lay ``batch`` out as one row. Every prompt needs at least one token: something must predict the first."""
    rows_of: list[list[int]] = [[] for _ in batch.prompts]
    for row, prompt in enumerate(batch.prompt_of.tolist()):
        rows_of[prompt].append(row)
    lengths = batch.lengths.tolist()
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    predicts: list[Tensor] = [torch.empty(0, dtype=torch.long)] * batch.size
    last = [0] * batch.size
    blocks: list[tuple[int, tuple[int, ...]]] = []
    at = 0
    for prompt, rows in zip(batch.prompts, rows_of, strict=True):
        p = len(prompt)
        if p == 0:
            raise ValueError("a prompt of zero tokens can't be packed: nothing predicts its first completion token")
        ids.append(prompt)
        positions.append(torch.arange(p))
        prompt_end = at + p - 1
        at += p
        sizes = []
        for row in rows:
            c = lengths[row]
            predicts[row] = (
                torch.cat([torch.tensor([prompt_end]), torch.arange(at, at + c - 1)]) if c else predicts[row]
            )
            last[row] = at + c - 1 if c else prompt_end
            if c == 0:
                continue
            ids.append(batch.tokens[row, :c])
            positions.append(torch.arange(p, p + c))
            sizes.append(c)
            at += c
        blocks.append((p, tuple(sizes)))
    device = batch.tokens.device
    return PackedRow(
        layout=PackedLayout(blocks=tuple(blocks)),
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None].to(device),
        predicts=torch.cat(predicts).to(device),
        last=torch.tensor(last, device=device),
    )


@dataclass(kw_only=True, eq=False)
class PrefillLayout:
    """Packed prompts, causal each; keeps every layer's keys and values [1, H_kv, N, D]."""

    lengths: tuple[int, ...]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def blocks(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """As ``PackedLayout`` has them."""
        return tuple((n, ()) for n in self.lengths)

    def keep(self, k: Tensor, v: Tensor) -> None:
        """Of the next layer."""
        self.keys.append(k)
        self.values.append(v)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        self.keep(k, v)
        return PackedLayout(blocks=self.blocks).attend(layer, q, k, v, scale=scale, window=window, softcap=softcap)
