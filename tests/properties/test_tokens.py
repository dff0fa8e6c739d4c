"""Whatever people write: tokens decode back to it, masks cover the answers and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tether.core.text import Demonstration, Message, Preference, Prompt
from tether.data.chat import ChatTokenizer
from tether.data.groups import tokenise

# Text with everything but lone surrogates (no UTF-8) and the special tokens' own spelling.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), min_size=1, max_size=25)
spoken = words.filter(lambda s: s.strip() != "")
short_words = st.text(st.sampled_from("ab \n:"), min_size=1, max_size=12).filter(lambda s: s.strip() != "")


@pytest.fixture(scope="module")
def chat(tiny_tokenizer) -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer)


def raw(chat: ChatTokenizer, tokens: torch.Tensor) -> str:
    return chat.tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


@given(prompt=words, completions=st.lists(spoken, min_size=1, max_size=4))
def test_plain_groups_are_the_joint_tokens(chat, prompt, completions):
    group = chat.group(Prompt(id="p", text=prompt), completions, id="g")
    for text, tokens in zip(completions, group.completions, strict=True):
        whole = torch.cat([group.prompt, tokens])
        assert whole.tolist() == [*chat.encode(prompt + text).ids, chat.tokenizer.eos_token_id]
        assert raw(chat, whole) == prompt + text + "<|im_end|>"


@given(prompt=short_words, completions=st.lists(short_words, min_size=2, max_size=3))
def test_masks_of_plain_groups_begin_at_the_border(chat, prompt, completions):
    group = chat.group(Prompt(id="p", text=prompt), completions, id="g")
    for text, tokens, mask in zip(completions, group.completions, group.loss_masks, strict=True):
        assert bool(mask[-1]), "the stop token is trained"
        assert mask.tolist() == sorted(mask.tolist()), "untrained tokens come first"
        trained = raw(chat, tokens[mask])
        # The whole answer is trained, and at most the one token that straddles the border beside it.
        assert trained.endswith(text + "<|im_end|>")
        extra = len(trained) - len(text + "<|im_end|>")
        if extra:
            assert len(raw(chat, tokens[mask][:1])) > extra


@given(turns=st.lists(spoken, min_size=2, max_size=6), last_turn_only=st.booleans())
def test_demonstrations_train_the_answers_and_nothing_else(chat, turns, last_turn_only):
    assume(len(turns) % 2 == 0)
    messages = tuple(Message(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(turns))
    group = chat.demonstration(Demonstration(id="d", messages=messages), last_turn_only=last_turn_only)
    tokens, mask = group.completions[0], group.loss_masks[0]
    answers = turns[-1:] if last_turn_only else turns[1::2]
    assert raw(chat, tokens[mask]) == "".join(a + "<|im_end|>" for a in answers)
    whole = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
    assert raw(chat, torch.cat([group.prompt, tokens])) + "\n" == whole
    assert bool(mask[0]) and bool(mask[-1])


@given(question=spoken, answer=spoken)
def test_what_is_trained_is_what_is_sampled_after(chat, question, answer):
    """The prompt of a pair is the one that rollouts start from, token by token."""
    prompt = Prompt(id="p", messages=(Message(role="user", content=question),))
    group = chat.group(prompt, [answer], id="g")
    sampled_after = chat.prompt(prompt).tolist()
    assert (
        torch.cat([group.prompt, group.completions[0]]).tolist()[: len(group.prompt)]
        == sampled_after[: len(group.prompt)]
    )
    assert chat.decode(group.completions[0][group.loss_masks[0]]).endswith(answer)


@given(
    rows=st.lists(st.tuples(spoken, spoken, spoken), min_size=1, max_size=8),
    max_prompt=st.integers(1, 60),
    max_completion=st.integers(1, 30),
    overlong=st.sampled_from(["drop", "cut"]),
)
def test_limits_hold_and_nothing_is_lost_in_silence(chat, rows, max_prompt, max_completion, overlong):
    from tether.core.errors import DataError

    records = [
        Preference(prompt=Prompt(id=str(i), text=p), chosen=c, rejected=r) for i, (p, c, r) in enumerate(rows) if c != r
    ]
    try:
        out = tokenise(
            records, chat, max_prompt_tokens=max_prompt, max_completion_tokens=max_completion, overlong=overlong
        )
    except DataError as error:
        assert "none of the" in str(error)
        return
    dropped = sum(n for cause, n in out.counts.items() if "dropped" in cause)
    assert len(out.groups) == len(out.records) == len(records) - dropped
    for group, record in zip(out.groups, out.records, strict=True):
        assert group.id == record.prompt.id
        assert len(group.prompt) <= max_prompt
        assert all(0 < len(c) <= max_completion for c in group.completions)
        assert all(bool(m.any()) for m in group.loss_masks)
        assert group.completions[0].tolist() != group.completions[1].tolist()
