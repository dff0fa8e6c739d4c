"""What a schema knows, in words: its paths, what a key wants, and the path a misspelt key was probably meant to be."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import create_model
from pydantic.fields import FieldInfo

from tether.config.sections import Section

# What other libraries call it.
ALIASES = {
    "lr": "optim.learning_rate",
    "max_grad_norm": "optim.clip_norm",
    "grad_clip": "optim.clip_norm",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step",
    "per_device_train_batch_size": "prompts_per_step",
    "micro_batch_size": "optim.tokens_per_micro_batch",
    "gradient_accumulation_steps": "optim.tokens_per_micro_batch",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "num_generations": "completions_per_prompt",
    "group_size": "completions_per_prompt",
    "model_name_or_path": "model.name",
    "output_dir": "run.folder",
    "save_steps": "run.checkpoint_every",
    "dataset": "data.train",
    "train_file": "data.train",
    "max_length": "data.max_completion_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "sampling.max_new_tokens",
    "max_tokens": "sampling.max_new_tokens",
    "ref_model": "reference.name",
    "reward_model": "reward",
    "beta": "loss.beta",
    "kl_weight": "overrides.loss.kl_weight",
    "kl_in_reward": "overrides.kl_in_reward",
    "clip_low": "overrides.loss.clip_low",
    "clip_high": "overrides.loss.clip_high",
}


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, if it holds one (``LoraConfig | None`` does)."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


@cache
def schema_paths(schema: type[Section]) -> Mapping[tuple[str, ...], FieldInfo]:
    """Every path of a schema, sections included, in the schema's order."""
    paths: dict[tuple[str, ...], FieldInfo] = {}
    for name, field in schema.model_fields.items():
        paths[(name,)] = field
        inner = subsection(field)
        if inner is not None:
            paths |= {(name, *path): deeper for path, deeper in schema_paths(inner).items()}
    return paths


def nearest_path(path: tuple[str, ...], known: Iterable[tuple[str, ...]]) -> str | None:
    """The path that ``path`` was probably meant to be, or None.

    In this order: the same name elsewhere, another library's word for it, a near name beside it, a near name anywhere.
    """
    known = list(known)
    *parent, name = path
    exact = [p for p in known if p[-1] == name]
    if exact:
        return ".".join(exact[0])
    alias = ALIASES.get(name)
    if alias and any(p[0] == alias.split(".")[0] for p in known):
        return alias
    beside = [p for p in known if list(p[:-1]) == parent]
    for candidates in (beside, known):
        near = difflib.get_close_matches(name, {p[-1]: None for p in candidates}, n=1, cutoff=0.6)
        if near:
            return ".".join(next(p for p in candidates if p[-1] == near[0]))
    return None


def describe(field: FieldInfo) -> str:
    """What values a field takes, in words: ``a whole number >= 1``, ``one of "drop", "cut"``."""
    kind: Any = (field.annotation, field)
    return in_words(create_model("Key", value=kind).model_json_schema()["properties"]["value"])


def in_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words, one level deep."""
    if "anyOf" in schema:
        return " or ".join(in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = schema.get("type")
    if kind == "array":
        return f"a list of {in_words(schema['items'])}" if schema.get("items") else "a list"
    if kind in ("integer", "number"):
        limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema)
        return f"a {'whole ' if kind == 'integer' else ''}number {bounds}".rstrip()
    if schema.get("minLength"):
        return "text that is not empty"
    words = {"string": "text", "boolean": "true or false", "null": "null"}
    return words.get(str(kind), "a mapping (key: value)")
