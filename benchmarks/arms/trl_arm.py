"""TRL's side: its own trainers, run by their own ``train()``. A step is what lies between two of their optimizer steps.

``setting`` "best": float32 without activation checkpointing, the fastest on a CPU without AMX; "default": TRL's own
defaults (bfloat16 autocast, checkpointing).
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRL_EXPERIMENTAL_SILENCE="1")

import logging
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks.arms.common import (
    LEARNING_RATE,
    Closed,
    Conversation,
    distinct_share,
    perturb,
    score_weight,
    serve,
    sketch,
)

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

BEST = {"bf16": False, "gradient_checkpointing": False}
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
ENDLESS = 10**7


class Paced(TrainerCallback):
    """Holds the trainer between its steps until the next one is asked for."""

    def __init__(self, conversation: Conversation, metrics: Mapping[str, list[float]]) -> None:
        self.conversation, self.metrics, self.waiting = conversation, metrics, True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.waiting:  # the first step; later ones are asked for where the one before them ends
            self.conversation.begin_step()
            self.waiting = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lengths = self.metrics.get("completions/mean_length")
        self.conversation.end_step(**({"drawn": lengths[-1]} if lengths else {}))
        self.conversation.begin_step()


class Training:
    """A trainer whose data is the rows of the work, all in one batch."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work, self.rows = work, work.get("rows", [])
        self.tokenizer = AutoTokenizer.from_pretrained(work["model"])
        self.folder = tempfile.TemporaryDirectory()
        self.facts: dict[str, Any] = {}
        self.trainer = getattr(self, work["kind"])()

    def config(self, kind: type, batch: int, **options: Any) -> Any:
        steady = {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0}
        setting = BEST if self.work["setting"] == "best" else {}
        sizes = {"per_device_train_batch_size": batch, "max_steps": ENDLESS}
        return kind(output_dir=self.folder.name, **{**QUIET, **steady, **setting, **sizes, **options})

    def weights(self) -> dict[str, Any]:
        return {"dtype": "float32"} if self.work["setting"] == "best" else {}

    def sft(self) -> SFTTrainer:
        rows = [{"input_ids": r["prompt"] + r["completions"][0]} for r in self.rows]
        longest = max(len(r["input_ids"]) for r in rows)
        packing = (
            {"packing": True, "max_length": max(512, longest)} if self.work.get("packing") else {"max_length": None}
        )
        trainer = SFTTrainer(
            model=self.work["model"],
            args=self.config(SFTConfig, len(rows), model_init_kwargs=self.weights(), **packing),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )
        # Packed rows are fewer: the batch is still all of them.
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = len(trainer.train_dataset)
        return trainer

    def reward(self) -> RewardTrainer:
        rows = [dict(zip(("chosen_ids", "rejected_ids"), whole(r), strict=True)) for r in self.rows]
        model = AutoModelForSequenceClassification.from_pretrained(self.work["model"], num_labels=1, **self.weights())
        with torch.no_grad():
            model.score.weight.copy_(score_weight(model.score.in_features))
        config = self.config(RewardConfig, len(rows), max_length=None)
        data = Dataset.from_list(rows)
        return RewardTrainer(model=model, args=config, train_dataset=data, processing_class=self.tokenizer)

    def dpo(self) -> DPOTrainer:
        kwargs = {"model_init_kwargs": self.weights()}
        trainer = DPOTrainer(
            model=self.work["model"],
            args=self.config(DPOConfig, len(self.rows), beta=0.1, max_length=None, **kwargs),
            train_dataset=Dataset.from_list([{"prompt": "say", "chosen": " hi", "rejected": " lo"}]),
            processing_class=self.tokenizer,
        )
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [dict(zip(names, (r["prompt"], *r["completions"]), strict=True)) for r in self.rows]
        if self.work["cached"]:
            chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, trainer.data_collator(rows))
            for row, c, r in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
                row |= {"ref_chosen_logps": c, "ref_rejected_logps": r}
            # As with precompute_ref_log_probs=True, which would have seen the text above and not these token ids.
            trainer.precompute_ref_logps, trainer.ref_model = True, None
        trainer.train_dataset = Dataset.from_list(rows)
        perturb(trainer.model.named_parameters())
        return trainer

    def grpo(self) -> GRPOTrainer:
        never = [len(self.tokenizer)]
        rows = len(self.work["prompts"]) * self.work["group"]
        config = self.config(
            GRPOConfig,
            rows,
            num_generations=self.work["group"],
            max_completion_length=self.work["new_tokens"],
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            generation_kwargs={"eos_token_id": never},
            model_init_kwargs=self.weights(),
        )
        trainer = GRPOTrainer(
            model=self.work["model"],
            reward_funcs=lambda completion_ids, **kwargs: [distinct_share(ids) for ids in completion_ids],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in self.work["prompts"]]),
            processing_class=self.tokenizer,
        )
        # No token ends a completion: every arm draws the same number of tokens.
        trainer.eos_token_ids = never
        self.facts["prompt_tokens"] = [len(ids) for ids in trainer._tokenize_prompts(self.work["prompts"])[0]]
        return trainer

    # -- what is asked -------------------------------------------------------------------------------------------------

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        trainer = self.trainer
        trainer.model.train()
        inputs = self._update() if self.work["kind"] == "grpo" else self._collated()
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        found = {"loss": float(loss.detach()), "gradient": sketch(trainer.model.named_parameters())}
        trainer.model.zero_grad(set_to_none=True)
        return found

    def _collated(self) -> dict[str, Any]:
        wanted = trainer_columns(self.trainer)
        rows = [{k: v for k, v in row.items() if k in wanted} for row in self.trainer.train_dataset]
        return self.trainer.data_collator(rows)

    def _update(self) -> dict[str, Any]:
        """The completions that are given, as GRPOTrainer lays out those that it has drawn."""
        trainer, work = self.trainer, self.work
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
        prompts = trainer._tokenize_prompts(work["prompts"])[0]
        rows = [(prompts[i], tokens) for i, group in enumerate(work["completions"]) for tokens in group]
        pad, width = self.tokenizer.pad_token_id, max(len(p) for p, _ in rows)
        longest = max(len(c) for _, c in rows)
        return {
            "prompt_ids": torch.tensor([[pad] * (width - len(p)) + p for p, _ in rows]),
            "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in rows]),
            "completion_ids": torch.tensor([c + [pad] * (longest - len(c)) for _, c in rows]),
            "completion_mask": torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for _, c in rows]),
            "advantages": torch.tensor(work["advantages"]),
            "num_items_in_batch": torch.tensor(sum(len(c) for _, c in rows)),
        }

    def steps(self, conversation: Conversation) -> None:
        self.trainer.add_callback(Paced(conversation, self.trainer._metrics["train"]))
        self.trainer.train()
        raise Closed


def whole(row: Mapping[str, Any]) -> list[list[int]]:
    return [row["prompt"] + completion for completion in row["completions"]]


def trainer_columns(trainer: Any) -> set[str]:
    """The columns that its data loader would keep."""
    trainer._set_signature_columns_if_needed()
    return set(trainer._signature_columns)


if __name__ == "__main__":
    serve(Training)
