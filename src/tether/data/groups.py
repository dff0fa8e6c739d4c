"""Records -> groups of tokens within the limits. What is dropped or cut is counted by cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tether.core.batches import Batch, Group
from tether.core.errors import DataError
from tether.core.text import Demonstration, Judgement, Preference, Prompt, Ranking, StepLabels
from tether.data.chat import ChatTokenizer

Record = Demonstration | Preference | Ranking | Judgement | StepLabels
Overlong = Literal["drop", "cut", "error"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenised:
    """``groups[i]`` is ``records[i]`` in tokens, its completions in the record's order (a pair: chosen, rejected).

    ``counts``: groups by cause of having been dropped or cut. ``notes``: the first few, in words.
    """

    groups: tuple[Group, ...]
    records: tuple[Record, ...]
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()


def tokenise(
    records: Sequence[Record],
    chat: ChatTokenizer,
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    overlong: Overlong = "drop",
    last_turn_only: bool = False,
    step_separator: str = "\n\n",
) -> Tokenised:
    """Tokenise ``records`` and hold them to the limits. ``step_separator``: the text between the steps of a solution.

    ``overlong``: "drop" leaves the group out; "cut" keeps the end of a prompt (and its BOS) and the beginning of a
    completion, which then has no stop token; "error" raises DataError. A group that cutting leaves with an empty
    side or with equal sides is dropped. Raises DataError where nothing is left.
    """
    counts: Counter[str] = Counter()
    groups: list[Group] = []
    kept: list[Record] = []
    notes: list[str] = []
    for record in records:
        try:
            group = _group(record, chat, last_turn_only, step_separator)
        except DataError as error:
            counts["refused by the chat template"] += 1
            notes.append(str(error))
            continue
        _refuse(group.id, "prompt", len(group.prompt), max_prompt_tokens, overlong)
        _refuse(group.id, "completion", max(len(c) for c in group.completions), max_completion_tokens, overlong)
        fitted, causes = _fit(group, max_prompt_tokens, max_completion_tokens, overlong, chat)
        counts.update(causes)
        if fitted is not None:
            groups.append(fitted)
            kept.append(record)
    if records and not groups:
        raise DataError(_nothing_left(len(records), counts, notes))
    return Tokenised(groups=tuple(groups), records=tuple(kept), counts=dict(counts), notes=tuple(notes[:5]))


def _group(record: Record, chat: ChatTokenizer, last_turn_only: bool, separator: str) -> Group:
    match record:
        case Demonstration():
            return chat.demonstration(record, last_turn_only=last_turn_only)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin):
            return chat.group(prompt, [chosen, rejected], id=prompt.id, margin=margin)
        case Ranking(prompt=prompt, completions=completions, ranks=ranks):
            return replace(chat.group(prompt, completions, id=prompt.id), ranks=ranks)
        case StepLabels(prompt=prompt, steps=steps, labels=labels):
            return _labelled(chat, prompt, steps, labels, separator)
        case Judgement(prompt=prompt, completion=completion, desirable=desirable):
            return replace(chat.group(prompt, [completion], id=prompt.id), desirable=desirable)
    raise TypeError(f"no group can be made of a {type(record).__name__}")


def _labelled(
    chat: ChatTokenizer, prompt: Prompt, steps: Sequence[str], labels: Sequence[bool], separator: str
) -> Group:
    """The solution as one completion; mask and labels at the last token of each step."""
    ends = [end for _, end in _spans(steps, separator)]
    group, slots = ends_in_tokens(chat, prompt, separator.join(steps), ends)
    if len(set(slots)) < len(slots):
        raise DataError(f"{prompt.id}: two steps end in the same token; join them, or change steps.separator")
    marks = torch.zeros(len(group.completions[0]), dtype=torch.bool)
    marks[[slot for slot, right in zip(slots, labels, strict=True) if right]] = True
    return replace(group, labels=marks)


def step_group(chat: ChatTokenizer, prompt: Prompt, text: str, separator: str) -> Group:
    """A completion whose loss mask is True at the last token of every step, as ``tokenise`` gives it for labelled
    steps. A completion without a word is one step, which ends with its last token."""
    steps = text.split(separator)
    ends = [end for begin, end in _spans(steps, separator) if text[begin:end].strip()]
    group, slots = ends_in_tokens(chat, prompt, text, ends)
    if not slots:
        mask = torch.arange(len(group.completions[0])) == len(group.completions[0]) - 1
        group = replace(group, loss_masks=(mask,))
    return group


def _spans(steps: Sequence[str], separator: str) -> list[tuple[int, int]]:
    """Characters [begin, end) of each step in the joined text, blanks at its end left out."""
    spans, at = [], 0
    for step in steps:
        spans.append((at, at + len(step.rstrip())))
        at += len(step) + len(separator)
    return spans


def ends_in_tokens(chat: ChatTokenizer, prompt: Prompt, text: str, ends: Sequence[int]) -> tuple[Group, list[int]]:
    """``text`` as one completion of ``prompt``, and the slots of the tokens that hold the characters before ``ends``;
    its loss mask is True at these slots and nowhere else. Raises DataError where the template changes the text."""
    group = chat.group(prompt, [text], id=prompt.id)
    head = chat.prompt_text(prompt)
    written = text if prompt.text is not None else chat.template.answer(prompt.messages, text)
    at = written.find(text.strip())
    offsets = chat.encode(head + written).offsets
    if at < 0 or not offsets:
        raise DataError(f"{prompt.id}: the chat template changes the text of the answer, so its steps can't be found")
    start = len(head) + at - (len(text) - len(text.lstrip()))
    holds = {c: i for i, (begin, end) in enumerate(offsets) for c in range(begin, end)}
    slots = [holds[start + end - 1] - len(group.prompt) for end in ends]
    mask = torch.zeros(len(group.completions[0]), dtype=torch.bool)
    mask[slots] = True
    return replace(group, loss_masks=(mask,)), slots


def share_prompts(groups: Sequence[Group]) -> Batch:
    """``groups`` as one batch, its rows in their order; prompts of the same tokens are stored, and computed, once."""
    batch = Batch.from_groups(groups)
    place: dict[tuple[int, ...], int] = {}
    place_of = [place.setdefault(tuple(p.tolist()), len(place)) for p in batch.prompts]
    prompts = tuple(torch.tensor(tokens, dtype=torch.long) for tokens in place)
    return replace(batch, prompts=prompts, prompt_of=torch.tensor(place_of, dtype=torch.long)[batch.prompt_of])


def _fit(
    group: Group, max_prompt: int, max_completion: int, overlong: Overlong, chat: ChatTokenizer
) -> tuple[Group | None, list[str]]:
    """The group within the limits or None, and the causes of what was done to it."""
    causes: list[str] = []
    if len(group.prompt) > max_prompt:
        if overlong == "drop":
            return None, ["prompt too long, dropped"]
        causes.append("prompt cut")
        group = replace(group, prompt=cut_prompt(group.prompt, max_prompt, chat))
    if any(len(c) > max_completion for c in group.completions):
        if overlong == "drop":
            return None, ["completion too long, dropped"]
        causes.append("completion cut")
        group = replace(
            group,
            completions=tuple(c[:max_completion] for c in group.completions),
            loss_masks=tuple(m[:max_completion] for m in group.loss_masks),
            labels=None if group.labels is None else group.labels[:max_completion],
        )
    after = " after the cut, dropped" if causes else " as tokens, dropped"
    if not all(bool(m.any()) for m in group.loss_masks):
        return None, ["a side without trained tokens" + after]
    if _has_equal(group.completions):
        return None, ["equal sides" + after]
    return group, causes


def cut_prompt(prompt: Tensor, limit: int, chat: ChatTokenizer) -> Tensor:
    """The last ``limit`` tokens of ``prompt`` [P]; its BOS, where it has one, stays in front."""
    if len(prompt) <= limit:
        return prompt
    bos = chat.tokenizer.bos_token_id
    if chat.adds_bos and limit > 1 and int(prompt[0]) == bos:
        return torch.cat([prompt[:1], prompt[len(prompt) - limit + 1 :]])
    return prompt[len(prompt) - limit :]


def _has_equal(completions: Sequence[Tensor]) -> bool:
    seen = {tuple(c.tolist()) for c in completions}
    return len(seen) < len(completions)


def _nothing_left(rows: int, counts: Mapping[str, int], notes: Sequence[str]) -> str:
    causes = "; ".join(f"{n} {cause}" for cause, n in counts.items())
    first = f"\nthe first: {notes[0]}" if notes else ""
    return (
        f"none of the {rows} rows can be used: {causes}. "
        f"Raise data.max_prompt_tokens / data.max_completion_tokens, or set data.overlong=cut{first}"
    )


def _refuse(id: str, part: str, length: int, limit: int, overlong: Overlong) -> None:
    if length > limit and overlong == "error":
        raise DataError(
            f"{id}: the {part} has {length} tokens, data.max_{part}_tokens is {limit}; "
            "raise the limit, or say data.overlong=drop or data.overlong=cut"
        )
