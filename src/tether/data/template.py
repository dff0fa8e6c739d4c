"""What a chat template does to a conversation, in characters: where an answer begins, and where its turn ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tether.core.errors import DataError, UserError, nearest
from tether.core.text import Message

# An answer that no template changes and no tokenizer has as a token of its own.
PROBE = "qzxanswerqzx"
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_template(template: str) -> str:
    """A chat template given as Jinja text, or as the path of a file that holds it."""
    if "{%" in template or "{{" in template:
        return template
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"data.template: can't read {template} ({error.strerror}){nearest(path.name, siblings)}"
        ) from None


class Template:
    """The chat template of a tokenizer. ``system`` is put before conversations that have no system message."""

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system

    def render(self, messages: Sequence[Message], *, header: bool = False) -> str:
        """The conversation as one string; ``header``: with the assistant's header at the end, for it to go on."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "a conversation was given, but the tokenizer has no chat template: give data.template=FILE "
                "(a Jinja chat template), choose an instruction-tuned model, or use plain-text rows"
            )
        turns = [{"role": m.role, "content": m.content} for m in self._with_system(messages)]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header)
        except Exception as error:  # templates raise what they like, jinja2's own errors included
            roles = ", ".join(t["role"] for t in turns)
            raise DataError(f"the chat template refuses a conversation of ({roles}): {error}") from None

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is None or any(m.role == "system" for m in messages):
            return list(messages)
        return [Message(role="system", content=self.system), *messages]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation up to and including the assistant's header."""
        return self.render(messages, header=True)

    @cached_property
    def _tail(self) -> str:
        """What the template writes after the words of the last answer."""
        rendered = self.render([Message(role="user", content="Hello?"), Message(role="assistant", content=PROBE)])
        return rendered.rpartition(PROBE)[2]

    @cached_property
    def _end(self) -> tuple[int | None, str]:
        """The token that ends a turn, and the characters after an answer up to and including it."""
        if not self.tokenizer.chat_template:
            return None, ""
        try:
            tail = self._tail
        except DataError:
            return None, ""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.get_added_vocab().values())
        ends = {self.tokenizer.convert_ids_to_tokens(i): i for i in special}
        found = [(at, -len(text), text) for text in ends if (at := tail.find(text)) >= 0]
        if not found:
            return None, ""
        at, _, text = min(found)
        return ends[text], tail[: at + len(text)]

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends an answer: the template's, else EOS."""
        return self.tokenizer.eos_token_id if self._end[0] is None else self._end[0]

    @property
    def end_of_turn_text(self) -> str:
        """The characters from the end of an answer to the end of its stop token; "" where the template has none."""
        return self._end[1]

    def answer(self, messages: Sequence[Message], content: str) -> str:
        """``content`` as the template writes it after the assistant's header, without the end of the turn.

        Templates may add a space or strip one. Where the rendered conversation does not continue the rendered
        prompt, ``content`` is used as it stands: that is what the model would have said after the prompt.
        """
        head = self.prompt(messages)
        whole = self.render([*messages, Message(role="assistant", content=content)])
        if not whole.startswith(head) or not whole.endswith(self._tail) or len(whole) < len(head) + len(self._tail):
            return content
        return whole[len(head) : len(whole) - len(self._tail)]

    def spans(self, messages: Sequence[Message], id: str) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and the characters [begin, end) of each assistant turn with its stop token."""
        text = self.render(messages)
        if GENERATION_MARK.search(self.tokenizer.get_chat_template()):
            spans = self._marked_spans(messages, text)
        else:
            spans = self._incremental_spans(messages, text, id)
        if not spans:
            raise DataError(f"{id}: no assistant turn to train on")
        return text, spans

    def _marked_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """The template's own {% generation %} marks, each widened to the stop token that follows it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{"role": m.role, "content": m.content} for m in self._with_system(messages)]
        rendered: Any = render_jinja_template(
            conversations=[turns],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        marks: list[tuple[int, int]] = rendered[1][0]
        end = self.end_of_turn_text
        return [(a, b + len(end) if end and text.startswith(end, b) else b) for a, b in marks if b > a]

    def _incremental_spans(self, messages: Sequence[Message], text: str, id: str) -> list[tuple[int, int]]:
        """Each turn found by rendering up to it. Turns that the template rewrites later are not trained."""
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        spans = [span for i in answers if (span := self._span_of(messages, i, text)) is not None]
        if len(spans) < len(answers):
            spans = self._probed_spans(messages, text) or spans
        if answers and not spans:
            raise DataError(
                f"{id}: the chat template rewrites the answers, so it can't be told which tokens are theirs; "
                "use a template with {% generation %} marks"
            )
        return spans

    def _span_of(self, messages: Sequence[Message], i: int, text: str) -> tuple[int, int] | None:
        """The answer ``messages[i]`` in ``text``, where what is rendered up to it is how ``text`` begins."""
        head, through = self.prompt(messages[:i]), self.render(messages[: i + 1])
        if not (text.startswith(through) and through.startswith(head) and through.endswith(self._tail)):
            return None
        return len(head), self._with_stop(text, len(through) - len(self._tail))

    def _with_stop(self, text: str, end: int) -> int:
        return end + len(self.end_of_turn_text) if text.startswith(self.end_of_turn_text, end) else end

    def _probed_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
        """The answers found by rendering the conversation with a probe for each turn; None where ``text`` differs."""
        probes = [f"{PROBE}{i}{PROBE}" for i in range(len(messages))]
        skeleton = self.render([Message(role=m.role, content=p) for m, p in zip(messages, probes, strict=True)])
        for written in (str, str.strip):
            built, rest, spans = "", skeleton, []
            for message, probe in zip(messages, probes, strict=True):
                before, _, rest = rest.partition(probe)
                built += before
                begin = len(built)
                built += written(message.content)
                if message.role == "assistant":
                    spans.append((begin, len(built)))
            if built + rest == text:
                return [(begin, self._with_stop(text, end)) for begin, end in spans]
        return None

    def complaints(self) -> list[str]:
        """What this template does that training should know of."""
        talk = [
            Message(role="user", content="Hello?"),
            Message(role="assistant", content="Yes."),
            Message(role="user", content="Who are you?"),
            Message(role="assistant", content=PROBE),
        ]
        try:
            text, head, first = self.render(talk), self.prompt(talk[:3]), self.render(talk[:2])
        except DataError as error:
            return [f"{error}: conversations of several turns can't be used with it"]
        if not text.startswith(head) or not text.startswith(first):
            return [
                "the chat template is not prefix-preserving (a later turn changes how earlier ones are written): "
                "answers are found by probing it, and those that it rewrites are not trained; "
                "prefer data.last_turn_only=true, or a template with {% generation %} marks"
            ]
        return []
