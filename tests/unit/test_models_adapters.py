"""LoRA: fresh adapters are the identity, switching is exact, and no adapter reaches into another or into the base."""

import pytest
import torch

import model_cases
from model_cases import FAMILIES, RAGGED, backbone, build, one_by_one
from tether.core.batches import pad_rows
from tether.core.errors import UserError
from tether.models.adapters import active, adapter_parameters, add_adapter, dropout_on, merged_state
from tether.models.attention import NAME
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


def adapted_head(family: str, **options) -> tuple[Backbone, Policy]:
    ours = backbone(family)
    lora(ours, "policy", targets=("q_proj", "lm_head"), **options)
    disturb(ours, "policy")
    return ours, Policy(backbone=ours, adapter="policy", temperature=0.8)


@pytest.mark.parametrize("family", ["llama", "phi", "granite", "gemma2_untied"])
def test_an_adapter_on_the_head_counts_and_learns(family: str, monkeypatch: pytest.MonkeyPatch):
    """Against peft's own forward of the whole model; Phi's head has a bias, Granite's is scaled, Gemma's is capped."""
    untied = {"gemma2_untied": lambda: _untied(FAMILIES["gemma2"]())}
    monkeypatch.setattr(model_cases, "FAMILIES", FAMILIES | untied)
    ours, policy = adapted_head(family)
    weights = torch.randn(RAGGED.tokens.shape, generator=torch.Generator().manual_seed(0))
    parameters = adapter_parameters(ours.hf, "policy")
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def gradients(logprobs: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
        objective = ((logprobs + 0.3 * entropy) * weights).sum()
        return dict(zip(parameters, torch.autograd.grad(objective, list(parameters.values())), strict=True))

    with active(ours.hf, "policy"):
        ours.hf.set_attn_implementation("eager")
        truth = one_by_one(ours.hf, RAGGED, temperature=0.8)
        ours.hf.set_attn_implementation(NAME)
        logprobs, entropy = pad_rows(truth.logprobs).float(), pad_rows(truth.entropy).float()
        right = gradients(logprobs, entropy)
    found = policy(RAGGED, entropy=True)
    torch.testing.assert_close(found.logprobs, logprobs, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(found.entropy, entropy, atol=5e-5, rtol=5e-5)
    assert sum("lm_head" in n for n in parameters) == 2
    for name, grad in gradients(found.logprobs, found.entropy).items():
        scale = float(right[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(grad / scale, right[name] / scale, atol=2e-4, rtol=0, msg=name)
    bare = Policy(backbone=ours, temperature=0.8)(RAGGED).logprobs
    assert float((found.logprobs - bare).detach().abs().max()) > 0.1


def _untied(config):
    config.tie_word_embeddings = False
    return config


@torch.no_grad()
def test_an_adapter_on_the_head_is_sampled_from_merged_and_drops_out():
    ours, policy = adapted_head("llama", dropout=0.5)
    plain = build("llama")
    plain.load_state_dict(merged_state(ours.hf, "policy"))
    right = pad_rows(one_by_one(plain, RAGGED, temperature=0.8).logprobs).float()
    torch.testing.assert_close(policy(RAGGED).logprobs, right, atol=5e-5, rtol=5e-5)
    states = torch.randn(5, 32)
    with active(ours.hf, "policy"):
        torch.testing.assert_close(ours.logits(states), plain.lm_head(states), atol=5e-5, rtol=5e-5)
    with active(ours.hf, None):
        torch.testing.assert_close(ours.logits(states), build("llama").lm_head(states), atol=5e-5, rtol=5e-5)
    head = [m for n, m in ours.hf.named_modules() if n == "lm_head"]
    with dropout_on(head):
        assert float((policy(RAGGED).logprobs - right).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("family", "target", "why"),
    [
        ("llama", "embed_tokens", "model.embed_tokens: it is an embedding"),
        ("llama_tied", "lm_head", "lm_head: it is the head of this model, which is its embedding too"),
        ("llama", "v_porj", "v_porj: no layer .*, did you mean v_proj"),
    ],
)
def test_a_target_that_would_be_ignored_is_refused_by_name(family: str, target: str, why: str):
    with pytest.raises(UserError, match=rf"LoRA can't be put on {why}(.|\n)*model\.lora\.targets"):
        lora(backbone(family), "policy", targets=("q_proj", target))
