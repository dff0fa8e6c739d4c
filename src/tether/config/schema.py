"""What a run can be told: one frozen pydantic model per section, one per method.

Field descriptions are the help text. Batch size has three numbers only, each said once: prompts per step, completions
per prompt, tokens per micro-batch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tether.config.sections import DataConfig, MethodConfig, ModelConfig, OptimConfig, SamplingConfig, Section


class OfflineConfig(MethodConfig):
    """Methods whose data exists before the run."""

    data: DataConfig
    epochs: float = Field(default=1.0, gt=0)
    prompts_per_step: int = Field(default=16, ge=1, description="conversations, pairs or judgements per optimizer step")


class SFTConfig(OfflineConfig):
    """Instruction tuning: cross-entropy on the assistant's tokens."""

    method: Literal["sft"] = "sft"
    optim: OptimConfig = OptimConfig(learning_rate=2e-5)


class StepsConfig(Section):
    """Solutions in steps, for a process reward model."""

    separator: str = Field(default="\n\n", min_length=1, description="text between two steps, in training and in use")
    aggregate: Literal["min", "product", "last"] = Field(
        default="min", description="how the probabilities of the steps make the score of a solution"
    )


class RewardModelConfig(OfflineConfig):
    """Reward model: from pairs, rankings, judged answers or judged steps, as the loss reads them."""

    method: Literal["reward"] = "reward"
    optim: OptimConfig = OptimConfig(learning_rate=1e-5)
    loss: dict[str, Any] = Field(default={"type": "bradley_terry"}, description="reward loss and its hyperparameters")
    pool: Literal["last", "mean"] = Field(
        default="last", description="pairs and rankings: score the last token, or the mean over the completion"
    )
    steps: StepsConfig | None = Field(default=None, description="process: where steps end; empty: the defaults")
    stratify_lengths: bool = Field(
        default=False, description="every optimizer step sees all lengths of completions, short to long"
    )
    scale_on: str | None = Field(
        default=None,
        description="SFT file on whose answers scores get mean 0 and std 1; empty: held-out rows, else training rows",
    )
    members: int | None = Field(
        default=None,
        ge=2,
        description="an ensemble: this many models, one after the other, with seeds run.seed, run.seed + 1, ...",
    )
    heads: int | None = Field(
        default=None,
        ge=2,
        description="this many scalar heads on one trunk: an ensemble from one pass, for pairs and rankings",
    )
    bootstrap: bool = Field(
        default=False,
        description="train on as many rows drawn with replacement (by run.seed) instead of each once; a draw a head",
    )


class NamedReferenceConfig(Section):
    """The frozen model that the policy is held to. Explicit, and fingerprinted in the run."""

    name: str | None = Field(default=None, description="a model of its own; empty: the policy as it was at the start")


class ReferenceConfig(NamedReferenceConfig):
    """A reference that stands still and is asked of data that exists."""

    cache: bool = Field(default=True, description="keep its log-probs on disk, for later runs on the same rows")


class PreferenceConfig(OfflineConfig):
    """Directly from preferences: the DPO family on pairs, KTO on judgements (or on pairs read as two judgements)."""

    method: Literal["preference"] = "preference"
    optim: OptimConfig = OptimConfig(learning_rate=5e-6)
    loss: dict[str, Any] = Field(
        default={"type": "dpo", "beta": 0.1}, description="preference loss and its hyperparameters"
    )
    reference: ReferenceConfig = ReferenceConfig()


class MovingReferenceConfig(NamedReferenceConfig):
    """A reference that may follow the policy instead of standing still. Its tensors are then part of a checkpoint."""

    update: Literal["fixed", "ema", "resync"] = Field(
        default="fixed",
        description="fixed; ema: after every step a share `rate` of the way to the policy; resync: a copy of the "
        "policy every `every` steps",
    )
    rate: float | None = Field(default=None, gt=0, lt=1, description="ema: share of the way, e.g. 0.01")
    every: int | None = Field(default=None, ge=1, description="resync: steps from one copy to the next")


class PretrainingConfig(Section):
    """Text for the pretraining term, which holds what the model knew (Ouyang 2022: ppo_ptx)."""

    data: str = Field(..., description="rows of text or demonstrations: JSONL or Parquet file, or hub id[:split]")
    rows_per_update: int = Field(default=8, ge=1, description="rows in every optimizer step")
    max_tokens: int = Field(default=1024, ge=1, description="longer rows are cut; always counted")


