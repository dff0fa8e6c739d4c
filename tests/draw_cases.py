"""What a token is drawn from after the cuts, in plain Python; a tokenizer of letters, and prompts for it."""

import torch
from torch import Tensor

from tether.core.text import Prompt


def nucleus(probs: list[float], top_p: float, top_k: int) -> list[float]:
    """The reference: sort, keep, renormalise, in plain Python."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    order = order[: top_k or len(order)]
    mass, kept = sum(probs[i] for i in order), []
    reached = 0.0
    for i in order:
        kept.append(i)
        reached += probs[i] / mass
        if reached >= top_p:
            break
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


class Letters:
    """Token i is chr(i); a prompt's tokens are those of its text. Nothing stops but ``stop_ids``."""

    def __init__(self, *stop_ids: int) -> None:
        self.stop_ids = frozenset(stop_ids)

    def prompt(self, prompt: Prompt) -> Tensor:
        return torch.tensor([3 + ord(c) % 90 for c in prompt.text or ""])

    def decode(self, tokens: Tensor) -> str:
        return "".join(chr(161 + i) for i in tokens.tolist() if i not in self.stop_ids)


PROMPTS = [
    Prompt(id=f"p{i}", text=text) for i, text in enumerate(["a", "a longer prompt", "short", "bb", "middle one"])
]
