"""Drawing a token from logits, and the log-prob of the distribution that was drawn from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from tether.core.protocols import SamplingSettings

# Tokens whose probabilities are summed before one of them is looked for: a cumulative sum runs over few numbers only.
BLOCK = 256


def scores(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """[W, V] logits of the distribution that is drawn from: after temperature, top-k and top-p (nucleus; Holtzman
    2020), -inf where cut. Not normalised.

    top-p keeps the smallest set of most likely tokens whose mass reaches ``top_p``; temperature 0 is greedy, whose
    distribution is a point mass.
    """
    if settings.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter_(1, best, 0.0)
    kept = logits if settings.temperature == 1 else logits / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[1]:
        smallest = kept.topk(settings.top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < smallest, float("-inf"))
    if settings.top_p < 1:
        ordered, index = kept.softmax(dim=-1).sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        cut = torch.zeros_like(kept, dtype=torch.bool).scatter_(1, index, mass_before >= settings.top_p)
        kept = kept.masked_fill(cut, float("-inf"))
    return kept


def draw(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draw from softmax(scores): the first token whose cumulative probability exceeds u, and its log-prob.
    [W, V], [W] -> [W] int64, [W] nats."""
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top).exp_()
    if short := -weights.shape[1] % BLOCK:
        weights = pad(weights, (0, short))
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(dim=-1)
    edges = sums.cumsum(dim=-1)
    # Rounding may leave the total a little off; u times it makes every u land on a token of positive mass.
    total = edges[:, -1:]
    target = uniforms[:, None] * total
    block = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1)
    rest = target - (edges - sums).gather(1, block)
    token = block * BLOCK + torch.searchsorted(inside, rest, right=True).clamp_(max=BLOCK - 1)
    # A u that lands exactly on the edge of the last token must not fall into the cut-off tail behind it.
    dead = weights.gather(1, token) == 0
    if dead.any():
        token = torch.where(dead, weights.argmax(dim=-1, keepdim=True), token)
    logprobs = scores.gather(1, token) - top - total.log()
    return token.squeeze(1), logprobs.squeeze(1)


def uniforms(seed: int, prompt_id: str, index: int, count: int) -> Tensor:
    """``count`` uniform numbers that depend on (seed, prompt id, sample index) alone, not on what shares the batch."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator)
