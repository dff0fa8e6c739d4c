"""The decoder that is written out: which networks it serves, and that its numbers are theirs."""

from typing import Any

import pytest
import torch

from model_cases import adapt, backbone
from tether.models import linear
from tether.models.backbone import Backbone
from tether.models.decoder import Decoder
from tether.models.decoding import PACKING_PAYS
from tether.models.native import build
from tether.models.packed import PackedLayout

pytestmark = pytest.mark.skipif(not linear.SERVES, reason="nothing is packed on this CPU")
SERVED = ["llama", "llama_tied", "llama_rope_llama3", "qwen2", "qwen3", "granite"]
NOT_SERVED = [
    "mistral_window", "qwen2_window", "gemma2", "gemma3", "phi", "olmo2", "olmo3", "olmo_clipped", "smollm3",
    "cohere2", "gpt2", "deepseek_v3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")


@torch.no_grad()
def both(ours: Any, adapter: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of a packed row by the model itself and by what decodes."""
    ids = torch.randint(3, 50, (1, 14), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(6), 6, 7, 8, 6, 7, 0, 1, 2]])
    layout = PackedLayout(blocks=((6, (3, 2)), (3, ())))
    with ours.decoding(adapter, PACKING_PAYS):
        found = ours.prefill(layout, ids, positions)
        assert isinstance(ours.passes.prefill, Decoder) == ours.agreed["packed"]
    with pytest.raises(RuntimeError, match="inside"):
        ours.prefill(layout, ids, positions)
    with linear_as_it_is(ours, adapter):
        return ours.run_trunk(layout, ids, positions), found


def linear_as_it_is(ours: Backbone, adapter: str | None):
    return ours.decoding(adapter, PACKING_PAYS - 1)


@pytest.mark.parametrize("adapter", [None, "policy"])
@pytest.mark.parametrize("family", SERVED)
def test_its_numbers_are_the_models(family: str, adapter: str | None):
    ours = backbone(family)
    adapt(ours, adapter)
    expected, found = both(ours, adapter)
    assert ours.agreed == {"packed": True}
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_window_that_no_short_row_reaches_is_a_window():
    """Mistral 7B's is of 4,096 tokens: a comparison of short rows sees nothing of it."""
    ours = backbone("mistral_window")
    ours.hf.config.sliding_window = 64
    both(ours, None)
    assert ours.agreed == {"packed": False}
    ours.hf.config.sliding_window = None
    ours.agreed.clear()
    both(ours, None)
    assert ours.agreed == {"packed": True}


@pytest.mark.parametrize("family", NOT_SERVED)
def test_another_shape_decodes_through_its_own_layers(family: str):
    ours = backbone(family)
    expected, found = both(ours, None)
    assert ours.agreed == {"packed": False}
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_network_that_only_looks_like_a_llama_is_found_out():
    ours = backbone("llama")
    layer = ours.hf.base_model.layers[0]
    layer.register_forward_hook(lambda module, args, out: 1.05 * out)
    both(ours, None)
    assert ours.agreed == {"packed": False}


def test_it_reads_the_weights_as_they_are_at_each_call():
    ours = backbone("llama")
    both(ours, None)
    with torch.no_grad():
        ours.hf.base_model.layers[0].mlp.up_proj.weight *= 2
    expected, found = both(ours, None)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
