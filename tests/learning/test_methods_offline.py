"""SFT, reward models and DPO through their front doors: a toy thing is learnt, and what the run folder then holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from method_cases import config, demonstrations, go, lines, preferences, series, weights, write_rows
from tether.core.errors import UserError
from tether.core.protocols import SamplingSettings
from tether.methods.sample import given_prompts, open_sampler


@pytest.fixture(scope="module")
def sft_run(tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    held_out = write_rows(
        folder / "held_out.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "what is sat?"},
                    {"role": "assistant", "content": "it is the one."},
                ]
            }
        ],
    )
    made = config(
        "sft", tiny_model_folder, demonstrations(folder), folder / "run",
        optim={"learning_rate": 2e-2}, epochs=15, prompts_per_step=4,
        data={"eval": held_out}, run={"report": True, "eval_every": 15},
    )  # fmt: skip
    return go(made)


def test_sft_ends_up_saying_it(sft_run):
    loss = series(sft_run, "loss")
    assert loss[0] == pytest.approx(math.log(320), abs=0.5)  # a random model knows nothing of the 320 tokens
    assert loss[-1] < 0.2
    before, after = series(sft_run, "loss", split="eval")
    assert after < before < loss[0]
    greedy = SamplingSettings(temperature=0, max_new_tokens=20)
    sampler = open_sampler(str(sft_run), None, greedy, lambda text: None)
    (answer,) = sampler.sample(given_prompts(None, ["what is dog?"]), n=1, settings=greedy, seed=0)
    assert answer.text == "it is the one." and answer.finish_reason == "stop"


def test_the_run_folder_is_whole(sft_run, tiny_model_folder):
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {p.name for p in sft_run.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "final", "report.html"} <= names
    kept = yaml.safe_load((sft_run / "config.yaml").read_text())
    assert kept["optim"]["learning_rate"] == 0.02 and kept["model"]["name"] == str(tiny_model_folder)
    assert json.loads((sft_run / "environment.json").read_text())["method"] == "sft"
    assert [row["step"] for row in lines(sft_run / "metrics.jsonl") if row["split"] == "train"] == list(range(1, 31))

    tokenizer = AutoTokenizer.from_pretrained(sft_run / "final")
    model: Any = AutoModelForCausalLM.from_pretrained(sft_run / "final").eval()
    assert model.dtype == torch.float32
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is cat?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(asked, return_tensors="pt").input_ids
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == "it is the one."
    card = (sft_run / "final" / "README.md").read_text()
    assert f"base_model: {tiny_model_folder}" in card and "learning_rate: 0.02" in card
    report = (sft_run / "report.html").read_text()
    assert "<svg" in report and "http://" not in report.replace("http://www.w3.org", "")


def test_only_the_assistant_is_learnt(tiny_model_folder, tmp_path):
    """The same answers to other questions: with weights as they are, the loss counts the same tokens."""
    made = config("sft", tiny_model_folder, demonstrations(tmp_path), tmp_path / "r", prompts_per_step=8)
    first = series(go(made), "loss")[0]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tether.data.chat import ChatTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    total, count = 0.0, 0
    for row in lines(tmp_path / "sft.jsonl"):
        asked = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
        whole = torch.tensor([tokenizer(asked + "it is the one.<|im_end|>").input_ids])
        start = len(tokenizer(asked).input_ids)
        with torch.no_grad():
            logprobs = model(whole).logits.log_softmax(-1)[0, start - 1 : -1]
        total -= float(logprobs.gather(1, whole[0, start:, None]).sum())
        count += whole.shape[1] - start
    assert ChatTokenizer(tokenizer).stop_ids  # the token that ends the turn is among those counted
    assert first == pytest.approx(total / count, abs=1e-4)


def test_a_reward_model_learns_the_preference(tiny_model_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    made = config(
        "reward", tiny_model_folder, preferences(tmp_path), tmp_path / "r",
        optim={"learning_rate": 2e-3}, epochs=6, prompts_per_step=4, data={"eval_fraction": 0.3},
    )  # fmt: skip
    out = go(made)
    assert series(out, "accuracy")[-1] == 1.0 and series(out, "loss")[-1] < 0.05
    assert series(out, "accuracy", split="eval") == [1.0]
    model = AutoModelForSequenceClassification.from_pretrained(out / "final")
    assert model.config.num_labels == 1 and weights(out)["score.weight"].shape == (1, 64)


@pytest.mark.parametrize("lora", [None, {"rank": 8}], ids=["full", "lora"])
def test_dpo_raises_the_margin_from_log_2(lora, tiny_model_folder, tmp_path):
    rate = 1e-3 if lora is None else 2e-2
    made = config(
        "preference", tiny_model_folder, preferences(tmp_path), tmp_path / "r",
        model={"lora": lora}, optim={"learning_rate": rate}, epochs=5, prompts_per_step=4,
    )  # fmt: skip
    out = go(made)
    loss = series(out, "loss")
    assert loss[0] == pytest.approx(math.log(2), abs=1e-7)  # the policy is its reference
    assert loss[-1] < 0.4 and series(out, "rewards/margins")[-1] > 0.5
    gap = [c - r for c, r in zip(series(out, "logps/chosen"), series(out, "logps/rejected"), strict=True)]
    assert gap[-1] > gap[0] + 5
    assert series(out, "rewards/accuracies")[-1] == 1.0


def test_pairs_that_share_an_id_keep_a_reference_of_their_own(tiny_model_folder, tmp_path):
    """Rows of a training and of a held-out file of the same name are numbered alike."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train = preferences(tmp_path / "a")
    pairs = lines(Path(train))
    held_out = write_rows(tmp_path / "b" / "pairs.jsonl", [{**p, "chosen": p["chosen"] + " one"} for p in pairs])
    made = config(
        "preference", tiny_model_folder, train, tmp_path / "r",
        data={"eval": held_out}, optim={"learning_rate": 1e-12}, prompts_per_step=8,
    )  # fmt: skip
    assert series(go(made), "loss", split="eval")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_reference_of_its_own_is_used_and_said(tiny_model_folder, tmp_path, capsys):
    from conftest import build_model, build_tokenizer

    other = tmp_path / "other"
    build_model(seed=9).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    made = config(
        "preference", tiny_model_folder, preferences(tmp_path), tmp_path / "r",
        reference={"name": str(other)}, prompts_per_step=8,
    )  # fmt: skip
    from tether.methods import preference

    out = preference.run(made)
    assert abs(series(out, "loss")[0] - math.log(2)) > 1e-3
    assert f"reference: {other}, weights " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["sft", "reward", "preference"])
