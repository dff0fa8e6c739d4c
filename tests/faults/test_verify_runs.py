"""pass@k in a run: measured once before the first step and once after the last, also where the run was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
    unclocked,
    write_rows,
)
from tether.backends.local.sampler import LocalSampler
from tether.config.load import load
from tether.config.schema import RLConfig
from tether.core.errors import UserError
from tether.core.pass_at import pass_at_k
from tether.methods.rl_parts import choose_guards
from tether.reports.before_after import changes
from tether.reports.run import read_run
from tether.runs.glossary import find
from tether.training.session import step_0

RUN: dict[str, Any] = {
    "algorithm": "rloo",
    "steps": 4,
    "prompts_per_step": 2,
    "completions_per_prompt": 3,
    "sampling": {"max_new_tokens": 6},
    "optim": {"learning_rate": 3e-2, "schedule": "constant"},
}
HELD_OUT = 5


def made(model: Path, folder: Path, name: str, /, verify: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An answer with an "a" in it is right."""
    paid = reward_file(folder, "return [float('a' in c) for c in completions]", name="holds_a.py")
    held = write_rows(folder / "held.jsonl", ({"prompt": f"which {word}?"} for word in WORDS))
    merged = {**RUN, "reward": paid, **settings}
    return config(
        "rl", model, questions(folder), folder / name, data={"eval": held},
        verify={"pass_at": [1, 3], "prompts": HELD_OUT, **(verify or {})}, **merged,
    )  # fmt: skip


def evaluations(run: Path) -> list[tuple[int, float, float]]:
    """(step, pass@1, pass@3) of each."""
    rows = [row for row in lines(run / "metrics.jsonl") if row["split"] == "eval"]
    return [(row["step"], row["values"]["pass@1"], row["values"]["pass@3"]) for row in rows]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[str]]]:
    """The answers to the held-out prompts, one list of groups for each time they were asked."""
    times: list[list[list[str]]] = []
    real = LocalSampler.sample

    def sample(self: LocalSampler, prompts: Any, **given: Any) -> Any:
        rollouts = real(self, prompts, **given)
        if len(prompts) == HELD_OUT:
            times.append([[r.text for r in rollouts if r.group == g] for g in range(HELD_OUT)])
        return rollouts

    monkeypatch.setattr(LocalSampler, "sample", sample)
    return times


def test_before_the_first_step_on_the_way_and_after_the_last(tiny_model_folder, tmp_path, drawn) -> None:
    out = go(made(tiny_model_folder, tmp_path, "r", verify={"samples": 4}, run={"eval_every": 3}))
    found = evaluations(out)
    assert [step for step, _, _ in found] == [0, 3, 4] and len(drawn) == 3
    for (_, one, three), groups in zip(found, drawn, strict=True):
        right = [sum("a" in text for text in group) for group in groups]
        assert [len(group) for group in groups] == [4] * HELD_OUT
        assert one == pytest.approx(sum(right) / 20) and three == pytest.approx(
            sum(pass_at_k(4, c, 3) for c in right) / 5
        )
    assert drawn[0] != drawn[2], "the policy has moved"
    first = lines(out / "metrics.jsonl")[0]
    assert (first["step"], first["split"]) == (0, "eval")
    names = first["values"]
    assert names["pass@1/low"] <= names["pass@1"] <= names["pass@1/high"]
    assert {"rollout/length", "rollout/truncated", "reward/dropped"} <= set(names) and names["reward/dropped"] == 0
    assert all(find(name) for name in names)


@pytest.mark.parametrize(("every", "dies_at"), [(2, 4), (0, 3), (0, 1)])
def test_a_run_that_was_killed_is_measured_at_its_start_once(
    every, dies_at, tiny_model_folder, tmp_path, monkeypatch, drawn
) -> None:
    """With a checkpoint, or without one: the row of the start stands, and is not asked for a second time."""
    rhythm = {"checkpoint_every": every}
    straight = go(made(tiny_model_folder, tmp_path, "straight", run=rhythm))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, dies_at)
        go(made(tiny_model_folder, tmp_path, "killed", run=rhythm))
    start = (tmp_path / "killed" / "metrics.jsonl").read_bytes().splitlines()[0]
    drawn.clear()
    killed = go(made(tiny_model_folder, tmp_path, "killed", run=rhythm), resume=True)
    assert len(drawn) == 1 and [step for step, _, _ in evaluations(killed)] == [0, 4]
    assert (killed / "metrics.jsonl").read_bytes().splitlines()[0] == start
    assert same_weights(straight, killed) and unclocked(straight) == unclocked(killed)


def test_a_torn_row_of_the_start_is_none(tiny_model_folder, tmp_path) -> None:
    """The run died while it wrote it: the start is measured again."""
    whole = go(made(tiny_model_folder, tmp_path, "whole"))
    row = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "torn.jsonl").write_bytes(row[:-1])
    assert step_0(tmp_path / "torn.jsonl") == 0 == step_0(tmp_path / "none.jsonl")
    (tmp_path / "torn.jsonl").write_bytes(row + row.replace(b'{"step": 0', b'{"step": 1') + row)
    assert step_0(tmp_path / "torn.jsonl") == len(row)


