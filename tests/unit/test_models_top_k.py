"""The most likely tokens against log_softmax and topk of the whole logits, in float64, and against transformers."""

import pytest
import torch

from model_cases import RAGGED, backbone, plain_twin
from tether.backends.local.learner import evaluate
from tether.models import logprobs as module
from tether.models.adapters import active, add_adapter
from tether.models.attention import NAME
from tether.models.logprobs import token_logprobs
from tether.models.roles import ActorCritic, Policy, Scorer, new_head

K, D, V, RANK = 7, 5, 11, 2
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap-temperature": {"softcap": 1.5, "temperature": 1.3},
    "logit_scale": {"logit_scale": 0.25, "temperature": 2.0},
}


@pytest.fixture(params=[(1, 1), (3, 4), (1000, 1000)], ids=lambda p: f"blocks-of-{p[0]}x{p[1]}")
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(module, "BLOCK_COLUMNS", request.param[1])
    monkeypatch.setattr(module, "BLOCK_BYTES", 0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(logits: torch.Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None):
    """[K, V] log-probs."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits * logit_scale / temperature).log_softmax(-1)


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapter"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("top_k", [1, 3, 5, V])
def test_values_and_tokens(top_k: int, settings: dict, adapted: bool, blocks: None):
    hidden, weight, bias = normal(K, D), normal(V, D, seed=1), normal(V, seed=2)
    low, up = normal(K, RANK, seed=3), normal(V, RANK, seed=4)
    table = whole(hidden @ weight.T + bias + (low @ up.T if adapted else 0), **settings)
    right = table.topk(top_k, dim=-1)
    targets = torch.arange(K)
    found = token_logprobs(
        hidden, weight, targets, bias=bias, low_rank=(low, up) if adapted else None, top_k=top_k, **settings
    )
    torch.testing.assert_close(found.top_logprobs, right.values)
    assert torch.equal(found.top_tokens, right.indices)
    torch.testing.assert_close(found.logprobs, table.gather(1, targets[:, None]).squeeze(1))


@pytest.mark.parametrize("top_k", range(1, V + 1))
def test_ties_across_the_borders_of_parts(top_k: int, blocks: None):
    """Small whole numbers, exact in any order: three different rows of the head, each there several times."""
    hidden = normal(K, D).mul(2).round()
    weight = normal(3, D, seed=1).mul(2).round()[torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 0, 1, 0])]
    table = whole(hidden @ weight.T)
    found = token_logprobs(hidden, weight, torch.zeros(K, dtype=torch.long), top_k=top_k)
    torch.testing.assert_close(found.top_logprobs, table.topk(top_k, dim=-1).values)
    torch.testing.assert_close(table.gather(1, found.top_tokens), found.top_logprobs)
    assert all(len(set(row)) == top_k for row in found.top_tokens.tolist()), "no token twice"


@pytest.mark.parametrize("keep", [0, 10**9], ids=["made-again", "kept"])
@pytest.mark.parametrize("entropy", [False, True])
def test_nothing_else_changes_and_no_gradient_goes_through(
    entropy: bool, keep: int, blocks: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "KEEP_BYTES", keep)
    made, real = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda *args: made.append(1) or real(*args))
    seen = []
    for top_k in (None, 3):
        made.clear()
        leaves = [t.requires_grad_() for t in (normal(K, D), normal(V, D, seed=1), normal(V, seed=2))]
        found = token_logprobs(*leaves[:2], torch.arange(K), bias=leaves[2], entropy=entropy, top_k=top_k)
        assert found.top_logprobs.shape == found.top_tokens.shape == (K, top_k or 0)
        assert not found.top_logprobs.requires_grad and found.logprobs.requires_grad
        assert found.entropy.requires_grad == entropy
        (found.logprobs * normal(K, seed=5) + 0.3 * found.entropy).sum().backward()
        seen.append((len(made), found.logprobs, found.entropy, *(leaf.grad for leaf in leaves)))
    assert seen[0][0] == seen[1][0], "logits are made as often as without"
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1:], seen[1][1:], strict=True))


def test_low_precision_gives_float32():
    hidden, weight = normal(K, D).bfloat16(), normal(V, D, seed=1).bfloat16()
    found = token_logprobs(hidden, weight, torch.arange(K), top_k=V)
    assert found.top_logprobs.dtype == torch.float32 and found.top_tokens.dtype == torch.int64
    torch.testing.assert_close(found.top_logprobs.exp().sum(1), torch.ones(K))
    at = (found.top_tokens == torch.arange(K)[:, None]).nonzero()[:, 1:]
    assert torch.equal(found.top_logprobs.gather(1, at).squeeze(1), found.logprobs)


@pytest.mark.parametrize("top_k", [0, -1, V + 1])
def test_a_k_that_makes_no_list_is_refused(top_k: int):
    with pytest.raises(ValueError, match=rf"top_k is {top_k}: give 1 to 11 \(the whole vocabulary\), or None"):
        token_logprobs(normal(K, D), normal(V, D), torch.arange(K), top_k=top_k)


def test_no_tokens_give_empty_lists():
    found = token_logprobs(normal(0, D), normal(V, D), torch.empty(0, dtype=torch.long), top_k=3)
    assert found.top_logprobs.shape == found.top_tokens.shape == (0, 3)


def tables(model, temperature: float) -> list[torch.Tensor]:
    """Per row of RAGGED, [n, V] log-probs in float64, of the row alone through plain transformers."""
    found = []
    for i, (p, n) in enumerate(zip(RAGGED.prompt_of.tolist(), RAGGED.lengths.tolist(), strict=True)):
        ids = torch.cat([RAGGED.prompts[p], RAGGED.tokens[i, :n]])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(ids) - n - 1 : -1]
        found.append((logits.double() / temperature).log_softmax(-1))
    return found


def assert_same(outputs, right: list[torch.Tensor], top_k: int) -> None:
    assert outputs.top_logprobs.shape == outputs.top_tokens.shape == (*RAGGED.tokens.shape, top_k)
    for i, table in enumerate(right):
        values, tokens = outputs.top_logprobs[i, : len(table)].double(), outputs.top_tokens[i, : len(table)]
        torch.testing.assert_close(values, table.topk(top_k, dim=-1).values, atol=5e-5, rtol=5e-5)
        torch.testing.assert_close(values, table.gather(1, tokens), atol=5e-5, rtol=5e-5)
        assert not outputs.top_logprobs[i, len(table) :].any() and not outputs.top_tokens[i, len(table) :].any()


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
@torch.no_grad()
def test_a_policy_lists_what_transformers_finds_likely(family: str, mode: str):
    ours = backbone(family, mode)
    policy, right = Policy(backbone=ours, temperature=0.8), tables(plain_twin(ours.hf), 0.8)
    assert_same(policy(RAGGED, top_k=4), right, 4)
    for budget in (9, 10**6):
        assert_same(evaluate(policy, RAGGED, budget, top_k=4), right, 4)
    plain = evaluate(policy, RAGGED, 9)
    assert plain.top_logprobs is None and plain.top_tokens is None


@torch.no_grad()
def test_an_adapter_on_the_head_counts():
    ours = backbone("llama")
    add_adapter(ours.hf, "policy", rank=2, alpha=4.0, targets=("q_proj", "lm_head"))
    torch.manual_seed(0)
    for name, parameter in ours.hf.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    with active(ours.hf, "policy"):
        ours.hf.set_attn_implementation("eager")
        right = tables(ours.hf, 1.0)
        ours.hf.set_attn_implementation(NAME)
    assert_same(Policy(backbone=ours, adapter="policy")(RAGGED, top_k=3), right, 3)
    bare = Policy(backbone=ours)(RAGGED, top_k=3)
    assert not torch.equal(bare.top_tokens[1, :7], torch.stack([t.topk(3).indices for t in right[1]]))


def test_only_a_policy_has_such_a_list():
    ours = backbone("llama")
    scorer = Scorer(backbone=ours, head=new_head(ours, zero=True))
    for role in (scorer, ActorCritic(policy=Policy(backbone=ours), critic=scorer)):
        with pytest.raises(ValueError, match=f"a {type(role).__name__} has no most likely tokens; give a Policy"):
            evaluate(role, RAGGED, 100, top_k=2)
