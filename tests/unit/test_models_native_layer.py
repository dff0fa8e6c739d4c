"""The compiled layer: values and gradients are those of the network's own forward in float64."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from model_cases import FAMILIES, build
from tether.core.machine import cxx
from tether.models.adapters import active, add_adapter
from tether.models.attention import NAME
from tether.models.checkpointing import checkpoint_activations
from tether.models.fused import use_fused
from tether.models.linear import SERVES, use_fast_linear
from tether.models.native import layer as native
from tether.models.packed import PackedLayout, PrefillLayout

pytestmark = pytest.mark.skipif(not SERVES or cxx() is None, reason="no AVX-512, or no C++ compiler")
# One with and one without biases on the products.
SERVED = ("llama_heads_16", "qwen2_heads_16")
# Rows that end within a vector, at one, and beyond a piece of work; prompts of one token, and with one completion.
BLOCKS = {
    "a group": ((37, (20, 1, 16)),),
    "sixteen": ((8, (3, 5)),),
    "one short of a vector": ((20, (5, 6)),),
    "several pieces": ((17, (15, 18)), (1, (4,)), (40, (31, 2, 16))),
}


def with_ours(model: nn.Module) -> nn.Module:
    """``model`` as ``load_backbone`` leaves it."""
    model.set_attn_implementation(NAME)
    use_fast_linear(model)
    use_fused(model)
    native.use_native_layers(model.base_model)
    return model


def prepared(family: str) -> nn.Module:
    return with_ours(build(family))


def own_layer(family: str) -> tuple[nn.Module, nn.Module]:
    """A compiled layer, and its float64 twin as transformers has it."""
    ours = prepared(family).base_model.layers[1]
    assert isinstance(ours, native.NativeLayer)
    model = build(family)
    model.set_attn_implementation(NAME)
    twin = model.base_model.layers[1].double()
    # So that it matters which norm an epsilon is of.
    ours.post_attention_layernorm.epsilon = twin.post_attention_layernorm.variance_epsilon = 0.5
    return ours.requires_grad_(True), twin.requires_grad_(True)


def row(blocks, width: int, depth: int) -> dict[str, Tensor]:
    """The input of a layer and the angles of its tokens, others in one half of a head than in the other."""
    places: list[Tensor] = []
    for prompt, completions in blocks:
        places += [torch.arange(prompt), *(torch.arange(prompt, prompt + n) for n in completions)]
    angles = torch.cat(places)[:, None] * torch.linspace(1, 0.05, depth // 2)
    x = torch.randn(1, len(angles), width, generator=torch.Generator().manual_seed(0))
    return {"x": x, "angles": torch.cat([angles, 0.7 * angles], dim=1)[None]}


def run(layer: nn.Module, given: dict[str, Tensor], blocks, kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return run_as(layer, given, PackedLayout(blocks=blocks), kind)


def run_as(
    layer: nn.Module, given: dict[str, Tensor], layout: PackedLayout | PrefillLayout, kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    x = given["x"].to(kind, copy=True).requires_grad_(True)
    angles = given["angles"].to(kind)
    places = (angles.cos(), angles.sin())
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    return x, layer(x, attention_mask=mask, position_embeddings=places, tether_layout=layout)


def sizes(layer: nn.Module) -> tuple[int, int]:
    return len(layer.input_layernorm.weight), layer.self_attn.head_dim


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("family", SERVED)
def test_values_and_gradients(family: str, blocks):
    ours, truth = own_layer(family)
    given = row(blocks, *sizes(ours))
    x, y = run(ours, given, blocks)
    wide, z = run(truth, given, blocks, torch.float64)
    assert type(y.grad_fn.next_functions[0][0]).__name__ == "_LayerBackward"
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(pull)
    z.backward(pull.double())
    expected = dict(truth.named_parameters(), x=wide)
    found = dict(ours.named_parameters(), x=x)
    assert found.keys() == expected.keys()
    differences = {"y": ((y - z).abs().max() / z.abs().max()).item()}
    for name, parameter in found.items():
        gap = (parameter.grad - expected[name].grad).abs().max()
        differences[name] = (gap / expected[name].grad.abs().max()).item()
    assert max(differences.values()) < 2e-5, differences


def test_a_pass_without_gradient_gives_the_same_bits():
    ours, _ = own_layer("llama_heads_16")
    blocks = BLOCKS["a group"]
    given = row(blocks, *sizes(ours))
    with torch.no_grad():
        _, plain = run(ours, given, blocks)
    assert torch.equal(plain, run(ours, given, blocks)[1])


@pytest.mark.parametrize("family", SERVED)
def test_prompts_leave_their_keys_and_values(family: str, monkeypatch: pytest.MonkeyPatch):
    ours, truth = own_layer(family)
    blocks = ((7, ()), (1, ()), (33, ()))
    given = row(blocks, *sizes(ours))
    found, expected = PrefillLayout(lengths=(7, 1, 33)), PrefillLayout(lengths=(7, 1, 33))
    taken: list[Tensor] = []
    native_run = native._run
    monkeypatch.setattr(native, "_run", lambda x, *rest: taken.append(x) or native_run(x, *rest))
    with torch.no_grad():
        y, z = run_as(ours, given, found)[1], run_as(truth, given, expected, torch.float64)[1]
    assert len(taken) == len(found.keys) == len(found.values) == 1
    for mine, right in ((y, z), (found.keys[0], expected.keys[0]), (found.values[0], expected.values[0])):
        assert mine.shape == right.shape and (mine - right).abs().max() < 2e-5 * right.abs().max()
    # With a gradient to follow, what leaves a layer has to be in its graph.
    assert run_as(ours, given, PrefillLayout(lengths=(7, 1, 33)))[1].requires_grad and len(taken) == 1


def test_what_is_frozen_has_no_gradient_and_passes_it_on():
    ours, _ = own_layer("qwen2_heads_16")
    blocks = BLOCKS["a group"]
    given = row(blocks, *sizes(ours))
    x, y = run(ours, given, blocks)
    y.square().sum().backward()
    everything = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    trained = ("self_attn.k_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name in trained)
    other, y = run(ours, given, blocks)
    y.square().sum().backward()
    assert torch.equal(other.grad, x.grad)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, everything[name]) if name in trained else parameter.grad is None


def test_only_what_the_backward_reads_is_kept():
    """Of a token: x, q, k, v, the output of attention, z, gate and up; no normed states, and h not."""
    ours, _ = own_layer("llama_heads_16")
    blocks = BLOCKS["several pieces"]
    given = row(blocks, *sizes(ours))
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in ours.parameters()}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(ours, given, blocks)
    config, n = ours.self_attn.config, given["x"].shape[1]
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    by_token = 2 * config.hidden_size + heads + 2 * config.intermediate_size
    # And of each a number of its two norms, and of every head of its scores.
    assert sum(kept.values()) == n * (by_token + 2 + config.num_attention_heads)


def test_an_adapter_that_acts_is_trained_through_the_network_s_own_layers():
    """And one that does not changes no bit of what the network gives without it."""
    model = prepared("llama_heads_16")
    layer, blocks = model.base_model.layers[1], BLOCKS["a group"]
    given = row(blocks, *sizes(layer))
    before = run(layer, given, blocks)[1]
    add_adapter(model, "policy", rank=2, alpha=4, targets=["q_proj"])
    torch.nn.init.ones_(layer.self_attn.q_proj.lora_B["policy"].weight)
    for name, same in {"policy": False, None: True, "another": True}.items():
        with active(model, name):
            assert torch.equal(run(layer, given, blocks)[1], before) == same, name
    with active(model, "policy"):
        run(layer, given, blocks)[1].sum().backward()
    assert layer.self_attn.q_proj.lora_B["policy"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "mlp.gate_proj.weight", "input_layernorm.weight"])
def test_a_broken_weight_shows(name: str):
    ours, _ = own_layer("llama_heads_16")
    blocks = BLOCKS["a group"]
    with torch.no_grad():
        ours.get_parameter(name)[5:6] = float("nan")
    assert run(ours, row(blocks, *sizes(ours)), blocks)[1].isnan().any()


def test_under_autocast_the_network_s_own_layers_run():
    ours, _ = own_layer("llama_heads_16")
    blocks = BLOCKS["a group"]
    given = row(blocks, *sizes(ours))
    exact = run(ours, given, blocks)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(ours, given, blocks)[1]
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.02


def test_layers_that_are_run_again_in_the_backward_give_the_same_gradients():
    blocks = BLOCKS["a group"]
    found = []
    for again in (False, True):
        model = prepared("llama_heads_16").requires_grad_(True)
        if again:
            checkpoint_activations(model)
        layer = model.base_model.layers[1]
        run(layer, row(blocks, *sizes(layer)), blocks)[1].square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen3", "norms of queries and keys"),
        ("gemma2", "four norms and a soft cap"),
        ("olmo2", "norms after, not before"),
        ("mistral_window", "a window"),
        ("phi3_window", "one product for queries, keys and values"),
    ],
)
def test_other_networks_are_left_alone(family: str, why: str):
    config = FAMILIES[family]()
    # Of sizes that the kernels take.
    for name, value in {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}.items():
        setattr(config, name, value)
    assert served(config) == [False, False], why


def test_layers_whose_numbers_differ_are_left_alone():
    """Granite has a Llama's parts under their names, and may scale what it adds to the residual."""
    config = FAMILIES["granite"]()
    config.hidden_size, config.intermediate_size = 64, 96
    assert served(config) == [True, True]
    config.residual_multiplier = 0.5
    assert served(config) == [False, False]


def served(config: hf.PretrainedConfig) -> list[bool]:
    """Of each layer of such a network."""
    model = with_ours(hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    return [isinstance(layer, native.NativeLayer) for layer in model.base_model.layers]


def test_a_norm_s_gradient_does_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    x, grad, beside = (torch.randn(200, 48, generator=generator) for _ in range(3))
    weight, threads = torch.randn(48, generator=generator), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            _, inverse = native._norm(x, weight, 1e-6)
            found.append(native._norm_backward(x, weight, inverse, grad, beside))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
