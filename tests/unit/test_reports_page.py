"""Reports: hostile text comes out literally, nothing is fetched or run, figures and tables say what the data says."""

import dataclasses
import itertools
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from tether.core.errors import UserError
from tether.evals.best_of_n import best_of_n
from tether.evals.reward_quality import reward_quality
from tether.evals.statistics import wilson
from tether.methods import report
from tether.reports import (
    Answer,
    ComparisonReport,
    Policy,
    PreferenceCurve,
    PreferencePoint,
    RLCurve,
    RLPoint,
    Sample,
    Stage,
    comparison_report,
    run_report,
)
from tether.reports.comparison import regressions
from tether.runs.folder import RunFolder
from tether.runs.log import MetricsLog, SamplesLog

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"></p></title>{{ 7 * 7 }} {% raw %} &amp; \' " ]]>'


class Reader(HTMLParser):
    """Collects tags, attributes and text; checks that elements close in order."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_safe(html):
    """One file, no script, nothing fetched; returns the reader."""
    page = Reader(html)
    assert not {"script", "img", "iframe", "link", "object", "embed", "form", "base"} & set(page.tags)
    policy = [v for t, k, v in page.attributes if t == "meta" and k == "content" and "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert not [k for _, k, _ in page.attributes if k.startswith("on")]
    assert all(v.startswith("#") for _, k, v in page.attributes if k in ("src", "href", "xlink:href"))
    assert "url(" not in html and "@import" not in html
    for chart in re.findall(r"<svg class=\"(?:chart|stack)\"[^>]*>", html):
        assert 'role="img"' in chart and re.search(r'aria-label="[^"]+"', chart)
    assert "nan" not in re.sub(r"[^\d\s.,na-]", "", " ".join(v or "" for _, k, v in page.attributes if k == "points"))
    headings = [int(t[1]) for t in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(headings)), "no heading level is skipped"
    assert len(html) < 2_000_000
    return page


def policy(name, **more):
    base = {"gold": 0.5, "length": 40.0, "truncated": 0.1, "distinct_2": 0.8, "unique": 1.0}
    return Policy(name=name, **{**base, **more})


def comparison(**changes):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 16, generator=generator)
    points = tuple(
        RLPoint(step=i, proxy=0.1 * i, gold=None if i == 3 else 0.05 * i, kl=0.5 * i - 0.6, length=40)
        for i in range(1, 9)
    )
    pairs = [torch.randn(40, generator=generator) for _ in range(4)]
    base = ComparisonReport(
        title="A <title>",
        verdict="PPO won & DPO won.",
        start="start",
        judge=("A formula: gold < 3.",),
        policies=(
            policy("start", gold=0.0),
            policy("PPO", gold=1.5, proxy=2.0, kl=6.0, kl_error=0.4, win_rate=wilson(31, 40)),
            policy("DPO", gold=1.25, kl=4.0, win_rate=wilson(29.5, 40), length_controlled=wilson(28, 40)),
        ),
        samples=(
            Sample(
                prompt_id="q1",
                question=HOSTILE,
                answers=(
                    Answer(policy="start", text=HOSTILE, gold=0.5),
                    Answer(policy="PPO", text="better", gold=1.0, proxy=2.0),
                    Answer(policy="DPO", text="worse " * 1000, gold=-0.25, truncated=True),
                ),
            ),
        ),
        stages=(
            Stage(name="PPO", seconds=130.0, parts={"sample": 3.0, "update": 1.0}),
            Stage(name="DPO", seconds=10.0),
        ),
        peak_memory_bytes=3 * 2**30,
        rl=(RLCurve(name="PPO", points=points),),
        preference=(
            PreferenceCurve(
                name="DPO",
                points=tuple(PreferencePoint(step=i, margin=i, logps_chosen=-i, logps_rejected=-2 * i) for i in (1, 2)),
            ),
        ),
        best_of_n=tuple(best_of_n(scores, scores, [1, 2, 16])),
        reward_quality=reward_quality(*pairs),
        environment={"torch": "2"},
        disclosures=("One seed.",),
        next_steps=("tether ppo -c my.yaml",),
    )
    return dataclasses.replace(base, **changes)


def test_the_comparison_shows_hostile_text_literally_and_fetches_nothing():
    html = comparison_report(comparison())
    page = check_safe(html)
    assert sum(HOSTILE in text for text in page.text) == 3, "question, regression and answer"
    assert HOSTILE not in html


def test_the_comparison_says_what_the_data_says():
    html = comparison_report(comparison())
    text = " ".join(" ".join(Reader(html).text).split())
    for words in ("PPO won & DPO won.", "77.5 %", "6 ± 0.4", "best of 16 of start", "√KL", "A formula: gold < 3.",
                  "One seed.", "tether ppo -c my.yaml", "3.00 GiB", "2 min 20 s", "sample 75 %, update 25 %",
                  "3000 more characters left out here", "cut at the limit", "70.0 %"):  # fmt: skip
        assert words in text, words
    figures = re.findall(r"<figure>.*?</figure>", html, re.S)
    assert len(figures) == 12
    assert all("<table>" in f and "<figcaption>" in f for f in figures), "a table behind every figure"


def test_regressions_are_listed_worst_first():
    worse = regressions(comparison())
    assert [(r.policy, r.change, r.place) for r in worse] == [("DPO", -0.75, 1)]
    html = comparison_report(comparison())
    assert "▼ worse" in html and "▲ better" in html and 'href="#sample-1"' in html and 'id="sample-1"' in html


def test_a_bare_comparison_works():
    bare = comparison(rl=(), preference=(), best_of_n=(), reward_quality=None, samples=(), policies=(policy("start"),))
    page = check_safe(comparison_report(bare))
    assert "No samples were kept." in " ".join(page.text)


def test_names_must_fit_together():
    with pytest.raises(UserError, match="must be one of the policies"):
        comparison_report(comparison(start="nobody"))
    with pytest.raises(UserError, match=r"\['DPO'\]"):
        comparison_report(comparison(policies=(policy("start"), policy("PPO"))))


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "my run"
    with RunFolder.create(path, config_yaml="method: rl # <b>\n", method="rl", resume=False) as folder:
        metrics, samples = MetricsLog(folder.metrics), SamplesLog(folder.samples)
        for step in range(1, 301):
            values = {
                "reward/mean": step / 100,
                "kl/reference": 2.0,
                "loss": 0.0,
                "grad_norm": math.nan if step < 4 else 1.0,
                "<b>odd</b>": 1.0,
                "memory/peak_gib": 1 + step / 300,
                "time/sample": 3.0,
                "time/update": 1.0,
            }
            metrics.append(step, "train", values)
        metrics.append(300, "eval", {"reward/mean": 2.5})
        for step in (1, 300):
            for k in range(20):
                row = {"question": HOSTILE, "completion": HOSTILE, "reward": k, "finish_reason": "length", "tokens": 5}
                samples.append(step, "train", row)
        metrics.close()
        samples.close()
    return path


def test_a_run_report(run):
    html = run_report(run)
    page = check_safe(html)
    text = " ".join(" ".join(page.text).split())
    for words in ("held-out mean reward is 2.5", "at 2 nats of KL from the reference", "stands at step 300",
                  "grad_norm was not a finite number in 3 of 300 rows", "sample 75 %", "2.00 GiB", "<b>odd</b>",
                  "method: rl # <b>", "Step 300", "60 of 300 rows", "Healthy", "reward 19.00"):  # fmt: skip
        assert words in text, words
    assert sum(HOSTILE in piece for piece in page.text) == 2 * 2 * 8
    figures = re.findall(r"<figure>.*?</figure>", html, re.S)
    assert len(figures) == 6 and all("<table>" in f for f in figures)
    assert html.index("<h3>reward/mean") < html.index("<h3>kl/reference") < html.index("<h3>loss"), "the surrogate last"


def test_the_report_is_written_beside_the_run_or_where_asked(run, tmp_path):
    assert report.run(run) == run / "report.html" and "reward/mean" in (run / "report.html").read_text()
    assert report.run(run, tmp_path / "x.html") == tmp_path / "x.html"
    with pytest.raises(UserError, match="make it first"):
        report.run(run, tmp_path / "none" / "x.html")
    with pytest.raises(UserError, match="not a run folder"):
        report.run(tmp_path)


def test_a_torn_log_and_a_run_without_steps_are_said(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30')
    assert "the last line is torn" in run_report(run)
    (run / "metrics.jsonl").write_text("")
    (run / "samples.jsonl").unlink()
    assert "No step has been recorded yet." in check_safe(run_report(run)).text
