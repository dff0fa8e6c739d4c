"""How large the demo is, and the configs of its three training stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tether.config.schema import CriticConfig, PreferenceConfig, RewardModelConfig, RLConfig
from tether.config.sections import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig

MODEL = "smollm2-135m"
# At 1.0 this model drifts into other languages; at 0.5 it speaks English.
SAMPLING = SamplingConfig(temperature=0.5, max_new_tokens=48)
TOKENS_PER_MICRO_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Numbers of everything. ``samples``: answers per training question, two to a pair."""

    questions: int = 60
    samples: int = 4
    ppo_steps: int = 14
    unanchored_steps: int = 10
    ppo_prompts: int = 10
    held_out: int = 64
    reward_epochs: float = 2.0
    dpo_epochs: float = 1.25


# Clipping alone holds a policy for a dozen steps, so the run without an anchor is pressed harder: it goes as far wrong
# in minutes as a long run does in hours.
UNANCHORED = {"learning_rate": 2e-3, "epochs_per_rollout": 2}

FULL = Scale()
QUICK = Scale(questions=18, ppo_steps=3, unanchored_steps=5, ppo_prompts=5, held_out=16)


def adapters() -> ModelConfig:
    """LoRA on the upper layers: style is decided there, and the lower ones need no backward pass."""
    return ModelConfig(name=MODEL, lora=LoraConfig(rank=16, alpha=32, last_layers=14))


def _run(folder: Path, seed: int) -> RunConfig:
    return RunConfig(folder=str(folder), seed=seed, report=True)


def reward_config(out: Path, scale: Scale, seed: int) -> RewardModelConfig:
    return RewardModelConfig(
        model=adapters(),
        data=DataConfig(train=str(out / "pairs.jsonl")),
        optim=OptimConfig(learning_rate=5e-4, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH, warmup=0.1),
        epochs=scale.reward_epochs,
        prompts_per_step=16,
        run=_run(out / "reward", seed),
    )


def dpo_config(out: Path, scale: Scale, seed: int) -> PreferenceConfig:
    return PreferenceConfig(
        model=adapters(),
        data=DataConfig(train=str(out / "pairs.jsonl")),
        optim=OptimConfig(learning_rate=1.1e-3, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH, warmup=0.1),
        loss={"type": "dpo", "beta": 0.1},
        epochs=scale.dpo_epochs,
        prompts_per_step=8,
        run=_run(out / "dpo", seed),
    )


def ppo_config(out: Path, scale: Scale, seed: int, *, anchored: bool) -> RLConfig:
    return RLConfig(
        model=adapters(),
        data=DataConfig(train=str(out / "prompts.jsonl")),
        optim=OptimConfig(
            learning_rate=7e-4 if anchored else UNANCHORED["learning_rate"],
            tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
            schedule="linear" if anchored else "constant",
            warmup=0,
        ),
        algorithm="ppo",
        overrides={
            "kl_in_reward": 0.1 if anchored else 0.0,
            "epochs_per_rollout": 1 if anchored else UNANCHORED["epochs_per_rollout"],
            "minibatches": 2,
        },
        reward=str(out / "reward"),
        steps=scale.ppo_steps if anchored else scale.unanchored_steps,
        prompts_per_step=scale.ppo_prompts,
        completions_per_prompt=4,
        sampling=SAMPLING,
        critic=CriticConfig(kind="head"),
        share_backbone=True,
        run=_run(out / ("ppo" if anchored else "ppo-unanchored"), seed),
    )