class CriticConfig(Section):
    """Where the critic (values) lives."""

    kind: Literal["head", "adapter", "separate"] = Field(
        default="separate",
        description="head: a scalar head on the policy's trunk; adapter: its own LoRA adapter on the shared backbone; "
        "separate: a model of its own",
    )
    name: str | None = Field(
        default=None, description="separate: model to start from; empty: the reward model, else the policy"
    )
    learning_rate: float | None = Field(default=None, gt=0, description="empty: the policy's")


class VerifyConfig(Section):
    """pass@k of the answers to data.eval: before the first step, every run.eval_every steps, and after the last."""

    reward: dict[str, Any] | str | None = Field(
        default=None, description="a verifier (1: right, 0: wrong); empty: the reward of the run"
    )
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 4), min_length=1, description="k of pass@k: one of k answers to a prompt is right"
    )
    samples: int | None = Field(default=None, ge=1, description="answers to each prompt; empty: the largest k")
    prompts: int | None = Field(
        default=None, ge=1, description="use only the first N prompts of data.eval; guards.judge, too, then sees these"
    )


class RLConfig(MethodConfig):
    """Optimising against a reward: one row of the algorithm table, and what may be changed in it."""

    method: Literal["rl"] = "rl"
    optim: OptimConfig = OptimConfig(learning_rate=1e-6, schedule="constant", warmup=0)
    data: DataConfig
    algorithm: str = Field(default="grpo", description="a row of the table: reinforce, ppo, rloo, grpo, dapo, ...")
    overrides: dict[str, Any] = Field(default={}, description="fields of that row to change, e.g. {kl_in_reward: 0.02}")
    reward: dict[str, Any] | str = Field(
        default=...,
        description="reward model folder, or {type: ..., ...}, or file.py:function / package.module:function, or "
        "{type: sum, parts: {NAME: ...}}",
    )
    scale_reward: bool = Field(
        default=True,
        description="reward model: mean 0 and std 1 by the scale saved with it; false: its scores as they are",
    )
    steps: int = Field(default=100, ge=1, description="rollout rounds")
    prompts_per_step: int = Field(default=8, ge=1)
    completions_per_prompt: int | None = Field(default=None, ge=1, description="empty: the algorithm's group size")
    sampling: SamplingConfig = SamplingConfig()
    reference: MovingReferenceConfig = MovingReferenceConfig()
    pretraining: PretrainingConfig | None = Field(
        default=None, description="text for the pretraining term, where the algorithm has one (ptx_weight)"
    )
    resample_rounds: int | None = Field(
        default=None, ge=1, description="dynamic sampling: rounds of fresh prompts a step at most; empty: 3"
    )
    critic: CriticConfig = CriticConfig()
    share_backbone: bool = Field(
        default=False,
        description="hold the reward model as an adapter of the policy's backbone (both LoRA, one base)",
    )
    max_logprob_gap: float = Field(
        default=0.1, gt=0, description="stop when mean |log-prob(learner) - log-prob(sampler)| is over this (nats)"
    )
    old_logprobs: Literal["auto", "learner"] = Field(
        default="auto",
        description="log-probs before an update. auto: the sampler's, where a part of each step, scored by the learner "
        "too, agrees to 1e-4 nats a token (not with critic.kind head, nor with a correction for the sampler); learner: "
        "scored anew",
    )
    on_reward_failure: Literal["stop", "skip"] = Field(
        default="stop", description="skip: leave the rollout out, and count it"
    )
    guards: dict[str, Any] = Field(
        default={},
        description="limits (kl_max, entropy_min, length_ratio_max, distinct_min, disagreement_max), a judge on the "
        "prompts of data.eval, patience, and action: note or stop",
    )
    verify: VerifyConfig | None = Field(
        default=None, description="pass@k on data.eval, before and after; empty: not measured"
    )


class PromptsConfig(Section):
    """Which prompts are answered."""

    train: str = Field(..., description="prompts: JSONL or Parquet file, or hub id[:split]")
    limit: int | None = Field(default=None, ge=1, description="use only the first N rows")
    max_bad_rows: float = Field(default=0.01, ge=0, le=1, description="stop when a larger share of rows is malformed")


class FolderConfig(Section):
    """Where made data is kept."""

    folder: str | None = Field(default=None, description="folder to write; empty: runs/<method>-<time>")
    seed: int = Field(default=0, ge=0, description="draws the answers and which principle is used where")


