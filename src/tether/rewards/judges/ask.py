"""Asking a language model: conversations in, replies out, each asked once and counted. Who answers is a ``Source``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tether.core.text import Message
from tether.rewards.judges.cache import AnswerCache, Reply, key_of

Conversation = tuple[Message, ...]


class Source(Protocol):
    """Who answers. ``identity``: everything beside the messages that an answer depends on; it is part of the cache key
    and never holds a secret."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """(position, reply) as they come in, in any order. Raises RewardFailure where no more will come."""
        ...


@dataclass(kw_only=True)
class Tally:
    """What asking took. ``asked`` went to the model, ``cached`` were known; ``refused`` came back without a text;
    ``unparsed`` held no verdict. Tokens are those of ``asked``; ``cost`` is in the currency of the prices."""

    asked: int = 0
    cached: int = 0
    refused: int = 0
    unparsed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def counts(self, who: str = "judge") -> dict[str, float]:
        """As metrics ``who/...``; tokens and cost from the moment there are any."""
        always = {"requests": self.asked, "cached": self.cached, "refused": self.refused, "unparsed": self.unparsed}
        some = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "cost": self.cost}
        return {f"{who}/{name}": float(n) for name, n in {**always, **some}.items() if name in always or n}

    def sentence(self) -> str:
        """One line for a person."""
        return sentence(self.counts())


def sentence(counts: Mapping[str, float], who: str = "judge") -> str:
    """``Tally.counts``, of a whole run or of one step, as one line for a person."""
    n = {name.removeprefix(f"{who}/"): count for name, count in counts.items()}
    tokens = [f"{n.get('prompt_tokens', 0):.0f} + {n.get('completion_tokens', 0):.0f} tokens"]
    tokens += [f"cost {n['cost']:.4g}"] if n.get("cost") else []
    told = f" ({', '.join(tokens)})" if n.get("prompt_tokens") or n.get("completion_tokens") else ""
    rest = {"cached": "from the cache", "refused": "without an answer", "unparsed": "without a verdict"}
    return ", ".join([f"{n['requests']:.0f} asked{told}", *(f"{n[k]:.0f} {v}" for k, v in rest.items() if n.get(k))])


@dataclass(kw_only=True, eq=False)
class Asker:
    """``ask``: conversations -> replies. An answer is kept in ``cache`` the moment it comes, so whoever is killed, or
    finds the judge down, asks only the rest next time. ``price_in``, ``price_out``: of a million tokens."""

    source: Source
    cache: AnswerCache | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    tally: Tally = field(default_factory=Tally)

    def ask(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """One reply each. The same conversation is asked once."""
        identity = self.source.identity
        keys = [key_of(identity, conversation) for conversation in conversations]
        known = self.cache.get(set(keys)) if self.cache else {}
        self.tally.cached += sum(key in known for key in keys)
        waiting = {key: conversation for key, conversation in zip(keys, conversations, strict=True) if key not in known}
        order = list(waiting)
        for position, reply in self.source.replies(list(waiting.values())):
            key = order[position]
            known[key] = reply
            self._count(reply)
            if self.cache and reply.text is not None:
                self.cache.put(key, reply, str(identity.get("model", "")))
        return [known[key] for key in keys]

    def _count(self, reply: Reply) -> None:
        self.tally.asked += 1
        self.tally.refused += reply.text is None
        self.tally.prompt_tokens += reply.prompt_tokens
        self.tally.completion_tokens += reply.completion_tokens
        self.tally.cost += (reply.prompt_tokens * self.price_in + reply.completion_tokens * self.price_out) / 1e6
