"""The compiled passes: their numbers are the model's own whatever its sizes, and a row's do not depend on the rest."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from draw_cases import PROMPTS, Letters
from model_cases import SMALL, VOCABULARY, adapt, backbone
from tether.backends.local.sampler import LocalSampler
from tether.core import machine
from tether.core.machine import cxx
from tether.core.protocols import SamplingSettings
from tether.models import decoding
from tether.models.attention import NAME
from tether.models.backbone import Backbone
from tether.models.fused import use_fused
from tether.models.linear import SERVES, use_fast_linear
from tether.models.load import load_backbone
from tether.models.native import build
from tether.models.native.decoder import NativeDecoder
from tether.models.native.decoder import _Linear as Linear
from tether.models.packed import PrefillLayout

needs_kernels = pytest.mark.skipif(
    not SERVES or cxx() is None, reason="no AVX-512, or no C++ compiler: nothing is compiled here"
)
SERVED = ["llama_heads_16", "qwen2_heads_16", "qwen3"]
# Sizes at the edges of the kernels' tiles: none of them a multiple of 16 but the depth of a head.
SIZES: dict[str, dict[str, Any]] = {
    "one head of keys": {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1},
    "a head of keys each": {"hidden_size": 39, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "deep heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
    "odd widths": {"hidden_size": 36, "intermediate_size": 51, "attention_bias": True, "mlp_bias": True},
    "many queries to a key": {
        "hidden_size": 40,
        "num_attention_heads": 20,
        "num_key_value_heads": 1,
        "vocab_size": 101,
    },
}


def of_sizes(sizes: dict[str, Any]) -> Backbone:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "head_dim": 16, **sizes})).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.set_attn_implementation(NAME)  # type: ignore[attr-defined]
    use_fast_linear(model)
    use_fused(model)
    return Backbone(hf=model, tokenizer=None, name="sizes")


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_kernels(ours: Backbone, prompts: list[torch.Tensor], rows: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """``rows``: (prompt, its tokens [T]) -> states [W, T, d], token by token. All rows have T tokens."""
    with ours.decoding(None, 1):
        assert isinstance(ours.passes, NativeDecoder)
        layout = PrefillLayout(lengths=tuple(map(len, prompts)))
        ours.prefill(layout, torch.cat(prompts)[None], torch.cat([torch.arange(len(p)) for p in prompts])[None])
        longest = max(layout.lengths)

        def held(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            pieces = [t[0].split(layout.lengths, dim=1) for t in tensors]
            # What stands behind a prompt's last key must not matter.
            filled = [
                [torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[1]), value=1e9) for p in ps] for ps in pieces
            ]
            return [torch.stack(ps).contiguous() for ps in filled]

        order = sorted(range(len(rows)), key=lambda i: rows[i][0])
        counts = [sum(p == g for p, _ in rows) for g in range(len(prompts))]
        steps = len(rows[0][1])
        keys = held(layout.keys)
        own = [torch.full((len(rows), k.shape[1], steps + 3, k.shape[3]), 1e9) for k in keys]
        state: Any = SimpleNamespace(
            prompt_keys=keys,
            prompt_values=held(layout.values),
            keys=own,
            values=[t.clone() for t in own],
            prompt_lengths=torch.tensor(layout.lengths),
            lengths=torch.zeros(len(rows), dtype=torch.long),
            members=torch.tensor(order),
            first=torch.tensor([0, *counts]).cumsum(0),
        )
        starts = torch.tensor([len(prompts[p]) for p, _ in rows])
        tokens = torch.stack([t for _, t in rows])
        found = []
        for at in range(steps):
            found.append(ours.step(state, tokens[:, at : at + 1], (starts + at)[:, None]))
            state.lengths += 1
        return torch.cat(found, dim=1)


@torch.no_grad()
def in_double(ours: Backbone, prompts: list[torch.Tensor], rows: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The same states by transformers' own layers in float64, one row at a time."""
    plain = type(ours.hf)(ours.hf.config)
    plain.load_state_dict(ours.hf.state_dict())
    plain.double().eval().set_attn_implementation("eager")
    whole = [torch.cat([prompts[p], tokens])[None] for p, tokens in rows]
    return torch.stack([plain.base_model(w).last_hidden_state[0, -len(rows[0][1]) :] for w in whole])


