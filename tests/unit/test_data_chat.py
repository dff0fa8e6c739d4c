"""Messages <-> tokens and masks, checked against strings that are written out by hand."""

from __future__ import annotations

import pytest
import torch

from tether.core.errors import DataError, UserError
from tether.core.text import Demonstration, Message, Prompt
from tether.data.chat import ChatTokenizer, Encoded, _border
from tether.data.template import read_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Answers that are no longer the last are shortened, as reasoning templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CORPUS = [
    "the cat sat on the mat. hello hello there",
    "user assistant system Say: hello say yes\n\n no\n\n yes\n\n no no",
]


def tokenizer(template: str | None = CHATML, *, bos: bool = False, pad: str | None = "<|pad|>", eos: bool = True):
    """A byte-level BPE; ``bos``: it puts <s> before every text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    named = {"pad_token": pad, "bos_token": "<s>" if bos else None, "eos_token": "<|im_end|>" if eos else None}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **{k: v for k, v in named.items() if v is not None})
    if template is not None:
        made.chat_template = template
    return made


def talk(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(turns))


def asked(*turns: str) -> Prompt:
    return Prompt(id="p", messages=talk(*turns))


def raw(chat: ChatTokenizer, tokens: torch.Tensor) -> str:
    """Every token's text, special tokens included."""
    return chat.tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


def trained(chat: ChatTokenizer, group, i: int = 0) -> str:
    return raw(chat, group.completions[i][group.loss_masks[i]])


def test_prompt_ends_with_the_assistants_header():
    chat = ChatTokenizer(tokenizer())
    assert raw(chat, chat.prompt(asked("hello"))) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_pair_is_answer_and_stop_token_on_each_side():
    chat = ChatTokenizer(tokenizer())
    group = chat.group(asked("hello"), ["yes", "no no"], id="g", margin=2.0)
    assert torch.equal(group.prompt, chat.prompt(asked("hello")))
    assert [raw(chat, c) for c in group.completions] == ["yes<|im_end|>", "no no<|im_end|>"]
    assert all(bool(m.all()) for m in group.loss_masks)
    assert (group.id, group.margin) == ("g", 2.0)


def test_tokens_are_those_of_the_joint_text():
    """The border is inside a token: "\\n" + "\\n" is one token, and it belongs to the completion."""
    chat = ChatTokenizer(tokenizer())
    whole = chat.encode("Say:\n\n hello").ids
    apart = chat.encode("Say:\n").ids + chat.encode("\n hello").ids
    assert whole != apart
    group = chat.group(Prompt(id="p", text="Say:\n"), ["\n hello"], id="g")
    assert torch.cat([group.prompt, group.completions[0]]).tolist() == [*whole, chat.tokenizer.eos_token_id]
    assert raw(chat, group.prompt) == "Say:"
    assert trained(chat, group) == "\n\n hello<|im_end|>"


def test_where_one_side_merges_across_the_border_the_other_has_the_rest_untrained():
    chat = ChatTokenizer(tokenizer())
    group = chat.group(Prompt(id="p", text="Say:\n"), ["\n hello", "yes"], id="g")
    assert raw(chat, group.prompt) == "Say:"
    assert [raw(chat, c) for c in group.completions] == ["\n\n hello<|im_end|>", "\nyes<|im_end|>"]
    assert trained(chat, group, 0) == "\n\n hello<|im_end|>"
    assert trained(chat, group, 1) == "yes<|im_end|>"


def test_demonstration_trains_the_assistants_words_and_stops_only():
    chat = ChatTokenizer(tokenizer())
    group = chat.demonstration(Demonstration(id="d", messages=talk("hello", "yes", "say no", "no no")))
    assert raw(chat, group.prompt) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert raw(chat, group.completions[0]) == (
        "yes<|im_end|>\n<|im_start|>user\nsay no<|im_end|>\n<|im_start|>assistant\nno no<|im_end|>"
    )
    assert trained(chat, group) == "yes<|im_end|>no no<|im_end|>"


