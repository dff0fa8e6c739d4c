"""Every kind of reward model through its front door: the toy preference is learnt, the saved folder is what plain
transformers reads, and the wrong data or a knob without use is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from method_cases import WORDS, config, demonstrations, go, preferences, series, write_rows
from tether.config.sections import ModelConfig
from tether.core.errors import DataError, UserError
from tether.core.protocols import SamplingSettings
from tether.core.text import Prompt
from tether.methods.judges import open_reward
from tether.methods.sample import open_sampler
from tether.models.load import load_tokenizer
from tether.models.roles import Scorer

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def rankings(folder: Path) -> str:
    """The more question marks the worse; the two without any are a tie."""
    return write_rows(
        folder / "rankings.jsonl",
        (
            {
                "prompt": f"what is {word}?",
                "completions": [f"? {word}", f"the {word}.", f"??? ??? {word}", f"a {word}."],
                "ranks": [1, 0, 2, 0],
            }
            for word in WORDS
        ),
    )


def judged(folder: Path) -> str:
    rows = [
        {"prompt": f"what is {word}?", "completion": text, "label": good}
        for word in WORDS
        for text, good in ((f"the {word} sat.", True), (f"???? {word} ??", False))
    ]
    return write_rows(folder / "judged.jsonl", rows)


def solutions(folder: Path) -> str:
    """A step with question marks is wrong."""
    rows = []
    for i, word in enumerate(WORDS):
        steps = [f"the {word} sat.", f"?? {word} ??", f"one {word}."]
        rows.append({"prompt": f"what is {word}?", "steps": steps[i % 2 :], "first_error": 1 - i % 2})
        rows.append({"prompt": f"what is {word}?", "steps": [steps[0], steps[2]], "first_error": -1})
    return write_rows(folder / "steps.jsonl", rows)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "bradley_terry": (preferences, {"nll_weight": 0.1}, {"pool": "mean"}),
    "plackett_luce": (rankings, {}, {}),
    "davidson": (rankings, {"nu": 0.5}, {"pool": "mean"}),
    "rao_kupper": (rankings, {"theta": 1.5}, {}),
    "outcome": (judged, {}, {"stratify_lengths": True}),
    "process": (solutions, {}, {"steps": {"separator": "\n", "aggregate": "product"}}),
}


def trained(name: str, start: Path, folder: Path, **settings: Any) -> Path:
    data, options, more = CASES[name]
    made = config(
        "reward", start, data(folder), folder / "run",
        loss={"type": name, **options}, optim={"learning_rate": 2e-3}, epochs=6, prompts_per_step=4,
        data={"eval_fraction": 0.3}, **{**more, **settings},
    )  # fmt: skip
    return go(made)


@pytest.fixture(scope="module")
def runs(tiny_model_folder, tmp_path_factory) -> dict[str, Path]:
    return {name: trained(name, tiny_model_folder, tmp_path_factory.mktemp(name)) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_each_kind_learns_on_held_out_rows(name: str, runs):
    run = runs[name]
    assert series(run, "loss")[-1] < series(run, "loss")[0]
    assert series(run, "accuracy", split="eval")[-1] == 1.0
    if name in ("plackett_luce", "davidson", "rao_kupper"):
        assert series(run, "ties/share")[0] == pytest.approx(1 / 6)
        assert series(run, "ties/gap", split="eval")[0] < series(run, "margin", split="eval")[0] / 4
    if name == "process":
        assert series(run, "first_error/found", split="eval") == series(run, "first_error/none", split="eval") == [1.0]
        assert series(run, "loss")[0] == pytest.approx(0.6931, abs=1e-3)  # probabilities start at one half
    if name == "bradley_terry":
        nll = series(run, "nll/chosen")
        assert nll[-1] < nll[0] - 0.5


TEXT = "the cat sat.\n?? mat\none."


def by_transformers(name: str, folder: Path, prompt: str, text: str) -> float:
    """The score from the published folder alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(prompt + text).input_ids, tokenizer.eos_token_id]
    start = len(tokenizer(prompt).input_ids)
    reading = json.loads((folder / "config.json").read_text()).get("tether_reading", {"kind": "last"})
    kind: Any = AutoModelForSequenceClassification if reading["kind"] == "last" else AutoModelForTokenClassification
    with torch.no_grad():
        logits = kind.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0]
    if reading["kind"] == "last":
        return float(logits)
    scores = logits[start:, 0]
    if reading["kind"] == "mean":
        return float(scores.mean())
    if reading["kind"] == "outcome":
        return float(scores[-1].sigmoid())
    # A step ends with the last token of what stands before the separator.
    ends = [len(tokenizer(prompt + text[:i]).input_ids) - start - 1 for i in (12, 19, len(text))]
    assert reading == {"kind": "process", "aggregate": "product", "separator": "\n"}
    return float(scores[ends].sigmoid().prod())