@needs_kernels
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("count", [1, 16, 50, 117])
def test_states_are_the_models_in_double(sizes: dict[str, Any], count: int):
    """Rows of three prompts in no order: 1, 16, 64 and more lanes, and every remainder of a tile."""
    ours = of_sizes(sizes)
    prompts = [ids_of(n, seed=n) for n in (1, 9, 33)]
    rows = [(i * 7 % 3 if count > 1 else 1, ids_of(4, seed=100 + i)) for i in range(count)]
    found = by_kernels(ours, prompts, rows)
    torch.testing.assert_close(found.double(), in_double(ours, prompts, rows), atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("sizes", ["a head of keys each", "deep heads", "many queries to a key"])
def test_rows_that_have_drawn_much(sizes: str):
    """Own tokens beyond two vectors."""
    ours = of_sizes(SIZES[sizes])
    prompts = [ids_of(n, seed=n) for n in (3, 20)]
    rows = [(i % 2, ids_of(37, seed=100 + i)) for i in range(5)]
    found = by_kernels(ours, prompts, rows)
    torch.testing.assert_close(found.double(), in_double(ours, prompts, rows), atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("family", SERVED)
def test_a_rows_numbers_do_not_depend_on_the_rows_beside_it(family: str):
    """To the last bit."""
    ours = backbone(family)
    prompts = [ids_of(n, seed=n) for n in (5, 21)]
    rows = [(i % 2, ids_of(5, seed=100 + i)) for i in range(70)]
    together = by_kernels(ours, prompts, rows)
    assert torch.equal(by_kernels(ours, prompts, rows[::-1]), together.flip(0))
    assert torch.equal(by_kernels(ours, prompts, rows[:17]), together[:17])
    assert torch.equal(by_kernels(ours, prompts, rows[3:4]), together[3:4])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int):
    ours, prompts, rows = backbone("qwen3"), [ids_of(7)], [(0, ids_of(3, seed=i)) for i in range(20)]
    expected = by_kernels(ours, prompts, rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(by_kernels(ours, prompts, rows), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 16, 17, 50, 117])
def test_a_product_writes_its_rows_and_nothing_behind_them(rows: int):
    outputs, inputs, beyond = 101, 24, 80
    x, weight = (torch.randn(n, inputs, generator=torch.Generator().manual_seed(n)) for n in (rows, outputs))
    y = torch.full((rows + beyond, outputs), 7.0)
    scratch = torch.empty(3 * inputs * (rows + 16))
    linear = Linear(weight.data_ptr(), None, outputs)
    x_at, y_at, scratch_at = (ctypes.c_void_p(t.data_ptr()) for t in (x, y, scratch))
    width, count, threads, rounded = map(ctypes.c_int64, (inputs, rows, 2, 0))
    build.library().tether_product(ctypes.byref(linear), width, x_at, count, y_at, scratch_at, threads, rounded)
    torch.testing.assert_close(y[:rows], x @ weight.T, atol=1e-4, rtol=1e-5)
    assert (y[rows:] == 7).all()


def drawn(ours: Backbone, adapter: str | None, autocast: str = "off") -> list[Any]:
    from tether.models.roles import Policy

    live = LocalSampler(policy=Policy(backbone=ours, adapter=adapter), chat=Letters(7, 8), width=6)  # type: ignore[arg-type]
    return live.sample(PROMPTS, n=4, settings=SamplingSettings(max_new_tokens=18, autocast=autocast), seed=1)


@needs_kernels
@pytest.mark.parametrize("adapter", [None, "policy"])
@pytest.mark.parametrize("family", SERVED)
def test_draws_are_those_of_the_packed_passes(family: str, adapter: str | None, monkeypatch: pytest.MonkeyPatch):
    ours = backbone(family)
    adapt(ours, adapter)
    found = drawn(ours, adapter)
    assert ours.agreed == {"compiled": True}
    monkeypatch.setenv(build.SWITCH, "0")
    expected = drawn(ours, adapter)
    assert ours.agreed["packed"]
    for a, b in zip(found, expected, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no products of bfloat16 on this CPU")
@pytest.mark.parametrize("family", SERVED)
def test_products_in_bfloat16_are_near_and_are_not_the_same(family: str):
    ours, prompts, rows = backbone(family), [ids_of(9)], [(0, ids_of(3, seed=i)) for i in range(20)]
    exact, real = by_kernels(ours, prompts, rows), Backbone.decoding
    try:
        Backbone.decoding = lambda self, adapter, steps: real(self, adapter, steps, torch.bfloat16)  # type: ignore
        rounded = by_kernels(ours, prompts, rows)
    finally:
        Backbone.decoding = real
    gap = (rounded - exact).abs().mean() / exact.abs().mean()
    assert 1e-4 < float(gap) < 0.03


@needs_kernels
def test_a_network_that_they_do_not_fit_decodes_otherwise():
    for family, reason in (("llama", "heads of 8"), ("gemma2", "caps"), ("mistral_window", "a window")):
        ours = backbone(family)
        with ours.decoding(None, 1):
            assert not isinstance(ours.passes, NativeDecoder), reason
    halved = backbone("qwen3")
    halved.hf.to(torch.bfloat16)
    with halved.decoding(None, 1):
        assert not isinstance(halved.passes, NativeDecoder)


@needs_kernels
def test_layers_of_different_sizes_decode_otherwise():
    """As pruning leaves them: the kernels have memory for one size."""
    ours = backbone("qwen3")
    mlp = ours.hf.base_model.layers[1].mlp
    for name, (outputs, inputs) in {"gate": (64, 32), "up": (64, 32), "down": (32, 64)}.items():
        setattr(mlp, f"{name}_proj", torch.nn.Linear(inputs, outputs, bias=False))
    use_fast_linear(ours.hf)
    with ours.decoding(None, 1):
        assert not isinstance(ours.passes, NativeDecoder)
    assert "compiled" not in ours.agreed, "not even tried"


@needs_kernels
def test_a_network_that_only_looks_like_a_llama_is_found_out():
    ours = backbone("qwen3")
    ours.hf.base_model.layers[0].register_forward_hook(lambda module, args, out: 1.05 * out)
    with ours.decoding(None, 1):
        assert not isinstance(ours.passes, NativeDecoder)
    assert ours.agreed == {"compiled": False}


@needs_kernels
def test_weights_are_read_as_they_are_at_each_call():
    ours, prompts, rows = backbone("qwen3"), [ids_of(4)], [(0, ids_of(2))]
    by_kernels(ours, prompts, rows)
    with torch.no_grad():
        ours.hf.base_model.layers[0].mlp.up_proj.weight *= 2
    found = by_kernels(ours, prompts, rows)
    torch.testing.assert_close(found.double(), in_double(ours, prompts, rows), atol=1e-4, rtol=1e-4)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not looked for the kernels yet, and an empty cache."""
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    monkeypatch.delenv(build.SWITCH, raising=False)
    return tmp_path


@needs_kernels
def test_they_are_compiled_once_and_that_is_said(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    assert build.library(said.append) is build.library(said.append)
    assert len(said) == 1 and "compiling the kernels once" in said[0] and str(fresh) in said[0]
    monkeypatch.setattr(build, "_loaded", [])
    assert build.library(said.append) is not None
    assert len(said) == 1 and len(list((fresh / "native").iterdir())) == 1


@needs_kernels
@pytest.mark.parametrize("place", [".", "kernels-*.so"])
def test_a_library_that_others_may_write_is_not_loaded(place: str, fresh: Path, monkeypatch: pytest.MonkeyPatch):
    build.library()
    monkeypatch.setattr(build, "_loaded", [])
    found = next((fresh / "native").glob(place)) if place != "." else fresh / "native"
    found.chmod(0o777)
    said: list[str] = []
    assert build.library(said.append) is None
    assert "can be written by other users" in said[0] and str(found) in said[0]


@pytest.mark.skipif(not SERVES, reason="nothing is compiled for this CPU")
@pytest.mark.parametrize(
    ("compiler", "reason"), [("none", "no C++ compiler was found"), ("broken", "fatal error: no such machine")]
)
def test_without_them_the_sampler_goes_on_and_says_so(
    compiler: str, reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
):
    (fresh / "bin").mkdir()
    if compiler == "broken":
        script = fresh / "bin" / "g++"
        script.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal error: no such machine" >&2\nexit 1\n'
        )
        script.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(
        machine.shutil, "which", lambda name: str(found) if (found := fresh / "bin" / name).exists() else None
    )
    said: list[str] = []
    ours = backbone("qwen3")
    build._loaded.clear()  # a first look, in silence
    decoding.prepare(ours, said.append)
    assert reason in said[-1] and "go through PyTorch" in said[-1]
    decoding.prepare(ours, said.append)
    assert len(said) == (2 if compiler == "broken" else 1), "once"
    assert drawn(ours, None)
    assert "compiled" not in ours.agreed
    assert not list(fresh.glob("native/*.so"))


@needs_kernels
def test_the_switch_leaves_them_alone(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.library() is None
    assert not list(fresh.iterdir())


@needs_kernels
def test_opening_a_model_says_that_they_are_compiled(fresh: Path, tiny_model_folder: Path):
    said: list[str] = []
    load_backbone(str(tiny_model_folder), say=said.append)
    load_backbone(str(tiny_model_folder), say=said.append)
    assert len(said) == 1 and "compiling the kernels once" in said[0]
