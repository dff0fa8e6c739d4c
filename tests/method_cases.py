"""Tiny data, configs and readers that the tests of the methods share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tether.config.schema import METHODS
from tether.core.batches import PolicyBatch
from tether.methods import preference, reward, rl, sft
from tether.training import online

RUNS: dict[str, Callable[..., Path]] = {
    "sft": sft.run,
    "reward": reward.run,
    "preference": preference.run,
    "rl": rl.run,
}
WORDS = ["cat", "dog", "mat", "one", "this", "that", "what", "then"]
# What the clock or the machine says may differ between two runs that are otherwise the same.
CLOCKED = ("time/", "memory/", "throughput/")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def demonstrations(folder: Path) -> str:
    """Whatever the word, the answer is the same."""
    return write_rows(
        folder / "sft.jsonl",
        (
            {
                "messages": [
                    {"role": "user", "content": f"what is {word}?"},
                    {"role": "assistant", "content": "it is the one."},
                ]
            }
            for word in WORDS
        ),
    )


def preferences(folder: Path) -> str:
    """Short and plain is preferred to a row of question marks."""
    return write_rows(
        folder / "pairs.jsonl",
        (
            {"prompt": f"what is {word}?", "chosen": f"the {word} sat.", "rejected": f"???? {word} ??" + "?" * i}
            for i, word in enumerate(WORDS)
        ),
    )


def questions(folder: Path, count: int = 8) -> str:
    asked = ([{"role": "user", "content": f"{WORDS[i % 8]} {i}?"}] for i in range(count))
    rows = ({"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(asked))
    return write_rows(folder / "prompts.jsonl", rows)


def config(method: str, model: Path | str, data: str, out: Path, /, **settings: Any) -> Any:
    """A small float32 run. Sections given in ``settings`` are merged into these."""
    settings = {**settings}
    return METHODS[method].model_validate(
        {
            "model": {"name": str(model), **settings.pop("model", {})},
            "data": {"train": data, **settings.pop("data", {})},
            "optim": {"warmup": 0, **settings.pop("optim", {})},
            "run": {"folder": str(out), "report": False, **settings.pop("run", {})},
            **settings,
        }
    )


def go(config: Any, **options: Any) -> Path:
    """Through the method's own front door."""
    return RUNS[config.method](config, quiet=True, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def series(run: Path, name: str, split: str = "train") -> list[float]:
    """One metric, step by step."""
    return [row["values"][name] for row in lines(run / "metrics.jsonl") if row["split"] == split]


def unclocked(run: Path) -> list[Any]:
    """Metrics and samples without what the clock and the machine put in."""
    rows = []
    for row in lines(run / "metrics.jsonl"):
        kept = {k: v for k, v in row["values"].items() if not k.startswith(CLOCKED)}
        rows.append((row["step"], row["split"], kept))
    samples = run / "samples.jsonl"
    for row in lines(samples) if samples.exists() else []:
        rows.append({k: v for k, v in row.items() if k not in ("time", "seconds")})
    return rows


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "final" / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def reward_file(folder: Path, body: str, name: str = "judge_file.py") -> str:
    """``reward`` in a file of its own; the body sees prompts, completions and columns."""
    text = "def score(prompts, completions, **columns):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    (folder / name).write_text(text, encoding="utf-8")
    return f"{folder / name}:score"


class Killed(BaseException):
    """A process that dies: nothing catches it but the test."""


def spied(monkeypatch: pytest.MonkeyPatch) -> list[PolicyBatch]:
    """The batches that the updates of a run were made of."""
    seen: list[PolicyBatch] = []
    real = online._Loop._policy_batch

    def spy(self, found, step):
        batch, metrics = real(self, found, step)
        seen.append(batch)
        return batch, metrics

    monkeypatch.setattr(online._Loop, "_policy_batch", spy)
    return seen


def kill_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """The ``nth`` optimizer step of this process never comes back."""
    from tether.backends.local.learner import LocalLearner

    real, calls = LocalLearner.optim_step, [0]

    def step(self: LocalLearner) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == nth:
            raise Killed
        return real(self)

    monkeypatch.setattr(LocalLearner, "optim_step", step)
