"""tether choose and tether sample --best-of: what is written, counted, refused, and read by the methods that train."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

from method_cases import lines, questions, reward_file, write_rows
from tether.backends.local.sampler import LocalSampler
from tether.cli.main import app
from tether.core.text import Rollout
from tether.data.readers import read
from tether.evals.best_of_n import kl_bound

NORMALISED = "{type: sum, parts: {a: {reward: exact_number, normalise: true}, b: {type: target_length}}}"


def tether(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def answers(monkeypatch):
    """What the model says, in the order of the draws: a text, or (text, finish reason)."""
    said: list[str | tuple[str, str]] = []
    asked: list[tuple[str, int]] = []

    def sample(self, prompts, *, n, settings, seed, finished=None):
        rollouts = []
        for group, prompt in enumerate(prompts):
            asked.append((prompt.id, n))
            for _ in range(n):
                found = said.pop(0)
                text, reason = (found, "stop") if isinstance(found, str) else found
                rollouts.append(
                    Rollout(
                        prompt=prompt, group=group, prompt_tokens=torch.tensor([1]), tokens=torch.tensor([5, 2]),
                        sampled=torch.tensor([True, True]), logprobs=torch.tensor([-0.5, -0.25]), text=text,
                        finish_reason=reason,
                    )
                )  # fmt: skip
        return rollouts

    monkeypatch.setattr(LocalSampler, "sample", sample)
    return said, asked


@pytest.fixture
def number_reward(tmp_path):
    """A completion scores the number in it; "?" is left unscored."""
    body = "return [None if '?' in c else float((c.split() or ['0'])[-1]) for c in completions]"
    return reward_file(tmp_path, body, name="number.py")


# -- sample --best-of --------------------------------------------------------------------------------------------------


def test_best_of_writes_the_best_with_all_scores_and_prints_the_curve(
    tiny_model_folder, tmp_path, answers, number_reward
):
    said, asked = answers
    said += ["a 1", "b 4", "c 2", "d 3", "e 0", "?", ("f 9", "length"), ""]
    out = tmp_path / "best.jsonl"
    result = tether(
        "sample", "-m", tiny_model_folder, "--prompts", questions(tmp_path, 2), "--out", out, "--best-of", 4,
        "--reward", number_reward, "--seed", 7,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert asked == [("prompts:1", 4), ("prompts:2", 4)], "one call: a prompt is prefilled once for its completions"
    first, second = lines(out)
    assert (first["id"], first["completion"], first["score"], first["scores"]) == ("prompts:1", "b 4", 4, [1, 4, 2, 3])
    assert (second["completion"], second["scores"]) == ("f 9", [0, None, 9, 0])
    source = first["source"]
    assert (source["rank"], source["n"], source["index"], source["seed"]) == (0, 4, 1, 7)
    assert source["reward"] == number_reward and source["sampling"]["temperature"] == 1.0
    assert re.fullmatch(r"[0-9a-f]{16}", source["weights"]) and source["kl_bound"] == kl_bound(4)
    assert second["source"]["finish_reason"] == "length" and second["source"]["n"] == 3
    for told in ("1 × without a finite score", "1 × empty", "1 × cut at the length limit", "upper bound"):
        assert told in result.output
    # Nine prompts of ten have three scored completions; E[max of 1, 2, 3] over the subsets of each pool.
    curve = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+|–) +([\d.]+)$", result.output, re.MULTILINE)
    assert [int(n) for n, *_ in curve] == [1, 2, 3]
    assert [float(r) for _, r, *_ in curve] == pytest.approx(
        [(2.5 + 3) / 2, (20 / 6 + 6) / 2, (15 / 4 + 9) / 2], abs=1e-4
    )
    assert read(str(out), "demonstrations").records[0].messages[-1].content == "b 4"


def test_best_of_says_pass_at_n_for_a_verifier_and_prints_the_best(tiny_model_folder, tmp_path, answers):
    said, _ = answers
    said += ["it is 0", "it is 5", "it is 1", "1"]
    result = tether(
        "sample", "-m", tiny_model_folder, "--prompts", questions(tmp_path, 2), "--best-of", 2,
        "--reward", "exact_number",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "pass@n" in result.output and "it is 0\n  [score 1]" in result.output
    assert "1 × prompt whose best was drawn by lot from equals" in result.output


def test_a_prompt_without_a_score_has_no_best_and_is_counted(tiny_model_folder, tmp_path, answers, number_reward):
    said, _ = answers
    said += ["?", "?", "a 1", "b 2"]
    out = tmp_path / "best.jsonl"
    result = tether(
        "sample", "-m", tiny_model_folder, "--prompts", questions(tmp_path, 2), "--out", out, "--best-of", 2,
        "--reward", number_reward,
    )  # fmt: skip
    assert [row["id"] for row in lines(out)] == ["prompts:2"]
    assert "1 of 2 prompts" in result.output and "1 × prompt without any score" in result.output
    said += ["?"] * 4
    result = tether(
        "sample",
        "-m",
        tiny_model_folder,
        "--prompts",
        questions(tmp_path, 2),
        "--best-of",
        2,
        "--reward",
        number_reward,
    )
    assert result.exit_code == 5 and "scored none of the 4" in result.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--best-of", 2], "belong together"),
        (["--reward", "exact_number"], "belong together"),
        (["--best-of", 2, "--reward", "exact_number", "-n", 3], "-n would be ignored"),
        (["--best-of", 2, "--reward", "exact_number", "--temperature", 0], "same completion 2 times"),
        (["--best-of", 2, "--reward", "exact_nubmer"], "did you mean exact_number?"),
        (["--best-of", 2, "--reward", NORMALISED], "parts.a.normalise: best of n has no training steps"),
    ],
)
def test_best_of_refuses_before_a_model_is_opened(more, words, tmp_path):
    result = tether("sample", "why?", "-m", tmp_path / "no-model", *more)
    assert result.exit_code == 2 and words in result.output


# -- choose: drawn -----------------------------------------------------------------------------------------------------


def choose(tmp_path, model, *more: object, out: str = "chosen"):
    return tether("choose", "--model", model, "--data", questions(tmp_path, 3), "--out", tmp_path / out, *more)


def test_choose_writes_sft_rows_with_their_provenance_and_a_control(
    tiny_model_folder, tmp_path, answers, number_reward
):
    said, _ = answers
    said += ["a 1", "b 4", "c 2", "d 0", "e 0", "?", ("f 9", "length"), "g 5", ""]
    result = choose(tmp_path, tiny_model_folder, "n=3", f"reward={number_reward}", "select.threshold=0.5")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "chosen"
    rows, control = lines(folder / "sft.jsonl"), lines(folder / "control.jsonl")
    assert [row["completion"] for row in rows] == ["b 4", "g 5"]
    source = rows[0]["source"]
    wanted = {
        "method": "choose", "by": "score", "prompt_id": "prompts:1", "generator": str(tiny_model_folder), "seed": 0,
        "reward": number_reward, "score": 4.0, "rank": 0, "n": 3, "index": 1, "finish_reason": "stop",
    }  # fmt: skip
    assert source | wanted == source
    assert source["sampling"]["max_new_tokens"] == 256 and re.fullmatch(r"[0-9a-f]{16}", source["weights"])
    # In rank the cut completion is ahead of the one that was chosen: it was left out, and that can be seen.
    assert (rows[1]["source"]["rank"], rows[1]["source"]["n"]) == (1, 3)
    assert [r["source"]["prompt_id"] for r in control] == ["prompts:1", "prompts:3"]
    assert {r["source"]["by"] for r in control} == {"lot"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["left_out"] == {
        "empty": 1, "without a finite score": 1, "cut at the length limit": 1, "prompt: nothing chosen": 1,
    }  # fmt: skip
    assert summary["chosen"]["score"] == 4.5 and summary["chosen"]["count"] == summary["control"]["count"] == 2
    everything = lines(folder / "candidates.jsonl")
    assert [len(row["completions"]) for row in everything] == [3, 3, 3] and everything[0]["answer"] == "0"
    assert [d.messages[-1].content for d in read(str(folder / "sft.jsonl"), "demonstrations").records] == ["b 4", "g 5"]


def test_choose_writes_preferences_that_dpo_reads(tiny_model_folder, tmp_path, answers, number_reward):
    said, _ = answers
    said += ["a 1", "b 4", "c 2", "d 7", "e 7", "f 7", "g 5", "h 0", "i 1"]
    result = choose(tmp_path, tiny_model_folder, "n=3", f"reward={number_reward}", "write=preferences")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "chosen"
    found = read(str(folder / "preferences.jsonl"), "preferences")
    assert [(p.chosen, p.rejected) for p in found.records] == [("b 4", "a 1"), ("g 5", "h 0")] and not found.bad
    row = lines(folder / "preferences.jsonl")[0]["source"]
    assert (row["chosen"]["rank"], row["rejected"]["rank"], row["against"]) == (0, 2, "worst")
    assert "1 × pair: none scores lower" in result.output
    assert len(read(str(folder / "control.jsonl"), "preferences").records) == 2
    assert not (folder / "sft.jsonl").exists()


def test_several_generators_fill_one_pool_and_each_has_its_curve(tiny_model_folder, tmp_path, answers, number_reward):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    said, _ = answers
    said += ["a 1", "b 2"] * 3 + ["c 3", "d 0"] * 3
    result = choose(
        tmp_path,
        tiny_model_folder,
        "n=2",
        f"models=[{other}]",
        f"reward={number_reward}",
        "select.per_prompt=2",
        "select.top=4",
    )
    assert result.exit_code == 0, result.output
    rows = lines(tmp_path / "chosen" / "sft.jsonl")
    assert sorted(row["completion"] for row in rows) == ["b 2", "c 3", "c 3", "c 3"]
    assert {row["source"]["generator"] for row in rows if row["completion"] == "c 3"} == {str(other)}
    assert all(row["source"]["n"] == 4 for row in rows)
    summary = json.loads((tmp_path / "chosen" / "summary.json").read_text())
    curves = {name: [p["reward"] for p in c["points"]] for name, c in summary["curves"].items()}
    assert curves == {str(tiny_model_folder): [1.5, 2.0], str(other): [1.5, 3.0]}


def test_a_killed_choose_goes_on_and_ends_alike(tiny_model_folder, tmp_path, monkeypatch):
    """Real draws, two prompts at a time; the reward dies in the second pair of prompts, and a line is torn."""
    from tether.methods import choose_candidates

    monkeypatch.setattr(choose_candidates, "AT_ONCE", 4)
    dying = tmp_path / "dying"
    body = f"import os\nif os.path.exists({str(dying)!r}) and '2 2?' in str(prompts):\n    raise OSError('down')\n"
    reward = reward_file(tmp_path, body.replace("2 2?", "mat 2") + "return [float(len(c)) for c in completions]")
    more = ("n=2", f"reward={reward}", "sampling.max_new_tokens=6", "select.keep_cut=true")
    whole = choose(tmp_path, tiny_model_folder, *more, out="whole")
    assert whole.exit_code == 0, whole.output
    dying.touch()
    assert choose(tmp_path, tiny_model_folder, *more, out="chosen").exit_code == 5
    drawn = tmp_path / "chosen" / "drawn-0.jsonl"
    assert [row["id"] for row in lines(drawn)] == ["prompts:1", "prompts:2"]
    with drawn.open("a") as file:
        file.write('{"id": "prompts:3", "pro')
    dying.unlink()
    resumed = choose(tmp_path, tiny_model_folder, *more, "--resume", out="chosen")
    assert resumed.exit_code == 0 and "2 prompts were answered before; 1 are left" in resumed.output
    for name in ("drawn-0.jsonl", "sft.jsonl", "control.jsonl", "candidates.jsonl", "summary.json"):
        assert (tmp_path / "chosen" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_resumed_choose_refuses_prompts_that_have_changed(tiny_model_folder, tmp_path, answers, number_reward):
    said, _ = answers
    said += ["a 1", "b 2"] * 3
    assert choose(tmp_path, tiny_model_folder, "n=2", f"reward={number_reward}").exit_code == 0
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"another {i}?"} for i in range(3)])
    args = ["--model", tiny_model_folder, "--data", tmp_path / "prompts.jsonl", "--out", tmp_path / "chosen"]
    result = tether("choose", *args, "n=2", f"reward={number_reward}", "--resume")
    assert result.exit_code == 2 and "has changed since this run began" in result.output


# -- choose: given -----------------------------------------------------------------------------------------------------


def given(tmp_path, rows, *more: object):
    file = write_rows(tmp_path / "candidates.jsonl", rows)
    return tether("choose", "--data", file, "--out", tmp_path / "chosen", *more)


def test_given_texts_with_scores_beside_them(tmp_path):
    rows = [
        {"prompt": "a?", "completions": ["x", "y", "z"], "scores": [0.5, None, 2]},
        {"prompt": "b?", "completions": ["x", "x ", "w"], "scores": [1, 1, 0]},
        {"prompt": "c?", "completions": [], "scores": []},
    ]
    result = given(tmp_path, rows, "given={}", "write=preferences", "against=random")
    assert result.exit_code == 0, result.output
    found = lines(tmp_path / "chosen" / "preferences.jsonl")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [("a?", "z", "x"), ("b?", "x", "w")]
    for told in ("1 × without a finite score", "1 × the same text", "1 × prompt: no usable candidate"):
        assert told in result.output


def test_given_objects_scored_by_a_verifier(tmp_path):
    found = [{"how": "m1", "says": "so 3", "ok": False}, {"how": "m2", "says": "so 4", "ok": True}]
    rows = [{"prompt": f"{i}?", "answer": "4", "tries": found} for i in range(3)]
    names = "column: tries, text: says, generator: how"
    result = given(tmp_path, rows, f"given={{{names}}}", "reward=exact_number")
    assert result.exit_code == 0, result.output
    (first, *_) = lines(tmp_path / "chosen" / "sft.jsonl")
    assert (first["completion"], first["source"]["generator"], first["source"]["reward"]) == (
        "so 4",
        "m2",
        "exact_number",
    )
    assert "pass@n" in result.output and "m1: mean score 0.0000 of 3 candidates" in result.output
    import shutil

    shutil.rmtree(tmp_path / "chosen")
    graded = given(tmp_path, rows, f"given={{{names}, score: ok}}")
    assert graded.exit_code == 0, graded.output
    assert lines(tmp_path / "chosen" / "sft.jsonl")[0]["source"]["reward"] == "column ok"


def test_what_choose_wrote_can_be_chosen_from_again(tmp_path):
    rows = [{"prompt": "a?", "completions": ["x", "y"], "scores": [math.pi, 1]}]
    assert given(tmp_path, rows, "given={}").exit_code == 0
    again = tether(
        "choose", "--data", tmp_path / "chosen" / "candidates.jsonl", "--out", tmp_path / "again", "given={}",
        "select.per_prompt=null",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert [r["source"]["score"] for r in lines(tmp_path / "again" / "sft.jsonl")] == [math.pi, 1]


def test_a_reward_model_scores_given_texts_as_its_own_tokens(tiny_model_folder, tmp_path):
    from tether.methods import choose_candidates

    reward, _ = choose_candidates.open_scorer("target_length", choose_candidates.TextOnly(), None, print)  # type: ignore[arg-type]
    assert reward is not None and choose_candidates.TextOnly().get_vocab() == {}
    from method_cases import config, go, preferences

    run = go(config("reward", tiny_model_folder, preferences(tmp_path), tmp_path / "rm"))
    rows = [{"prompt": [{"role": "user", "content": "what is dog?"}], "completions": ["the dog sat.", "???? dog ??"]}]
    result = given(tmp_path, rows, "given={}", f"reward={run}")
    assert result.exit_code == 0, result.output
    found = lines(tmp_path / "chosen" / "candidates.jsonl")[0]["completions"]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(run / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    for one in found:
        text = f"<|im_start|>user\nwhat is dog?<|im_end|>\n<|im_start|>assistant\n{one['text']}<|im_end|>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert one["score"] == pytest.approx(float(model(input_ids=ids).logits), abs=1e-4)
        assert re.fullmatch(r"[0-9a-f]{16}", one["reward_weights"])


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"scores": [1]}, [], "one score for each"),
        ({"scores": ["good", 1]}, [], "must be a number"),
        ({}, [], "has no list 'scores'"),
        ({"scores": [1, 2]}, ["reward=exact_number", "given.column=tries"], "has no list 'tries'"),
        ({"scores": [1, 2]}, ["given.score=scores", "reward=exact_number"], "given.score would be ignored"),
        ({"scores": [1, 2]}, ["n=4"], "n would be ignored"),
        ({"scores": [1, 2]}, ["sampling.temperature=0.5"], "sampling would be ignored"),
        ({"scores": [1, 2]}, ["against=random"], "against would be ignored"),
        ({"scores": [1, 2]}, ["reward=exact_nubmer"], "did you mean exact_number?"),
        ({}, ["reward={type: length_penalty, per: 4}"], "reward: length_penalty counts tokens"),
        ({}, ["reward=repetition_penalty"], "reward: repetition_penalty counts tokens"),
        (
            {},
            ["reward={type: sum, parts: {a: {reward: {type: overlong_penalty, limit: 9, cache: 2}, weight: 2}}}"],
            "reward.parts.a.reward: overlong_penalty counts tokens",
        ),
        (
            {},
            ["reward={type: sum, parts: {s: {type: sum, parts: {a: repetition_penalty}}}}"],
            "reward.parts.s.parts.a: repetition_penalty counts tokens",
        ),
        ({}, ["reward=missing_eos_penalty"], "2 of 2 given candidates do not say how they ended"),
    ],
)
def test_given_candidates_that_can_not_be_read_are_refused(row, more, words, tmp_path):
    result = given(tmp_path, [{"prompt": "a?", "completions": ["x", "y"], **row}], "given={}", *more)
    assert result.exit_code == 2 and words in result.output, result.output


def test_nothing_chosen_is_a_failure_that_says_why(tmp_path):
    result = given(
        tmp_path, [{"prompt": "a?", "completions": ["x", " "], "scores": [None, 3]}], "given={}", "select.threshold=1"
    )
    assert (
        result.exit_code == 5
        and "nothing was chosen from 2 candidates: 1 × without a finite score, 1 × empty" in result.output
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "nothing scores the candidates"),
        (["reward=exact_number", "sampling.temperature=0"], "same completion 8 times"),
        (["reward=exact_number", "models=[{model}]"], "named twice"),
        (["reward={type: pair_judge}", "models=[other]"], "one generator only"),
        ([f"reward={NORMALISED}"], "reward.parts.a.normalise: choose has no training steps"),
    ],
)
def test_choose_refuses_before_a_model_is_opened(more, words, tmp_path):
    model = tmp_path / "no-model"
    result = choose(tmp_path, model, *[m.replace("{model}", str(model)) for m in more])
    assert result.exit_code == 2 and words in result.output, result.output


def test_a_judge_of_pairs_scores_by_the_share_that_is_beaten(monkeypatch):
    from tether.core.text import Prompt
    from tether.evals.winrate import PairwiseJudge
    from tether.methods.choose_candidates import WinShare
    from tether.methods.judge_models import PairJudge

    def ask(pairs):
        """The longer one is better; of equal length a tie; with "?" no verdict."""
        return [math.nan if "?" in a + b else 0.5 if len(a) == len(b) else float(len(a) > len(b)) for _, a, b in pairs]

    monkeypatch.setattr(PairJudge, "pairwise", property(lambda self: PairwiseJudge(ask=ask)))
    none = torch.tensor([])

    def rollout(group: int, text: str) -> Rollout:
        return Rollout(
            prompt=Prompt(id=str(group), text="q"), group=group, prompt_tokens=none, tokens=none, sampled=none,
            logprobs=none, text=text, finish_reason="stop",
        )  # fmt: skip

    texts = [(0, "aaa"), (0, "a"), (0, "b"), (1, "a"), (1, "bb"), (1, "?"), (2, "alone")]
    total = WinShare(judge=PairJudge())([rollout(*t) for t in texts]).total.tolist()
    assert total[:5] == [1.0, 0.25, 0.25, 0.0, 1.0] and math.isnan(total[5]) and math.isnan(total[6])


@pytest.fixture
def longer_wins(monkeypatch):
    """Every pair_judge prefers the longer answer."""
    from tether.evals.winrate import PairwiseJudge
    from tether.methods.judge_models import PairJudge

    def ask(pairs):
        return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for _, a, b in pairs]

    monkeypatch.setattr(PairJudge, "pairwise", property(lambda self: PairwiseJudge(ask=ask)))


def test_a_judge_of_pairs_has_no_curve_and_no_mean_across_prompts(longer_wins, tiny_model_folder, tmp_path, answers):
    # Of two answers one has 1 and the other 0: no verifier, and no pass@n.
    rows = [{"prompt": f"{i}?", "completions": ["the long one", "short"]} for i in range(3)]
    result = given(tmp_path, rows, "given={}", "reward={type: pair_judge}")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "chosen" / "summary.json").read_text())
    assert summary["curves"] == summary["generators"] == {} and not summary["reward_is_0_or_1"]
    answers[0].extend(["the long one", "short"])
    best = tether("sample", "-m", tiny_model_folder, "a?", "--best-of", 2, "--reward", "pair_judge")
    assert best.exit_code == 0, best.output
    for output in (result.output, best.output):
        assert "no reward curve or mean: a pair_judge's score is the share" in output
        assert not re.search(r"pass@n|upper bound|mean score [\d.]+ of", output)


def test_the_end_of_given_candidates_is_judged_where_they_say_it(tmp_path):
    cut = [{"text": "a", "finish_reason": "length"}, {"text": "b", "finish_reason": "stop"}]
    result = given(
        tmp_path,
        [{"prompt": "q", "completions": cut}],
        "given={}",
        "reward=missing_eos_penalty",
        "select.keep_cut=true",
    )
    assert result.exit_code == 0, result.output
    assert [row["completion"] for row in lines(tmp_path / "chosen" / "sft.jsonl")] == ["b"]


def test_evaluate_refuses_a_part_that_is_normalised(tmp_path):
    result = tether("evaluate", "-m", tmp_path / "no-model", "--prompts", questions(tmp_path, 2), "--judge", NORMALISED)
    assert result.exit_code == 2 and "judge.parts.a.normalise: evaluate has no" in result.output, result.output


def test_what_is_written_trains_as_it_stands(tiny_model_folder, tmp_path):
    from method_cases import config, go, series

    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "completions": ["the cat", "a dog", "mat"],
            "scores": [i, 2, 1],
        }
        for i in range(4)
    ]
    for write, method in (("sft", "sft"), ("preferences", "preference")):
        made = tether(
            "choose", "--data", write_rows(tmp_path / "given.jsonl", rows), "--out", tmp_path / write, "given={}",
            f"write={write}",
        )  # fmt: skip
        assert made.exit_code == 0, made.output
        for name in (write, "control"):
            file = str(tmp_path / write / f"{name}.jsonl")
            run = go(config(method, tiny_model_folder, file, tmp_path / f"{write}-{name}", data={"max_bad_rows": 0}))
            assert math.isfinite(series(run, "loss")[-1])
