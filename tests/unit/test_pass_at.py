"""pass@k and its interval, against enumeration, formula and simulation; evaluate --pass-at, and what it refuses."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import pytest
import torch
from typer.testing import CliRunner

from method_cases import lines, questions, reward_file, write_rows
from tether.backends.local.sampler import LocalSampler
from tether.cli.main import app
from tether.core.errors import UserError
from tether.core.intervals import share_interval
from tether.core.pass_at import PassAt, pass_at
from tether.core.text import Rollout
from tether.methods.evaluate_pass import difference


def measured(rows: Sequence[Sequence[float]], *ks: int) -> list[PassAt]:
    """Scores of each prompt's answers."""
    scores = torch.tensor([score for row in rows for score in row])
    return pass_at(scores, [group for group, row in enumerate(rows) for _ in row], ks)


# -- the number --------------------------------------------------------------------------------------------------------


def test_the_rate_is_the_mean_over_prompts_of_the_share_of_subsets_with_a_right_answer():
    rows = [[0.0] * 5, [0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 5]
    for found in measured(rows, 1, 2, 3, 5):
        by_hand = [[max(subset) for subset in itertools.combinations(row, found.k)] for row in rows]
        rates = [sum(each) / len(each) for each in by_hand]
        assert list(found.rates.values()) == pytest.approx(rates, abs=1e-12)
        assert found.interval.estimate == pytest.approx(sum(rates) / 4, abs=1e-12)
        assert found.interval.n == 4


def test_unscored_answers_are_left_out_and_a_prompt_with_too_few_is_too():
    nan = math.nan
    one, two = measured([[1, nan, 0], [0, nan, nan], [1, 1, nan]], 1, 2)
    assert one.rates == {0: 0.5, 1: 0.0, 2: 1.0}
    assert two.rates == {0: 1.0, 2: 1.0} and two.interval.n == 2
    with pytest.raises(UserError, match=r"pass@3: none of the 2 prompts has 3 scored answers"):
        measured([[1, nan, 0], [0, nan, nan]], 3)


@pytest.mark.parametrize("score", [0.5, -1.0, 2.0])
def test_other_scores_than_0_and_1_are_refused(score):
    with pytest.raises(UserError, match=rf"1 of 3 scores are others, the first is {score:g}\n  name a verifier"):
        measured([[0.0, 1.0, math.nan], [score]], 1)


# -- the interval ------------------------------------------------------------------------------------------------------


def by_the_formula(rates: list[float], most: int) -> tuple[float, float]:
    """Wilson (1927) at n* = p(1 − p) / Var(mean), at most ``most``, times (z/t)²; float64, from the papers."""
    n, p = len(rates), sum(rates) / len(rates)
    variance = sum((rate - p) ** 2 for rate in rates) / (n - 1) / n
    size = min(most, p * (1 - p) / variance) if variance > 1e-15 else n
    z, t = 1.959964, {9: 2.262157, 19: 2.093024}[n - 1]
    size *= (z / t) ** 2
    middle, scale = (p + z * z / (2 * size)) / (1 + z * z / size), 1 + z * z / size
    half = z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


ROWS = [[1, 0, 0, 0]] * 3 + [[1, 1, 1, 0]] * 2 + [[0, 0, 0, 0]] * 4 + [[1, 1, 1, 1]]


@pytest.mark.parametrize(("k", "most"), [(1, 4), (2, 2), (3, 2), (4, 2)])
def test_the_interval_is_wilsons_at_the_size_that_the_spread_of_the_prompts_leaves(k, most):
    (found,) = measured(ROWS, k)
    low, high = by_the_formula(list(found.rates.values()), most * len(ROWS))
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), rel=1e-3)


def test_pass_at_1_is_the_share_of_right_answers_with_prompts_as_clusters():
    (found,) = measured(ROWS, 1)
    flat, groups = torch.tensor([s for row in ROWS for s in row]), [g for g in range(10) for _ in range(4)]
    direct = share_interval(flat, groups)
    assert (found.interval.low, found.interval.high) == pytest.approx((direct.low, direct.high), abs=1e-12)


def test_none_right_leaves_open_what_so_few_prompts_leave_open():
    one, four = measured([[0, 0, 0, 0]] * 20, 1, 4)
    low, high = by_the_formula([0.0] * 20, 20)
    for found in (one, four):
        assert (found.interval.estimate, found.interval.low) == (0, 0) == (0, low)
        assert found.interval.high == pytest.approx(high, rel=1e-3) and 0.1 < high < 0.25


@pytest.mark.parametrize("k", [1, 4])
def test_the_interval_holds_the_truth_as_often_as_it_says(k):
    """Prompts of which most are never solved and few sometimes are, as with a small model: p is 0 or uniform."""
    generator = torch.Generator().manual_seed(k)
    truth = 0.3 * (1 - 1 / (k + 1))  # E[1 − (1 − p)^k] of a uniform p is 1 − 1/(k + 1)
    held, tries = 0, 300
    for _ in range(tries):
        p = torch.rand(40, 1, generator=generator) * (torch.rand(40, 1, generator=generator) < 0.3)
        rows = torch.bernoulli(p.expand(40, 4), generator=generator)
        (found,) = pass_at(rows.flatten(), [g for g in range(40) for _ in range(4)], [k])
        held += found.interval.low <= truth <= found.interval.high
    assert 0.92 <= held / tries <= 0.99


