"""The log-probs in blocks against torch's own log_softmax, gather and Categorical, in float64, gradients included."""

import pytest
import torch

from model_cases import RAGGED, backbone, build
from tether.models import logprobs as module
from tether.models.backbone import Backbone
from tether.models.logprobs import token_logprobs
from tether.models.roles import Policy

K, D, V = 7, 5, 11
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 1.5},
    "softcap-temperature": {"softcap": 1.5, "temperature": 1.3},
    "logit_scale": {"logit_scale": 0.25, "temperature": 2.0},
}


@pytest.fixture(
    params=[(1, 1, 0), (3, 4, 0), (3, 4, 10**9), (1000, 1000, 0), (1000, 1000, 10**9)],
    ids=lambda p: f"blocks-of-{p[0]}x{p[1]}-{'kept' if p[2] else 'made-again'}",
)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, keep = request.param
    monkeypatch.setattr(module, "KEEP_BYTES", keep)
    monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    monkeypatch.setattr(module, "BLOCK_COLUMNS", columns)
    monkeypatch.setattr(module, "BLOCK_BYTES", 0)
    made = [len(list(module._parts(rows, V))) for rows in module._slices(K, rows)]
    assert made == [-(-V // columns)] * -(-K // rows)


def leaves(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((K, D), (V, D), (V,)))
    targets = torch.randint(0, V, (K,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), b.requires_grad_() if bias else None, targets


def reference(hidden, weight, bias, targets, temperature=1.0, logit_scale=1.0, softcap=None):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    table = torch.distributions.Categorical(logits=logits * logit_scale / temperature)
    return table.log_prob(targets), table.entropy()


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_values_and_gradients(settings: dict, bias: bool, blocks: None):
    mine, theirs = leaves(bias), leaves(bias)
    ours = token_logprobs(mine[0], mine[1], mine[3], bias=mine[2], entropy=True, **settings)
    right = reference(*theirs, **settings)
    weights = torch.randn(2, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, want in zip(ours[:2], right, strict=True):
        torch.testing.assert_close(got, want)
    sum((o * w).sum() for o, w in zip(ours[:2], weights, strict=True)).backward()
    sum((o * w).sum() for o, w in zip(right, weights, strict=True)).backward()
    for got, want in zip(mine[:3], theirs[:3], strict=True):
        if got is not None:
            torch.testing.assert_close(got.grad, want.grad)


def test_a_second_backward_is_the_first(blocks: None):
    hidden, weight, _, targets = leaves(False)
    total = token_logprobs(hidden, weight, targets, entropy=True)[0].sum()
    first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_logits_are_made_again_only_where_they_were_not_kept(monkeypatch: pytest.MonkeyPatch):
    made, real = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda *args: made.append(1) or real(*args))
    hidden, weight, _, targets = leaves(False)
    for budget, products in ((K * V * 8, 1), (K * V * 8 - 1, 2)):
        monkeypatch.setattr(module, "KEEP_BYTES", budget)
        made.clear()
        token_logprobs(hidden, weight, targets)[0].sum().backward()
        assert len(made) == products


def test_gradcheck():
    hidden, weight, bias, targets = leaves(bias=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, targets, bias=b, temperature=0.6, softcap=2.0, entropy=True)[:2],
        (hidden, weight, bias),
    )


def test_entropy_that_was_not_asked_for_is_zero_and_has_no_gradient():
    hidden, weight, bias, targets = leaves(bias=True)
    logprobs, entropy, *_ = token_logprobs(hidden, weight, targets, bias=bias)
    assert not entropy.any() and not entropy.requires_grad and logprobs.requires_grad


def test_a_frozen_head_gets_no_gradient_and_passes_one_on():
    hidden, weight, _, targets = leaves(bias=False)
    whole = torch.autograd.grad(token_logprobs(hidden, weight, targets)[0].sum(), hidden)[0]
    frozen = weight.detach()
    token_logprobs(hidden, frozen, targets)[0].sum().backward()
    assert frozen.grad is None
    torch.testing.assert_close(hidden.grad, whole)


def test_low_precision_is_computed_in_float32():
    hidden, weight, _, targets = (t.detach() if t is not None else t for t in leaves(bias=False))
    half = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)[0]
    assert half.dtype == torch.float32
    # Only the logits are rounded to bfloat16 (8 bits); the sum over the vocabulary is not.
    torch.testing.assert_close(half, reference(hidden, weight, None, targets)[0].float(), atol=0.05, rtol=0.02)


def test_no_tokens_give_no_numbers():
    hidden, weight, _, _ = leaves(bias=False)
    logprobs, *_ = token_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.long), entropy=True)
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and not weight.grad.any()


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_gradient_of_a_tied_embedding_is_the_sum_of_both_uses(family: str):
    """In float64 against transformers' logits: an untied head has a gradient of its own."""
    plain = build(family).double().requires_grad_(True)
    ours = Backbone(hf=build(family).double().requires_grad_(True), tokenizer=None, name=family, mode="padded")
    Policy(backbone=ours)(RAGGED).logprobs.sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for i, (p, n) in enumerate(zip(RAGGED.prompt_of.tolist(), RAGGED.lengths.tolist(), strict=True)):
        ids = torch.cat([RAGGED.prompts[p], RAGGED.tokens[i, :n]])
        table = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        total = total + table[len(ids) - n - 1 : -1].gather(1, RAGGED.tokens[i, :n, None]).sum()
    total.backward()
    for (name, mine), theirs in zip(ours.hf.named_parameters(), plain.parameters(), strict=True):
        # RMSNorm and rotary tables are float32 inside transformers, whatever the model's type.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_the_sampler_reads_the_same_distribution():
    for family in ("gemma2", "cohere2", "granite"):
        ours = backbone(family)
        hidden = torch.randn(3, 32)
        targets = torch.tensor([4, 5, 6])
        table = ours.logits(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(ours.head(hidden, targets, temperature=1.0, entropy=False)[0], table)
