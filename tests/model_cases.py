"""Tiny random models of many families, ragged batches, and the slow oracle: one row at a time through plain
transformers with eager attention, log-softmax in float64."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor

from tether.core.batches import Batch, pad_rows
from tether.models.adapters import add_adapter
from tether.models.attention import NAME
from tether.models.backbone import Backbone
from tether.models.fused import use_fused
from tether.models.linear import use_fast_linear
from tether.models.native.layer import use_native_layers

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,  # attention that is far from flat, so that a wrong mask shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "head_dim": 8}
ROPE = {"rope_theta": 10000.0}
FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "llama_tied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    # Heads as wide as the compiled passes want them.
    "llama_heads_16": lambda: hf.LlamaConfig(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen2_heads_16": lambda: hf.Qwen2Config(**{**SMALL, "hidden_size": 64}),
    "llama_rope_llama3": lambda: hf.LlamaConfig(
        **SMALL,
        rope_parameters={
            **ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama_rope_linear": lambda: hf.LlamaConfig(
        **SMALL, rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}
    ),
    "llama_rope_dynamic": lambda: hf.LlamaConfig(
        **{**SMALL, "max_position_embeddings": 32}, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 4.0}
    ),
    "qwen2": lambda: hf.Qwen2Config(**SMALL),
    "qwen2_window": lambda: hf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=16),
    "qwen3_rope_yarn": lambda: hf.Qwen3Config(
        **SMALL,
        head_dim=8,
        rope_parameters={
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral_window": lambda: hf.MistralConfig(**SMALL, sliding_window=5),
    "gemma2": lambda: hf.Gemma2Config(
        **SMALL,
        **MIXED,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, **MIXED, query_pre_attn_scalar=8),
    "phi3_window": lambda: hf.Phi3Config(**SMALL, sliding_window=5),
    "phi3_longrope": lambda: hf.Phi3Config(
        **SMALL,
        original_max_position_embeddings=32,
        rope_parameters={
            **ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    # Rotates a half of each head; its own head has a bias.
    "phi": lambda: hf.PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "olmo_clipped": lambda: hf.OlmoConfig(**SMALL, clip_qkv=0.5),
    "olmo3": lambda: hf.Olmo3Config(**SMALL, **{k: MIXED[k] for k in ("layer_types", "sliding_window")}),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "smollm3": lambda: hf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "cohere2": lambda: hf.Cohere2Config(**SMALL, **MIXED, logit_scale=0.25),
    "granite": lambda: hf.GraniteConfig(**SMALL, logits_scaling=4.0, attention_multiplier=0.2),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.25
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=2,
    ),
}
# Families that the packed pass can't serve, each for a reason of its own: attention sinks, ALiBi, a convolution.
UNPACKABLE = {
    "gpt_oss": lambda: hf.GptOssConfig(
        **SMALL, **MIXED, num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default"}
    ),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25, pad_token_id=0
    ),
    "lfm2": lambda: hf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
}


def build(family: str, *, seed: int = 0):
    """A random model of ``family``, biases and norms random too."""
    torch.manual_seed(seed)
    config = {**FAMILIES, **UNPACKABLE}[family]()
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def plain_twin(model):
    """The same weights under transformers' own eager attention: the oracle."""
    twin = copy.deepcopy(model)
    if twin._can_set_attn_implementation():
        twin.set_attn_implementation("eager")
    return twin


def backbone(family: str, mode: str = "packed", *, seed: int = 0) -> Backbone:
    """As ``load_backbone`` leaves it, but without the self-test."""
    model = build(family, seed=seed)
    if mode == "packed":
        model.set_attn_implementation(NAME)
    use_fast_linear(model)
    use_fused(model)
    if mode == "packed":
        use_native_layers(model.base_model)
    return Backbone(hf=model, tokenizer=None, name=family, mode=mode)  # type: ignore[arg-type]


def adapt(ours: Backbone, adapter: str | None) -> None:
    """Give ``ours`` an adapter of that name, if any, that changes what it says."""
    if adapter is None:
        return
    add_adapter(ours.hf, adapter, rank=2, alpha=4)
    for name, parameter in ours.hf.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)


def random_batch(prompt_lengths: Sequence[int], rows: Sequence[tuple[int, int]], seed: int = 0) -> Batch:
    """``rows``: (prompt, completion length) of each row, in any order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (n,), generator=generator)

    completions = [draw(n) for _, n in rows]
    return Batch(
        prompts=tuple(draw(n) for n in prompt_lengths),
        prompt_of=torch.tensor([p for p, _ in rows]),
        tokens=pad_rows(completions),
        lengths=torch.tensor([n for _, n in rows]),
        loss_mask=pad_rows([torch.ones(n, dtype=torch.bool) for _, n in rows]),
    )


# Shared prompts out of order, a group of one, an empty completion, one of one token, a prompt of one token, a prompt
# that nobody uses; the longest prompt and completions reach beyond every window of FAMILIES.
RAGGED = random_batch((9, 1, 4, 3), [(2, 4), (0, 7), (1, 1), (0, 0), (2, 2), (0, 11), (1, 6)], seed=3)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Per row: log-probs, entropies [n] in float64, states before each token [n, d], state at the end [d]."""

    logprobs: list[Tensor]
    entropy: list[Tensor]
    states: list[Tensor]
    last: list[Tensor]


def one_by_one(model, batch: Batch, temperature: float = 1.0) -> Truth:
    """Each row alone: prompt and completion joined, nothing padded, the model's own logits."""
    found: dict[str, list[Tensor]] = {"logprobs": [], "entropy": [], "states": [], "last": []}
    for i, (p, n) in enumerate(zip(batch.prompt_of.tolist(), batch.lengths.tolist(), strict=True)):
        ids = torch.cat([batch.prompts[p], batch.tokens[i, :n]])[None]
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        start = len(batch.prompts[p]) - 1
        logits = out.logits[0, start : start + n].double() / temperature
        table = logits.log_softmax(dim=-1)
        found["logprobs"].append(table.gather(1, batch.tokens[i, :n, None]).squeeze(1))
        found["entropy"].append(-(table.exp() * table).sum(dim=-1))
        found["states"].append(out.hidden_states[-1][0, start : start + n])
        found["last"].append(out.hidden_states[-1][0, -1])
    return Truth(**found)
