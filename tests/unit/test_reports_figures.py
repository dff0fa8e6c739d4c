"""Figures and verdicts: points stand where the numbers say, round ticks, no claim beyond the noise."""

import itertools
import random
import re

import pytest

from tether.reports import svg
from tether.reports.page import averaged, duration, number, percent, thin, time_figure
from tether.reports.svg import Bar, Series
from tether.reports.verdict import verdict


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.9, [0, 0.5, 1]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
    ],
)
def test_ticks_are_round_and_cover(low, high, wanted):
    assert svg.ticks(low, high) == pytest.approx(wanted)


def test_ticks_cover_any_range():
    chance = random.Random(0)
    for _ in range(500):
        low = chance.uniform(-1, 1) * 10 ** chance.randint(-20, 6)
        high = low + chance.uniform(0.01, 1) * 10 ** chance.randint(-20, 6)
        made = svg.ticks(*svg.span([low, high]))
        slack = 1e-8 * (high - low)
        assert made[0] <= low + slack and made[-1] >= high - slack and 2 <= len(made) <= 8


def test_points_stand_where_the_numbers_say():
    chart = svg.line_chart([Series(name="a", x=[0, 5, 10], y=[0, 1, 0.5])], title="t", x_label="x", y_label="y")
    points = re.search(r'<polyline[^>]* points="([^"]+)"', chart)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in points[1].split())
    assert x0 == svg.LEFT and x2 == svg.WIDTH - svg.RIGHT and x1 == pytest.approx((x0 + x2) / 2)
    assert y0 == svg.HEIGHT - svg.BOTTOM and y1 == svg.TOP and y2 == pytest.approx((y0 + y1) / 2)


def test_a_gap_breaks_the_line_and_nothing_is_drawn_for_nan():
    nan = float("nan")
    chart = svg.line_chart([Series(name="a", x=[1, 2, 3, 4], y=[1, nan, 3, 4])], title="t", x_label="x", y_label="y")
    assert chart.count("<polyline") == 2 and "nan" not in chart
    empty = svg.line_chart([Series(name="a", x=[1], y=[nan])], title="t", x_label="x", y_label="y")
    assert "<polyline" not in empty and "nan" not in empty


def test_bars_have_the_length_of_their_value():
    chart = svg.bar_chart([Bar(name="a" * 30, value=0.5, low=0.4, high=0.6), Bar(name="b", value=1.0)],
                          title="t", x_label="x", percent=True, limits=(0, 1), rule=0.5)  # fmt: skip
    widths = [float(w) for w in re.findall(r'<rect class="bar[^>]* width="([\d.]+)"', chart)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2) and "50 %" in chart and "a" * 15 + "…" in chart
    assert chart.index('class="rule"') < chart.index(">50 %</text>", chart.index("<rect")), "no number is crossed out"
    below = svg.bar_chart([Bar(name="a", value=-2.0), Bar(name="b", value=float("nan"))], title="t", x_label="x")
    assert below.count("<rect") == 1 and 'width="-' not in below


def test_the_bars_give_way_to_long_names():
    def drawn(name: str) -> tuple[float, float]:
        chart = svg.bar_chart([Bar(name=name, value=1.0)], title="t", x_label="x", names=25)
        assert f">{name}</text>" in chart
        end = re.search(r'<text class="name" x="([\d.]+)"', chart)
        bar = re.search(r'<rect class="bar[^>]* x="([\d.]+)"', chart)
        assert end and bar
        return float(end[1]), float(bar[1])

    short, long = drawn("a"), drawn("agreement with an opinion")
    assert short == (110, 118) and long[0] >= 25 * 7.5 and long[1] - long[0] == pytest.approx(8, abs=0.11)


