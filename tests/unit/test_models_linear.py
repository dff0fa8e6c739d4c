"""Linear layers on oneDNN: the same numbers and gradients as PyTorch's own, and the same model around them."""

import pytest
import torch
from torch import nn

from model_cases import RAGGED, backbone
from tether.models import linear
from tether.models.linear import Linear, packed_weights, use_fast_linear
from tether.models.roles import Policy

needs_onednn = pytest.mark.skipif(not linear.SERVES, reason="this CPU's float32 products stay with PyTorch")


def network(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Tanh(), nn.Linear(40, 8, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (1, 24), (0, 24)])
def test_values_and_gradients_are_those_of_float64(bias: bool, shape: tuple[int, ...]):
    ours, truth = network(bias), network(bias).double()
    use_fast_linear(ours)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    wide = x.detach().double().requires_grad_(True)
    y, z = ours(x), truth(wide)
    torch.testing.assert_close(y.double(), z, atol=1e-5, rtol=1e-5)
    (y**2).sum().backward()
    (z**2).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(ours.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)


def test_gradients_flow_only_where_they_are_wanted():
    ours = network(True)
    use_fast_linear(ours)
    ours.requires_grad_(False)
    ours[2].weight.requires_grad_(True)
    ours(torch.ones(3, 24)).sum().backward()
    assert ours[2].weight.grad is not None
    assert all(p.grad is None for n, p in ours.named_parameters() if n != "2.weight")


def test_a_layer_is_still_a_plain_linear_to_everybody_else():
    ours, plain = network(True), network(True)
    use_fast_linear(ours)
    assert isinstance(ours[0], nn.Linear)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.double()  # a type that oneDNN is not asked for
    assert ours(torch.ones(2, 24, dtype=torch.float64)).dtype == torch.float64


@needs_onednn
def test_packed_weights_give_the_same_numbers_and_are_gone_afterwards():
    ours = network(True)
    use_fast_linear(ours)
    x = torch.randn(5, 24)
    with torch.no_grad():
        plain = ours(x)
        with packed_weights(ours):
            assert all(m.packed is not None for m in ours if isinstance(m, Linear))
            for rows in (1, 2, 5):  # one order of the weights serves any number of rows
                torch.testing.assert_close(ours(x[:rows]), plain[:rows], atol=1e-5, rtol=1e-5)
    assert all(m.packed is None for m in ours if isinstance(m, Linear))


@needs_onednn
def test_a_pass_with_gradient_reads_the_live_weights_inside_too():
    ours = network(False)
    use_fast_linear(ours)
    with packed_weights(ours, lambda layer: torch.zeros_like(layer.weight)):
        assert ours(torch.ones(1, 24)).any()
        with torch.no_grad():
            assert not ours(torch.ones(1, 24)).any()


@needs_onednn
def test_log_probs_of_a_model_agree_between_the_two_libraries(monkeypatch: pytest.MonkeyPatch):
    policy = Policy(backbone=backbone("llama_tied"))
    use_fast_linear(policy.backbone.hf)
    ours = policy(RAGGED, entropy=True)
    monkeypatch.setattr(linear, "SERVES", False)
    theirs = policy(RAGGED, entropy=True)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, atol=1e-5, rtol=1e-5)
