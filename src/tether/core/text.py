"""Records made of text: what people write, compare and rank, before any token exists.

All records are frozen and keyword-only. A prompt is either a conversation (``messages``, rendered with the model's
chat template) or plain text (``text``, used as it stands); a completion is the text that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What is asked. Exactly one of ``messages`` and ``text`` is set; ``metadata`` carries answers for verifiers."""

    id: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.text is None) == (not self.messages):
            raise ValueError(f"prompt {self.id!r}: give either messages or text, and not both")

    @property
    def question(self) -> str:
        """The last user turn, or the plain text: what a person would say was asked."""
        if self.text is not None:
            return self.text
        return next((m.content for m in reversed(self.messages) if m.role == "user"), self.messages[-1].content)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A conversation to imitate (SFT): ``messages`` whole, or ``prompt`` text and ``completion`` text."""

    id: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """``chosen`` was preferred to ``rejected``; ``margin`` says by how much where the scale says so (Llama 2)."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    annotator: str | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """K completions and their ranks: 0 is best, equal ranks are ties."""

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One completion that was found desirable or not (unpaired, for KTO)."""

    prompt: Prompt
    completion: str
    desirable: bool
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLabels:
    """Process supervision: ``labels[k]`` says whether ``steps[k]`` is right."""

    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[bool, ...]
    source: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One sampled completion, token in and token out.

    ``tokens`` [C] int64 are the tokens that were sampled, the stop token included; ``sampled`` [C] bool marks the ones
    the policy chose (tool output is False); ``logprobs`` [C] float32 are log-probs of the distribution that was
    sampled (temperature, top-p and top-k included). ``text`` is the decoded completion without special tokens.
    ``finish_reason`` is "stop" (the model ended) or "length" (it was cut).
    """

    prompt: Prompt
    group: int
    prompt_tokens: torch.Tensor
    tokens: torch.Tensor
    sampled: torch.Tensor
    logprobs: torch.Tensor
    text: str
    finish_reason: str
    policy_version: int = 0