def test_labels_of_near_points_do_not_hide_each_other():
    series = [Series(name=n, x=[1.0 + i / 1000], y=[1.0], labels=[n], line=False) for i, n in enumerate("abc")]
    chart = svg.line_chart([*series, Series(name="z", x=[0, 2], y=[0, 2])], title="t", x_label="x", y_label="y")
    heights = [float(y) for y in re.findall(r'<text class="name" x="[\d.]+" y="([\d.]+)"', chart)]
    assert len(heights) == 3 and all(abs(a - b) > 12 for a, b in itertools.combinations(heights, 2))


def test_text_in_figures_is_escaped():
    chart = svg.line_chart(
        [Series(name="<a>", x=[1], y=[1], labels=["<b>"])], title='"<c>', x_label="<d>", y_label="<e>"
    )
    assert not re.search(r"<[abcde]>", chart) and "&lt;b&gt;" in chart and 'aria-label="&quot;&lt;c&gt;"' in chart
    assert "<x>" not in svg.bar_chart([Bar(name="<x>", value=1)], title="<x>", x_label="<x>")
    assert "<x>" not in svg.stack([("<x>", 1.0)], title="<x>")


def test_words_for_numbers():
    assert [number(v) for v in (None, float("nan"), 3.0, 0.123456, 12345, "x")] == [
        "–",
        "–",
        "3",
        "0.1235",
        "12\u202f345",
        "x",
    ]
    assert percent(0.125, 1) == "12.5 %" and percent(None) == "–" and percent(float("nan")) == "–"
    assert [duration(s) for s in (1.25, 61, 7260)] == ["1.2 s", "1 min 01 s", "2 h 01 min"]


def test_thinning_keeps_the_ends_and_says_so():
    rows, note = thin([(i,) for i in range(1000)], 10)
    assert len(rows) == 10 and rows[0] == (0,) and rows[-1] == (999,) and note.startswith("10 of 1000 rows")
    assert thin([(1,)]) == (((1,),), "")


def test_averaging_keeps_the_mean_and_skips_gaps():
    x, y = averaged(range(1000), [float(i) for i in range(1000)])
    assert len(x) == 200 and x[-1] == 999 and sum(y) / 200 == pytest.approx(499.5)
    values = [1.0] * 400
    values[:2] = [float("nan")] * 2
    _, y = averaged(range(400), values)
    assert y[0] != y[0] and y[1:] == [1.0] * 199


def test_small_parts_of_the_time_are_put_together():
    figure = time_figure("t", {f"p{i}": 10.0 - i for i in range(8)})
    assert len(figure.legend) == 6 and figure.legend[-1].startswith("other 23") and len(figure.rows) == 8


def columns(**values):
    return {n.replace("__", "/"): (list(range(1, len(v) + 1)), v) for n, v in values.items()}


def test_verdict_names_a_clear_change():
    said = verdict("rl", True, columns(reward__mean=[i / 10 for i in range(20)], kl__reference=[3.0] * 20), {})
    assert said == (
        "Over 20 steps the mean reward rose from 0.15 to 1.75 (means of the first and the last fifth), "
        "at 3 nats of KL from the reference."
    )


def test_verdict_does_not_call_noise_progress():
    chance = random.Random(1)
    noise = [chance.gauss(0, 1) for _ in range(50)]
    assert "did not change clearly" in verdict("rl", True, columns(reward__mean=noise), {})


def test_verdict_prefers_held_out_numbers_and_says_when_worse():
    train = columns(loss=[3.0, 2.0, 1.0])
    said = verdict("sft", False, train, columns(loss=[2.0, 2.5]))
    assert "held-out loss rose from 2 to 2.5, which is worse" in said and "not finished: it stands at step 3" in said
    assert "loss went from 3 to 1; so few steps do not tell" in verdict("sft", True, train, {})
    steady = columns(loss=[3.0 - i / 10 for i in range(10)])
    assert "loss fell from 2.95 to 2.15 (means of" in verdict("sft", True, steady, {})


def test_verdict_warns_of_cut_completions():
    train = columns(reward__mean=[1.0, 2.0], rollout__truncated=[0.2, 0.8])
    assert "More than half of the last completions were cut" in verdict("rl", True, train, {})