def test_last_turn_only_makes_the_rest_the_prompt():
    chat = ChatTokenizer(tokenizer())
    d = Demonstration(id="d", messages=talk("hello", "yes", "say no", "no no"))
    group = chat.demonstration(d, last_turn_only=True)
    assert raw(chat, group.completions[0]) == trained(chat, group) == "no no<|im_end|>"
    assert raw(chat, group.prompt).endswith("say no<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_that_ends_with_the_user_is_cut_after_the_answer():
    chat = ChatTokenizer(tokenizer())
    group = chat.demonstration(Demonstration(id="d", messages=talk("hello", "yes", "bye")))
    assert raw(chat, group.completions[0]) == "yes<|im_end|>"


def test_generation_marks_give_the_same_mask_as_offsets():
    d = Demonstration(id="d", messages=talk("hello", "yes", "say no", "no no"))
    by_offsets = ChatTokenizer(tokenizer(CHATML)).demonstration(d)
    by_marks = ChatTokenizer(tokenizer(MARKED)).demonstration(d)
    assert torch.equal(by_offsets.completions[0], by_marks.completions[0])
    assert torch.equal(by_offsets.loss_masks[0], by_marks.loss_masks[0])


def test_a_demonstration_and_a_pair_hold_the_same_tokens():
    chat = ChatTokenizer(tokenizer())
    d = chat.demonstration(Demonstration(id="d", messages=talk("hello", " yes\n")))
    g = chat.group(asked("hello"), [" yes\n"], id="g")
    assert torch.equal(d.prompt, g.prompt) and torch.equal(d.completions[0], g.completions[0])


def test_a_template_that_forgets_is_reported_and_masks_what_it_shows():
    chat = ChatTokenizer(tokenizer(FORGETFUL))
    assert any("not prefix-preserving" in m for m in ChatTokenizer(tokenizer(_strips_last(CHATML))).preflight())
    group = chat.demonstration(Demonstration(id="d", messages=talk("hello", "think|yes", "more", "think|no")))
    assert trained(chat, group) == "think|no<|im_end|>"


def _strips_last(template: str) -> str:
    return template.replace("{{ m.content }}", "{% if loop.last %}>{% endif %}{{ m.content }}")


@pytest.mark.parametrize("words", [("yes", "yes", "no", "no no"), ("user", "user\n", "assistant", " user")])
def test_answers_are_found_where_rendering_up_to_a_turn_changes_it(words):
    """The words of an answer stand elsewhere too, so searching for them would not do."""
    chat = ChatTokenizer(tokenizer(_strips_last(CHATML)))
    group = chat.demonstration(Demonstration(id="d", messages=talk(*words)))
    assert trained(chat, group) == f"{words[1]}<|im_end|>{words[3]}<|im_end|>"
    assert raw(chat, group.prompt) == f"<|im_start|>user\n{words[0]}<|im_end|>\n<|im_start|>assistant\n"


def test_answers_that_the_template_rewrites_altogether_are_refused():
    shouts = CHATML.replace("{{ m.content }}", "{% if loop.last %}>{% endif %}{{ m.content | upper }}")
    with pytest.raises(DataError, match="d: the chat template rewrites the answers"):
        ChatTokenizer(tokenizer(shouts)).demonstration(Demonstration(id="d", messages=talk("hello", "yes")))


def test_the_border_is_after_prompt_tokens_that_were_split_anew():
    """head "abc" = [ab][c], but the joint text "abcd" = [a][bc][d]: [bc] ends at the border, and is prompt."""
    row = Encoded(ids=[1, 23, 4], offsets=[(0, 1), (1, 3), (3, 4)])
    assert _border([12, 3], row, 3) == 2


def test_plain_text_ends_with_a_trained_eos():
    chat = ChatTokenizer(tokenizer(None))
    group = chat.group(Prompt(id="p", text="the cat"), [" sat"], id="g")
    assert (raw(chat, group.prompt), trained(chat, group)) == ("the cat", " sat<|im_end|>")


def test_text_without_a_prompt_gives_its_first_token_to_the_prompt():
    chat = ChatTokenizer(tokenizer(None))
    group = chat.demonstration(Demonstration(id="d", completion="the cat sat"))
    assert len(group.prompt) == 1
    assert raw(chat, torch.cat([group.prompt, group.completions[0]])) == "the cat sat<|im_end|>"


def test_a_template_without_stop_token_is_ended_with_eos():
    chat = ChatTokenizer(tokenizer(PLAIN_TURNS))
    pair = chat.group(asked("hello"), ["yes", "no"], id="g")
    assert trained(chat, pair, 0) == " yes<|im_end|>"
    d = chat.demonstration(Demonstration(id="d", messages=talk("hello", "yes")))
    assert trained(chat, d) == " yes<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML], ids=["tokenizer", "both"])
def test_exactly_one_bos(template):
    chat = ChatTokenizer(tokenizer(template, bos=True))
    bos = chat.tokenizer.bos_token_id
    group = chat.group(asked("hello"), ["yes", "no"], id="g")
    d = chat.demonstration(Demonstration(id="d", messages=talk("hello", "yes")))
    plain = chat.group(Prompt(id="p", text="the cat"), [" sat"], id="g")
    for prompt in (chat.prompt(asked("hello")), group.prompt, d.prompt, plain.prompt):
        assert int(prompt[0]) == bos and (prompt == bos).sum() == 1
    for tokens in (*group.completions, *d.completions, *plain.completions):
        assert (tokens == bos).sum() == 0
    assert trained(chat, group) == "yes<|im_end|>"


def test_pad_that_is_eos_does_not_hide_the_stop_token():
    chat = ChatTokenizer(tokenizer(pad="<|im_end|>"))
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id
    group = chat.demonstration(Demonstration(id="d", messages=talk("hello", "yes")))
    assert trained(chat, group) == "yes<|im_end|>"


def test_stop_ids_hold_eos_and_the_templates_end_of_turn():
    made = tokenizer()
    made.eos_token = "</s>"
    chat = ChatTokenizer(made)
    names = {chat.tokenizer.convert_ids_to_tokens(i) for i in chat.stop_ids}
    assert names == {"</s>", "<|im_end|>"}
    group = chat.group(asked("hello"), ["yes"], id="g")
    assert trained(chat, group) == "yes<|im_end|>"


def test_decode_is_the_answer_without_special_tokens():
    chat = ChatTokenizer(tokenizer())
    group = chat.group(asked("hello"), ["say  yes , then\nno"], id="g")
    assert chat.decode(group.completions[0]) == "say  yes , then\nno"


def test_system_is_put_first_once():
    chat = ChatTokenizer(tokenizer(), system="the cat")
    assert chat.prompt_text(asked("hello")).startswith("<|im_start|>system\nthe cat<|im_end|>\n<|im_start|>user\nhello")
    own = Prompt(id="p", messages=(Message(role="system", content="mine"), *talk("hello")))
    assert "the cat" not in chat.prompt_text(own)


def test_a_template_file_replaces_the_tokenizers_and_is_saved_with_it(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(PLAIN_TURNS)
    made = tokenizer()
    chat = ChatTokenizer(made, template=str(file))
    assert chat.prompt_text(asked("hello")) == "user: hello\nassistant:"
    assert made.chat_template == PLAIN_TURNS
    with pytest.raises(UserError, match=r"data\.template: can't read .*did you mean mine\.jinja"):
        read_template(str(tmp_path / "mime.jinja"))


def test_preflight_is_silent_when_all_is_well():
    assert ChatTokenizer(tokenizer()).preflight() == []


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: tokenizer(None), "no chat template"),
        (lambda: tokenizer(pad=None), "no pad token: fine"),
        (lambda: tokenizer(eos=False), "no EOS token"),
        (lambda: tokenizer(PLAIN_TURNS, eos=False), "no stop token is trained"),
        (lambda: tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML, bos=True), "writes BOS twice"),
        (lambda: tokenizer("{{ bos_token }}" + CHATML, bos=True), "one of the two is kept"),
        (lambda: tokenizer(CHATML, bos=True), "the tokenizer's own is put first"),
        (lambda: tokenizer("{{ raise_exception('never') }}"), "never"),
    ],
)
def test_preflight_says_what_is_odd(made, said):
    assert any(said in message for message in ChatTokenizer(made()).preflight())


