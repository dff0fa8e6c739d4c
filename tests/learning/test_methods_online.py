"""Every row of the algorithm table raises a simple reward on the tiny model; what holds at the first step of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from method_cases import (
    config,
    demonstrations,
    go,
    lines,
    preferences,
    questions,
    reward_file,
    series,
    spied,
    write_rows,
)
from tether.algorithms import ALGORITHMS
from tether.core.errors import UserError
from tether.core.text import Message, Prompt
from tether.data.chat import ChatTokenizer
from tether.data.groups import tokenise
from tether.data.readers import read
from tether.methods.rl_parts import PromptOrder, choose_algorithm
from tether.models.load import load_tokenizer

SHARE = "return [(c.count('t') + c.count('a')) / 8 for c in completions]"
# steps, prompts a step, completions a prompt: three seeds of each rise by more than the test asks for.
SIZES = {
    "reinforce": (24, 32, 1), "reinforce_pp": (10, 32, 1), "remax": (14, 32, 1), "a2c": (30, 32, 1),
    "ppo": (12, 32, 1), "ppo_ptx": (9, 16, 1), "rloo": (20, 4, 8), "grpo": (20, 4, 8), "dr_grpo": (16, 4, 8),
    "dapo": (9, 4, 8), "gspo": (9, 4, 8), "cispo": (8, 4, 8),
}  # fmt: skip
RISES = {"remax": 0.2, "ppo_ptx": 0.3}
# A baseline that is greedy speaks for samples that are nearly so; every token of these completions counts, so a cut one
# is not punished; and the text to keep must not outweigh the reward.
CHANGED = {
    "remax": {"sampling": {"max_new_tokens": 8, "temperature": 0.3}},
    "dapo": {"overrides": {"overlong_cache": 0.0}},
    "ppo_ptx": {"overrides": {"ptx_weight": 0.01}},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_row_of_the_table_learns(algorithm, tiny_model_folder, tmp_path):
    steps, prompts, completions = SIZES[algorithm]
    row = ALGORITHMS[algorithm]
    settings = {"sampling": {"max_new_tokens": 8}, **CHANGED.get(algorithm, {})}
    if row.ptx_weight:
        settings["pretraining"] = {"data": demonstrations(tmp_path)}
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", **settings,
        algorithm=algorithm, reward=reward_file(tmp_path, SHARE), optim={"learning_rate": 1e-2},
        steps=steps, prompts_per_step=prompts, completions_per_prompt=completions,
    )  # fmt: skip
    out = go(made)
    rewards = series(out, "reward/mean")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + RISES.get(algorithm, 0.4)
    # The policy is its reference at the start, and the sampler draws from the policy that is trained, at every step.
    if "reference" in row.needs:
        assert abs(series(out, "kl/reference")[0]) < 1e-4
        assert series(out, "kl/reference")[-1] > 0.3
    assert max(series(out, "sampler/gap_max")) < 1e-4
    samples = lines(out / "samples.jsonl")
    assert len(samples) == steps * prompts * completions
    updates = row.updates_per_rollout
    assert [row["policy_version"] for row in samples][:: prompts * completions] == [i * updates for i in range(steps)]
    last = [row for row in samples if row["step"] == steps]
    assert sum(row["reward"] for row in last) / len(last) == pytest.approx(rewards[-1], abs=1e-6)
    assert all(row["reward"] == (row["completion"].count("t") + row["completion"].count("a")) / 8 for row in last)


def test_score_and_kl_land_where_they_belong(tiny_model_folder, tmp_path, monkeypatch):
    """Rewards to go of an untrained critic: the score minus the KL of the tokens from here to the end."""
    seen = spied(monkeypatch)
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r",
        algorithm="a2c", overrides={"kl_in_reward": 0.5}, reward=reward_file(tmp_path, SHARE),
        critic={"kind": "separate"}, optim={"learning_rate": 3e-2}, steps=3, prompts_per_step=8,
        sampling={"max_new_tokens": 6, "temperature": 0.7},
    )  # fmt: skip
    out = go(made)
    scores = [row["reward"] for row in lines(out / "samples.jsonl")]
    assert len(seen) == 3 and seen[0].values is not None and not seen[0].values.any()
    for number, batch in enumerate(seen):
        assert batch.ref_logprobs is not None and batch.sampler_logprobs is not None and batch.returns is not None
        kl = torch.where(batch.loss_mask, batch.old_logprobs - batch.ref_logprobs, 0.0)
        score = torch.tensor(scores[number * 8 : number * 8 + 8])
        to_go = score[:, None] - 0.5 * kl.flip(1).cumsum(1).flip(1)
        assert torch.allclose(batch.returns[batch.loss_mask], to_go[batch.loss_mask], atol=1e-5)
        assert not batch.advantages[~batch.loss_mask].any()
        assert (batch.old_logprobs - batch.sampler_logprobs)[batch.loss_mask].abs().max() < 1e-4
    assert len({int(n) for batch in seen for n in batch.lengths}) > 1 or not (~seen[0].loss_mask).any()
    kl = series(out, "kl/reference")
    assert kl[0] == pytest.approx(0.0, abs=1e-4) and abs(kl[2]) > 1e-2


def test_a_step_makes_the_planned_number_of_updates(tiny_model_folder, tmp_path, monkeypatch):
    """Five prompts in four minibatches are four updates, each prompt in one of them, in every epoch."""
    from tether.backends.local.learner import LocalLearner

    rows: list[int] = []
    real = LocalLearner.forward_backward

    def spy(self, batch, loss, weight=1.0):
        rows.append(batch.size)
        return real(self, batch, loss, weight)

    monkeypatch.setattr(LocalLearner, "forward_backward", spy)
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", algorithm="grpo", steps=1, prompts_per_step=5,
        completions_per_prompt=2, overrides={"minibatches": 4, "epochs_per_rollout": 2}, reward="target_length",
        sampling={"max_new_tokens": 4},
    )  # fmt: skip
    go(made)
    assert sorted(rows[:4]) == [2, 2, 2, 4] and sorted(rows[4:]) == [2, 2, 2, 4]


def test_old_logprobs_are_those_of_the_start_of_the_step(tiny_model_folder, tmp_path):
    """Were they of the policy as it moves, nothing would ever be clipped and the ratio would stay 1."""
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", algorithm="ppo", steps=2, prompts_per_step=8,
        reward=reward_file(tmp_path, SHARE), optim={"learning_rate": 1e-2}, sampling={"max_new_tokens": 6},
    )  # fmt: skip
    out = go(made)
    row = lines(out / "metrics.jsonl")[1]["values"]
    clipped = [value for name, value in row.items() if "clip" in name and "value" not in name]
    assert clipped and max(clipped) > 0


def test_prompts_come_epoch_by_epoch_and_never_twice_alike():
    prompts = [Prompt(id=str(i), messages=(Message(role="user", content="x"),)) for i in range(5)]
    order = PromptOrder(prompts, seed=1)
    drawn = [prompt.id for step in range(5) for prompt in order(3 * step, 3)]
    assert sorted(drawn[:5]) == sorted(p.split("#")[0] for p in drawn[5:10]) == ["0", "1", "2", "3", "4"]
    assert [p.id for p in order(9, 3)] == [p.id for p in PromptOrder(prompts, seed=1)(9, 3)]
    assert drawn != [p.id for step in range(5) for p in PromptOrder(prompts, seed=2)(3 * step, 3)]
    alone = PromptOrder(prompts[:1], seed=0)
    assert [p.id for p in alone(0, 3)] == ["0", "0#2", "0#3"]


def test_one_prompt_is_answered_anew_each_time(tiny_model_folder, tmp_path):
    data = write_rows(tmp_path / "one.jsonl", [{"prompt": "what?"}])
    made = config(
        "rl", tiny_model_folder, data, tmp_path / "r", algorithm="reinforce", steps=2, prompts_per_step=6,
        reward="target_length", sampling={"max_new_tokens": 8}, optim={"learning_rate": 1e-12},
    )  # fmt: skip
    samples = lines(go(made) / "samples.jsonl")
    assert len({row["completion"] for row in samples}) == 12


def test_a_reward_model_folder_is_the_reward_and_the_critics_start(tiny_model_folder, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    from tether.methods import rl
    from tether.rewards.model import RewardModel

    scored: list = []
    real = RewardModel.__call__
    monkeypatch.setattr(
        RewardModel, "__call__", lambda self, rollouts: scored.append((rollouts, real(self, rollouts))) or scored[-1][1]
    )
    pairs = preferences(tmp_path)
    scorer = go(config("reward", tiny_model_folder, pairs, tmp_path / "rm", optim={"learning_rate": 1e-3}))
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", algorithm="ppo", steps=1, prompts_per_step=8,
        reward=str(scorer), sampling={"max_new_tokens": 6},
    )  # fmt: skip
    out = rl.run(made)
    said = capsys.readouterr().out
    assert f"reward model: {scorer}" in said and f"critic: separate, from {scorer}" in said
    # The scores are the reward model's own, at the last token that was sampled.
    model = AutoModelForSequenceClassification.from_pretrained(scorer / "final").eval()
    ((rollouts, found),) = scored

    def score(prompt, completion) -> float:
        with torch.no_grad():
            states = model.model(torch.cat([prompt, completion])[None]).last_hidden_state
            return float(model.score(states[0, -1]))

    expected = [score(rollout.prompt_tokens, rollout.tokens) for rollout in rollouts]
    assert found.parts["unscaled"].tolist() == pytest.approx(expected, abs=1e-4)
    # The reward is in standard deviations of the scores on the pairs, so that one KL weight serves every reward model.
    chat = ChatTokenizer(load_tokenizer(str(scorer / "final")))
    groups = tokenise(read(pairs, "preferences").records, chat, max_prompt_tokens=99, max_completion_tokens=99).groups
    on_pairs = np.array([score(g.prompt, completion) for g in groups for completion in g.completions])
    assert found.total.numpy() == pytest.approx((np.array(expected) - on_pairs.mean()) / on_pairs.std(), abs=1e-3)
    assert f"as measured on {len(on_pairs)} completions" in said
    assert [row["reward"] for row in lines(out / "samples.jsonl")] == pytest.approx(found.total.tolist())


def test_a_second_judge_watches_and_changes_nothing(tiny_model_folder, tmp_path):
    from method_cases import same_weights
    from tether.methods import rl
    from tether.rewards.rules import TargetLength

    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "a", algorithm="rloo", steps=2, prompts_per_step=2,
        reward=reward_file(tmp_path, SHARE), sampling={"max_new_tokens": 6}, optim={"learning_rate": 1e-2},
    )  # fmt: skip
    plain = go(made)
    watched = made.model_copy(update={"run": made.run.model_copy(update={"folder": str(tmp_path / "b")})})
    other = rl.run(watched, quiet=True, watch=TargetLength(target=3))
    assert same_weights(plain, other)
    assert len(series(other, "reward/watched")) == 2 and series(other, "reward/mean") == series(plain, "reward/mean")


def test_a_dry_run_of_rl_writes_nothing(tiny_model_folder, tmp_path, capsys):
    made = config(
        "rl",
        tiny_model_folder,
        questions(tmp_path),
        tmp_path / "r",
        reward="target_length",
        steps=5,
        prompts_per_step=2,
    )
    go(made, dry_run=True)
    shown = capsys.readouterr().out
    assert not (tmp_path / "r").exists()
    assert "grpo: 5 steps of 2 prompts × 8 completions = 16 rollouts" in shown and "<|im_start|>assistant" in shown


def test_answers_that_may_exceed_the_token_budget_are_named_before_the_run(tiny_model_folder, tmp_path):
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward="target_length",
        sampling={"max_new_tokens": 50}, optim={"tokens_per_micro_batch": 50, "oversize": "refuse"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"8 of 8 prompts, with answers of sampling.max_new_tokens=50, have more"):
        go(made, dry_run=True)


def test_a_row_of_the_table_is_changed_by_overrides():
    row = choose_algorithm("ppo", {"kl_in_reward": 0.5, "loss": {"clip_high": 0.3}})
    plain = ALGORITHMS["ppo"]
    assert row.kl_in_reward == 0.5 and row.loss.clip_high == 0.3  # type: ignore[attr-defined]
    assert replace(row, kl_in_reward=plain.kl_in_reward, loss=plain.loss) == plain


def test_what_a_second_judge_leaves_unscored_is_in_no_mean(tiny_model_folder, tmp_path):
    from tether.core.protocols import Scores
    from tether.methods import rl

    def half(rollouts):
        return Scores(total=torch.tensor([3.0 if i % 2 else float("nan") for i in range(len(rollouts))]))

    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "a", prompts_per_step=2, steps=1,
        algorithm="rloo", sampling={"max_new_tokens": 4}, reward="target_length",
    )  # fmt: skip
    assert series(rl.run(made, quiet=True, watch=half), "reward/watched") == [3.0]
