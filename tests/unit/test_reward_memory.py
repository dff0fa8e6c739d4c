"""A reward with a memory: where it may stand, what a checkpoint holds of it, and what is said where they do not fit."""

from __future__ import annotations

import json

import pytest

from method_cases import config, questions, series, write_rows
from tether.config.schema import METHODS
from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import SamplingSettings
from tether.methods import choose, choose_best, evaluate, evaluate_pass, iterate, judge, rl
from tether.methods.judges import open_rule

CLASS = """
from dataclasses import dataclass
import torch
from tether.core.protocols import Scores

@dataclass
class Mine:
    seen: float = 0.0

    def __call__(self, rollouts):
        return Scores(total=torch.tensor([self.seen + len(r.text) % 3 for r in rollouts]))
"""
ADVANCE = """
    def advance(self, parts):
        self.seen += 10.0
"""
STATE = """
    def state(self):
        return {"seen": self.seen}

    def restore(self, state):
        self.seen = state["seen"]
"""


def own(folder, body: str, name: str = "own.py") -> str:
    (folder / name).write_text(body, encoding="utf-8")
    return f"{folder / name}:Mine"


@pytest.fixture
def remembering(tmp_path) -> str:
    return own(tmp_path, CLASS + ADVANCE + STATE)


def in_a_sum(name: str) -> dict:
    return {"type": "sum", "parts": {"a": {"reward": name, "weight": 2.0}, "b": "target_length"}}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", ["choose", "iterate", "best of n", "evaluate", "pass", "constraint"])
def test_without_training_steps_a_memory_is_refused(method, nested, remembering, tmp_path):
    spec = in_a_sum(remembering) if nested else remembering
    text = json.dumps(spec) if nested else remembering
    settings = SamplingSettings(max_new_tokens=4)
    data = questions(tmp_path)
    rows = write_rows(tmp_path / "given.jsonl", [{"prompt": "q", "completions": ["a", "b"]}])

    def start() -> object:
        if method == "choose":
            made = {"data": {"train": rows}, "given": {}, "write": "sft", "reward": spec}
            return choose.run(METHODS["choose"].model_validate(made), quiet=True)
        if method == "iterate":
            made = {"data": {"train": data}, "reward": spec, "loss": {"type": "dpo"}}
            return iterate.run(METHODS["iterate"].model_validate(made), quiet=True)
        if method == "best of n":
            return choose_best.run(
                model="none", prompts=data, prompt=[], out=None, best_of=2, reward=text, settings=settings, seed=0,
                system=None,
            )  # fmt: skip
        if method == "constraint":
            return judge.constraint(
                path=data, model="none", text="Be brief.", check=text, without_it=False, out=str(tmp_path / "o.jsonl"),
                n_prompts=None, settings=settings, seed=0,
            )  # fmt: skip
        every = {"model": "none", "baseline": None, "prompts": data, "judge": text, "n_prompts": None, "seed": 0}
        every |= {"settings": settings, "system": None, "out": None}
        if method == "pass":
            return evaluate_pass.run(**every, ks=[1], samples=None)
        return evaluate.run(**every)

    with pytest.raises(UserError) as caught:
        start()
    where = {"evaluate": "judge", "pass": "judge", "constraint": "--check"}.get(method, "reward")
    where += ".parts.a.reward" if nested else ""
    assert str(caught.value).startswith(f"{where}: {remembering} has a memory (advance), and ")
    assert "name a class or function without a memory" in str(caught.value)


@pytest.mark.parametrize("reader", ["guards", "verify"])
def test_what_judges_held_out_answers_has_no_memory(reader, remembering, tiny_model_folder, tmp_path):
    reads = {"guards": {"guards": {"judge": remembering}}, "verify": {"verify": {"reward": remembering}}}[reader]
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward="target_length", algorithm="rloo",
        data={"eval": questions(tmp_path, 4)}, run={"eval_every": 1}, **reads,
    )  # fmt: skip
    with pytest.raises(UserError, match="has a memory") as caught:
        rl.run(made, quiet=True)
    assert str(caught.value).startswith({"guards": "guards.judge", "verify": "verify.reward"}[reader])
    normalised = {"type": "sum", "parts": {"a": {"reward": "target_length", "normalise": True}}}
    made = made.model_copy(update={"guards": {"judge": normalised}, "verify": None})
    with pytest.raises(UserError, match=r"guards.judge.parts.a.normalise: a held-out judge has no training steps"):
        rl.run(made, quiet=True)


def test_half_a_memory_is_refused_and_a_state_alone_is_none(tmp_path):
    with pytest.raises(UserError, match="has advance, which would be ignored: a memory needs advance, state and"):
        open_rule(own(tmp_path, CLASS + ADVANCE))
    assert not hasattr(open_rule(own(tmp_path, CLASS + STATE, "state_only.py")), "state")


@pytest.mark.parametrize("value", ["torch.ones(1)", "float('nan')", "{1, 2}"])
def test_a_state_that_no_checkpoint_can_hold_is_named(value, tmp_path):
    made = open_rule(own(tmp_path, CLASS + ADVANCE + STATE.replace("self.seen}", value + "}"), "held.py"))
    with pytest.raises(RewardFailure, match=r"held.py:Mine raised \w+: .* in its state"):
        made.state()  # type: ignore[union-attr]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("first", "then"), [("", ADVANCE + STATE), (ADVANCE + STATE, "")])
def test_a_class_whose_memory_came_or_went_is_named_on_resume(
    first, then, nested, tiny_model_folder, tmp_path, monkeypatch
):
    import sys

    def go(steps: int, body: str, resume: bool):
        sys.modules.pop("changing", None)
        name = own(tmp_path, CLASS + body, "changing.py")
        made = config(
            "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", algorithm="rloo", prompts_per_step=2,
            reward=in_a_sum(name) if nested else name, completions_per_prompt=2, steps=3,
            sampling={"max_new_tokens": 4}, run={"checkpoint_every": 1},
        )  # fmt: skip
        if steps < 3:
            stop_after(monkeypatch, steps)
        return rl.run(made, resume=resume, quiet=True)

    with pytest.raises(KeyboardInterrupt):
        go(1, first, False)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"the reward has changed since the checkpoint: (it|its part a) ") as caught:
        go(3, then, True)
    had = "has a memory, and had none then" if then else "has no memory, and had one then"
    assert had in str(caught.value) and "put its code back" in str(caught.value)
    out = go(3, first, True)
    assert len(series(out, "reward/mean")) == 3
    assert (series(out, "reward/mean")[-1] > 20) is bool(first)


def stop_after(monkeypatch, steps: int) -> None:
    """The run ends like one that was interrupted, after the checkpoint of step ``steps``."""
    from tether.training.online import _Loop

    real = _Loop.step

    def step(self, number):
        if number > steps:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(_Loop, "step", step)
