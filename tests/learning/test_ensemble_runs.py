"""An ensemble through its front doors: trained in one command, stopped and resumed, trained against on one backbone."""

from __future__ import annotations

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
)
from tether.cli.main import app
from tether.config.sections import ModelConfig
from tether.core.errors import DataError, UserError
from tether.core.protocols import SamplingSettings
from tether.core.text import Prompt
from tether.methods.judges import open_reward
from tether.methods.sample import open_sampler
from tether.models.adapters import adapter_parameters
from tether.rewards.ensemble import Ensemble

LORA = {"lora": {"rank": 2}}
CAUTIOUS = {"combine": "mean_minus_std", "c": 0.5}


def members(start: Path, folder: Path, name: str, **settings: Any) -> Any:
    return config(
        "reward", start, preferences(folder), folder / name, model=LORA, data={"eval_fraction": 0.3},
        optim={"learning_rate": 5e-3}, epochs=2, prompts_per_step=3, bootstrap=True,
        run={"checkpoint_every": 1, **settings.pop("run", {})}, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory) -> Path:
    return go(members(tiny_model_folder, tmp_path_factory.mktemp("ensemble"), "run", members=2, run={"seed": 3}))


def test_each_member_is_the_run_that_its_seed_makes_alone(trained: Path, tiny_model_folder, tmp_path):
    alone = go(members(tiny_model_folder, tmp_path, "alone", run={"seed": 4}))
    assert same_weights(alone, trained / "member-1")
    assert unclocked(alone) == unclocked(trained / "member-1")
    assert not same_weights(trained / "member-0", trained / "member-1")
    each_once = members(tiny_model_folder, tmp_path, "once", run={"seed": 4}).model_copy(update={"bootstrap": False})
    assert not same_weights(alone, go(each_once))


def test_a_stopped_ensemble_goes_on_where_it_was(trained: Path, tiny_model_folder, tmp_path, monkeypatch):
    made = members(tiny_model_folder, tmp_path, "run", members=2, run={"seed": 3})
    steps = len(series(trained / "member-0", "loss"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, steps + 2)  # in member-1
        go(made)
    first = (tmp_path / "run" / "member-0" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        go(made)
    with pytest.raises(UserError, match="not trained to the end"):
        opened(tmp_path / "run", tiny_model_folder)
    go(made, resume=True)
    assert (tmp_path / "run" / "member-0" / "metrics.jsonl").read_bytes() == first
    for name in ("member-0", "member-1"):
        assert same_weights(tmp_path / "run" / name, trained / name)


def test_an_ensemble_that_never_began_leaves_no_folder(tiny_model_folder, tmp_path):
    with pytest.raises(DataError):
        go(config("reward", tiny_model_folder, questions(tmp_path), tmp_path / "run", members=2))
    assert not (tmp_path / "run").exists()


def opened(run: Path, start: Path, *, shared: bool = False) -> tuple[Any, Any]:
    """The ensemble in ``run`` as a reward, and the sampler whose backbone it may share."""
    sampler = open_sampler(str(start), None, SamplingSettings(), lambda text: None)
    backbone = sampler.policy.backbone
    reward, scorer = open_reward(
        {"type": "ensemble", "members": [str(run)], **CAUTIOUS}, backbone.tokenizer, ModelConfig(name="x"), 512,
        lambda text: None, shared=backbone if shared else None,
    )  # fmt: skip
    assert isinstance(reward, Ensemble) and scorer is None
    return reward, sampler


def test_members_on_one_backbone_score_as_networks_of_their_own(trained: Path, tiny_model_folder):
    own, sampler = opened(trained, tiny_model_folder)
    on_policy, other = opened(trained, tiny_model_folder, shared=True)
    asked = [Prompt(id=str(i), text=f"what is {word}?") for i, word in enumerate(("cat", "dog", "mat"))]
    rollouts = sampler.sample(asked, n=2, settings=SamplingSettings(max_new_tokens=5), seed=0)
    ours, theirs = own(rollouts), on_policy(rollouts)
    torch.testing.assert_close(theirs.total, ours.total, atol=1e-5, rtol=1e-5)
    for name in ("member-0", "member-1", "disagreement"):
        torch.testing.assert_close(theirs.parts[name], ours.parts[name], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours.parts["member-0"], ours.parts["member-1"], atol=1e-3)
    # One network: what the members add is their adapters.
    shared, plain = other.policy.backbone.hf, sampler.policy.backbone.hf
    added = [adapter_parameters(shared, f"reward_{i}") for i in range(2)]
    extra = sum(p.numel() for a in added for p in a.values())
    assert (
        all(added) and sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in plain.parameters()) + extra
    )


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_trained_against_and_resumed(shared: bool, trained: Path, tiny_model_folder, tmp_path, monkeypatch):
    def made(name: str) -> Any:
        return config(
            "rl", tiny_model_folder, questions(tmp_path), tmp_path / name,
            algorithm="rloo", reward={"type": "ensemble", "members": [str(trained)], **CAUTIOUS}, steps=3,
            prompts_per_step=4, completions_per_prompt=2, sampling={"max_new_tokens": 5}, model=LORA,
            optim={"learning_rate": 1e-2}, share_backbone=shared, run={"checkpoint_every": 1},
        )  # fmt: skip

    run = go(made("run"))
    names = ("reward/mean", "reward/member-0", "reward/member-1", "reward/disagreement")
    for mean, a, b, apart in zip(*(series(run, name) for name in names), strict=True):
        assert apart > 0
        assert mean == pytest.approx((a + b) / 2 - 0.5 * apart, abs=1e-5)
    assert series(run, "kl/reference")[-1] != 0  # the policy moved
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        go(made("stopped"))
    again = go(made("stopped"), resume=True)
    assert same_weights(again, run) and unclocked(again) == unclocked(run)


def test_a_judge_of_tether_evaluate(trained: Path, tiny_model_folder, tmp_path):
    judge = f"{{type: ensemble, members: [{trained}], combine: minimum}}"
    said = CliRunner().invoke(
        app,
        ["evaluate", "--model", str(tiny_model_folder), "--prompts", questions(tmp_path, 3), "--judge", judge,
         "--max-new-tokens", "4"],
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert "mean score" in said.output and "over 3 prompts" in said.output


def test_what_does_not_go_together_is_refused(trained: Path, tiny_model_folder, tmp_path):
    def made(**settings: Any) -> Any:
        return config("rl", tiny_model_folder, questions(tmp_path), tmp_path / "run", algorithm="rloo", steps=1,
                      sampling={"max_new_tokens": 4}, **settings)  # fmt: skip

    both = {"type": "ensemble", "members": [str(trained)]}
    with pytest.raises(UserError, match="scale_reward=false would be ignored"):
        go(made(reward=both, scale_reward=False))
    whole = tmp_path / "whole"
    whole.mkdir()
    go(config("reward", tiny_model_folder, preferences(tmp_path), whole / "run"))
    mixed = {"type": "ensemble", "members": [str(trained), str(whole / "run")]}
    with pytest.raises(UserError, match=f"{whole}.*it was not trained with LoRA"):
        go(made(reward=mixed, share_backbone=True, model=LORA))
