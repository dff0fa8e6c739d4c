"""``tether sample``: completions of prompts, printed or written as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tether.backends.local.sampler import LocalSampler
from tether.config.sections import ModelConfig
from tether.core.errors import UserError
from tether.core.protocols import SamplingSettings
from tether.core.text import Message, Prompt
from tether.data.chat import ChatTokenizer
from tether.data.readers import read
from tether.methods import parts
from tether.models.roles import Policy


def open_sampler(
    model: ModelConfig | str, system: str | None, settings: SamplingSettings, say: parts.Say
) -> LocalSampler:
    """A sampler of ``model`` at the settings' temperature."""
    backbone = parts.open_backbone(ModelConfig(name=model) if isinstance(model, str) else model, say)
    chat = ChatTokenizer(backbone.tokenizer, system=system)
    policy = Policy(backbone=backbone, temperature=settings.temperature or 1.0)
    return LocalSampler(policy=policy, chat=chat)


def given_prompts(path: str | None, texts: list[str], n_prompts: int | None = None) -> list[Prompt]:
    """Prompts from a file and from the command line, in this order."""
    prompts = list(read(path, "prompts", limit=n_prompts).records) if path else []
    prompts += [Prompt(id=f"argument:{i}", messages=(Message(role="user", content=t),)) for i, t in enumerate(texts)]
    if not prompts:
        raise UserError("nothing to answer: write the prompt behind the command, or give --prompts FILE")
    return prompts


def check_system(system: str | None, prompts: Sequence[Prompt], what: str) -> None:
    """Raises UserError where no prompt is a conversation that a system message could be put before."""
    if system is not None and all(p.text is not None for p in prompts):
        raise UserError(
            f"{what} would be ignored: the prompts are plain text, and a system message stands before a conversation\n"
            '  write the rows as {"question": ...} or {"prompt": [{"role": "user", "content": ...}]}, or take it out'
        )


def run(
    *,
    model: str,
    prompts: str | None,
    prompt: list[str],
    out: str | None,
    n: int,
    settings: SamplingSettings,
    seed: int,
    system: str | None,
) -> None:
    """Draw ``n`` completions per prompt; print them, or write one JSON object a line to ``out``."""
    path = parts.new_file(out) if out is not None else None
    asked = given_prompts(prompts, prompt)
    sampler = open_sampler(model, system, settings, parts.speaker(False))
    rollouts = sampler.sample(asked, n=n, settings=settings, seed=seed)
    if path is None:
        for rollout in rollouts:
            cut = "" if rollout.finish_reason == "stop" else "  [cut at the length limit]"
            print(parts.printable(f"\n> {rollout.prompt.question}\n{rollout.text}{cut}"))
        return
    with path.open("w", encoding="utf-8") as file:
        for r in rollouts:
            row = {
                "id": r.prompt.id,
                "prompt": [{"role": m.role, "content": m.content} for m in r.prompt.messages] or r.prompt.text,
                "completion": r.text,
                "finish_reason": r.finish_reason,
                "logprob": float(r.logprobs.sum()),
                "tokens": len(r.tokens),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(rollouts)} completions of {len(asked)} prompts: {path}")
