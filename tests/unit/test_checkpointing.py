"""Activation checkpointing: the same gradients in every layout and with every kind of adapter, and less held."""

import copy

import pytest
import torch
from torch import nn

from method_cases import config, demonstrations, go, series
from model_cases import RAGGED, backbone, random_batch
from tether.backends.local.learner import AdamWSettings, LocalLearner
from tether.core.errors import UserError
from tether.losses import CrossEntropy
from tether.models.adapters import active, add_adapter
from tether.models.backbone import Backbone
from tether.models.checkpointing import checkpoint_activations
from tether.models.roles import ActorCritic, Policy, Role, Scorer, new_head


def gradients(role: Role) -> dict[str, torch.Tensor]:
    learner = LocalLearner(role, AdamWSettings(learning_rate=lambda step: 0.0), tokens_per_micro_batch=10_000)
    torch.manual_seed(7)  # for dropout
    learner.forward_backward(RAGGED, CrossEntropy())
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.parameters.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and any(g.any() for g in right.values())
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", "packed"), ("gemma2", "packed"), ("mistral_window", "packed"), ("gpt2", "packed"), ("llama", "padded")],
)
def test_gradients_are_the_same(family: str, mode: str):
    plain, checked = backbone(family, mode), backbone(family, mode)
    checkpoint_activations(checked.hf)
    same(gradients(Policy(backbone=checked)), gradients(Policy(backbone=plain)))


def adapted(dropout: float) -> Backbone:
    made = backbone("llama")
    for name in ("policy", "critic"):  # the one that was added last is not the one that is trained
        add_adapter(made.hf, name, rank=2, alpha=4.0, dropout=dropout)
    with torch.no_grad():
        for n, p in made.hf.named_parameters():
            if ".lora_B" in n:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(n)))
    return made


def test_a_layer_runs_again_under_its_own_adapter_and_dropout():
    """In the backward the other adapter is the active one, and dropout is off."""
    found = []
    for check in (False, True):
        made = adapted(dropout=0.4)
        if check:
            checkpoint_activations(made.hf)
        with active(made.hf, "critic"):
            found.append(gradients(Policy(backbone=made, adapter="policy")))
    same(found[1], found[0])
    without = gradients(Policy(backbone=adapted(dropout=0.0), adapter="policy"))
    assert any(not torch.allclose(found[0][n], g, atol=1e-4) for n, g in without.items()), "dropout was on"


def test_two_adapters_of_one_backward_and_one_network_given_twice():
    def total(made: Backbone) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        critic = Scorer(backbone=made, head=new_head(made, zero=False), adapter="critic")
        role = ActorCritic(policy=Policy(backbone=made, adapter="policy"), critic=critic)
        for parameter in role.parameters().values():
            parameter.requires_grad_(True)
        outputs = role(RAGGED)
        (outputs.logprobs.sum() + outputs.values.sum()).backward()  # type: ignore[union-attr]
        return {n: p.grad for n, p in role.parameters().items() if p.grad is not None}

    checked = adapted(dropout=0.0)
    checkpoint_activations(checked.hf)
    layer = checked.hf.model.layers[0].forward
    checkpoint_activations(checked.hf)
    assert checked.hf.model.layers[0].forward is layer, "wrapped once"
    same(total(checked), total(adapted(dropout=0.0)))


def held(made: Backbone) -> int:
    """Bytes of tensors that the forward pass keeps for the backward."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    made.hf.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = made.hidden(random_batch((40,), [(0, 40)]), None).predicts
    assert states.requires_grad
    return sum(kept.values())


def test_less_is_held():
    checked = backbone("llama")
    checkpoint_activations(checked.hf)
    assert held(checked) < held(backbone("llama")) / 4


def test_passes_without_gradient_and_copies_are_as_they_were():
    plain, checked = backbone("llama"), backbone("llama")
    checkpoint_activations(checked.hf)
    copied = Backbone(hf=copy.deepcopy(checked.hf), tokenizer=None, name="copy")  # type: ignore[arg-type]
    with torch.no_grad():
        checked.hf.model.layers[0].mlp.down_proj.weight.zero_()
        want = Policy(backbone=plain)(RAGGED).logprobs
        assert torch.equal(Policy(backbone=copied)(RAGGED).logprobs, want), "a copy reads its own weights"
        assert not torch.equal(Policy(backbone=checked)(RAGGED).logprobs, want)


def test_layers_that_are_not_known_are_refused():
    with pytest.raises(UserError, match="would be ignored; take it out"):
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2)))


def test_a_run_with_it_ends_where_one_without_does(tiny_model_folder, tmp_path):
    data = demonstrations(tmp_path)
    plain, checked = (
        go(
            config(
                "sft",
                tiny_model_folder,
                data,
                tmp_path / str(on),
                optim={"learning_rate": 1e-3, "checkpoint_activations": on},
            )
        )
        for on in (False, True)
    )
    assert series(checked, "loss") == pytest.approx(series(plain, "loss"), rel=1e-4)
