"""FLOPs of a trained token: against torch's own counter of a forward and backward, and against counting by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model_cases import SMALL, VOCABULARY, backbone, random_batch
from tether.models import linear, logprobs
from tether.models.adapters import add_adapter
from tether.models.roles import ActorCritic, Policy, Role, Scorer, new_head
from tether.models.work import training_work

BATCH = random_batch((5, 3), [(0, 4), (0, 6), (1, 7)])
TOKENS, PREDICTED = 5 + 3 + 4 + 6 + 7, 4 + 6 + 7
D, INNER, KV = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["hidden_size"] // 2


@pytest.fixture(autouse=True)
def products_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SERVES", False)
    # A head's logits made a second time in the backward are work, but not useful work.
    monkeypatch.setattr(logprobs, "KEEP_BYTES", 10**9)


def counted(role: Role) -> int:
    """Products with weights (aten.mm, addmm) in one forward and backward; attention's are others (bmm, sdpa)."""
    for parameter in role.parameters().values():
        parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        outputs = role(BATCH)
        parts = (outputs.logprobs, outputs.values, outputs.scores)
        torch.stack([part.sum() for part in parts if part is not None]).sum().backward()
    found = counter.get_flop_counts()["Global"]
    return sum(count for name, count in found.items() if str(name) in ("aten.mm", "aten.addmm"))


def ours(role: Role) -> float:
    work = training_work(role)
    assert work is not None
    return work.of(TOKENS, PREDICTED)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma2", "deepseek_v3", "phi3_window"])
def test_a_fully_trained_policy_as_torch_counts(family: str):
    role = Policy(backbone=backbone(family))
    assert ours(role) == counted(role)


def test_a_llama_by_hand():
    work = training_work(Policy(backbone=backbone("llama")))
    assert work is not None
    layer = D * D + 2 * D * KV + D * D + 3 * D * INNER
    assert work.token == 6 * 2 * layer and work.predicted == 6 * D * VOCABULARY


def test_adapters_pay_for_their_own_gradients_and_for_what_is_above_the_lowest():
    model = backbone("llama")
    add_adapter(model.hf, "policy", rank=2, alpha=4.0)
    add_adapter(model.hf, "other", rank=3, alpha=4.0)  # not run, not counted
    role = Policy(backbone=model, adapter="policy")
    # Of the lowest layer we leave the gradients of inputs out; torch needs those of all matrices but q, k and v, whose
    # input is the frozen embedding's, and of every B, whose input is A's output.
    base = D * D + 3 * D * INNER
    every_b = 2 * (D + KV + KV + D + INNER + INNER + D)
    some_a = 2 * (D + D + D + INNER)
    assert counted(role) - ours(role) == 2 * TOKENS * (base + every_b + some_a)


def test_layers_below_the_lowest_trained_one_pay_for_the_forward_alone():
    sizes = {}
    for last in (1, None):
        model = backbone("llama")
        add_adapter(model.hf, "policy", rank=2, alpha=4.0, last_layers=last)
        work = training_work(Policy(backbone=model, adapter="policy"))
        assert work is not None
        sizes[last] = work
    layer = 2 * D * D + 2 * D * KV + 3 * D * INNER
    adapter = 2 * (2 * D + 2 * (D + KV) + 3 * (D + INNER) + 2 * D)
    assert sizes[1].token == 2 * 2 * layer + 4 * adapter
    assert sizes[None].token == 2 * (1 + 2) * layer + (4 + 6) * adapter
    assert sizes[1].predicted == sizes[None].predicted == 4 * D * VOCABULARY


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_a_critic_costs_a_trunk_of_its_own_unless_it_shares_one(kind: str):
    policy = Policy(backbone=backbone("llama"))
    theirs = policy.backbone if kind == "head" else backbone("llama", seed=3)
    role = ActorCritic(policy=policy, critic=Scorer(backbone=theirs, head=new_head(theirs, zero=False)))
    # The scalar head reads the state before every completion token and after the last: one product of d each, thrice.
    scalar = 6 * (PREDICTED + 3) * D
    assert ours(role) == counted(role) - scalar


def test_a_scorer_has_no_language_head_unless_it_keeps_it():
    plain, with_language = (
        training_work(Scorer(backbone=b, head=new_head(b, zero=False), language=language))
        for b, language in ((backbone("llama"), False), (backbone("llama"), True))
    )
    assert plain is not None and with_language is not None
    assert plain.predicted == 0 and with_language.predicted == 4 * D * VOCABULARY and plain.token == with_language.token


def test_what_cant_be_told_from_the_shapes_is_not_told():
    assert training_work(Policy(backbone=backbone("gpt_oss", "padded"))) is None
    assert training_work(object()) is None  # type: ignore[arg-type]
