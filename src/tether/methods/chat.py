"""``tether chat``: talk to a model in the terminal."""

from __future__ import annotations

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
        history += (Message(role="user", content=text),)
        prompt = Prompt(id=f"turn:{turn}", messages=history)
        (answer,) = sampler.sample([prompt], n=1, settings=settings, seed=turn)
        turn += 1
        # Control characters from a model could steer the terminal.
        shown = "".join(c for c in answer.text if c.isprintable() or c in "\n\t")
        print(f"{model}> {shown}" + ("" if answer.finish_reason == "stop" else " [cut]"))
        history += (Message(role="assistant", content=answer.text),)
