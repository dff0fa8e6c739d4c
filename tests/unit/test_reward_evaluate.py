"""``tether reward evaluate`` from files to page: what is scored, sliced, left out, printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tether.cli.main import app
from tether.config.sections import ModelConfig
from tether.core.errors import DataError, UserError
from tether.core.intervals import Interval
from tether.data.audit import Comparison
from tether.evals.model_quality import model_quality, verdict
from tether.methods import reward_evaluate
from tether.methods.reward_scores import pairs_of, read_labelled, score
from tether.models.load import load_backbone, load_scorer, save_scorer
from tether.models.roles import Scorer, new_head

MANY = 2**12


@pytest.fixture(scope="module")
def models(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two reward models with random heads."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        backbone = load_backbone(str(tiny_model_folder), say=lambda text: None)
        folder = tmp_path_factory.mktemp(f"scorer-{seed}")
        save_scorer(Scorer(backbone=backbone, head=new_head(backbone, zero=False)), folder)
        made.append(str(folder))
    return made[0], made[1]


def write(folder: Path, rows: list, name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(file)


PAIRS = [
    {"prompt": f"the cat {i}", "chosen": "sat " * (i % 5 + 1), "rejected": "mat " * (i % 3 + 1), "subset": "ab"[i % 2]}
    for i in range(24)
]


def quiet(text: str) -> None:
    pass


def test_scores_are_those_of_transformers(models, tmp_path):
    """Text in the model's own template, read at the last token, whatever order and batches it went through."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    k_wise = [{"prompt": "the cat", "completions": ["sat", "sat on the mat", "x"], "ranks": [0, 1, 1]}]
    plain = [{k: v for k, v in row.items() if k != "subset"} for row in PAIRS[:3]]
    files = [write(tmp_path, k_wise, "k.jsonl"), write(tmp_path, plain, "p.jsonl")]
    scored = score(read_labelled(files, [], None, 0), models[:1], ModelConfig(name=models[0]), 40, quiet)
    model = AutoModelForSequenceClassification.from_pretrained(models[0], num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for ranking, scores, lengths in zip(scored.labelled.rankings, scored.scores[0], scored.lengths, strict=True):
        for completion, got, length in zip(ranking.completions, scores, lengths, strict=True):
            ids = [*tokenizer(ranking.prompt.text + completion).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0, 0]
            assert float(got) == pytest.approx(float(expected), abs=1e-5) and 0 < length < len(ids)
    made = pairs_of(scored)
    first = scored.scores[0][0]
    assert made.margins[0][:2].tolist() == pytest.approx([float(first[0] - first[1]), float(first[0] - first[2])])
    lengths = scored.lengths[0]
    assert made.length_gap[:2].tolist() == [float(lengths[0] - lengths[1]), float(lengths[0] - lengths[2])] != [0, 0]
    assert made.ties == 1 and len(made.comparisons) == 2 + 3 and made.clusters[0] == made.clusters[1]


def test_judged_answers_are_compared_within_their_prompt(tmp_path):
    rows = [{"prompt": "a", "completion": t, "label": t == "x"} for t in "xyz"] + [
        {"prompt": "b", "completion": "x", "label": True}
    ]
    made = read_labelled([write(tmp_path, rows)], [], None, 0)
    assert [r.ranks for r in made.rankings] == [(0, 1, 1)]
    assert made.counts == {"prompt without answers of both verdicts": 1}


def test_rewardbench_rows_are_user_turns_with_their_subset(tmp_path):
    one = {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "chat", "id": 3}
    four = {"prompt": "q2", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "math", "num_correct": 1}
    made = read_labelled([write(tmp_path, [one], "one.jsonl"), write(tmp_path, [four], "four.jsonl")], [], None, 0)
    assert [r.prompt.messages[0].role for r in made.rankings] == ["user", "user"]
    assert [r.ranks for r in made.rankings] == [(0, 1), (0, 1, 1, 1)]
    assert [t["subset"] for t in made.tags] == ["chat", "math"] and made.tags[1]["file"].endswith("four.jsonl")


def test_the_command_writes_page_and_numbers(models, tmp_path):
    file, page = write(tmp_path, [*PAIRS, "{"]), tmp_path / "page.html"
    args = ["reward", "evaluate", "-m", models[0], "-m", models[1], "--data", file, "--out", str(page)]
    result = CliRunner().invoke(app, [*args, "--max-bad-rows", "0.1"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "24 pairs of 24 prompts" in result.output and "1 × not JSON" in result.output
    assert (
        "longer wins" in result.output and "subset = a" in result.output and "prefer the same answer" in result.output
    )
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert [len(m["slices"]) for m in numbers["models"]] == [2, 2] and numbers["counts"] == {"not JSON": 1}
    assert numbers["models"][0]["slices"][0]["pairs"] == 12 and numbers["agreements"][0]["first"] == models[0]
    html = page.read_text()
    assert "Calibration" in html and "<script" not in html and "http" not in html.replace("http-equiv", "")
    assert numbers["models"][0]["verdict"][0].replace('"', "&#34;") in html
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 2 and "exists already" in again.output


def test_k_wise_data_brings_rank_correlation(models, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "completions": ["a", "b c", "d e f", "g"], "ranks": [0, 1, 2, 2]} for i in range(3)] + [
        {"prompt": "tie", "completions": ["a", "b"], "ranks": [0, 0]}
    ]
    reward_evaluate.run(models=[models[0]], data=[write(tmp_path, rows)])
    shown = capsys.readouterr().out
    assert "3 rankings: Kendall tau" in shown and "triples in the right order" in shown
    assert "15 pairs of 3 prompts, 3 ties left out" in shown and "1 × all answers tied" in shown


def test_what_does_not_fit_a_model_is_left_out_and_counted(models, tmp_path):
    rows = [*PAIRS[:2], {"prompt": "long " * 600, "chosen": "a", "rejected": "b"}]
    labelled = read_labelled([write(tmp_path, rows)], [], None, 0)
    scored = score(labelled, models, ModelConfig(name=models[0]), MANY, quiet)
    assert len(scored.labelled.rankings) == 2 and scored.labelled.counts["over the 512 tokens of a model"] == 1
    with pytest.raises(DataError, match="no row is left"):
        score(labelled.of([2]), models, ModelConfig(name=models[0]), MANY, quiet)


def test_bad_input_is_refused_in_words(models, tmp_path):
    file = write(tmp_path, PAIRS)
    with pytest.raises(UserError, match="no row has a text or whole number in column 'colour'"):
        read_labelled([file], ["colour"], None, 0)
    with pytest.raises(UserError, match="holds prompts: a reward model is judged on"):
        read_labelled([write(tmp_path, [{"prompt": "a", "answer": "1"}], "p.jsonl")], [], None, 0)
    with pytest.raises(DataError, match="no two answers of different rank"):
        rows = [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}]
        read_labelled([write(tmp_path, rows, "t.jsonl")], [], None, 0)
    with pytest.raises(UserError, match=r"name the page \(.html\)"):
        reward_evaluate.run(models=[models[0]], data=[file], out=str(tmp_path / "x.json"))
    broken = load_scorer(models[0], say=quiet)
    broken.head.weight.data.fill_(float("nan"))
    save_scorer(broken, tmp_path / "broken")
    with pytest.raises(UserError, match=r"rows\.jsonl:"):
        reward_evaluate.run(models=[str(tmp_path / "broken")], data=[file])


def test_reward_alone_still_trains():
    assert "Reward model from pairs" in CliRunner().invoke(app, ["reward", "--help"]).output
    assert "--slice" in CliRunner().invoke(app, ["reward", "evaluate", "--help"]).output


# -- the verdict -------------------------------------------------------------------------------------------------------


def quality(margin, gap, clusters=None):
    pairs = [
        Comparison(question="q", better="b", worse="w", cluster=i if clusters is None else clusters[i])
        for i in range(len(margin))
    ]
    return model_quality("m", pairs, torch.tensor(margin), torch.tensor(gap))


def test_a_model_of_length_is_told_from_one_of_content():
    generator = torch.Generator().manual_seed(0)
    gap = torch.randint(-30, 31, (400,), generator=generator).double()
    length = " ".join(verdict(quality((0.1 * gap).tolist(), gap.tolist())))
    assert "worse than" not in length and 'not surely better than "longer wins" (+0.0 points' in length
    assert "where the better answer is the shorter one it is right in 0.0 %" in length
    content = verdict(quality([1.0] * 300 + [-0.1] * 100, gap.tolist()))
    assert content[0].startswith('it beats "longer wins" by +') and not any(
        "follows length" in line for line in content
    )


def test_intervals_are_by_prompt_and_ties_half():
    alone = quality([1.0, -1.0, 0.0, 2.0] * 10, [1.0] * 40)
    together = quality([1.0, -1.0, 0.0, 2.0] * 10, [1.0] * 40, [i // 4 for i in range(40)])
    assert alone.accuracy.estimate == together.accuracy.estimate == 2.5 / 4 and together.accuracy.n == 10
    assert isinstance(alone.gain, Interval) and alone.gain.estimate == pytest.approx(2.5 / 4 - 1)
    assert alone.equal_scores == 0.25 and alone.chosen_shorter is None
    with pytest.raises(UserError, match="0 pairs"):
        quality([], [])


def test_one_pair_is_enough():
    made = quality([0.5], [3.0])
    assert made.accuracy.n == 1 and made.pairs == 1 and "coin" in verdict(made)[0]
