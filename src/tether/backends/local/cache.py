"""Keys and values of running completions, and the two layouts that fill and read them.

A slot is one running completion. Its prompt is prefilled once per prompt and copied into the slots of all its
completions; a decode step appends one token to every slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.models.attention import attend_block
from tether.models.packed import PackedLayout


@dataclass(kw_only=True, eq=False)
class PrefillLayout:
    """Packed prompts, causal each; keeps every layer's keys and values [1, H_kv, N, D] for the fan-out."""

    lengths: tuple[int, ...]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        packed = PackedLayout(blocks=tuple((n, ()) for n in self.lengths))
        return packed.attend(layer, q, k, v, scale=scale, window=window, softcap=softcap)


class DecodeLayout:
    """One new token per slot: q [W, H, 1, D] against the cache of its slot.

    ``keys``, ``values``: one tensor [W, H_kv, L, D] per layer; ``lengths`` [W]: tokens held by each slot, the new one
    not yet counted.
    """

    def __init__(self, width: int) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths = torch.zeros(width, dtype=torch.long)

    def fill(self, slots: list[int], prefill: PrefillLayout, spans: list[tuple[int, int]], capacity: int) -> None:
        """Copy prompt ``spans`` (start, end in the prefilled row) into ``slots``; the cache grows to ``capacity``."""
        if not self.keys:
            for own, new in ((self.keys, prefill.keys), (self.values, prefill.values)):
                own += [t.new_zeros(len(self.lengths), t.shape[1], capacity, t.shape[3]) for t in new]
            self.lengths = self.lengths.to(prefill.keys[0].device)
        for slot, (start, end) in zip(slots, spans, strict=True):
            for own, new in zip(self.keys + self.values, prefill.keys + prefill.values, strict=True):
                own[slot, :, : end - start] = new[0, :, start:end]
            self.lengths[slot] = end - start

    def keep(self, slots: list[int]) -> None:
        """Drop every slot but these: finished rows leave the batch."""
        index = torch.tensor(slots, device=self.lengths.device)
        self.keys = [k[index] for k in self.keys]
        self.values = [v[index] for v in self.values]
        self.lengths = self.lengths[index]

    def begin_step(self) -> None:
        """Fix what all layers of the coming step share: where the new token goes and which keys it sees."""
        self._used = int(self.lengths.max()) + 1
        key = torch.arange(self._used, device=self.lengths.device)
        self._key, self._rows = key, torch.arange(len(self.lengths), device=self.lengths.device)
        self._seen = (key <= self.lengths[:, None])[:, None, None, :]

    def end_step(self) -> None:
        self.lengths += 1

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys[self._rows, :, self.lengths] = k[:, :, 0]
        values[self._rows, :, self.lengths] = v[:, :, 0]
        seen = self._seen
        if window is not None and window < self._used:
            seen = seen & (self._key > self.lengths[:, None] - window)[:, None, None, :]
        keys, values = keys[:, :, : self._used], values[:, :, : self._used]
        # Query heads that share a key head become rows of one small product: nothing is repeated in memory.
        w, heads, _, depth = q.shape
        grouped = q.view(w, keys.shape[1], heads // keys.shape[1], depth)
        out = attend_block(grouped, keys, values, allowed=seen, causal=False, scale=scale, softcap=softcap)
        return out.reshape(w, heads, 1, -1)
