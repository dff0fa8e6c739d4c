"""The sections of a config that all methods share: model, data, optimizer, run, sampling."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tether.core.protocols import SamplingSettings


class Section(BaseModel):
    """Frozen; unknown keys are refused; defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class LoraConfig(Section):
    """Low-rank adapters (Hu 2021) on the linear layers of the trunk, through peft."""

    rank: int = Field(default=16, ge=1, description="rank of every adapter")
    alpha: float = Field(default=32.0, gt=0, description="scale numerator: the update is alpha / rank * B A")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: tuple[str, ...] = Field(
        default=(), description="module names to adapt; empty: every linear layer of the trunk"
    )
    last_layers: int | None = Field(default=None, ge=1, description="adapt only the last N layers; empty: all of them")


class ModelConfig(Section):
    """Which language model, and how it is held."""

    name: str = Field(default="smollm2-135m", description="embedded name, local folder, or hub id")
    revision: str | None = Field(default=None, description="hub revision")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of the weights")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")
    lora: LoraConfig | None = Field(default=None, description="train adapters instead of all weights")
    attention: Literal["auto", "packed", "padded"] = Field(default="auto", description="layout of the forward pass")
    trust_remote_code: bool = Field(default=False, description="run Python code shipped with the model (dangerous)")


class DataConfig(Section):
    """Which rows, and what happens to rows that do not fit."""

    train: str = Field(..., description="JSONL or Parquet file, or hub id[:split]")
    eval: str | None = Field(default=None, description="held-out rows; empty: eval_fraction of train")
    eval_fraction: float = Field(default=0.0, ge=0, lt=1, description="share of train held out when eval is empty")
    limit: int | None = Field(default=None, ge=1, description="use only the first N rows")
    max_prompt_tokens: int = Field(default=1024, ge=1, description="longer prompts are handled by `overlong`")
    max_completion_tokens: int = Field(default=1024, ge=1, description="longer completions are handled by `overlong`")
    overlong: Literal["drop", "cut", "error"] = Field(
        default="drop", description="rows over the limits; always counted"
    )
    max_bad_rows: float = Field(default=0.01, ge=0, le=1, description="stop when a larger share of rows is malformed")
    last_turn_only: bool = Field(default=False, description="SFT: train on the last assistant turn only")
    system: str | None = Field(default=None, description="system message put before every conversation that has none")
    template: str | None = Field(default=None, description="chat template (Jinja) file; empty: the model's own")


class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    warmup: float = Field(default=0.1, ge=0, description="below 1: share of all steps; else a number of steps")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="linear", description="after warm-up, down to 0")
    clip_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this global norm")
    tokens_per_micro_batch: int = Field(default=2048, ge=1, description="tokens computed at once; bounds memory only")
    oversize: Literal["run", "refuse"] = Field(
        default="run", description="a group with more tokens than that by itself: run it alone, or stop before the run"
    )
    nonfinite_limit: int = Field(default=3, ge=1, description="stop after this many non-finite steps in a row")
    autocast: Literal["off", "auto", "bfloat16"] = Field(
        default="off",
        description="matrix products of training in bfloat16, weights in float32; auto: where a probe at the start "
        "finds it over 1.1 times as fast, which another machine, or a busy one, may not",
    )
    checkpoint_activations: bool = Field(
        default=False, description="hold each layer's input alone and run the layer again in the backward: less memory"
    )


class RunConfig(Section):
    """The run folder and its rhythm."""

    folder: str | None = Field(default=None, description="where the run is kept; empty: runs/<method>-<time>")
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: at the end only")
    keep_checkpoints: int = Field(default=2, ge=1)
    eval_every: int = Field(
        default=0, ge=0, description="steps between evaluations on held-out rows; 0: at the end only"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; empty: all")
    report: bool = Field(default=True, description="write report.html at the end")


class SamplingConfig(Section):
    """How completions are drawn; log-probs are always those of the distribution that was sampled."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0: off")
    max_new_tokens: int = Field(default=128, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    autocast: Literal["off", "bfloat16"] = Field(
        default="off",
        description="bfloat16: draw from weights rounded to it, in less time and memory; a learner in float32 then "
        "scores each completion anew, because its log-probs differ (sampler/gap)",
    )

    def settings(self) -> SamplingSettings:
        return SamplingSettings(**self.model_dump())


class MethodConfig(Section):
    """What every method shares."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _rounds_once(self) -> Self:
        for name, section in (("optim", self.optim), ("sampling", getattr(self, "sampling", None))):
            kind = getattr(section, "autocast", "off")
            if kind != "off" and self.model.dtype == "bfloat16":
                raise ValueError(
                    f"{name}.autocast={kind} would be ignored: with model.dtype=bfloat16 everything is in "
                    "bfloat16 already; take one of them out"
                )
        return self
