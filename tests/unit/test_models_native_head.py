"""The head by compiled kernels: log-probs, entropies and gradients are those of log-softmax in float64, and a NaN is
not lost."""

import pytest
import torch
from torch import Tensor

from tether.core.machine import cxx
from tether.models import logprobs
from tether.models.linear import SERVES
from tether.models.logprobs import token_logprobs
from tether.models.native import attention, head

pytestmark = pytest.mark.skipif(not SERVES or cxx() is None, reason="no AVX-512, or no C++ compiler")
# A vocabulary that ends within a vector has a last part that the kernels do not take.
VOCABULARY, WIDTH = 16 * 37 + 5, 24


def leaves(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator).requires_grad_() for n in (rows, VOCABULARY))
    return hidden, weight, torch.randint(0, VOCABULARY, (rows,), generator=generator)


def small_blocks(monkeypatch: pytest.MonkeyPatch, keep: int) -> list[bool]:
    """Three parts of 256 columns or fewer; what is returned says later whether each block was the kernels'."""
    monkeypatch.setattr(logprobs, "BLOCK_BYTES", 0)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep)
    asked: list[bool] = []
    serves = head.serves
    monkeypatch.setattr(head, "serves", lambda logits: asked.append(serves(logits)) or asked[-1])
    return asked


@pytest.mark.parametrize("keep", [0, 10**9], ids=["made again", "kept"])
@pytest.mark.parametrize("rows", [1, 16, 31, 150])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(rows: int, keep: int, temperature: float, monkeypatch: pytest.MonkeyPatch):
    asked = small_blocks(monkeypatch, keep)
    hidden, weight, targets = leaves(rows)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    pull = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    found = token_logprobs(hidden, weight, targets, temperature=temperature).logprobs
    right = (exact[0] @ exact[1].T / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad(found, (hidden, weight), pull, retain_graph=True)
    assert asked == [True, True, False] * 2
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=1e-6)
    for got, want in zip(gradients, torch.autograd.grad(right, exact, pull.double()), strict=True):
        assert (got - want).abs().max() < 3e-6 * want.abs().max()
    again = torch.autograd.grad(found, (hidden, weight), pull)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True)), "what was kept was overwritten"


@pytest.mark.parametrize("keep", [0, 10**9], ids=["made again", "kept"])
@pytest.mark.parametrize("rows", [1, 31, 150])
@pytest.mark.parametrize("of_logprobs", [True, False])
def test_entropy_and_its_gradient(rows: int, keep: int, of_logprobs: bool, monkeypatch: pytest.MonkeyPatch):
    asked = small_blocks(monkeypatch, keep)
    hidden, weight, targets = leaves(rows)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    pull, other = torch.randn(2, rows, generator=torch.Generator().manual_seed(1))
    found = token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
    logits = exact[0] @ exact[1].T / 0.7
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    total, right = (found.entropy * pull).sum(), (entropy * pull.double()).sum()
    if of_logprobs:
        total = total + (found.logprobs * other).sum()
        right = right + (log_p.gather(1, targets[:, None])[:, 0] * other.double()).sum()
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert asked == [True, True, False] * 2
    for got, want in zip(gradients, torch.autograd.grad(right, exact), strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_an_entropy_that_is_only_looked_at_changes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, 0)
    hidden, weight, targets = leaves(40)
    looked, plain = (
        torch.autograd.grad(token_logprobs(hidden, weight, targets, entropy=e).logprobs.sum(), (hidden, weight))
        for e in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(looked, plain, strict=True))


def test_a_token_that_is_ruled_out_has_no_part(monkeypatch: pytest.MonkeyPatch):
    asked = small_blocks(monkeypatch, 0)
    hidden, weight, targets = leaves(20)
    allowed = torch.arange(VOCABULARY) % 3 != 0
    bias = torch.where(allowed, 0.0, -torch.inf)
    targets = targets - targets % 3 + 1
    found = token_logprobs(hidden, weight, targets, bias=bias)
    logits = (hidden.double() @ weight.double().T)[:, allowed]
    log_p = logits.log_softmax(-1)
    at = targets - targets // 3 - 1  # among those that are left
    torch.testing.assert_close(found.logprobs.double(), log_p.gather(1, at[:, None])[:, 0], atol=2e-5, rtol=1e-6)
    gradient = torch.autograd.grad(found.logprobs.sum(), hidden)[0]
    right = log_p.gather(1, at[:, None]).sum()
    assert (gradient - torch.autograd.grad(right, hidden)[0]).abs().max() < 1e-5
    assert any(asked)


@pytest.mark.parametrize("more", ["bias", "softcap", "low rank"])
def test_what_the_head_has_beside_its_weight(more: str):
    hidden, weight, targets = leaves(20)
    generator = torch.Generator().manual_seed(2)
    bias, low, up = (torch.randn(s, generator=generator) for s in ((VOCABULARY,), (20, 2), (VOCABULARY, 2)))
    with torch.no_grad():  # a vocabulary that they would take
        hidden, weight = hidden.detach().requires_grad_(), weight[:-5].detach().requires_grad_()
    bias, up, targets = bias[:-5].requires_grad_(), up[:-5].requires_grad_(), targets % (VOCABULARY - 5)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias, up)]
    logits = exact[0] @ exact[1].T
    given = {"bias": {"bias": bias}, "softcap": {"softcap": 2.0}, "low rank": {"low_rank": (low, up)}}[more]
    logits = {
        "bias": lambda: logits + exact[2],
        "softcap": lambda: 2 * (logits / 2).tanh(),
        "low rank": lambda: logits + low.double() @ exact[3].T,
    }[more]()
    token_logprobs(hidden, weight, targets, **given).logprobs.sum().backward()
    logits.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    for mine, right in zip((hidden, weight, bias, up), exact, strict=True):
        assert (mine.grad is None) == (right.grad is None)
        if mine.grad is not None:
            assert (mine.grad - right.grad).abs().max() < 1e-5 * right.grad.abs().max()


def test_logits_far_apart(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, 0)
    hidden, weight, targets = leaves(20)
    with torch.no_grad():
        weight[20] *= 100  # of the second sixteen
    right = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = token_logprobs(hidden, weight, targets).logprobs
    assert right.min() < -500
    torch.testing.assert_close(found.double(), right, atol=1e-3, rtol=1e-6)


def test_a_frozen_head_passes_the_gradient_on(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, 0)
    hidden, weight, targets = leaves(20)
    both = torch.autograd.grad(token_logprobs(hidden, weight, targets).logprobs.sum(), (hidden, weight))
    alone = torch.autograd.grad(token_logprobs(hidden, weight.detach(), targets).logprobs.sum(), hidden)
    assert torch.equal(both[0], alone[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_broken_row_of_the_head_breaks_every_log_prob(value: float, monkeypatch: pytest.MonkeyPatch):
    """Nobody's target: it is in log Z alone."""
    small_blocks(monkeypatch, 0)
    hidden, weight, targets = leaves(20)
    with torch.no_grad():
        weight[3] = value
    targets[targets == 3] = 4
    assert not token_logprobs(hidden, weight, targets).logprobs.isfinite().any()


def test_a_broken_key_breaks_what_sees_it():
    q, k, v = (torch.randn(1, 2, 12, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k[0, 1, 7, 3] = float("nan")
    out, _ = attention.forward(q, k, v, ((4, (3, 5)),), 0.25)
    broken = out.isnan().any(-1)[0]
    # The first token of the second completion: the second head of that completion sees it, and nobody else.
    assert broken[1].tolist() == [False] * 7 + [True] * 5 and not broken[0].any()
