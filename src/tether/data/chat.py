"""Messages <-> tokens and loss masks. Everything is tokenised once, jointly, and masks come from character offsets.

"Say: " and "hello" tokenised apart are not the tokens of "Say: hello". So prompt and completion are one string, and a
token that straddles their border belongs to the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tether.core.batches import Group
from tether.core.errors import DataError, UserError
from tether.core.text import Demonstration, Message, Prompt
from tether.data.template import Template, read_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids and, for each, the characters it stands for (empty where the tokenizer can't say)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class ChatTokenizer:
    """A tokenizer with its chat template: what every method turns text into tokens with.

    ``template``: a Jinja chat template or the path of one, instead of the tokenizer's own (it is set on the
    tokenizer, so that checkpoints keep it). ``system``: put before every conversation that has no system message.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template: str | None = None, system: str | None = None
    ) -> None:
        self.tokenizer: Any = tokenizer
        if template is not None:
            self.tokenizer.chat_template = read_template(template)
        self.template = Template(self.tokenizer, system)

    # -- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def adds_bos(self) -> bool:
        """Whether this tokenizer begins every text with BOS by itself."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a").input_ids[:1] == [bos]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion: EOS, and the template's end-of-turn token."""
        eos = self.tokenizer.eos_token_id
        ids = {self.template.end_of_turn, *(eos if isinstance(eos, list) else [eos])}
        return frozenset(i for i in ids if i is not None)

    def encode(self, text: str) -> Encoded:
        """Tokens of ``text`` with exactly one BOS where this tokenizer uses one, whoever wrote it."""
        offsets_known = bool(self.tokenizer.is_fast)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=offsets_known)
        ids = list(out["input_ids"])
        offsets = [tuple(o) for o in out["offset_mapping"]] if offsets_known else []
        if self.adds_bos and ids[:1] != [self.tokenizer.bos_token_id]:
            ids.insert(0, self.tokenizer.bos_token_id)
            if offsets_known:
                offsets.insert(0, (0, 0))
        return Encoded(ids=ids, offsets=offsets)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of ``tokens`` without special tokens and without the stop token."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        ids = [i for i in ids if i not in self.stop_ids]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # -- records ---------------------------------------------------------------------------------------------------

    def prompt_text(self, prompt: Prompt) -> str:
        """What the model reads before it answers: the conversation with the assistant's header, or the text."""
        if prompt.text is not None:
            return prompt.text
        return self.template.prompt(prompt.messages)

    def prompt(self, prompt: Prompt) -> Tensor:
        """The tokens [P] int64 that a completion of ``prompt`` is sampled after."""
        ids = self.encode(self.prompt_text(prompt)).ids
        if not ids:
            raise DataError(f"{prompt.id}: the prompt is empty and this tokenizer has no BOS; give it some text")
        return torch.tensor(ids)

    def group(self, prompt: Prompt, completions: Sequence[str], *, id: str, margin: float | None = None) -> Group:
        """``prompt`` and its ``completions``, tokenised jointly; each completion ends with a trained stop token.

        The prompt is stored once: the tokens that all completions share up to the border. Where a tokenizer merges
        across the border for one completion only, the others begin with the rest of the prompt, mask False.
        """
        head = self.prompt_text(prompt)
        head_ids = self.encode(head).ids
        if prompt.text is not None:
            stop = self.tokenizer.eos_token_id
            rows = [self.encode(head + c) for c in completions]
        else:
            stop = self.template.end_of_turn
            rows = [self.encode(head + self.template.answer(prompt.messages, c)) for c in completions]
        starts = [_border(head_ids, row, len(head)) for row in rows]
        shared = min(_common(head_ids, row.ids) for row in rows)
        tail = [] if stop is None else [stop]
        tokens, masks = [], []
        # The very first token of a text can't be predicted from anything: without a prompt it becomes the prompt.
        first = max(shared, 1)
        if any(row.ids[:first] != rows[0].ids[:first] for row in rows):
            raise DataError(f"{id}: the prompt has no tokens that all completions share; give it some text")
        for row, start in zip(rows, starts, strict=True):
            ids = row.ids[first:] + tail
            tokens.append(torch.tensor(ids, dtype=torch.long))
            masks.append(torch.arange(first, first + len(ids)) >= start)
        return Group(
            id=id,
            prompt=torch.tensor(rows[0].ids[:first], dtype=torch.long),
            completions=tuple(tokens),
            loss_masks=tuple(masks),
            margin=margin,
        )

    def demonstration(self, demonstration: Demonstration, *, last_turn_only: bool = False) -> Group:
        """A conversation to imitate, as one completion: everything after the first assistant header.

        The mask is True on the assistant's words and on the token that ends its turn. ``last_turn_only``: the
        earlier turns are part of the prompt.
        """
        d = demonstration
        if not d.messages:
            return self.group(Prompt(id=d.id, text=d.prompt), [d.completion], id=d.id)
        text, spans = self.template.spans(d.messages, d.id)
        encoded = self.encode(text)
        mask = _mask_of(encoded, spans[-1:] if last_turn_only else spans, self.tokenizer, d.id)
        trained = [i for i, counts in enumerate(mask) if counts]
        if not trained:
            raise DataError(f"{d.id}: no assistant token to train on; the assistant's turns are empty once rendered")
        first, last = max(trained[0], 1), trained[-1] + 1
        ids, counts = encoded.ids[first:last], mask[first:last]
        eos = self.tokenizer.eos_token_id
        if self.template.end_of_turn_text == "" and eos is not None:
            ids, counts = [*ids, eos], [*counts, True]
        return Group(
            id=d.id,
            prompt=torch.tensor(encoded.ids[:first], dtype=torch.long),
            completions=(torch.tensor(ids, dtype=torch.long),),
            loss_masks=(torch.tensor(counts, dtype=torch.bool),),
        )

    # -- what a person should know before training ------------------------------------------------------------------

    def preflight(self) -> list[str]:
        """What is odd about this tokenizer and template, in words, each with what to do; empty when all is well."""
        said: list[str] = []
        if self.tokenizer.eos_token_id is None:
            said.append(
                "the tokenizer has no EOS token, so nothing teaches the model to stop: "
                'set "eos_token" in its tokenizer_config.json'
            )
        if self.tokenizer.pad_token_id is None:
            said.append("the tokenizer has no pad token: fine, masks come from lengths and no pad id is ever read")
        if not self.tokenizer.is_fast:
            said.append("the tokenizer is a slow one without offsets: borders are found by comparing tokens")
        if not self.tokenizer.chat_template:
            said.append(
                "the tokenizer has no chat template, so only plain-text rows can be used: "
                "give data.template=FILE (a Jinja chat template) for conversations"
            )
            return said
        said += self.template.complaints()
        try:
            said += self._check_sample()
        except UserError as error:
            said.append(str(error))
        return said

    def _check_sample(self) -> list[str]:
        said: list[str] = []
        bos = self.tokenizer.bos_token_id
        messages = (Message(role="user", content="Hello?"), Message(role="assistant", content="Yes."))
        text = self.template.prompt(messages[:1])
        ids = self.encode(text).ids
        if bos is not None and ids[:2] == [bos, bos]:
            said.append("the chat template writes BOS twice: remove one from the template")
        elif self.adds_bos and text.startswith(self.tokenizer.bos_token):
            said.append("both the tokenizer and the chat template add BOS: one of the two is kept")
        elif self.adds_bos:
            said.append("the chat template writes no BOS: the tokenizer's own is put first, once")
        group = self.demonstration(Demonstration(id="preflight", messages=messages))
        if int(group.completions[0][-1]) not in self.stop_ids or not bool(group.loss_masks[0][-1]):
            said.append(
                "no stop token is trained at the end of an answer: the model won't learn to stop; "
                "end the assistant's turn with the EOS token in the chat template"
            )
        return said

    def token_table(self, group: Group, completion: int = 0) -> str:
        """One example, a token a line: position, part, whether it is trained, id, text. For people to look at."""
        lines = ["  slot part       trained      id token"]
        for i, token in enumerate(group.prompt.tolist()):
            lines.append(self._table_line(i - len(group.prompt), "prompt", False, token))
        mask = group.loss_masks[completion].tolist()
        for t, token in enumerate(group.completions[completion].tolist()):
            lines.append(self._table_line(t, "completion", mask[t], token))
        lines.append(f"{sum(mask)} of {len(mask)} completion tokens are trained")
        return "\n".join(lines)

    def _table_line(self, slot: int, part: str, counts: bool, token: int) -> str:
        shown = repr(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))[1:-1]
        return f"{slot:6d} {part:10} {'yes' if counts else '-':7} {token:7d} {shown}"


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _border(head_ids: list[int], row: Encoded, border: int) -> int:
    """The first token of ``row`` that holds a character of the completion."""
    same = _common(head_ids, row.ids)
    if same == len(head_ids) or not row.offsets:
        return same
    return next((i for i in range(same, len(row.ids)) if row.offsets[i][1] > border), len(row.ids))


def _mask_of(encoded: Encoded, spans: list[tuple[int, int]], tokenizer: Any, id: str) -> list[bool]:
    """True on tokens that hold a character of one of the ``spans``."""
    if not encoded.offsets:
        raise UserError(
            f"{id}: {type(tokenizer).__name__} can't say which characters a token stands for, which masks of "
            "conversations need; use the model's fast tokenizer (tokenizer.json)"
        )
    mask, k = [], 0
    for begin, end in encoded.offsets:
        while k < len(spans) and spans[k][1] <= begin:
            k += 1
        mask.append(k < len(spans) and end > spans[k][0])
    return mask