def test_a_dry_run_writes_nothing_and_shows_the_whole(method, tiny_model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = demonstrations(tmp_path) if method == "sft" else preferences(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    go(config(method, tiny_model_folder, data, tmp_path / "r"), dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    assert "learning_rate:" in shown and "1 optimizer steps: 16 groups a step" in shown
    assert "one example:" in shown


def test_a_group_over_the_token_budget_is_named_and_may_be_refused(tiny_model_folder, tmp_path, capsys):
    from tether.methods import preference

    data = preferences(tmp_path)
    for oversize in ("run", "refuse"):
        made = config(
            "preference", tiny_model_folder, data, tmp_path / "r",
            optim={"tokens_per_micro_batch": 8, "oversize": oversize},
        )  # fmt: skip
        if oversize == "refuse":
            with pytest.raises(UserError, match=r"8 of 8 groups(.|\n)*optim.oversize=run"):
                preference.run(made, dry_run=True)
        else:
            preference.run(made, dry_run=True)
            assert (
                capsys.readouterr().out.count("have more tokens than optim.tokens_per_micro_batch=8; the longest") == 1
            )


def test_a_folder_that_exists_is_refused_untouched(tiny_model_folder, tmp_path):
    taken = tmp_path / "r"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already and is never overwritten"):
        go(config("sft", tiny_model_folder, demonstrations(tmp_path), taken))
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]


def test_dropout_is_for_gradients_alone(tiny_model_folder, tmp_path):
    """Held-out loss with dropout in it would differ from one evaluation to the next."""
    from tether.methods import parts
    from tether.models.load import load_backbone
    from tether.models.roles import Policy

    backbone = load_backbone(str(tiny_model_folder), say=lambda text: None)
    made = config(
        "sft", tiny_model_folder, demonstrations(tmp_path), tmp_path / "r",
        model={"lora": {"rank": 4, "dropout": 0.5}}, optim={"learning_rate": 1e-2},
    )  # fmt: skip
    policy = Policy(backbone=backbone, adapter=parts.adapt(backbone, made.model.lora, "policy"))
    learner = parts.open_learner(policy, made.optim, 10)
    chat = parts.open_chat(made.model, made.data, lambda text: None)
    data = parts.open_data(made.data, "demonstrations", chat, lambda text: None)
    from tether.core.batches import Batch
    from tether.losses.supervised import CrossEntropy

    batch = Batch.from_groups(data.train)
    losses = []
    for _ in range(2):
        losses.append(learner.forward_backward(batch, CrossEntropy())["loss"].value())
        learner.optim_step()
    assert learner.logprobs(batch).equal(learner.logprobs(batch))
    with_dropout = {learner.forward_backward(batch, CrossEntropy())["loss"].value() for _ in range(3)}
    assert len(with_dropout) == 3