@pytest.mark.parametrize("name", CASES)
def test_the_reward_is_what_plain_transformers_reads(name: str, runs):
    from tether.core.text import Rollout

    folder = runs[name] / "final"
    tokenizer = load_tokenizer(str(folder))
    prompt = "what is this?"
    tokens = torch.tensor(tokenizer(prompt + TEXT).input_ids[len(tokenizer(prompt).input_ids) :])
    tokens = torch.cat([tokens, torch.tensor([tokenizer.eos_token_id])])
    rollout = Rollout(
        prompt=Prompt(id="p", text=prompt),
        group=0,
        prompt_tokens=torch.tensor(tokenizer(prompt).input_ids),
        tokens=tokens,
        sampled=torch.ones(len(tokens), dtype=torch.bool),
        logprobs=torch.zeros(len(tokens)),
        text=TEXT,
        finish_reason="stop",
    )
    said: list[str] = []
    reward, scorer = open_reward(str(runs[name]), tokenizer, ModelConfig(name="x", device="cpu"), 512, said.append)
    assert isinstance(scorer, Scorer)
    torch.testing.assert_close(
        reward([rollout]).total[0], torch.tensor(by_transformers(name, folder, prompt, TEXT)), **CLOSE
    )
    scaled, _ = open_reward(
        str(runs[name]), tokenizer, ModelConfig(name="x", device="cpu"), 512, said.append, scaled=True
    )
    scale = json.loads((folder / "score_scale.json").read_text())
    expected = (reward([rollout]).total - scale["mean"]) / scale["std"]
    torch.testing.assert_close(scaled([rollout]).total, expected, **CLOSE)
    assert scale["completions"] > 0


def test_a_process_model_is_a_reward_to_train_against(runs, tiny_model_folder, tmp_path):
    """Through tether's own loop, rollouts of no words and all; with LoRA as an adapter of the policy's backbone too."""
    lora = {"lora": {"rank": 2}}
    shared = trained("process", tiny_model_folder, tmp_path, model=lora)
    prompts = write_rows(tmp_path / "p.jsonl", ({"prompt": f"what is {word}?"} for word in WORDS))
    for name, folder, extra in (("own", runs["process"], {}), ("shared", shared, {"share_backbone": True})):
        made = config(
            "rl", tiny_model_folder, prompts, tmp_path / name,
            algorithm="rloo", reward=str(folder), steps=1, prompts_per_step=4, completions_per_prompt=2,
            sampling={"max_new_tokens": 6}, model=lora, scale_reward=False, **extra,
        )  # fmt: skip
        (mean,) = series(go(made), "reward/mean")
        assert 0.0 < mean < 1.0
    sampler = open_sampler(str(tiny_model_folder), None, SamplingSettings(), lambda text: None)
    tokenizer = sampler.policy.backbone.tokenizer
    ours, _ = open_reward(str(shared), tokenizer, ModelConfig(name="x"), 512, lambda text: None)
    on_policy, _ = open_reward(
        str(shared), tokenizer, ModelConfig(name="x"), 512, lambda text: None, shared=sampler.policy.backbone
    )
    asked = [Prompt(id=str(i), text=f"what is {word}?") for i, word in enumerate(WORDS)]
    rollouts = sampler.sample(asked, n=1, settings=SamplingSettings(max_new_tokens=5), seed=0)
    torch.testing.assert_close(on_policy(rollouts).total, ours(rollouts).total, **CLOSE)


