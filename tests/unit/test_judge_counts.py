"""What a judge was asked, as metrics: of each step, each round, each time a command ran; added up by hand here."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

from method_cases import config, lines, questions, write_rows
from tether.config.schema import METHODS
from tether.core.protocols import SamplingSettings, Scores
from tether.methods import choose, choose_best, constitutional, iterate, judge_models, rl
from tether.rewards.compose import Gate, GateOptions, Part, Sum
from tether.rewards.judges.ask import Tally, sentence
from tether.rewards.judges.cache import Reply
from tether.rewards.meter import Meter, added
from tether.runs.glossary import METRICS, find

ASKED_FOR = re.compile(r"(Verdict|Score) ([0-9a-f]{12}):")
ENDPOINT = {"url": "http://127.0.0.1:1/v1", "model": "m", "price_in": 2.0, "price_out": 10.0}


@pytest.fixture
def source(monkeypatch, tmp_path):
    """Behind every endpoint: answers in which every third question finds no verdict, 100 + 10 tokens each."""
    asked: list[str] = []

    class Source:
        def __init__(self, *, endpoint, settings) -> None:
            self.identity = {"model": endpoint.model}

        def replies(self, conversations):
            for i, conversation in enumerate(conversations):
                text = conversation[-1].content
                asked.append(text)
                word, code = ASKED_FOR.search(text).groups()
                told = f"{word} {code}: {'A' if word == 'Verdict' else 1 + len(asked) % 9}"
                text = "I can not say." if len(asked) % 3 == 0 else told
                yield i, Reply(text=text, prompt_tokens=100, completion_tokens=10)

    monkeypatch.setattr(judge_models, "EndpointSource", Source)
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    return asked


def rows_of(folder, split="train"):
    return [
        {name: n for name, n in row["values"].items() if name.startswith("judge/")}
        for row in lines(folder / "metrics.jsonl")
        if row["split"] == split
    ]


def test_a_meter_reads_what_came_since_it_was_last_read():
    class Asks:
        def __init__(self, **now):
            self.now = now

        def counts(self):
            return dict(self.now)

    one, two = Asks(a=5.0), Asks(a=1.0, b=2.0)
    meter = Meter([one, None, torch.nn.ReLU(), two])
    assert meter() == {"a": 0, "b": 0}  # what was counted before the meter was made is not the run's
    one.now = {"a": 7.0, "c": 4.0}
    two.now = {"a": 4.0, "b": 2.0}
    assert meter() == {"a": 5, "b": 0, "c": 4}
    assert meter() == {"a": 0, "b": 0, "c": 0}
    assert added([{"a": 1.0}, {"b": 2.0}, {"a": 3.0}]) == {"a": 4, "b": 2}
    twice = Meter([one, two, one])  # the reward of a run that is also its verifier
    one.now = {"a": 10.0}
    assert twice()["a"] == 3


def test_a_sum_counts_for_what_it_is_made_of():
    class Asks:
        def __call__(self, rollouts):
            return Scores(total=torch.ones(len(rollouts)))

        def counts(self):
            return {"judge/requests": 3.0}

    class Silent:
        def __call__(self, rollouts):
            return Scores(total=torch.ones(len(rollouts)))

    inner = Sum(parts={"deep": Part(reward=Asks()), "rule": Part(reward=Silent())})
    gates = {"first": Gate(reward=Asks(), options=GateOptions(otherwise=0.0))}
    assert Sum(gates=gates, parts={"inner": Part(reward=inner)}).counts() == {"judge/requests": 6.0}
    assert Meter([Sum(parts={"rule": Part(reward=Silent())})])() == {}


def test_counts_and_their_sentence():
    assert set(Tally().counts()) == {"judge/requests", "judge/cached", "judge/refused", "judge/unparsed"}
    tally = Tally(asked=4, cached=2, refused=1, unparsed=3, prompt_tokens=50, completion_tokens=7, cost=0.5)
    assert tally.counts("writer")["writer/cost"] == 0.5 and len(tally.counts()) == 7
    said = "4 asked (50 + 7 tokens, cost 0.5), 2 from the cache, 1 without an answer, 3 without a verdict"
    assert tally.sentence() == said == sentence(tally.counts("writer"), "writer")
    assert all(name in METRICS for name in tally.counts())
    assert find("writer/requests") is METRICS["writer/*"]


def test_every_step_of_a_run_says_what_its_judge_was_asked(source, tiny_model_folder, tmp_path):
    reward = {"type": "sum", "parts": {"judge": {"type": "judge", "endpoint": ENDPOINT}, "short": "target_length"}}
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward=reward, algorithm="rloo", steps=2,
        prompts_per_step=2, completions_per_prompt=3, sampling={"max_new_tokens": 6}, on_reward_failure="skip",
        data={"eval": questions(tmp_path, 4)}, run={"eval_every": 1},
        guards={"judge": {"type": "judge", "endpoint": ENDPOINT, "criterion": "kind"}},
    )  # fmt: skip
    out = rl.run(made, quiet=True)
    steps, held_out = rows_of(out), rows_of(out, "eval")
    assert len(steps) == len(held_out) == 2
    total = added([*steps, *held_out])
    assert total["judge/requests"] == len(source)
    # A question that comes twice in a step is asked once; what comes again in a later one is in the cache.
    assert sum(steps[0].values()) and steps[0]["judge/requests"] + steps[0]["judge/cached"] <= 6
    for row in (*steps, *held_out):
        assert row.get("judge/prompt_tokens", 0) == 100 * row["judge/requests"]
        assert row.get("judge/cost", 0) == pytest.approx(row["judge/requests"] * (100 * 2 + 10 * 10) / 1e6)
    dropped = [row["values"]["reward/dropped"] for row in lines(out / "metrics.jsonl") if row["split"] == "train"]
    assert [row["judge/unparsed"] for row in steps] == dropped and sum(dropped) > 0


def test_choose_and_its_summary_count_over_all_calls(source, tiny_model_folder, tmp_path):
    def go(resume, reward):
        made = METHODS["choose"].model_validate(
            {
                "model": {"name": str(tiny_model_folder)}, "data": {"train": questions(tmp_path, 4)}, "n": 3,
                "run": {"folder": str(tmp_path / "c")}, "sampling": {"max_new_tokens": 6}, "reward": reward,
                "select": {"keep_cut": True},
            }
        )  # fmt: skip
        return choose.run(made, resume=resume, quiet=True)

    folder = go(False, {"type": "judge", "endpoint": ENDPOINT})
    summary = json.loads((folder / "summary.json").read_text())
    (row,) = rows_of(folder)
    assert summary["judge"] == row and row["judge/requests"] == len(source)
    assert row["judge/unparsed"] == summary["left_out"]["without a finite score"]
    assert f"judge: {sentence(row)}" in choose.told(summary)
    (folder / "drawn-0.jsonl").unlink()  # it is scored again, from the cache
    go(True, {"type": "judge", "endpoint": ENDPOINT})
    first, second = rows_of(folder)
    assert first == row and second["judge/requests"] == 0 and second["judge/cached"] == 12
    assert json.loads((folder / "summary.json").read_text())["judge"] == added([first, second])


@pytest.mark.parametrize("kind", ["judge", "pair_judge"])
def test_candidates_that_are_given_are_counted_too(kind, source, tmp_path):
    rows = [{"prompt": f"q{i}", "completions": ["a b", "c d e", "f"]} for i in range(2)]
    made = METHODS["choose"].model_validate(
        {
            "data": {"train": write_rows(tmp_path / "g.jsonl", rows)}, "given": {}, "write": "sft",
            "run": {"folder": str(tmp_path / "c")}, "reward": {"type": kind, "endpoint": ENDPOINT},
        }
    )  # fmt: skip
    folder = choose.run(made, quiet=True)
    (row,) = rows_of(folder)
    assert row["judge/requests"] == len(source) == {"judge": 6, "pair_judge": 12}[kind]


def test_the_best_of_several_says_what_its_judge_was_asked(source, tiny_model_folder, tmp_path, capsys):
    choose_best.run(
        model=str(tiny_model_folder), prompts=questions(tmp_path, 2), prompt=[], out=None, best_of=3,
        reward=json.dumps({"type": "judge", "endpoint": ENDPOINT}), settings=SamplingSettings(max_new_tokens=6),
        seed=0, system=None,
    )  # fmt: skip
    assert f"judge: {len(source)} asked (" in capsys.readouterr().out and source


def test_without_a_judge_nothing_is_said_of_one(tmp_path):
    rows = [{"prompt": f"q{i}", "answer": "1", "completions": ["1", "2"]} for i in range(2)]
    made = METHODS["choose"].model_validate(
        {
            "data": {"train": write_rows(tmp_path / "g.jsonl", rows)}, "given": {}, "write": "sft",
            "run": {"folder": str(tmp_path / "c")}, "reward": "exact_number",
        }
    )  # fmt: skip
    folder = choose.run(made, quiet=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["judge"] == {} and not any("judge" in line for line in choose.told(summary))
    assert not (folder / "metrics.jsonl").exists()


def test_every_round_says_what_its_judge_was_asked(source, tiny_model_folder, tmp_path, capsys):
    others = write_rows(tmp_path / "others.jsonl", [{"prompt": f"and {i}?"} for i in range(4)])
    made = METHODS["iterate"].model_validate(
        {
            "model": {"name": str(tiny_model_folder)},
            "data": {"train": questions(tmp_path, 4), "eval": others},
            "run": {"folder": str(tmp_path / "i"), "report": False},
            "sampling": {"max_new_tokens": 6}, "reward": {"type": "judge", "endpoint": ENDPOINT},
            "rounds": {"count": 1, "prompts": 4, "completions": 3}, "loss": {"type": "dpo"}, "prompts_per_step": 2,
            "optim": {"warmup": 0},
        }
    )  # fmt: skip
    out = iterate.run(made)
    trained, held_out = rows_of(out), rows_of(out, "eval")
    assert len(trained) == len(held_out) == 2 and held_out[0]["judge/requests"] > 0
    assert added([*trained, *held_out])["judge/requests"] == len(source)
    assert [r["judge/unparsed"] for r in trained] == [
        row["values"]["reward/dropped"] for row in lines(out / "metrics.jsonl") if row["split"] == "train"
    ]
    said = capsys.readouterr().out
    for number in (0, 1):
        assert f"; judge: {sentence(added([trained[number], held_out[number]]))}" in said


def test_a_constitution_counts_its_writer_and_its_judge(source, tiny_model_folder, tmp_path, monkeypatch):
    from tether.rewards.judges.ask import Asker

    asked = Counter()

    class Writer:
        def __init__(self):
            self.identity = {"model": "script"}

        def replies(self, conversations):
            for i, conversation in enumerate(conversations):
                asked["writer"] += 1
                yield i, Reply(text=f"{len(conversation)} of {conversation[0].content}", prompt_tokens=3)

    monkeypatch.setattr(constitutional, "_writer", lambda config, endpoint, cache: Asker(source=Writer(), cache=cache))
    made = METHODS["constitutional"].model_validate(
        {
            "data": {"train": questions(tmp_path, 3)}, "run": {"folder": str(tmp_path / "c")},
            "constitution": ("Be kind.",), "feedback": {"type": "pair_judge", "endpoint": ENDPOINT},
        }
    )  # fmt: skip
    out = constitutional.run(made, quiet=True)
    (row,) = [row["values"] for row in lines(out / "metrics.jsonl")]
    assert row["writer/requests"] == asked["writer"] == 9 and row["writer/prompt_tokens"] == 27
    assert row["judge/requests"] == len(source) == 6 and row["judge/unparsed"] == 2
    constitutional.run(made, quiet=True, resume=True)
    assert [r["values"]["writer/cached"] for r in lines(out / "metrics.jsonl")] == [0, 9]
