"""Drawing a token from logits, and the log-prob of the distribution that was drawn from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tether.core.protocols import SamplingSettings


def log_distribution(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """[W, V] log-probs after temperature, top-k and top-p (nucleus; Holtzman 2020), renormalised; -inf where cut.

    top-p keeps the smallest set of most likely tokens whose mass reaches ``top_p``; temperature 0 is greedy, whose
    distribution is a point mass.
    """
    if settings.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter_(1, best, 0.0)
    logprobs = (logits / settings.temperature).log_softmax(dim=-1)
    if settings.top_k and settings.top_k < logits.shape[1]:
        smallest = logprobs.topk(settings.top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < smallest, float("-inf")).log_softmax(dim=-1)
    if settings.top_p < 1:
        ordered, index = logprobs.sort(dim=-1, descending=True)
        mass_before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        cut = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, index, mass_before >= settings.top_p)
        logprobs = logprobs.masked_fill(cut, float("-inf")).log_softmax(dim=-1)
    return logprobs


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw: the first token whose cumulative probability exceeds u. [W, V], [W] -> [W] int64."""
    probs = logprobs.exp()
    cumulative = probs.cumsum(dim=-1)
    # Rounding may leave the total a little off 1; scaling u by it makes every u land on a token of positive mass.
    target = uniforms[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp_(max=probs.shape[1] - 1).squeeze(1)
    # A u that lands exactly on the edge of the last token must not fall into the cut-off tail behind it.
    dead = probs.gather(1, token[:, None]).squeeze(1) == 0
    return torch.where(dead, probs.argmax(dim=-1), token)


def uniforms(seed: int, prompt_id: str, index: int, count: int) -> Tensor:
    """``count`` uniform numbers that depend on (seed, prompt id, sample index) alone, not on what shares the batch."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator)
