"""sample, evaluate and chat on tiny models: what is printed, what is written, what is refused before any work."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from method_cases import lines, questions, reward_file
from tether.backends.local.sampler import LocalSampler
from tether.cli.main import app
from tether.core.text import Prompt, Rollout


def tether(*args: object, keys: str | None = None):
    return CliRunner().invoke(app, [str(a) for a in args], input=keys)


@pytest.fixture
def answers(monkeypatch):
    """What the model will say, prompt after prompt; remembers what it was asked."""
    said: list[str] = []
    asked: list[Prompt] = []

    def sample(self, prompts, *, n, settings, seed, finished=None):
        rollouts = []
        for group, prompt in enumerate(prompts):
            asked.append(prompt)
            for _ in range(n):
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        group=group,
                        prompt_tokens=torch.tensor([1]),
                        tokens=torch.tensor([5, 2]),
                        sampled=torch.tensor([True, True]),
                        logprobs=torch.tensor([-0.5, -0.25]),
                        text=said.pop(0),
                        finish_reason="stop",
                    )
                )
        return rollouts

    monkeypatch.setattr(LocalSampler, "sample", sample)
    return said, asked


# -- sample ------------------------------------------------------------------------------------------------------------


def test_sample_to_the_screen_and_to_a_file_say_the_same(tiny_model_folder, tmp_path):
    common = ["sample", "what is this?", "-m", tiny_model_folder, "-n", 2, "--max-new-tokens", 5, "--seed", 3]
    shown = tether(*common)
    assert shown.exit_code == 0 and shown.output.count("> what is this?") == 2
    out = tmp_path / "out.jsonl"
    written = tether(*common, "--out", out)
    assert written.exit_code == 0 and f"2 completions of 1 prompts: {out}" in written.output
    rows = lines(out)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "what is this?"}]] * 2
    assert rows[0]["completion"] != rows[1]["completion"]
    assert all(row["logprob"] < 0 and 1 <= row["tokens"] <= 5 for row in rows)
    again = tether(*common, "--out", tmp_path / "again.jsonl")
    assert again.exit_code == 0 and lines(tmp_path / "again.jsonl") == rows


def test_sample_reads_prompts_from_a_file(tiny_model_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    prompts = questions(tmp_path, 3)
    result = tether(
        "sample", "-m", tiny_model_folder, "--prompts", prompts, "--out", out, "--max-new-tokens", 4, "--temperature", 0
    )
    assert result.exit_code == 0
    assert [row["id"] for row in lines(out)] == ["prompts:1", "prompts:2", "prompts:3"]


def test_sample_prints_no_control_characters(tiny_model_folder, answers):
    said, _ = answers
    said.append("red \x1b[31m\x07and\x9b2J\rdone\nnext\tline ü")
    result = tether("sample", "hello", "-m", tiny_model_folder)
    assert "red [31mand2Jdone\nnext\tline ü" in result.output
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.output)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(("name", "words"), [("taken.jsonl", "exists already"), ("no/such.jsonl", "is no folder")])
def test_a_file_that_can_not_be_written_is_refused_before_the_work(command, name, words, tmp_path):
    (tmp_path / "taken.jsonl").write_text("mine")
    more = ["--prompts", tmp_path / "none.jsonl"] + (["--judge", "target_length"] if command == "evaluate" else [])
    result = tether(command, "-m", tmp_path / "no-model", "--out", tmp_path / name, *more)
    assert result.exit_code == 2 and words in result.output
    assert (tmp_path / "taken.jsonl").read_text() == "mine"


# -- evaluate ----------------------------------------------------------------------------------------------------------


def test_evaluate_prints_the_win_rate_with_its_interval(tiny_model_folder, tmp_path, answers):
    said, _ = answers
    # Ours has the wanted 2 words 4 times of 6, the baseline once, and once both have: 3 won, 1 lost, 2 tied.
    said += ["a b", "a b", "a b", "a b", "a", "a", "a", "a", "a", "a b", "a b", "a"]
    judge = reward_file(tmp_path, "return [float(len(c.split()) == 2) for c in completions]", name="two_words.py")
    out = tmp_path / "result.jsonl"
    result = tether(
        "evaluate", "-m", tiny_model_folder, "--baseline", tiny_model_folder, "--prompts", questions(tmp_path, 6),
        "--judge", judge, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"win rate 66\.7 % \[\d+\.\d, \d+\.\d\] over 6 prompts \(3 won, 2 tied, 1 lost\)", result.output)
    assert re.search(r"mean score 0\.667 \[0\.\d+, \d\.\d+\]", result.output)
    *rows, summary = lines(out)
    assert [(row["our_score"], row["baseline_score"]) for row in rows] == [
        (1, 0), (1, 0), (1, 0), (1, 1), (0, 1), (0, 0),
    ]  # fmt: skip
    assert summary["summary"]["win_rate"] == pytest.approx(4 / 6)
    assert 0 < summary["summary"]["low"] < 4 / 6 < summary["summary"]["high"] <= 1 and summary["summary"]["n"] == 6


def test_evaluate_scores_each_answer_once(tiny_model_folder, tmp_path, answers):
    """A reward that never says the same twice agrees with itself: the numbers printed are those written."""
    said, _ = answers
    said += ["a", "b", "c", "d"]
    body = "global calls; calls += 1; return [float(10 * calls + i) for i in range(len(completions))]"
    judge = reward_file(tmp_path, body, name="counts.py")
    source = tmp_path / "counts.py"
    source.write_text("calls = 0\n" + source.read_text())
    out = tmp_path / "o.jsonl"
    result = tether(
        "evaluate", "-m", tiny_model_folder, "--baseline", tiny_model_folder, "--prompts", questions(tmp_path, 2),
        "--judge", judge, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [(r["our_score"], r["baseline_score"]) for r in lines(out)[:-1]] == [(10, 20), (11, 21)]


def test_evaluate_of_real_samples_without_a_baseline(tiny_model_folder, tmp_path):
    result = tether(
        "evaluate", "-m", tiny_model_folder, "--prompts", questions(tmp_path), "--judge", "target_length",
        "--n-prompts", 5, "--max-new-tokens", 6,
    )  # fmt: skip
    assert result.exit_code == 0 and "over 5 prompts" in result.output and "win rate" not in result.output


def test_evaluate_says_what_the_judge_left_unscored(tiny_model_folder, tmp_path, answers):
    said, _ = answers
    said += ["a", "b", "c", "d"]
    judge = reward_file(tmp_path, "return [None if c == 'b' else 1.0 for c in completions]", name="leaves_out.py")
    result = tether(
        "evaluate", "-m", tiny_model_folder, "--prompts", questions(tmp_path, 4), "--judge", judge,
        "--out", tmp_path / "o.jsonl",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mean score 1.000" in result.output and "1 left unscored" in result.output
    assert [row["our_score"] for row in lines(tmp_path / "o.jsonl")] == [1.0, None, 1.0, 1.0]


def test_evaluate_with_a_judge_that_scores_nothing_is_a_failure(tiny_model_folder, tmp_path, answers):
    said, _ = answers
    said += ["a", "b"]
    judge = reward_file(tmp_path, "return [None] * len(completions)", name="scores_nothing.py")
    result = tether("evaluate", "-m", tiny_model_folder, "--prompts", questions(tmp_path, 2), "--judge", judge)
    assert result.exit_code == 5 and "scored none of the 2 answers" in result.output


def test_evaluate_with_a_misspelt_judge_says_so_before_a_model_is_opened(tmp_path):
    result = tether(
        "evaluate", "-m", tmp_path / "no-model", "--prompts", questions(tmp_path, 2), "--judge", "target_lenght"
    )
    assert result.exit_code == 2 and "did you mean target_length?" in result.output


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_remembers_forgets_and_keeps_the_terminal_clean(tiny_model_folder, answers):
    said, asked = answers
    said += ["first \x1b]0;title\x07answer", "second", "third"]
    result = tether("chat", "-m", tiny_model_folder, keys="one\ntwo\n/new\nthree\n\n")
    assert result.exit_code == 0
    assert "first ]0;titleanswer" in result.output and "\x1b" not in result.output and "\x07" not in result.output
    turns = [[m.content for m in prompt.messages] for prompt in asked]
    assert turns == [["one"], ["one", "first \x1b]0;title\x07answer", "two"], ["three"]]


def test_chat_ends_at_the_end_of_its_input(tiny_model_folder):
    result = tether("chat", "-m", tiny_model_folder, "--max-new-tokens", 3, keys="hello\n")
    assert result.exit_code == 0 and "Traceback" not in result.output


def test_chat_goes_on_when_the_conversation_is_too_long(tiny_model_folder):
    result = tether("chat", "-m", tiny_model_folder, "--max-new-tokens", 3, keys="q" * 900 + "\nhello\n\n")
    assert result.exit_code == 0 and "longer than the model can read" in result.output
    assert result.output.count("you>") == 3


def test_a_result_line_is_json_however_odd_the_text(tiny_model_folder, tmp_path, answers):
    said, _ = answers
    said.append('quote " newline \n separator \u2028 end')
    tether("sample", "x", "-m", tiny_model_folder, "--out", tmp_path / "o.jsonl")
    (row,) = (json.loads(line) for line in (tmp_path / "o.jsonl").read_bytes().split(b"\n")[:-1])
    assert row["completion"] == 'quote " newline \n separator \u2028 end'
