"""Guards: limits crossed for long enough, a judge on held-out prompts, the best policy kept, words in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from method_cases import (
    WORDS,
    Killed,
    config,
    go,
    kill_at,
    lines,
    questions,
    reward_file,
    same_weights,
    series,
    unclocked,
    write_rows,
)
from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Prompt, Rollout
from tether.reports.run import run_report
from tether.reports.verdict import verdict
from tether.rewards.compose import Gate, GateOptions, Part, Sum
from tether.rewards.ensemble import Ensemble, EnsembleOptions
from tether.rewards.rules import RULES
from tether.runs.glossary import find
from tether.training.guards import WATCHED, Guards, HeldOut, Watch, has_ensemble


def watch(**settings: Any) -> tuple[Watch, list[str]]:
    said: list[str] = []
    return Watch(Guards(**settings), said.append), said


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metric", "limit", "within", "beyond"),
    [
        ("kl_max", "kl/reference", 5.0, 5.0, 5.1),
        ("entropy_min", "policy/entropy", 0.5, 0.5, 0.4),
        ("distinct_min", "rollout/distinct_2", 0.3, 0.3, 0.2),
        ("disagreement_max", "reward/disagreement", 0.6, 0.6, 0.7),
        ("disagreement_max", "reward/models.disagreement", 0.6, 0.6, 0.7),
    ],
)
def test_a_limit_is_crossed_beyond_it_only(name, metric, limit, within, beyond) -> None:
    guard, said = watch(**{name: limit}, patience=1)
    assert guard.step(1, {metric: within}) == {f"guard/{name}": 0.0} and not said
    assert guard.step(2, {metric: beyond}) == {f"guard/{name}": 1.0} and not guard.stop
    assert f"step 2: {WATCHED[name]} is {beyond:g}" in said[0] and f"guards.{name}={limit:g}, 1 steps" in said[0]


def test_length_is_held_against_the_first_step() -> None:
    guard, said = watch(length_ratio_max=1.5, length_ratio_min=0.5, patience=1)
    found = [guard.step(i, {"rollout/length": length}) for i, length in enumerate([20.0, 30.0, 31.0, 10.0, 9.0])]
    assert [row["guard/length_ratio_max"] for row in found] == [0, 0, 1, 0, 0]
    assert [row["guard/length_ratio_min"] for row in found] == [0, 0, 0, 0, 1]
    assert "rollout/length over that of the first step is 1.55, above" in said[0] and "0.45, below" in said[1]


def test_patience_counts_steps_in_a_row_and_each_row_is_told_once() -> None:
    guard, said = watch(kl_max=1.0, patience=2)
    for step, kl in enumerate([2.0, 0.5, 2.0, 2.0, 2.0, 0.5, 2.0, 2.0], start=1):
        guard.step(step, {"kl/reference": kl})
        assert len(said) == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 1, 8: 2}[step]


def test_a_limit_that_stops_says_so() -> None:
    guard, said = watch(kl_max=1.0, patience=2, action="stop")
    assert guard.step(1, {"kl/reference": 2.0}) == {"guard/kl_max": 1.0} and not guard.stop
    assert guard.step(2, {"kl/reference": 2.0}) == {"guard/kl_max": 1.0, "guard/stopped": 1.0} and guard.stop
    assert "the run ends here (guards.action=stop)" in said[0]


def test_a_metric_that_is_not_measured_is_an_error_and_one_that_is_nan_is_not() -> None:
    guard, _ = watch(disagreement_max=1.0)
    with pytest.raises(UserError, match=r"guards.disagreement_max: the run measures no reward/disagreement"):
        guard.step(1, {"reward/my_disagreement": 3.0, "kl/reference": 1.0})
    assert guard.step(1, {"reward/disagreement": math.nan}) == {"guard/disagreement_max": 0.0}


def test_a_step_in_which_no_completion_reaches_the_ensemble_leaves_the_streak_alone() -> None:
    """It stands behind a gate: the step tells nothing of it, and the run goes on."""
    said: list[str] = []
    guard = Watch(Guards(disagreement_max=1.0, patience=2), said.append, ensemble=True)
    steps = [{"reward/x.disagreement": 2.0}, {"reward/x": 0.0}, {"reward/x.disagreement": 2.0}]
    found = [guard.step(i, numbers)["guard/disagreement_max"] for i, numbers in enumerate(steps, start=1)]
    assert found == [1.0, 0.0, 1.0] and len(said) == 1 and "step 3" in said[0]


def test_an_ensemble_is_found_wherever_it_stands_in_the_reward() -> None:
    several = Ensemble(options=EnsembleOptions(members=("a", "b")), members={})
    inner = Sum(parts={"models": Part(reward=several)})
    assert has_ensemble(several) and has_ensemble(Sum(parts={"in": Part(reward=inner)}))
    gates = {"g": Gate(reward=several, options=GateOptions(otherwise=0.0))}
    assert has_ensemble(Sum(gates=gates, parts={}))
    assert not has_ensemble(Sum(parts={"short": Part(reward=RULES["target_length"]())}))


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_the_judge_remembers_its_best_and_tells_a_rise_of_the_reward_from_a_fall() -> None:
    guard, said = watch(judge="missing_eos_penalty", patience=2)
    judged = [(1.0, 0.1), (3.0, 0.2), (2.0, 0.3), (3.0, 0.4), (2.0, 0.5), (4.0, 0.1), (1.0, 0.0), (1.0, -1.0)]
    found = [
        guard.judged(5 * i, {"reward/gold": gold, "reward/proxy": proxy})
        for i, (gold, proxy) in enumerate(judged, start=1)
    ]
    assert [better for better, _ in found] == [True, True, False, False, False, True, False, False]
    assert [row["guard/best_step"] for _, row in found] == [5, 10, 10, 10, 10, 30, 30, 30]
    assert len(said) == 2 and "since then the reward has risen (0.2 to 0.4)" in said[0]
    assert "its best, 3 at step 10, for 2 evaluations in a row" in said[0]
    assert "has not risen (0.1 to -1)" in said[1] and not guard.stop


def test_a_judge_that_stops() -> None:
    guard, _ = watch(judge="missing_eos_penalty", patience=1, action="stop")
    guard.judged(1, {"reward/gold": 1.0, "reward/proxy": 0.0})
    assert guard.judged(2, {"reward/gold": 0.0, "reward/proxy": 0.0}) == (
        False,
        {"guard/best_step": 1.0, "guard/stopped": 1.0},
    )


def test_held_out_scores_are_means_over_what_both_scored() -> None:
    def rollout(text: str) -> Rollout:
        row = torch.tensor([1] * len(text))
        return Rollout(
            prompt=Prompt(id=text, text=text), group=0, prompt_tokens=row, tokens=row, sampled=row > 0,
            logprobs=row * 0.0, text=text, finish_reason="stop",
        )  # fmt: skip

    def says(**numbers: float):
        return lambda rollouts: Scores(total=torch.tensor([numbers[r.text] for r in rollouts]))

    rows = [rollout(t) for t in ("a", "bb", "ccc", "dddd")]
    held = HeldOut(prompts=[], judge=says(a=1.0, bb=3.0, ccc=math.nan, dddd=5.0))
    found = held.scores(rows, says(a=0.0, bb=2.0, ccc=9.0, dddd=math.nan))
    # a and bb are left: mean 2, sample variance 2
    assert found == {
        "reward/gold": 2.0,
        "reward/gold_error": pytest.approx(1.0, abs=1e-12),
        "reward/gold_dropped": 2.0,
        "reward/proxy": 1.0,
        "rollout/length": 2.5,
    }
    single = held.scores(rows[:1], says(a=0.0))
    assert math.isnan(single["reward/gold_error"]) and single["reward/gold_dropped"] == 0.0
    nothing = HeldOut(prompts=[], judge=says(a=math.nan, bb=math.nan, ccc=1.0, dddd=1.0))
    with pytest.raises(RewardFailure, match="no answer to the 4 held-out prompts"):
        nothing.scores(rows, says(a=1.0, bb=1.0, ccc=math.nan, dddd=math.nan))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guards": {"patience": 2}}, "guards: nothing is guarded: set one of kl_max"),
        ({"guards": {"kl_maxx": 2.0}}, "did you mean kl_max?"),
        ({"guards": {"kl_max": 0.0}}, "kl_max is a number above 0, got 0"),
        ({"guards": {"kl_max": 1.0, "patience": 0}}, "patience is 1 or more"),
        ({"guards": {"kl_max": 1.0, "action": "halt"}}, "guards.action must be"),
        ({"guards": {"length_ratio_max": 0.9}}, "length_ratio_max is above 1"),
        ({"guards": {"judge": "missing_eos_penalty"}}, "guards.judge needs prompts that are not trained on"),
        ({"guards": {"judge": "missing_eos"}}, 'guards.judge: no folder and no rule "missing_eos", did you mean'),
        ({"data": {"eval": "x.jsonl"}}, "data.eval would be ignored: nothing is held out without guards.judge"),
        ({"run": {"eval_every": 5}}, "run.eval_every would be ignored"),
        ({"data": {"eval_fraction": 0.1}}, "data.eval_fraction would be ignored"),
    ],
)
def test_what_would_be_ignored_or_is_wrong_is_refused_before_a_folder_is_made(settings, words, tmp_path) -> None:
    made = config("rl", "none", "none.jsonl", tmp_path / "r", **{"reward": "target_length", **settings})
    with pytest.raises(UserError) as caught:
        go(made)
    assert words in str(caught.value) and not (tmp_path / "r").exists()


# -- in a run ----------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "algorithm": "rloo",
    "steps": 6,
    "prompts_per_step": 2,
    "completions_per_prompt": 3,
    "sampling": {"max_new_tokens": 6},
    "optim": {"learning_rate": 3e-2, "schedule": "constant"},
}


def made(
    model: Path, folder: Path, name: str, /, run: dict[str, Any] | None = None, friend: bool = False, **settings: Any
) -> Any:
    """Some letters are paid for; the judge counts how few there are, or, a ``friend``, wants what is paid for."""
    paid = reward_file(folder, "return [float(sum(b in c for b in 'aeiou ?')) for c in completions]", name="paid.py")
    judge = reward_file(
        folder, "return [-float(sum(b in c for b in 'aeiou ?')) for c in completions]", name="counts.py"
    )
    held = write_rows(folder / "held.jsonl", ({"prompt": f"which {word}?"} for word in WORDS))
    guards = {"judge": paid if friend else judge, **settings.pop("guards", {})}
    return config(
        "rl", model, questions(folder), folder / name,
        reward=paid, data={"eval": held}, guards=guards, run={"eval_every": 2, **(run or {})}, **{**RUN, **settings},
    )  # fmt: skip


def test_the_best_policy_is_kept_and_the_report_says_what_happened(tiny_model_folder, tmp_path) -> None:
    out = go(made(tiny_model_folder, tmp_path, "r", guards={"kl_max": 1e-3}))
    gold, proxy = series(out, "reward/gold", "eval"), series(out, "reward/proxy", "eval")
    assert len(gold) == 3 and proxy == pytest.approx([-g for g in gold])
    best = 2 * (gold.index(max(gold)) + 1)
    kept = json.loads((out / "best" / "best.json").read_text())
    assert kept["step"] == best == series(out, "guard/best_step", "eval")[-1] and kept["reward/gold"] == max(gold)

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(out / "best")
    assert series(out, "guard/kl_max")[-1] == 1.0 and "The guard kl_max was crossed in" in run_report(out)
    names = {name for row in lines(out / "metrics.jsonl") for name in row["values"]}
    assert all(find(name) for name in names if not name.startswith("time/"))


@pytest.mark.parametrize("friend", [False, True])
def test_best_is_the_policy_of_its_step(friend, tiny_model_folder, tmp_path) -> None:
    """A run that ends at that step has the same weights. What the judge of a rising reward likes best comes late."""
    out = go(made(tiny_model_folder, tmp_path, "r", friend=friend))
    step = json.loads((out / "best" / "best.json").read_text())["step"]
    assert (step > 2) == friend
    short = go(made(tiny_model_folder, tmp_path, "short", steps=step))
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (out / "best", short / "final"))
    assert one == other


def test_a_run_that_was_killed_has_its_guards_back(tiny_model_folder, tmp_path, monkeypatch) -> None:
    guards = {"kl_max": 1e-3, "length_ratio_max": 1.01, "distinct_min": 0.999, "patience": 3, "action": "stop"}

    def of(name: str) -> Any:
        return made(tiny_model_folder, tmp_path, name, guards=guards, run={"checkpoint_every": 2})

    straight = go(of("straight"))
    rows = [row["step"] for row in lines(straight / "metrics.jsonl") if row["split"] == "train"]
    assert rows[-1] < RUN["steps"] and (straight / "final").is_dir(), "it was stopped early, and is whole"
    # In step 4, after steps 2, 3 and 4: what was counted before the checkpoint of step 2 is part of it.
    stopped = [row["step"] for row in lines(straight / "metrics.jsonl") if "guard/stopped" in row["values"]]
    assert set(stopped) == {4} and rows[-1] == 4
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        go(of("killed"))
    go(of("killed"), resume=True)
    assert same_weights(straight, tmp_path / "killed") and unclocked(straight) == unclocked(tmp_path / "killed")
    assert (straight / "best/best.json").read_text() == (tmp_path / "killed/best/best.json").read_text()


def test_a_limit_on_the_kl_brings_its_own_reference(tiny_model_folder, tmp_path) -> None:
    settings = {**RUN, "steps": 2, "overrides": {"kl_in_reward": 0.0}, "guards": {"kl_max": 1e-3, "patience": 1}}
    files = questions(tmp_path)
    out = go(config("rl", tiny_model_folder, files, tmp_path / "r", reward="target_length", **settings))
    assert len(series(out, "kl/reference")) == 2 and series(out, "guard/kl_max") == [0.0, 1.0]


def test_a_guard_on_disagreement_without_an_ensemble_is_an_error(tiny_model_folder, tmp_path) -> None:
    settings = {**RUN, "guards": {"disagreement_max": 1.0}}
    with pytest.raises(UserError, match="the run measures no reward/disagreement"):
        go(config("rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward="target_length", **settings))


# -- in words ----------------------------------------------------------------------------------------------------------


def columns(**series: list[float]) -> dict[str, tuple[list[float], list[float]]]:
    return {n.replace("__", "/"): ([10.0 * (i + 1) for i in range(len(v))], v) for n, v in series.items()}


TRAIN = columns(reward__mean=[0.1 * i for i in range(20)])


def said_of(gold: list[float], proxy: list[float], error: float) -> str:
    held_out = columns(reward__gold=gold, reward__proxy=proxy, reward__gold_error=[error] * len(gold))
    return verdict("rl", True, TRAIN, held_out)


def test_the_verdict_on_a_reward_that_rises_while_the_judge_falls() -> None:
    said = said_of([1.0, 3.0, 2.5, 1.5], [0.1, 0.5, 0.7, 0.9], error=0.1)
    assert (
        "The reward is over-optimised: since step 20 it rose from 0.5 to 0.9 while the held-out judge's score fell "
        "from 3 to 1.5; the model of that step is in best/."
    ) in said
    assert "the reward did not rise" in said_of([3.0, 1.0], [0.5, 0.4], error=0.1)


@pytest.mark.parametrize(
    ("gold", "error"), [([1.0, 3.0, 2.5], 0.2), ([1.0, 2.0, 3.0], 0.0), ([3.0], 0.0), ([3.0, 1.0], math.nan)]
)
def test_no_verdict_within_the_error_or_without_a_fall(gold, error) -> None:
    """3 to 2.5 is within 2 √(0.2² + 0.2²) = 0.57."""
    assert "judge" not in said_of(gold, [0.1 * i for i in range(len(gold))], error)


def test_the_verdict_names_crossed_guards() -> None:
    train = {**TRAIN, **columns(guard__kl_max=[0.0, 0.0, 1.0, 1.0], guard__entropy_min=[0.0] * 4, guard__stopped=[1.0])}
    said = verdict("rl", True, train, {})
    assert "The guard kl_max was crossed in 2 of 4 steps, first in 30. A guard ended the run early." in said
    assert "entropy_min" not in said
