"""A run whose reward fails: it stops with exit code 5, or leaves the completion out and counts it; never a zero."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch
from typer.testing import CliRunner

from method_cases import config, go, lines, questions, reward_file, same_weights, series
from tether.cli.main import app
from tether.core.errors import NumericStop, RewardFailure, UserError

SMALL = {
    "algorithm": "rloo",
    "steps": 2,
    "prompts_per_step": 2,
    "completions_per_prompt": 2,
    "sampling": {"max_new_tokens": 4},
}


def run(model, folder, body, /, **settings):
    file = reward_file(folder, body, name=f"bad_{crc32(body.encode()):x}.py")
    return config("rl", model, questions(folder), folder / "r", reward=file, **{**SMALL, **settings})


def test_a_reward_that_raises_stops_the_command_with_exit_code_5(tiny_model_folder, tmp_path):
    file = reward_file(tmp_path, "raise RuntimeError('the judge is asleep')", name="asleep.py")
    command = [
        "rloo", "--model", str(tiny_model_folder), "--data", questions(tmp_path), "--out", str(tmp_path / "r"),
        f"reward={file}", "steps=2", "prompts_per_step=2", "sampling.max_new_tokens=4", "-q",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 5
    assert f"error: the reward {file} raised RuntimeError: the judge is asleep" in result.output
    assert "prompts:" in result.output  # the id of a sample
    # Nothing was learnt, so the name stays free for the mended command.
    assert not (tmp_path / "r").exists()


def test_a_reward_that_raises_later_keeps_what_was_recorded(tiny_model_folder, tmp_path):
    body = "import pathlib\nf = pathlib.Path(__file__).with_suffix('.seen')\nold = f.exists()\nf.touch()\n"
    body += "assert not old, 'second call'\nreturn [0.0] * len(completions)"
    with pytest.raises(RewardFailure, match="second call"):
        go(run(tiny_model_folder, tmp_path, body))
    assert len(lines(tmp_path / "r" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_raise_stops_whatever_may_be_skipped(policy, tiny_model_folder, tmp_path):
    with pytest.raises(RewardFailure, match="ZeroDivisionError"):
        go(run(tiny_model_folder, tmp_path, "return [1 / 0 for c in completions]", on_reward_failure=policy))


@pytest.mark.parametrize("unscored", ["None", "float('nan')"])
def test_unscored_completions_stop_the_run_or_are_left_out_and_counted(unscored, tiny_model_folder, tmp_path):
    body = f"return [{unscored} if i == 1 else float(i) for i in range(len(completions))]"
    with pytest.raises(RewardFailure, match=r"1 of 4 completions were left unscored by the reward .*score") as caught:
        go(run(tiny_model_folder, tmp_path, body))
    assert "on_reward_failure=skip" in str(caught.value)
    out = go(run(tiny_model_folder, tmp_path, body, on_reward_failure="skip"))
    assert series(out, "reward/dropped") == [1.0, 1.0]
    assert series(out, "reward/mean") == [pytest.approx(5 / 3)] * 2  # 0, 2 and 3
    assert [row["reward"] for row in lines(out / "samples.jsonl")] == [0.0, 2.0, 3.0] * 2


def test_nothing_left_to_learn_from_stops_even_where_skipping_is_allowed(tiny_model_folder, tmp_path):
    with pytest.raises(RewardFailure, match="no completion of the step is left"):
        go(run(tiny_model_folder, tmp_path, "return [None] * len(completions)", on_reward_failure="skip"))


def test_a_prompt_may_lose_all_its_completions(tiny_model_folder, tmp_path):
    body = "return [None, None, 1.0, 2.0]"
    out = go(run(tiny_model_folder, tmp_path, body, on_reward_failure="skip", overrides={"minibatches": 2}))
    assert series(out, "reward/dropped") == [2.0, 2.0]
    assert all(torch.isfinite(torch.tensor(series(out, "grad_norm"))))


def test_a_reward_that_reseeds_changes_nothing(tiny_model_folder, tmp_path):
    plain = "return [float(len(c)) for c in completions]"
    reseeding = "import random, torch\ntorch.manual_seed(5)\nrandom.seed(5)\n" + plain
    lora = {"model": {"lora": {"rank": 2}}, "optim": {"learning_rate": 1e-2}}
    a = go(run(tiny_model_folder, tmp_path, plain, **lora, run={"folder": str(tmp_path / "a")}))
    b = go(run(tiny_model_folder, tmp_path, reseeding, **lora, run={"folder": str(tmp_path / "b")}))
    assert same_weights(a, b)


def test_scores_of_the_wrong_shape_from_a_class_of_ones_own(tiny_model_folder, tmp_path):
    (tmp_path / "own_reward.py").write_text(
        "from dataclasses import dataclass\nimport torch\nfrom tether.core.protocols import Scores\n"
        "@dataclass(frozen=True)\nclass One:\n"
        "    def __call__(self, rollouts):\n        return Scores(total=torch.zeros(1))\n"
    )
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward=f"{tmp_path}/own_reward.py:One", **SMALL
    )
    with pytest.raises(RewardFailure, match=r"One gave scores of shape \(1,\) for 4 completions"):
        go(made)


# -- what else must stop a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"top_p": 0.9}}, "top_p and sampling.top_k cut the tail"),
        ({"sampling": {"top_k": 5}}, "top_p and sampling.top_k cut the tail"),
        ({"sampling": {"temperature": 0}}, "temperature=0 draws nothing to learn from"),
        ({"algorithm": "ppo", "critic": {"kind": "adapter"}}, "critic.kind=adapter needs model.lora"),
        ({"critic": {"kind": "head"}}, "critic.* would be ignored: rloo has no critic"),
        ({"critic": {"learning_rate": 1e-3}}, "critic.* would be ignored"),
        ({"overrides": {"kl_in_reward": 0.0}, "reference": {"name": "x"}}, "reference.name would be ignored"),
        ({"completions_per_prompt": 1}, "rloo compares the completions of one prompt"),
        ({"overrides": {"minibatches": 3}}, "minibatches=3 is more than prompts_per_step=2"),
        ({"model": {"lora": {"rank": 2, "dropout": 0.1}}}, "model.lora.dropout=0.1"),
        ({"reward": "target_lenght"}, "did you mean target_length?"),
        ({"algorithm": "grop"}, "did you mean grpo?"),
        ({"data": {"max_prompt_tokens": 3}}, "no prompts are left; the shortest has"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_a_folder_is_made(settings, words, tiny_model_folder, tmp_path):
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", **{**SMALL, "reward": "target_length", **settings}
    )
    with pytest.raises(UserError) as caught:
        go(made)
    assert words in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_sampler_that_draws_from_another_distribution_stops_the_run(tiny_model_folder, tmp_path, monkeypatch):
    from dataclasses import replace

    from tether.backends.local.sampler import LocalSampler

    real = LocalSampler.sample

    def lying(self, *args, **kwargs):
        return [replace(r, logprobs=r.logprobs - 0.2) for r in real(self, *args, **kwargs)]

    monkeypatch.setattr(LocalSampler, "sample", lying)
    made = config("rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward="target_length", **SMALL)
    with pytest.raises(NumericStop, match=r"differ by 0.2 nats a token") as caught:
        go(made)
    assert caught.value.exit_code == 4