WRONG_DATA = [
    ("plackett_luce", demonstrations, "rankings need prompt \\+ completions \\+ ranks"),
    ("davidson", judged, "rankings need prompt \\+ completions \\+ ranks"),
    ("outcome", rankings, "judgements need prompt \\+ completion \\+ label"),
    ("process", preferences, "steps need prompt \\+ completions \\(the steps\\) \\+ labels"),
    ("bradley_terry", solutions, "preferences need prompt \\+ chosen \\+ rejected"),
]


@pytest.mark.parametrize(("name", "data", "says"), WRONG_DATA, ids=[w[0] for w in WRONG_DATA])
def test_the_wrong_data_is_refused_by_name(name: str, data: Any, says: str, tiny_model_folder, tmp_path, capsys):
    from tether.methods import reward

    made = config("reward", tiny_model_folder, data(tmp_path), tmp_path / "r", loss={"type": name})
    with pytest.raises(DataError, match=says):
        reward.run(made)
    assert f"loss {name}: reads {says.split()[0]}" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": {"type": "davidson", "nu": 0.0}}, r"rankings:1: Davidson\(.*nu=0.0\) gives ties no probability"),
        ({"loss": {"type": "plackett_luce"}, "steps": {"aggregate": "min"}}, r"steps\.\* would be ignored"),
        ({"loss": {"type": "outcome"}, "pool": "mean"}, "pool=mean would be ignored: outcome"),
        ({"loss": {"type": "process"}, "pool": "mean"}, "pool=mean would be ignored: process"),
        ({"loss": {"type": "plackett"}}, "did you mean plackett_luce"),
        ({"loss": {"type": "davidson", "theta": 2.0}}, 'unknown key "theta" for davidson'),
    ],
)
def test_what_would_be_ignored_or_impossible_is_refused(settings: dict, says: str, tiny_model_folder, tmp_path):
    with pytest.raises(UserError, match=says):
        go(config("reward", tiny_model_folder, rankings(tmp_path), tmp_path / "r", **settings))
    assert not (tmp_path / "r").exists()


def test_groups_in_memory_of_another_kind_are_refused(tiny_tokenizer):
    from tether.core.text import Judgement
    from tether.data.chat import ChatTokenizer
    from tether.data.groups import tokenise
    from tether.methods import reward

    record = Judgement(prompt=Prompt(id="it", text="the cat"), completion="sat", desirable=True)
    chat = ChatTokenizer(tiny_tokenizer)
    groups = tokenise([record], chat, max_prompt_tokens=9, max_completion_tokens=9).groups
    for lay_out, what in ((reward.pairs, "preferences"), (reward.rankings, "rankings"), (reward.steps_of, "steps")):
        with pytest.raises(UserError, match=f"this loss reads {what}: .*; it is none"):
            lay_out(groups)
    assert reward.judgements(groups).desirable.tolist() == [True]


def test_pairs_with_and_without_a_margin_are_not_mixed(tiny_model_folder, tmp_path):
    rows = [{"prompt": f"what is {w}?", "chosen": f"the {w}.", "rejected": f"? {w} ?", "margin": 1.0} for w in WORDS]
    del rows[3]["margin"]
    mixed = write_rows(tmp_path / "pairs.jsonl", rows)
    told = f"data.train: {len(rows) - 1} pairs have a margin and 1 have none; .* loss.margin=ignore"
    with pytest.raises(UserError, match=told):
        go(config("reward", tiny_model_folder, mixed, tmp_path / "r"))
    small = {"epochs": 1, "loss": {"type": "bradley_terry", "margin": "ignore"}}
    assert go(config("reward", tiny_model_folder, mixed, tmp_path / "ignored", **small)).is_dir()
