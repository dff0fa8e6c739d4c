"""Attention of a packed row on a CPU: values and gradients against scores written out for each token."""

import pytest
import torch
from torch.autograd import gradcheck

from tether.models import cpu_attention
from tether.models.shared_prefix import attend

BLOCKS = {
    "a group": ((3, (2, 4, 1)),),
    "one completion": ((3, (2,)),),
    "prompts alone": ((2, ()), (3, ())),
    "all of these": ((2, (3, 1)), (1, ()), (2, (2,)), (1, (1, 1, 2))),
}


def seen(blocks) -> torch.Tensor:
    """[N, N]: which tokens (columns) each token of the row sees."""
    size = sum(p + sum(cs) for p, cs in blocks)
    table = torch.zeros(size, size, dtype=torch.bool)
    at = 0
    for prompt, completions in blocks:
        table[at : at + prompt, at : at + prompt] = torch.ones(prompt, prompt).tril().bool()
        start = at + prompt
        for length in completions:
            table[start : start + length, at : at + prompt] = True
            table[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
            start += length
        at = start
    return table


def inputs(blocks, heads: int, shared: int) -> list[torch.Tensor]:
    """As a model hands them over: tokens before heads in memory."""
    size, generator = sum(p + sum(cs) for p, cs in blocks), torch.Generator().manual_seed(0)
    made = (torch.randn(1, size, h, 4, generator=generator, dtype=torch.float64) for h in (heads, shared, shared))
    return [t.transpose(1, 2).requires_grad_(True) for t in made]


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (3, 1)])
def test_values_and_gradients(blocks, heads: int, shared: int):
    mine = inputs(blocks, heads, shared)
    q, k, v = theirs = inputs(blocks, heads, shared)
    repeat = heads // shared
    scores = 0.3 * q @ k.repeat_interleave(repeat, 1).transpose(-1, -2)
    right = scores.masked_fill(~seen(blocks), float("-inf")).softmax(-1) @ v.repeat_interleave(repeat, 1)
    got = attend(*mine, blocks, 0.3)
    torch.testing.assert_close(got, right)
    pull = torch.randn(right.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, expected in zip(
        torch.autograd.grad(got, mine, pull), torch.autograd.grad(right, theirs, pull), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_gradcheck():
    blocks = BLOCKS["all of these"]
    assert gradcheck(lambda q, k, v: attend(q, k, v, blocks, 0.5), inputs(blocks, 2, 1))


@pytest.mark.parametrize("room", [cpu_attention.SCORE_BYTES, 0], ids=["scores in the open", "fused"])
@pytest.mark.parametrize("blocks", [((9, (8, 14, 1)),), ((12, ()), (7, (20,)))], ids=["a group", "causal alone"])
def test_in_bfloat16_the_error_is_that_of_its_eight_bits(blocks, room: int, monkeypatch):
    """Of numbers that bfloat16 holds, by the norm of the whole: each way, and the gradients with it."""
    monkeypatch.setattr(cpu_attention, "SCORE_BYTES", room)
    mine = [t.detach().bfloat16().requires_grad_(True) for t in inputs(blocks, 6, 2)]
    q, k, v = theirs = [t.detach().double().requires_grad_(True) for t in mine]
    scores = 0.7 * q @ k.repeat_interleave(3, 1).mT
    right = scores.masked_fill(~seen(blocks), float("-inf")).softmax(-1) @ v.repeat_interleave(3, 1)
    got = attend(*mine, blocks, 0.7)
    pull = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = (got, *torch.autograd.grad(got, mine, pull))
    expected = (right, *torch.autograd.grad(right, theirs, pull.double()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.01 * other.norm()
