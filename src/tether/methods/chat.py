"""``tether chat``: talk to a model in the terminal."""

from __future__ import annotations

from tether.core.errors import UserError
from tether.core.protocols import SamplingSettings
from tether.core.text import Message, Prompt
from tether.methods import parts
from tether.methods.sample import open_sampler


def run(*, model: str, system: str | None, settings: SamplingSettings) -> None:
    """Read a line, answer it, remember both; an empty line or Ctrl-D ends, /new forgets."""
    sampler = open_sampler(model, system, settings, parts.speaker(False))
    print("type a message; /new starts over, an empty line ends")
    history: tuple[Message, ...] = ()
    turn = 0
    while True:
        try:
            text = input("\nyou> ").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            history = ()
            continue
        asked = (*history, Message(role="user", content=text))
        try:
            (answer,) = sampler.sample([Prompt(id=f"turn:{turn}", messages=asked)], n=1, settings=settings, seed=turn)
        except UserError:
            print("(this conversation is longer than the model can read; /new starts over)")
            continue
        turn += 1
        print(f"{model}> {parts.printable(answer.text)}" + ("" if answer.finish_reason == "stop" else " [cut]"))
        history = (*asked, Message(role="assistant", content=answer.text))
