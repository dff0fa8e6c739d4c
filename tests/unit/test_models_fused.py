"""Fused norms and gated layers: the numbers and gradients of the modules they stand in for, in float64's eyes."""

import copy

import pytest
import torch
from torch import nn

from model_cases import RAGGED, backbone, build
from tether.backends.local import learner
from tether.core.batches import Batch, Outputs
from tether.core.metrics import Mean
from tether.core.protocols import LossOutput
from tether.losses import CrossEntropy
from tether.models import linear
from tether.models.adapters import active, add_adapter
from tether.models.fused import GatedMLP, Norm, use_fused
from tether.models.linear import use_fast_linear
from tether.models.roles import Policy, Scorer, new_head

# Family -> what its norms hold less of in their weight.
SHIFTS = {"llama": 0.0, "qwen3": 0.0, "gemma2": 1.0, "gemma3": 1.0, "olmo3": 0.0}
needs_onednn = pytest.mark.skipif(not linear.SERVES, reason="this CPU's float32 products stay with PyTorch")


def fused(family: str) -> tuple[nn.Module, nn.Module]:
    """A model and its float64 twin as transformers has it, with weights that are not those of the start."""
    plain = build(family).base_model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours = copy.deepcopy(plain)
    use_fast_linear(ours)
    use_fused(ours)
    return ours.requires_grad_(True), plain.double().requires_grad_(True)


def parts(model: nn.Module, kind: type) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kind)]


def by_name(model: nn.Module, twin: nn.Module, kind: type) -> list[tuple[nn.Module, nn.Module]]:
    return [(m, twin.get_submodule(name)) for name, m in model.named_modules() if isinstance(m, kind)]


def check(ours: nn.Module, truth: nn.Module, width: int) -> None:
    x = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    wide = x.detach().double().requires_grad_(True)
    pull = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(2))
    y, z = ours(x), truth(wide)
    torch.testing.assert_close(y.double(), z, atol=1e-4, rtol=1e-4)
    (y * pull).sum().backward()
    (z * pull.double()).sum().backward()
    for mine, theirs in zip((x, *ours.parameters()), (wide, *truth.parameters()), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(ours(x), y)


@pytest.mark.parametrize("family", SHIFTS)
def test_norms(family: str):
    ours, truth = fused(family)
    pairs = by_name(ours, truth, Norm)
    named = [m for m in ours.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(pairs) == len(named) > 2 and {m.shift for m, _ in pairs} == {SHIFTS[family]}
    for mine, theirs in pairs:
        check(mine, theirs, len(mine.weight))


@needs_onednn
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gated_layers(family: str):
    ours, truth = fused(family)
    pairs = by_name(ours, truth, GatedMLP)
    assert len(pairs) == ours.config.num_hidden_layers
    for mine, theirs in pairs:
        check(mine, theirs, ours.config.hidden_size)


def test_another_activation_is_left_alone():
    """Gemma's gate is a GELU: a SwiGLU in its place would be another network."""
    assert not parts(fused("gemma2")[0], GatedMLP)


@needs_onednn
def test_an_adapter_on_the_way_down_is_trained():
    model = build("llama")
    use_fast_linear(model)
    use_fused(model)
    add_adapter(model, "policy", rank=2, alpha=4, targets=["down_proj"])
    layer = model.base_model.layers[0].mlp
    assert isinstance(layer, GatedMLP)
    with active(model, "policy"):
        layer(torch.ones(1, 2, model.config.hidden_size)).sum().backward()
    assert layer.down_proj.lora_B["policy"].weight.grad.abs().sum() > 0


def test_a_frozen_model_passes_the_gradient_on_alone():
    ours, _ = fused("llama")
    ours.requires_grad_(False)
    for module in (*parts(ours, Norm), *parts(ours, GatedMLP)):
        x = torch.ones(1, 2, ours.config.hidden_size, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None and all(p.grad is None for p in module.parameters())


@needs_onednn
def test_under_autocast_what_feeds_a_product_is_rounded_and_the_last_state_is_not():
    ours, truth = fused("llama")
    x = torch.randn(1, 6, ours.config.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    wide = x.detach().double().requires_grad_(True)
    for kind in (Norm, GatedMLP):
        for mine, theirs in by_name(ours, truth, kind):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = mine(x)
            assert y.dtype == (torch.float32 if mine is ours.norm else torch.bfloat16)
            z = theirs(wide)
            gradients = [torch.autograd.grad(t.double().square().sum(), at)[0] for t, at in ((y, x), (z, wide))]
            for found, expected in ((y, z), gradients):
                assert (found.double() - expected).norm() < 0.02 * expected.norm()
            assert gradients[0].dtype == torch.float32


class SquaredScores:
    """Σ score²: a loss that the language-model head has no part in."""

    needs: frozenset[str] = frozenset()

    def count(self, batch: Batch) -> float:
        return float(len(batch.lengths))

    def __call__(self, outputs: Outputs, batch: Batch) -> LossOutput:
        assert outputs.scores is not None
        return LossOutput(loss=Mean(outputs.scores.square().sum(), self.count(batch)))


@pytest.mark.parametrize("budget", [10_000, 12], ids=["one micro-batch", "several"])
@pytest.mark.parametrize("head", ["own", "none"])
def test_a_tied_embedding_has_the_gradient_of_both_its_uses(head: str, budget: int, monkeypatch: pytest.MonkeyPatch):
    """As rows where the language-model head has a gradient too, and alone, for a reward model's; always a plain one."""
    found = []
    for sparse in (True, False):
        if not sparse:
            monkeypatch.setattr(learner, "use_sparse_embedding", lambda network: None)
        ours = backbone("llama_tied")
        torch.manual_seed(0)
        role = Policy(backbone=ours) if head == "own" else Scorer(backbone=ours, head=new_head(ours, zero=False))
        settings = learner.AdamWSettings(learning_rate=lambda step: 0.0)
        made = learner.LocalLearner(role, settings, tokens_per_micro_batch=budget)
        made.forward_backward(RAGGED, CrossEntropy() if head == "own" else SquaredScores())
        gradient = ours.hf.get_input_embeddings().weight.grad
        assert ours.hf.get_input_embeddings().sparse == sparse
        assert not gradient.is_sparse and gradient.abs().max() > 0
        found.append(gradient.clone())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
