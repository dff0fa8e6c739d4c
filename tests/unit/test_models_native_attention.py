"""The compiled attention: values and gradients are those of scores written out in float64, whatever the shapes."""

import pytest
import torch
from test_models_shared_prefix import seen

from tether.core.machine import cxx
from tether.models import shared_prefix
from tether.models.linear import SERVES
from tether.models.native import attention, build

pytestmark = pytest.mark.skipif(not SERVES or cxx() is None, reason="no AVX-512, or no C++ compiler")
BLOCKS = {
    "a group": ((37, (20, 1, 16)),),
    "one completion": ((3, (30,)),),
    "prompts alone": ((16, ()), (1, ()), (33, ())),
    "all of these": ((17, (15, 0, 18)), (1, ()), (31, (2,)), (5, (1, 32, 2, 16))),
}
# Query heads, key heads, depth: one to seven queries to a key, and depths of one to nine vectors.
HEADS = [(2, 2, 16), (4, 2, 32), (3, 1, 64), (8, 2, 48), (5, 1, 80), (7, 1, 144), (2, 1, 96)]


def inputs(blocks, heads: int, shared: int, depth: int) -> list[torch.Tensor]:
    """As a model hands them over: tokens before heads in memory."""
    size, generator = sum(p + sum(cs) for p, cs in blocks), torch.Generator().manual_seed(0)
    made = (torch.randn(1, size, h, depth, generator=generator) for h in (heads, shared, shared))
    return [t.transpose(1, 2).requires_grad_(True) for t in made]


def in_double(q, k, v, blocks, scale: float) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(repeat, 1).mT
    return scores.masked_fill(~seen(blocks), float("-inf")).softmax(-1) @ v.repeat_interleave(repeat, 1)


def differences(given: list[torch.Tensor], blocks, scale: float, pull: torch.Tensor) -> list[float]:
    """Largest relative difference of the output and of each gradient."""
    exact = [t.detach().double().requires_grad_(True) for t in given]
    right = in_double(*exact, blocks, scale)
    got = shared_prefix.attend(*given, blocks, scale)
    assert attention.serves(*given)
    found = (got, *torch.autograd.grad(got, given, pull))
    expected = (right, *torch.autograd.grad(right, exact, pull.double()))
    return [float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(("heads", "shared", "depth"), HEADS)
def test_values_and_gradients(blocks, heads: int, shared: int, depth: int):
    given = inputs(blocks, heads, shared, depth)
    pull = torch.randn(1, heads, given[0].shape[2], depth, generator=torch.Generator().manual_seed(1))
    assert max(differences(given, blocks, depth**-0.5, pull)) < 2e-6


def test_of_bfloat16_only_what_goes_in_and_out_is_rounded():
    blocks = BLOCKS["all of these"]
    given = [t.detach().bfloat16().requires_grad_(True) for t in inputs(blocks, 6, 2, 32)]
    pull = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert 1e-4 < max(differences(given, blocks, 0.2, pull)) < 2**-8


def test_scores_far_apart():
    """Softmax of scores in the hundreds: one key takes all, and nothing overflows."""
    blocks = BLOCKS["all of these"]
    given = inputs(blocks, 4, 2, 16)
    pull = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    assert max(differences(given, blocks, 40.0, pull)) < 1e-4


def test_memory_in_another_order():
    """Heads before tokens, a gradient that is a view, and a gradient that is one number everywhere."""
    blocks = BLOCKS["a group"]
    given = [t.detach().contiguous().requires_grad_(True) for t in inputs(blocks, 4, 2, 16)]
    pull = torch.randn(1, 4, given[0].shape[2], 32, generator=torch.Generator().manual_seed(1))[..., ::2]
    assert max(differences(given, blocks, 0.25, pull)) < 2e-6
    assert max(differences(given, blocks, 0.25, torch.ones(()).expand(pull.shape))) < 5e-6


def test_threads_change_no_bit():
    blocks = BLOCKS["all of these"]
    given = inputs(blocks, 6, 2, 16)
    pull = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = shared_prefix.attend(*given, blocks, 0.25)
            found.append((out, *torch.autograd.grad(out, given, pull)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_they_do_not_take_goes_the_other_way(monkeypatch: pytest.MonkeyPatch):
    blocks = BLOCKS["a group"]
    for given in (inputs(blocks, 2, 2, 8), [t.detach().double() for t in inputs(blocks, 2, 2, 16)]):
        assert not attention.serves(*given)
    given = inputs(blocks, 2, 2, 16)
    monkeypatch.setenv(build.SWITCH, "0")
    assert not attention.serves(*given)
    torch.testing.assert_close(
        shared_prefix.attend(*given, blocks, 0.25), in_double(*given, blocks, 0.25), atol=1e-5, rtol=1e-4
    )
