"""Keys and values of running completions, and the two layouts that fill and read them.

A prompt is held once for all its completions: a decode step attends to the prompts, group by group, and to what each
completion has added, row by row, and joins the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from tether.models.packed import PrefillLayout

# Tokens that the rows' own cache has room for at first; it doubles whenever that is not enough.
FIRST_ROOM = 64


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor | None:
    """0 where a key is seen and -inf where not; None where all are."""
    if bool(seen.all()):
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _scores(q: Tensor, keys: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """q Kᵀ of a part of the keys; ``bias``: 0 where a query sees a key and -inf where it does not."""
    scores = q @ keys.mT
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores if bias is None else scores + bias


def _wider(tensor: Tensor, room: int) -> Tensor:
    """[n, H_kv, L, D] with zeros up to ``room`` tokens: what was never written must be a number."""
    return pad(tensor, (0, 0, 0, room - tensor.shape[2]))


class DecodeLayout:
    """One new token per row: q [W, H, 1, D] against the row's prompt and what the row holds itself.

    Per layer: ``prompt_keys``, ``prompt_values`` [G, H_kv, P, D] and ``keys``, ``values`` [W, H_kv, L, D].
    ``prompt_lengths`` [G]; ``prompt_of`` [W]: whose completion a row is; ``lengths`` [W]: tokens that a row holds, the
    new one not yet counted.
    """

    def __init__(self, device: torch.device, longest: int) -> None:
        """``longest``: most tokens that a row will hold."""
        self.longest = longest
        self.prompt_keys: list[Tensor] = []
        self.prompt_values: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        self.prompt_lengths, self.prompt_of, self.lengths, self._resting = nothing, nothing, nothing, nothing

    @property
    def positions(self) -> Tensor:
        """[W] position of each row's new token."""
        return self.prompt_lengths[self.prompt_of] + self.lengths

    def add(self, prefill: PrefillLayout, prompt_of: Sequence[int]) -> None:
        """Hold the prompts of ``prefill`` and begin an empty row for each entry of ``prompt_of``, which counts the
        prompts that are held, the new ones last."""
        for held, new in ((self.prompt_keys, prefill.keys), (self.prompt_values, prefill.values)):
            for layer, packed in enumerate(new):
                pieces = list(packed[0].transpose(0, 1).split(prefill.lengths))
                # In the order in which every step reads them: products would copy them each time otherwise.
                each = pad_sequence(pieces, batch_first=True).transpose(1, 2).contiguous()
                if layer == len(held):
                    held.append(each)
                else:
                    longest = max(held[layer].shape[2], each.shape[2])
                    held[layer] = torch.cat([_wider(t, longest) for t in (held[layer], each)])
        self.prompt_lengths = torch.cat([self.prompt_lengths, self.prompt_lengths.new_tensor(prefill.lengths)])
        for held, prompts in ((self.keys, self.prompt_keys), (self.values, self.prompt_values)):
            for layer, prompt in enumerate(prompts):
                first = layer == len(held)
                room = min(FIRST_ROOM, self.longest) if first else held[layer].shape[2]
                empty = prompt.new_zeros(len(prompt_of), prompt.shape[1], room, prompt.shape[3])
                if first:
                    held.append(empty)
                else:
                    held[layer] = torch.cat([held[layer], empty])
        self.prompt_of = torch.cat([self.prompt_of, self.prompt_of.new_tensor(prompt_of)])
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(len(prompt_of))])
        self._arrange()

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop every row but these, and the prompts that none of them needs; which prompts are left, in order."""
        index = self.lengths.new_tensor(rows)
        self.keys = [k[index] for k in self.keys]
        self.values = [v[index] for v in self.values]
        self.lengths, self._resting = self.lengths[index], index[:0]
        prompts, self.prompt_of = self.prompt_of[index].unique(return_inverse=True)
        self.prompt_lengths = self.prompt_lengths[prompts]
        longest = int(self.prompt_lengths.max()) if len(prompts) else 0
        self.prompt_keys = [k[prompts, :, :longest] for k in self.prompt_keys]
        self.prompt_values = [v[prompts, :, :longest] for v in self.prompt_values]
        self._arrange()
        return prompts.tolist()

    def rest(self, rows: Sequence[int]) -> None:
        """These are finished, and stay until ``keep`` drops them: each step writes their first place again, so that
        they never run out of room or positions."""
        self._resting = torch.cat([self._resting, self.lengths.new_tensor(rows)])
        self.lengths[self._resting] = 0

    def _arrange(self) -> None:
        """The rows of one prompt side by side, as attention to the prompts takes them: ``members`` [W] are the rows,
        prompt after prompt, those of prompt g from ``first[g]`` on ([G + 1]). ``_rows`` [G · n] says whose
        query stands at each place (a prompt with fewer than n rows has some that nobody reads), ``_place`` [W] where
        each row's stands. Both are None where the rows stand so already."""
        of = self.prompt_of.tolist()
        members: list[list[int]] = [[] for _ in self.prompt_lengths]
        for row, prompt in enumerate(of):
            members[prompt].append(row)
        n = max((len(m) for m in members), default=0)
        rows = [row for m in members for row in m + [0] * (n - len(m))]
        self.members = self.prompt_of.new_tensor([row for m in members for row in m])
        self.first = self.prompt_of.new_tensor([0, *(len(m) for m in members)]).cumsum(0)
        self._rows = self._place = None
        if rows != list(range(len(of))):
            place = {row: g * n + j for g, m in enumerate(members) for j, row in enumerate(m)}
            self._rows = self.prompt_of.new_tensor(rows)
            self._place = self.prompt_of.new_tensor([place[row] for row in range(len(of))])

    def begin_step(self) -> None:
        """Make room for a new token of each row."""
        self._used = int(self.lengths.max()) + 1
        self._looked = False
        if self._used > self.keys[0].shape[2]:
            self.keys, self.values = ([_wider(t, 2 * t.shape[2]) for t in ts] for ts in (self.keys, self.values))

    def _look(self) -> None:
        """Fix what all layers of this step share: where the new token goes and which keys it sees."""
        self._looked = True
        device = self.lengths.device
        self._own = torch.arange(self._used, device=device)
        self._theirs = torch.arange(int(self.prompt_lengths.max()), device=device)
        kind = self.keys[0].dtype
        self._own_bias = _bias((self._own <= self.lengths[:, None])[:, None, None], kind)
        self._prompt_bias = _bias((self._theirs < self.prompt_lengths[:, None])[:, None, None], kind)
        self._longest = int(self.positions.max()) + 1
        # Rows of one length write a slice, which is less work than a place each.
        together = self._own_bias is None
        rows = slice(None) if together else torch.arange(len(self.lengths), device=device)
        self._new = (rows, slice(None), self._used - 1 if together else self.lengths)

    def end_step(self) -> None:
        self.lengths += 1
        self.lengths[self._resting] = 0

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if not self._looked:
            self._look()
        keys, values = self.keys[layer], self.values[layer]
        keys[self._new] = k[:, :, 0]
        values[self._new] = v[:, :, 0]
        keys, values = keys[:, :, : self._used], values[:, :, : self._used]
        prompt_keys, prompt_values = self.prompt_keys[layer], self.prompt_values[layer]
        w, heads, _, depth = q.shape
        shared = keys.shape[1]
        repeat = heads // shared
        own_bias, prompt_bias = self._own_bias, self._prompt_bias
        if window is not None and window < self._longest:
            own_bias, prompt_bias = self._window(window, repeat)
        # Query heads that share a key head are rows of one product, and so are the rows that share a prompt.
        q = (q * scale).view(w, shared, repeat, depth)
        own = _scores(q, keys, own_bias, softcap)
        seen = self._by_row(_scores(self._by_prompt(q), prompt_keys, prompt_bias, softcap), repeat)
        weights = torch.cat([seen, own], dim=-1).float().softmax(dim=-1).to(v.dtype)
        theirs, mine = weights.split((seen.shape[-1], own.shape[-1]), dim=-1)
        out = self._by_row(self._by_prompt(theirs) @ prompt_values, repeat) + mine @ values
        return out.reshape(w, heads, 1, -1)

    def _by_prompt(self, t: Tensor) -> Tensor:
        """[W, H_kv, r, x] -> [G, H_kv, n · r, x]: what is multiplied with one prompt is one matrix."""
        placed = (t if self._rows is None else t[self._rows]).unflatten(0, (len(self.prompt_lengths), -1))
        return placed.transpose(1, 2).flatten(2, 3)

    def _by_row(self, t: Tensor, repeat: int) -> Tensor:
        """``_by_prompt`` undone."""
        rows = t.unflatten(2, (-1, repeat)).transpose(1, 2).flatten(0, 1)
        return rows if self._place is None else rows[self._place]

    def _window(self, window: int, repeat: int) -> tuple[Tensor | None, Tensor | None]:
        """The biases of both parts where a query sees the last ``window`` tokens alone."""
        kind = self.keys[0].dtype
        own = (self._own <= self.lengths[:, None]) & (self._own > self.lengths[:, None] - window)
        # First position that a row sees, beside the places of its prompt: [G, n, P].
        first = self.positions - window
        first = (first if self._rows is None else first[self._rows]).view(len(self.prompt_lengths), -1, 1)
        theirs = (self._theirs < self.prompt_lengths[:, None, None]) & (self._theirs > first)
        theirs = theirs.repeat_interleave(repeat, dim=1)
        return _bias(own[:, None, None], kind), _bias(theirs[:, None], kind)
