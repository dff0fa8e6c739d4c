"""LoRA: fresh adapters are the identity, switching is exact, and no adapter reaches into another or into the base."""

import pytest
import torch

from model_cases import RAGGED, backbone, build
from tether.core.errors import UserError
from tether.models.adapters import active, adapter_parameters, add_adapter, dropout_on, merged_state
from tether.models.backbone import Backbone
from tether.models.load import clone_frozen, fingerprint
from tether.models.roles import ActorCritic, Policy, Scorer, new_head


@pytest.fixture
def ours() -> Backbone:
    return backbone("qwen2", seed=1)


def lora(ours: Backbone, name: str, **options) -> None:
    add_adapter(ours.hf, name, **{"rank": 3, "alpha": 6.0, **options})


def disturb(ours: Backbone, name: str, seed: int = 0) -> None:
    """Give every tensor of the adapter random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(ours.hf, name).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logprobs(ours: Backbone, adapter: str | None) -> torch.Tensor:
    return Policy(backbone=ours, adapter=adapter)(RAGGED).logprobs


def test_a_fresh_adapter_is_the_identity(ours: Backbone):
    before = logprobs(ours, None)
    lora(ours, "policy")
    assert torch.equal(logprobs(ours, "policy"), before)


def test_the_reference_is_the_model_as_it_was(ours: Backbone):
    before, mark = logprobs(ours, None), fingerprint(Policy(backbone=ours))
    lora(ours, "policy")
    disturb(ours, "policy")
    assert torch.equal(logprobs(ours, None), before)
    assert float((logprobs(ours, "policy") - before).abs().max()) > 0.01
    assert fingerprint(Policy(backbone=ours)) == mark != fingerprint(Policy(backbone=ours, adapter="policy"))


def test_active_switches_and_restores_also_after_an_error(ours: Backbone):
    lora(ours, "policy")
    lora(ours, "critic")
    for name in ("policy", "critic"):
        disturb(ours, name, seed=len(name))
    inside = {name: logprobs(ours, name) for name in ("policy", "critic", None)}
    assert not torch.allclose(inside["policy"], inside["critic"])
    with active(ours.hf, "critic"):
        assert torch.equal(logprobs(ours, "policy"), inside["policy"])
        with pytest.raises(KeyError), active(ours.hf, None):
            raise KeyError
        plain = ours.hf(RAGGED.prompts[0][None]).logits
    with active(ours.hf, "critic"):
        assert torch.equal(ours.hf(RAGGED.prompts[0][None]).logits, plain)
    for name, value in inside.items():
        assert torch.equal(logprobs(ours, name), value)


def test_two_adapters_do_not_leak_gradients(ours: Backbone):
    lora(ours, "policy")
    lora(ours, "critic")
    disturb(ours, "policy")
    disturb(ours, "critic")
    policy = Policy(backbone=ours, adapter="policy")
    critic = Scorer(backbone=ours, head=new_head(ours, zero=False), adapter="critic")
    ours.hf.requires_grad_(False)
    for parameter in (*policy.parameters().values(), *critic.parameters().values()):
        parameter.requires_grad_(True)
    both = ActorCritic(policy=policy, critic=critic)
    assert not both.shares_trunk

    both(RAGGED).values.sum().backward()
    assert all(p.grad is None for p in policy.parameters().values())
    assert any(p.grad is not None and p.grad.any() for p in critic.parameters().values())
    critics = {n: p.grad.clone() for n, p in critic.parameters().items() if p.grad is not None}
    both(RAGGED).logprobs.sum().backward()
    assert all(torch.equal(critic.parameters()[n].grad, g) for n, g in critics.items())
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters().values())
    own = {id(p) for p in both.parameters().values()}
    assert all(p.grad is None for p in ours.hf.parameters() if id(p) not in own)


def test_names_of_parameters(ours: Backbone):
    lora(ours, "policy")
    lora(ours, "critic")
    policy = Policy(backbone=ours, adapter="policy")
    critic = Scorer(backbone=ours, head=new_head(ours, zero=True), adapter="critic")
    assert policy.parameters() and all(".policy." in n for n in policy.parameters())
    assert not set(policy.parameters()) & set(critic.parameters())
    names = ActorCritic(policy=policy, critic=critic).parameters()
    assert "critic.score.weight" in names
    assert len(names) == len(policy.parameters()) + len(critic.parameters())
    shared = ActorCritic(policy=policy, critic=Scorer(backbone=ours, head=critic.head, adapter="policy"))
    assert set(shared.parameters()) == {*policy.parameters(), "critic.score.weight"}
    assert all(".lora_" not in n for n in Policy(backbone=ours).parameters())


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_every_linear_layer_of_the_trunk_is_adapted(ours: Backbone, second: bool):
    if second:
        lora(ours, "first")
    lora(ours, "policy")
    adapted = {
        n.split(".self_attn.")[-1].split(".mlp.")[-1].split(".")[0] for n in adapter_parameters(ours.hf, "policy")
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_last_layers_and_targets_limit_it(ours: Backbone):
    lora(ours, "policy", last_layers=1, targets=("q_proj", "v_proj"))
    names = list(adapter_parameters(ours.hf, "policy"))
    assert len(names) == 4 and all(".layers.1.self_attn." in n for n in names)
    assert all("q_proj" in n or "v_proj" in n for n in names)
    lora(ours, "critic", last_layers=1)
    assert all(".layers.1." in n for n in adapter_parameters(ours.hf, "critic"))
    lora(ours, "all", last_layers=99)
    assert {n.split(".layers.")[1][0] for n in adapter_parameters(ours.hf, "all")} == {"0", "1"}


def test_rank_alpha_and_dropout_arrive(ours: Backbone):
    lora(ours, "policy", rank=5, alpha=20.0, dropout=0.25)
    config = ours.hf.peft_config["policy"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (5, 20.0, 0.25)


def test_a_model_without_linear_layers_names_the_way_out():
    with pytest.raises(UserError, match=r"model\.lora\.targets"):
        add_adapter(build("gpt2"), "policy", rank=2, alpha=2.0)
    named = backbone("gpt2")
    before = logprobs(named, None)
    add_adapter(named.hf, "policy", rank=2, alpha=2.0, targets=("c_attn",))
    assert torch.equal(logprobs(named, "policy"), before)
    with pytest.raises(UserError, match=r"model\.lora\.targets"):
        add_adapter(build("llama"), "policy", rank=2, alpha=2.0, targets=("nothing",))


def test_merged_state_is_the_model_with_its_adapter(ours: Backbone):
    lora(ours, "policy")
    lora(ours, "critic")
    disturb(ours, "policy")
    disturb(ours, "critic", seed=5)
    plain = backbone("qwen2", seed=7)
    for adapter in ("policy", "critic", None):
        plain.hf.load_state_dict(merged_state(ours.hf, adapter))
        torch.testing.assert_close(logprobs(plain, None), logprobs(ours, adapter), atol=1e-5, rtol=1e-5)


def test_a_frozen_copy_does_not_follow(ours: Backbone):
    frozen = clone_frozen(ours)
    before = logprobs(frozen, None)
    with torch.no_grad():
        for parameter in ours.hf.parameters():
            parameter.add_(0.1)
    assert torch.equal(logprobs(frozen, None), before)
    assert not any(p.requires_grad for p in frozen.hf.parameters())


def test_dropout_acts_inside_its_context_and_nowhere_else(ours: Backbone):
    before = logprobs(ours, None)
    lora(ours, "policy", dropout=0.5)
    disturb(ours, "policy")
    still = logprobs(ours, "policy")
    assert torch.equal(still, logprobs(ours, "policy"))
    torch.manual_seed(0)
    with dropout_on([ours.hf]):
        first, second = logprobs(ours, "policy"), logprobs(ours, "policy")
        assert not torch.allclose(first, second) and not torch.allclose(first, still)
        assert torch.equal(logprobs(ours, None), before)
        torch.manual_seed(0)
        assert torch.equal(logprobs(ours, "policy"), first), "the global generator decides; a resumed run restores it"
    assert torch.equal(logprobs(ours, "policy"), still)