class ConstitutionalConfig(Section):
    """Critique, revise, prefer by a constitution (Bai 2022): writes sft.jsonl and preferences.jsonl, trains nothing."""

    method: Literal["constitutional"] = "constitutional"
    model: ModelConfig = ModelConfig()
    endpoint: dict[str, Any] | None = Field(
        default=None, description="{url, model, ...}: this endpoint answers, criticises and revises instead of model"
    )
    data: PromptsConfig
    run: FolderConfig = FolderConfig()
    constitution: str | tuple[dict[str, Any] | str, ...] = Field(
        default=...,
        description="a text file, one principle a line; a YAML file with `principles`; or the principles themselves",
    )
    revisions: int = Field(default=1, ge=1, description="rounds of critique and revision, each by a principle drawn")
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256)
    feedback: dict[str, Any] = Field(
        default={"type": "pair_judge", "verdict": "logprob", "orders": "average"},
        description="the pair_judge that prefers revision or first answer, by a principle drawn",
    )


class GivenConfig(Section):
    """Where candidates stand that exist already, in rows of a prompt and a list of them: texts, or objects."""

    column: str = Field(default="completions", description="column that holds the list")
    text: str = Field(default="text", description="objects: key of the text")
    score: str | None = Field(
        default=None, description="key of the score, or column of the list of scores; empty: score, or scores"
    )
    generator: str = Field(default="generator", description="objects: key that names who wrote it, kept in the rows")


class SelectConfig(Section):
    """Which candidates are chosen; all limits hold at once, ties are broken by lot."""

    per_prompt: int | None = Field(default=1, ge=1, description="at most this many of each prompt; null: no limit")
    top: int | None = Field(default=None, ge=1, description="at most this many of all; empty: no limit")
    threshold: float | None = Field(default=None, description="at least this score; empty: no limit")
    keep_cut: bool = Field(
        default=False, description="also candidates cut at sampling.max_new_tokens, which teach to stop in mid-sentence"
    )


class ChooseConfig(Section):
    """Best of n, rejection sampling: candidates drawn (or given), scored, chosen, and written as a data set."""

    method: Literal["choose"] = "choose"
    model: ModelConfig = ModelConfig()
    models: tuple[str, ...] = Field(default=(), description="further generators, beside model.name")
    data: PromptsConfig
    run: FolderConfig = FolderConfig()
    n: int = Field(default=8, ge=1, description="completions of each prompt by each generator")
    given: GivenConfig | None = Field(
        default=None, description="data.train holds candidates (`given: {}` for the usual names); empty: draw them"
    )
    reward: dict[str, Any] | str | None = Field(
        default=None, description="what scores them, as for rl, or a pair_judge; empty: the scores that are given"
    )
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256)
    select: SelectConfig = SelectConfig()
    write: Literal["sft", "preferences"] = Field(
        default="sft", description="sft: the chosen; preferences: each against a lower one of its prompt"
    )
    against: Literal["worst", "random"] = Field(default="worst", description="preferences: what is rejected")


class RoundsConfig(Section):
    """One round: prompts are answered and scored, best and worst become pairs, the pairs are trained on."""

    count: int = Field(default=3, ge=1, description="rounds")
    prompts: int = Field(default=64, ge=1, description="prompts of a round, the next ones of the file")
    completions: int = Field(default=4, ge=2, description="answers to each prompt, of which a best and a worst")
    pairs_per_prompt: int = Field(default=1, ge=1, description="also the second best against the second worst, ...")


class RoundReferenceConfig(Section):
    """What each round is held to."""

    of: Literal["start", "previous"] = Field(
        default="start", description="start: the model of the beginning; previous: the policy as its round begins"
    )


class IterateConfig(MethodConfig):
    """Online preference optimisation: rounds of sample, score, pair and train, each from the last one's result."""

    method: Literal["iterate"] = "iterate"
    optim: OptimConfig = OptimConfig(learning_rate=5e-6)
    data: DataConfig
    reward: dict[str, Any] | str = Field(default=..., description="what scores the answers, as for rl, or a pair_judge")
    rounds: RoundsConfig = RoundsConfig()
    sampling: SamplingConfig = SamplingConfig()
    loss: dict[str, Any] = Field(
        default={"type": "dpo", "beta": 0.1}, description="preference loss on pairs and its hyperparameters"
    )
    reference: RoundReferenceConfig = RoundReferenceConfig()
    epochs: float = Field(default=1.0, gt=0, description="passes over the pairs of a round")
    prompts_per_step: int = Field(default=16, ge=1, description="pairs per optimizer step")


class PipelineConfig(Section):
    """Several methods in order; later ones may name earlier folders."""

    method: Literal["pipeline"] = "pipeline"
    stages: tuple[dict[str, Any], ...]

    @model_validator(mode="after")
    def _named(self) -> PipelineConfig:
        if not self.stages:
            raise ValueError("a pipeline needs at least one stage")
        return self


METHODS: dict[str, type[Section]] = {
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "preference": PreferenceConfig,
    "rl": RLConfig,
    "constitutional": ConstitutionalConfig,
    "choose": ChooseConfig,
    "iterate": IterateConfig,
}