def test_the_guards_judge_and_the_verifier_share_the_answers(tiny_model_folder, tmp_path, drawn) -> None:
    """The judge sees the first answer to each prompt, as it would alone; only what is verified is measured at 0."""
    judge = reward_file(tmp_path, "return [-float(len(c)) for c in completions]", name="short.py")
    alone = made(tiny_model_folder, tmp_path, "alone", guards={"judge": judge}).model_copy(update={"verify": None})
    both = go(made(tiny_model_folder, tmp_path, "both", guards={"judge": judge}, run={"eval_every": 2}))
    assert len(drawn) == 3 and all(len(group) == 3 for groups in drawn for group in groups)
    rows = [row["values"] for row in lines(both / "metrics.jsonl") if row["split"] == "eval"]
    assert "reward/gold" not in rows[0] and (both / "best" / "best.json").is_file()
    for values, groups in zip(rows[1:], drawn[1:], strict=True):
        assert values["reward/gold"] == pytest.approx(-sum(len(group[0]) for group in groups) / HELD_OUT)
    assert [row["split"] for row in lines(go(alone) / "metrics.jsonl")].count("eval") == 1


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_has_a_row_for_each_k_and_says_what_can_not_be_told(tiny_model_folder, tmp_path) -> None:
    out = go(made(tiny_model_folder, tmp_path, "r", run={"report": True}))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Before and after</h2>" in page and "after step 4" in page
    told = changes(read_run(out).held_out)
    assert [change.name for change in told] == ["pass@1", "pass@3"]
    assert (told[0].before[0], told[0].after[0]) == tuple(one for _, one, _ in evaluations(out))
    for change in told:
        assert change.sentence in page and all(f">{cell}</t" in page for cell in change.row)
    assert "pass@1 by step" in page and "pass@1/low by step" not in page and 'class="band' in page


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ((0.5, 0.31, 0.7), "rose."),
        ((0.4, 0.25, 0.6), "no measurable change"),
        ((0.05, 0.0, 0.12), "no measurable change"),
        ((0.05, 0.0, 0.09), "fell."),
    ],
)
def test_only_intervals_apart_are_a_change(after, words, tmp_path) -> None:
    rows = zip((0.15, 0.1, 0.3), after, strict=True)
    columns = {f"pass@8{end}": ([0.0, 12.0], pair) for end, pair in zip(("", "/low", "/high"), rows, strict=True)}
    (found,) = changes(columns)
    assert found.sentence.endswith(words) or words in found.sentence
    assert found.step == 12 and found.sentence.startswith("Held-out pass@8 was 15.0 % [10.0, 30.0] before and ")
    assert changes({name: (x[:1], y[:1]) for name, (x, y) in columns.items()}) == []


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"verify": {}}, "verify needs prompts that are not trained on: give data.eval=FILE"),
        ({"verify": {"pass_at": [8], "samples": 4}}, "pass@8 needs 8 answers to each prompt, and verify.samples is 4"),
        ({"verify": {}, "reward": "runs/reward"}, "verify.reward: pass@k counts right and wrong answers"),
        ({"verify": {"reward": {"type": "judge", "model": "m"}}}, "and judge gives other scores"),
        ({"verify": {"reward": "exact_nubmer"}}, "verify.reward: no folder and no rule"),
        ({"data": {"eval": "x.jsonl"}}, "nothing is held out without guards.judge or verify"),
    ],
)
def test_what_can_not_be_verified_is_refused_before_a_folder_is_made(settings, words, tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        go(config("rl", "none", "none.jsonl", tmp_path / "r", **{"reward": "exact_number", **settings}))
    assert words in str(caught.value) and not (tmp_path / "r").exists()


def test_a_reward_that_is_not_0_or_1_ends_the_run_before_its_first_step(tiny_model_folder, tmp_path) -> None:
    with pytest.raises(UserError, match=r"verify.reward: pass@k counts right and wrong answers, scores of 1 and 0"):
        go(made(tiny_model_folder, tmp_path, "r", reward="target_length"))
    assert not (tmp_path / "r").exists()
    beside = made(tiny_model_folder, tmp_path, "r", reward="target_length", verify={"reward": made_rule(tmp_path)})
    assert len(evaluations(go(beside))) == 2


def made_rule(folder: Path) -> str:
    return reward_file(folder, "return [float('e' in c) for c in completions]", name="holds_e.py")


def test_a_system_message_before_plain_text_is_refused(tiny_model_folder, tmp_path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", ({"prompt": word} for word in WORDS))
    told = config("rl", tiny_model_folder, texts, tmp_path / "r", reward="target_length", data={"system": "Be brief."})
    with pytest.raises(UserError, match=r"data.system would be ignored: the prompts are plain text"):
        go(told)


def test_the_recipe_measures_what_it_says() -> None:
    recipe = load("rl", [Path(__file__).parents[2] / "recipes" / "gsm8k-grpo.yaml"])
    assert isinstance(recipe, RLConfig) and recipe.verify is not None and recipe.data.eval is not None
    assert choose_guards(recipe) is None and recipe.verify.pass_at == (1, 4)
