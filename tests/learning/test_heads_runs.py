"""Several heads through their front doors: trained, stopped and resumed, evaluated, trained against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from method_cases import (
    Killed,
    config,
    go,
    kill_at,
    preferences,
    questions,
    same_weights,
    series,
    unclocked,
    weights,
    write_rows,
)
from tether.cli.main import app
from tether.config.sections import ModelConfig
from tether.core.errors import UserError
from tether.core.protocols import SamplingSettings
from tether.core.text import Prompt
from tether.methods.judges import open_reward
from tether.methods.sample import open_sampler

K = 3


def trained_on(start: Path, folder: Path, name: str = "run", **settings: Any) -> Any:
    return config(
        "reward", start, preferences(folder), folder / name, data={"eval_fraction": 0.3},
        model={"lora": {"rank": 2}}, optim={"learning_rate": 5e-3}, prompts_per_step=3,
        run={"checkpoint_every": 1, "seed": 3, "eval_every": 2, **settings.pop("run", {})},
        **{"epochs": 2, "heads": K, "bootstrap": True, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory) -> Path:
    return go(trained_on(tiny_model_folder, tmp_path_factory.mktemp("heads")))


def test_a_run_of_several_heads(trained: Path):
    assert weights(trained)["score.weight"].shape == (K, 64)
    facts = json.loads((trained / "final" / "score_scale.json").read_text())
    assert len(facts["heads"]) == K and all(one["std"] > 0 for one in facts["heads"])
    assert "3 labels" in (trained / "final" / "README.md").read_text()
    for split in ("train", "eval"):
        assert all(0 <= v <= 1 for v in series(trained, "heads/accuracy_spread", split))
        assert all(v > 0 for v in series(trained, "heads/disagreement", split))


def test_stopped_it_goes_on_as_it_was(trained: Path, tiny_model_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        go(trained_on(tiny_model_folder, tmp_path))
    again = go(trained_on(tiny_model_folder, tmp_path), resume=True)
    assert same_weights(again, trained) and unclocked(again) == unclocked(trained)


def test_every_head_learns_and_a_draw_of_its_own_makes_another(trained: Path, tiny_model_folder, tmp_path):
    run = go(trained_on(tiny_model_folder, tmp_path, bootstrap=False, epochs=6, run={"checkpoint_every": 100}))
    assert series(run, "accuracy")[-1] == 1 and series(run, "heads/accuracy_spread")[-1] == 0
    once = go(trained_on(tiny_model_folder, tmp_path, "once", bootstrap=False))
    assert not same_weights(once, trained)


def test_rankings_and_pooled_heads(tiny_model_folder, tmp_path):
    rows = [{"prompt": f"p{i}", "completions": ["a", "b c", "d e"], "ranks": [0, 1, 1]} for i in range(6)]
    made = config(
        "reward", tiny_model_folder, write_rows(tmp_path / "r.jsonl", rows), tmp_path / "run", prompts_per_step=3,
        data={"eval_fraction": 0}, heads=2, bootstrap=True, pool="mean", loss={"type": "plackett_luce"},
    )  # fmt: skip
    run = go(made)
    assert weights(run)["score.weight"].shape == (2, 64) and weights(run)["score.bias"].shape == (2,)
    assert len(series(run, "loss")) == 2


def opened(spec: Any, start: Path, *, shared: bool) -> Any:
    sampler = open_sampler(str(start), None, SamplingSettings(), lambda text: None)
    backbone = sampler.policy.backbone
    asked = [Prompt(id=str(i), text=f"what is {word}?") for i, word in enumerate(("cat", "dog", "mat"))]
    rollouts = sampler.sample(asked, n=2, settings=SamplingSettings(max_new_tokens=5), seed=0)
    reward, _ = open_reward(
        spec, backbone.tokenizer, ModelConfig(name="x"), 512, lambda text: None, shared=backbone if shared else None
    )
    return reward(rollouts)


def test_on_the_policys_backbone_they_score_as_on_their_own(trained: Path, tiny_model_folder):
    spec = {"type": "ensemble", "members": [str(trained)], "combine": "mean_minus_std", "c": 0.5}
    own, shared = (opened(spec, tiny_model_folder, shared=s) for s in (False, True))
    torch.testing.assert_close(shared.total, own.total, atol=1e-5, rtol=1e-5)
    for name in ("head-0", "head-1", "head-2", "disagreement"):
        torch.testing.assert_close(shared.parts[name], own.parts[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plain", [False, True], ids=["ensemble", "plain"])
def test_trained_against(plain: bool, trained: Path, tiny_model_folder, tmp_path):
    spec = {"type": "ensemble", "members": [str(trained)], "combine": "mean_minus_std", "c": 0.5}
    run = go(config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "run", algorithm="rloo",
        reward=str(trained) if plain else spec, steps=2, prompts_per_step=4, completions_per_prompt=2,
        sampling={"max_new_tokens": 5}, model={"lora": {"rank": 2}}, share_backbone=True,
    ))  # fmt: skip
    apart, mean = series(run, "reward/disagreement"), series(run, "reward/mean")
    assert all(v > 0 for v in apart)
    if plain:
        scale = json.loads((trained / "final" / "score_scale.json").read_text())
        raw = series(run, "reward/unscaled")
        assert mean == pytest.approx([(r - scale["mean"]) / scale["std"] for r in raw], abs=1e-4)
    else:
        each = [series(run, f"reward/head-{k}") for k in range(K)]
        cautious = [sum(h) / K - 0.5 * a for *h, a in zip(*each, apart, strict=True)]
        assert mean == pytest.approx(cautious, abs=1e-5)


def test_a_critic_of_its_own_starts_from_the_trunk(trained: Path, tiny_model_folder, tmp_path):
    run = go(config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "run", algorithm="ppo", reward=str(trained), steps=1,
        prompts_per_step=2, completions_per_prompt=1, sampling={"max_new_tokens": 4},
    ))  # fmt: skip
    assert len(series(run, "value/loss")) == 1


def test_evaluated_head_by_head(trained: Path, tmp_path):
    page = tmp_path / "page.html"
    args = ["reward", "evaluate", "-m", str(trained), "--data", preferences(tmp_path), "--out", str(page)]
    said = CliRunner().invoke(app, args, env={"COLUMNS": "250"})
    assert said.exit_code == 0, said.output
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert [m["name"] for m in numbers["models"]] == [f"{trained} head-{k}" for k in range(K)]
    assert len(numbers["agreements"]) == 3 and "mean of all" in said.output


def test_what_would_be_ignored_is_refused(tiny_model_folder, tmp_path):
    with pytest.raises(UserError, match="heads and members"):
        go(trained_on(tiny_model_folder, tmp_path, members=2))
    for loss in ("outcome", "process"):
        with pytest.raises(UserError, match=f"heads=3: {loss} is read at single tokens and has one head"):
            go(trained_on(tiny_model_folder, tmp_path, loss={"type": loss}))
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        trained_on(tiny_model_folder, tmp_path, heads=1)
    assert not (tmp_path / "run").exists()
