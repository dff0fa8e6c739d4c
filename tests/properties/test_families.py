"""Models of any shape: packed, padded and one row at a time give the same numbers and the same gradients.

Weights are float64, so that what is compared is who saw whom and not rounding (norms, rotary tables and eager softmax
stay float32 inside transformers, whatever the model's type: hence 1e-5 and not 1e-12).
"""

from dataclasses import replace

import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model_cases import ROPE, SMALL, one_by_one, plain_twin, random_batch
from tether.core.batches import Batch, pad_rows
from tether.data.batching import micro_batches
from tether.models.attention import NAME
from tether.models.backbone import Backbone
from tether.models.roles import ActorCritic, Policy, Scorer, new_head

ROPES = st.sampled_from(
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ]
)


@st.composite
def configs(draw: st.DrawFn):
    """A random shape of one of the common families, at most four layers."""
    layers, shared = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    window = draw(st.integers(1, 9))
    shape = {
        **SMALL,
        "vocab_size": 97,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 // shared,
        "tie_word_embeddings": draw(st.booleans()),
    }
    rope = {"rope_parameters": {**ROPE, **draw(ROPES)}}
    kinds = draw(st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=layers, max_size=layers))
    mixed = {"layer_types": kinds, "sliding_window": window}
    head = {"head_dim": draw(st.sampled_from([4, 8, 12]))}
    scalar = {"query_pre_attn_scalar": draw(st.sampled_from([4, 8, 20]))}
    caps = {
        "attn_logit_softcapping": draw(st.sampled_from([None, 2.0])),
        "final_logit_softcapping": draw(st.sampled_from([None, 3.0])),
    }
    families = {
        "llama": lambda: hf.LlamaConfig(**shape, **rope, **head, attention_bias=draw(st.booleans())),
        "mistral": lambda: hf.MistralConfig(
            **shape, **rope, **head, sliding_window=draw(st.sampled_from([None, window]))
        ),
        "qwen2": lambda: hf.Qwen2Config(**shape, **rope, **mixed, use_sliding_window=True),
        "qwen3": lambda: hf.Qwen3Config(**shape, **rope, **mixed, **head, use_sliding_window=True),
        "gemma2": lambda: hf.Gemma2Config(**shape, **rope, **mixed, **head, **scalar, **caps),
        "gemma3": lambda: hf.Gemma3TextConfig(**shape, **mixed, **head, **scalar),
        "smollm3": lambda: hf.SmolLM3Config(
            **shape, **rope, no_rope_layers=draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
        ),
        "phi3": lambda: hf.Phi3Config(**shape, sliding_window=draw(st.sampled_from([None, window]))),
        "olmo": lambda: hf.OlmoConfig(**shape, **rope, clip_qkv=draw(st.sampled_from([None, 0.5]))),
        "olmo2": lambda: hf.Olmo2Config(**shape, **rope),
    }
    return families[draw(st.sampled_from(sorted(families)))]()


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Groups of different sizes, empty completions and completions of one token, turns that are not trained."""
    prompts = draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    row = st.tuples(st.integers(0, len(prompts) - 1), st.sampled_from([0, 1, 1, 2, 4, 7, 12]))
    batch = random_batch(prompts, draw(st.lists(row, min_size=1, max_size=7)), seed=draw(st.integers(0, 99)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    holes = torch.rand(batch.loss_mask.shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    return replace(batch, loss_mask=batch.loss_mask & ~holes)


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(True)


def role(model, mode: str) -> ActorCritic:
    twin = plain_twin(model)
    if mode == "packed":
        twin.set_attn_implementation(NAME)
    ours = Backbone(hf=twin, tokenizer=None, name="random", mode=mode)  # type: ignore[arg-type]
    head = new_head(ours, zero=True).double()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.in_features, dtype=torch.float64)[None])
    return ActorCritic(policy=Policy(backbone=ours, temperature=0.8), critic=Scorer(backbone=ours, head=head))


def numbers(outputs, mask: Tensor) -> list[Tensor]:
    found = [t.double() for t in (outputs.logprobs, outputs.entropy, outputs.values, outputs.scores)]
    return [t * mask if t.dim() == 2 else t for t in found]


def objective(found: list[Tensor]) -> Tensor:
    """A loss that every number has a weight of its own in."""
    weights = (torch.linspace(-1, 1.5, t.numel(), dtype=t.dtype).view(t.shape) for t in found)
    return torch.stack([(t * w).sum() for t, w in zip(found, weights, strict=True)]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def same_gradients(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in right.values()) + 1e-6
    for name, grad in right.items():
        torch.testing.assert_close(left[name] / scale, grad / scale, atol=1e-5, rtol=0, msg=name)


def truth_of(model, head: nn.Linear, batch: Batch) -> list[Tensor]:
    """Every row alone, through transformers' eager attention and its own logits."""
    truth = one_by_one(model, batch, temperature=0.8)
    values = pad_rows([head(s).squeeze(-1) for s in truth.states])
    return [
        pad_rows(truth.logprobs) * batch.loss_mask,
        pad_rows(truth.entropy) * batch.loss_mask,
        values * batch.loss_mask,
        torch.cat([head(s) for s in truth.last]),
    ]


@given(configs(), batches())
@settings(max_examples=30)
def test_one_answer_and_one_gradient_for_every_layout(config, batch: Batch):
    model = build(config)
    plain, head = plain_twin(model), role(model, "padded").critic.head
    right = truth_of(plain, head, batch)
    objective(right).backward()
    for mode in ("packed", "padded"):
        ours = role(model, mode)
        found = numbers(ours(batch, entropy=True), batch.loss_mask)
        for mine, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        objective(found).backward()
        same_gradients(gradients(ours.policy.backbone.hf), gradients(plain))
        assert head.weight.grad is not None and ours.critic.head.weight.grad is not None
        torch.testing.assert_close(ours.critic.head.weight.grad, head.weight.grad, atol=1e-4, rtol=1e-5)


@given(configs(), batches(), st.integers(1, 70))
@settings(max_examples=10)
def test_gradients_do_not_depend_on_the_token_budget(config, batch: Batch, budget: int):
    model = build(config)
    whole, parts = role(model, "packed"), role(model, "packed")
    weights = torch.randn(2, *batch.tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(ours: ActorCritic, rows: Tensor) -> Tensor:
        part = batch.select(rows)
        logprobs, _, values, scores = numbers(ours(part, entropy=True), part.loss_mask)
        width = part.tokens.shape[1]
        return (logprobs * weights[0, rows, :width]).sum() + (values * weights[1, rows, :width]).sum() + scores.sum()

    loss(whole, torch.arange(batch.size)).backward()
    for rows in micro_batches(batch, budget):
        loss(parts, rows).backward()
    same_gradients(gradients(parts.policy.backbone.hf), gradients(whole.policy.backbone.hf))


@given(configs())
@settings(max_examples=15)
def test_the_self_test_keeps_them_packed(config):
    def silent(text: str) -> None:
        raise AssertionError(f"nothing to say, but said: {text}")

    ours = Backbone(hf=build(config).float().requires_grad_(False), tokenizer=None, name="random")
    windows = [getattr(m, "sliding_window", None) for m in (ours.config, *ours.hf.modules())]
    ours.self_test(silent)
    assert ours.mode == "packed"
    assert windows == [getattr(m, "sliding_window", None) for m in (ours.config, *ours.hf.modules())]
