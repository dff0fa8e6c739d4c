"""``scale_on``: the scale that is saved with a reward model, against transformers' own scores of the answers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from method_cases import config, preferences, write_rows
from tether.config.sections import ModelConfig
from tether.core.errors import DataError, UserError
from tether.core.text import Prompt
from tether.methods import reward
from tether.methods.choose_candidates import TextOnly
from tether.methods.judges import open_reward
from tether.rewards.model import ScoreScale
from verifier_cases import rollout


def answers(count: int) -> list[dict]:
    """Those from the 64th on are longer, so that the first ones alone have another scale."""
    return [
        {"prompt": f"what is {i}? ", "completion": "the cat sat. " * (1 + i // 64 * 2 + i % 3)} for i in range(count)
    ]


def trained(model, folder, **settings):
    made = config(
        "reward",
        model,
        preferences(folder),
        folder / "r",
        prompts_per_step=8,
        optim={"learning_rate": 1e-3},
        **settings,
    )
    return reward.run(made, quiet=True) / "final"


def plain_scores(folder, rows) -> numpy.ndarray:
    """[N] or [N, K] float64, text by text, no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        tokens = [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            found.append(model(torch.tensor([tokens])).logits[0].double().numpy())
    return numpy.stack(found).squeeze(-1) if found[0].shape == (1,) else numpy.stack(found)


@pytest.mark.parametrize("count", [10, 150])
def test_the_answers_have_mean_0_and_std_1(count, tiny_model_folder, tmp_path):
    rows = answers(count)
    out = trained(tiny_model_folder, tmp_path, scale_on=write_rows(tmp_path / "sft.jsonl", rows))
    found = json.loads((out / "score_scale.json").read_text())
    measured = rows if count <= 64 else [rows[i * count // 64] for i in range(64)]
    scores = plain_scores(out, measured)
    assert found["completions"] == len(measured) == min(count, 64)
    assert found["mean"] == pytest.approx(scores.mean(), abs=1e-5)
    assert found["std"] == pytest.approx(scores.std(), rel=1e-3)
    first = plain_scores(out, rows[:64])
    assert count <= 64 or abs(first.mean() - scores.mean()) > 1e-3, "the first ones alone would have another mean"


def test_without_it_the_scale_is_of_the_preferences(tiny_model_folder, tmp_path):
    found = json.loads((trained(tiny_model_folder, tmp_path) / "score_scale.json").read_text())
    assert found["completions"] == 16


def test_every_head_is_measured_on_the_answers(tiny_model_folder, tmp_path):
    rows = answers(12)
    out = trained(tiny_model_folder, tmp_path, heads=2, scale_on=write_rows(tmp_path / "sft.jsonl", rows))
    found = json.loads((out / "score_scale.json").read_text())
    scores = plain_scores(out, rows)
    assert [one["mean"] for one in found["heads"]] == pytest.approx(scores.mean(axis=0).tolist(), abs=1e-5)
    assert found["mean"] == pytest.approx(scores.mean(), abs=1e-5)


def test_the_last_turn_is_the_answer(tiny_model_folder, tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "the cat")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]}, {"prompt": "x", "completion": "y"}]
    out = trained(tiny_model_folder, tmp_path, scale_on=write_rows(tmp_path / "sft.jsonl", rows))
    assert json.loads((out / "score_scale.json").read_text())["completions"] == 2


def test_what_no_scale_can_be_measured_on_is_said_before_training(tiny_model_folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        trained(tiny_model_folder, tmp_path, scale_on=str(tmp_path / "nowhere.jsonl"))
    assert not (tmp_path / "r" / "metrics.jsonl").exists() or not (tmp_path / "r" / "metrics.jsonl").read_text()
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"asked\.jsonl"):
        trained(tiny_model_folder, tmp_path, scale_on=asked, run={"folder": str(tmp_path / "r2")})


@pytest.mark.parametrize("loss", ["process", "outcome"])
def test_models_of_steps_and_outcomes_are_measured_as_they_will_be_read(loss, tiny_model_folder, tmp_path):
    """The scale is of the scores that a policy's completions will get, whatever the loss reads them off."""
    rows = {
        "process": [
            {"prompt": f"{i}?", "completions": ["the cat", "sat"], "labels": [True, i % 2 == 0]} for i in range(8)
        ],
        "outcome": [{"prompt": f"{i}?", "completion": "the cat sat", "label": i % 2 == 0} for i in range(8)],
    }[loss]
    answered = [{"prompt": f"{i}?", "completion": "the cat\n\nsat " + "on " * i + "\n\nit."} for i in range(5)]
    made = config(
        "reward", tiny_model_folder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "r", prompts_per_step=8,
        loss={"type": loss}, scale_on=write_rows(tmp_path / "sft.jsonl", answered),
    )  # fmt: skip
    out = reward.run(made, quiet=True) / "final"
    found = ScoreScale.load(out)
    assert found is not None and found.completions == 5
    judge, _ = open_reward(str(out), TextOnly(), ModelConfig(), 4096, lambda text: None)
    asked = [Prompt(id=str(i), text=row["prompt"]) for i, row in enumerate(answered)]
    scores = judge([replace(rollout(r["completion"]), prompt=p) for r, p in zip(answered, asked, strict=True)]).total
    assert found.mean == pytest.approx(float(scores.double().mean()), abs=1e-5)
    assert found.std == pytest.approx(float(scores.double().std(correction=0)), rel=1e-3)