# -- evaluate --pass-at ------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """What the model will say, prompt after prompt."""
    said: list[str] = []

    def sample(self, prompts, *, n, settings, seed, finished=None):
        return [
            Rollout(
                prompt=prompt, group=group, prompt_tokens=torch.tensor([1]), tokens=torch.tensor([5, 2]),
                sampled=torch.tensor([True, True]), logprobs=torch.tensor([-0.5, -0.25]), text=said[0],
                finish_reason="length" if said.pop(0) == "cut" else "stop",
            )
            for group, prompt in enumerate(prompts)
            for _ in range(n)
        ]  # fmt: skip

    monkeypatch.setattr(LocalSampler, "sample", sample)
    return said


def evaluate(*args: object):
    return CliRunner().invoke(app, ["evaluate", *(str(a) for a in args)])


def test_evaluate_prints_and_writes_pass_at_k(tiny_model_folder, tmp_path, answers):
    # The answers to questions 0, 1, 2: one of two right, none, both; then the baseline's.
    answers += ["it is 0", "9", "cut", "8", "2", "2.0", "0", "0", "9", "9", "2", "9"]
    out = tmp_path / "out.jsonl"
    result = evaluate(
        "-m", tiny_model_folder, "--baseline", tiny_model_folder, "--prompts", questions(tmp_path, 3),
        "--judge", "exact_number", "--pass-at", 2, "--pass-at", 1, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rates = r": pass@1 50\.0 % \[\d+\.\d, \d+\.\d\], pass@2 66\.7 % \[\d+\.\d, \d+\.\d\] over 3 prompts"
    assert len(re.findall(rates, result.output)) == 2
    assert "2 answers to each of 3 prompts at temperature 1, judged by exact_number" in result.output
    assert "2.0 tokens, 17 % cut at the length limit, 0 % unscored" in result.output
    assert "pass@1 against the baseline +0.0 points [" in result.output and "no measurable difference" in result.output
    assert "pass@2: the same as the baseline's on every one of 3 prompts" in result.output
    rows = lines(out)
    assert [row["score"] for row in rows[:6]] == [1, 0, 0, 0, 1, 1] and rows[2]["finish_reason"] == "length"
    assert rows[-2]["summary"]["pass@1"]["estimate"] == 0.5 and len(rows) == 14


def test_evaluate_says_how_much_was_unscored(tiny_model_folder, tmp_path, answers):
    answers += ["a", "b", "c", "b"]
    judge = reward_file(tmp_path, "return [None if c == 'b' else 1.0 for c in completions]", name="leaves_half.py")
    result = evaluate(
        "-m", tiny_model_folder, "--prompts", questions(tmp_path, 2), "--judge", judge, "--pass-at", 1, "--samples", 2
    )
    assert result.exit_code == 0 and "50 % unscored" in result.output and "pass@1 100.0 % [" in result.output


def test_the_difference_is_taken_prompt_by_prompt():
    ours, theirs = measured([[1, 1], [1, 0], [1, 1], [0, 0]], 1)[0], measured([[1, 0], [0, 0], [1, 0], [0, 0]], 1)[0]
    # 0.5, 0.5, 0.5, 0: mean 0.375, standard error 0.125, t(3) = 3.18 (the expansion gives 3.14)
    said = difference(ours, theirs)
    low, high = map(float, re.findall(r"[-+]\d+\.\d(?=[,\]])", said))
    assert "+37.5 points" in said and low == pytest.approx(-2, abs=1) and high == pytest.approx(77, abs=1)
    assert said.endswith("no measurable difference")
    wide = difference(measured([[1], [1], [1], [1], [0]] * 4, 1)[0], measured([[0], [0], [0], [1], [0]] * 4, 1)[0])
    assert wide.endswith("prompt by prompt over 20")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--pass-at", 4, "--samples", 2], "pass@4 needs 4 answers to each prompt, and --samples is 2"),
        (["--samples", 2], "--samples would be ignored"),
        (["--pass-at", 1, "--judge", "{type: judge, model: m}"], "and judge gives other scores\n  name a verifier"),
        (["--pass-at", 1, "--judge", "{type: pair_judge, model: m}"], "and pair_judge gives other scores"),
        (["--pass-at", 1, "--judge", "some/reward/model"], "and some/reward/model gives other scores"),
        (["--pass-at", 1, "--system", "Be brief."], "--system would be ignored: the prompts are plain text"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_a_model_is_opened(args, words, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}])
    given = args if "--judge" in args else [*args, "--judge", "exact_number"]
    result = evaluate("-m", tmp_path / "no-model", "--prompts", texts, *given)
    assert result.exit_code == 2 and words in result.output, result.output


def test_a_score_that_is_neither_right_nor_wrong_is_refused(tiny_model_folder, tmp_path, answers):
    answers += ["a b c"]
    result = evaluate(
        "-m", tiny_model_folder, "--prompts", questions(tmp_path, 1), "--judge", "target_length", "--pass-at", 1
    )
    assert result.exit_code == 2 and "judge: pass@k counts right and wrong answers" in result.output