def test_a_conversation_without_a_template_says_what_to_do():
    with pytest.raises(UserError, match=r"no chat template: give data\.template=FILE"):
        ChatTokenizer(tokenizer(None)).prompt(asked("hello"))


def test_a_refusing_template_names_the_roles():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"\(system, user\): no system here"):
        ChatTokenizer(tokenizer(refuses), system="x").prompt(asked("hello"))


def test_an_empty_plain_prompt_is_refused():
    with pytest.raises(DataError, match="the prompt is empty"):
        ChatTokenizer(tokenizer(None)).prompt(Prompt(id="p", text=""))


def test_token_table_marks_what_is_trained():
    chat = ChatTokenizer(tokenizer())
    group = chat.demonstration(Demonstration(id="d", messages=talk("hello", "yes", "say", "no")))
    lines = chat.token_table(group).splitlines()
    marked = [line for line in lines if " yes " in line[:30]]
    assert len(marked) == int(group.loss_masks[0].sum())
    assert lines[-1] == f"{len(marked)} of {len(group.completions[0])} completion tokens are trained"
    assert len(lines) == 2 + group.token_count


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_has_no_header_and_adds_a_space():
    """As Mistral's: the prompt is the same with and without header, and the space before the answer is trained."""
    chat = ChatTokenizer(tokenizer(MISTRAL, bos=True))
    pair = chat.group(asked("hello"), ["yes \n", "no"], id="g")
    d = chat.demonstration(Demonstration(id="d", messages=talk("hello", "yes \n", "say", "no")))
    assert raw(chat, pair.prompt) == raw(chat, d.prompt) == "<s>[INST] hello [/INST]"
    assert [trained(chat, pair, i) for i in (0, 1)] == [" yes<|im_end|>", " no<|im_end|>"]
    assert trained(chat, d) == " yes<|im_end|> no<|im_end|>"
    assert chat.preflight() == ["both the tokenizer and the chat template add BOS: one of the two is kept"]
