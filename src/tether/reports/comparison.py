"""The page that holds several policies against the one they started from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tether.core.errors import UserError
from tether.reports import svg
from tether.reports.data import Answer, ComparisonReport, PreferenceCurve, Sample
from tether.reports.page import Figure, averaged, duration, number, percent, render, thin, time_figure
from tether.reports.svg import Bar, Series

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Regression:
    """An answer that the gold score likes less than the start's answer to the same question."""

    place: int
    question: str
    policy: str
    change: float


def comparison_report(data: ComparisonReport) -> str:
    """One self-contained HTML page. Raises UserError where the names of the policies do not fit together."""
    names = [p.name for p in data.policies]
    if data.start not in names or len(set(names)) != len(names):
        raise UserError(f"start={data.start!r} must be one of the policies, each named once; got {names}")
    unknown = {a.policy for s in data.samples for a in s.answers} - set(names)
    if unknown:
        raise UserError(f"samples speak of policies that the report does not hold: {sorted(unknown)}")
    worse = regressions(data)
    return render(
        "comparison.html",
        data=data,
        start=next(p for p in data.policies if p.name == data.start),
        others=[p for p in data.policies if p.name != data.start],
        main=[f for f in (_win_rates(data), _lengths(data), _frontier(data), _overoptimisation(data)) if f],
        training=_training(data),
        quality=_quality(data),
        worse=worse,
        worse_by_policy={n: sum(r.policy == n for r in worse) for n in names if n != data.start},
        places={n: i for i, n in enumerate(names)},
        time=time_figure("Time by stage", {s.name: s.seconds for s in data.stages}, "Wall-clock time of each stage."),
        stages=[(s.name, duration(s.seconds), _parts(s.parts)) for s in data.stages],
        total=duration(sum(s.seconds for s in data.stages)),
        memory=f"{data.peak_memory_bytes / 2**30:.2f} GiB",
    )


def _parts(parts: Mapping[str, float]) -> str:
    total = sum(parts.values())
    return (
        ", ".join(f"{n} {100 * v / total:.0f} %" for n, v in sorted(parts.items(), key=lambda p: -p[1]))
        if total
        else ""
    )


def regressions(data: ComparisonReport) -> list[Regression]:
    """Worst first."""
    found = []
    for place, sample in enumerate(data.samples, start=1):
        before = _answer(sample, data.start)
        for answer in sample.answers if before else ():
            if before and answer.policy != data.start and answer.gold < before.gold:
                found.append(
                    Regression(
                        place=place, question=sample.question, policy=answer.policy, change=answer.gold - before.gold
                    )
                )
    return sorted(found, key=lambda r: r.change)


def _answer(sample: Sample, policy: str) -> Answer | None:
    return next((a for a in sample.answers if a.policy == policy), None)


def _hues(data: ComparisonReport) -> dict[str, int]:
    """One colour per policy, in every figure."""
    return {p.name: i for i, p in enumerate(data.policies)}


def _win_rates(data: ComparisonReport) -> Figure | None:
    rated = [(p, p.win_rate) for p in data.policies if p.win_rate is not None]
    if not rated:
        return None
    hues = _hues(data)
    bars = [Bar(name=p.name, hue=hues[p.name], value=w.estimate, low=w.low, high=w.high) for p, w in rated]
    return Figure(
        title=f"Win rate against {data.start}",
        image=svg.bar_chart(
            bars,
            title="; ".join(f"{p.name} {percent(w.estimate)}" for p, w in rated),
            x_label="share of held-out prompts won, ties half",
            percent=True,
            limits=(0.0, 1.0),
            rule=0.5,
        ),
        caption="By the gold score. Whiskers: 95 % interval. The line at 50 % is no better than the start.",
        columns=("policy", "win rate", "low", "high", "prompts", "at equal length"),
        rows=tuple(
            (
                p.name,
                percent(w.estimate, 1),
                percent(w.low, 1),
                percent(w.high, 1),
                w.n,
                percent(p.length_controlled.estimate, 1) if p.length_controlled else None,
            )
            for p, w in rated
        ),
    )


def _frontier(data: ComparisonReport) -> Figure | None:
    """Gold against KL: policies, the paths of the RL runs, and best-of-n on the same axes."""
    hues = _hues(data)
    series: list[Series] = []
    rows: list[tuple[object, ...]] = []
    if data.best_of_n:
        points = data.best_of_n
        x, y = [b.kl_bound for b in points], [b.gold for b in points]
        labels = ["" for _ in points[:-1]] + [f"best of {points[-1].n}"]
        series.append(Series(name="best of n (KL: upper bound)", x=x, y=y, labels=labels, hue=len(hues)))
        rows += [(f"best of {b.n} of {data.start}", b.kl_bound, None, b.gold, b.proxy) for b in points]
    for curve in data.rl:
        known = [(p, p.gold) for p in curve.points if p.gold is not None]
        if known:
            x, y = [p.kl for p, _ in known], [gold for _, gold in known]
            hue = hues.get(curve.name, len(hues) + 1)
            series.append(Series(name=f"{curve.name} during training", x=x, y=y, hue=hue, markers=len(x) <= 12))
            rows += [(f"{curve.name}, step {p.step}", p.kl, None, gold, p.proxy) for p, gold in known]
    drawn = len(series)
    for p in data.policies:
        kl = 0.0 if p.name == data.start and p.kl is None else p.kl
        if kl is not None:
            series.append(Series(name=p.name, x=[kl], y=[p.gold], labels=[p.name], line=False, hue=hues[p.name]))
            rows.append((p.name, kl, p.kl_error, p.gold, p.proxy))
    if len(rows) < 2:
        return None
    shown, note = thin(rows)
    return Figure(
        title="Reward against KL",
        image=svg.line_chart(
            series, title="gold score against KL to the start", x_label="KL to the start (nats)", y_label="gold score"
        ),
        legend=tuple(s.name for s in series[:drawn]),
        hues=tuple(s.hue or 0 for s in series[:drawn]),
        caption="Named points: the policies on held-out prompts. Up is better, left is closer to the start. A policy "
        "below the best-of-n line pays more KL for the same score than sampling n answers and keeping the best.",
        columns=("what", "KL (nats)", "standard error", "gold", "proxy"),
        rows=shown,
        note=note,
    )


def _overoptimisation(data: ComparisonReport) -> Figure | None:
    """Change of gold and proxy since the first measured step over √KL (Gao 2023)."""
    series, rows = [], []
    for curve in data.rl:
        known = [p for p in curve.points if p.gold is not None]
        if len(known) < 2:
            continue
        x = [math.sqrt(max(p.kl, 0.0)) for p in known]
        proxy, gold = [p.proxy - known[0].proxy for p in known], [(p.gold or 0) - (known[0].gold or 0) for p in known]
        series.append(Series(name=f"{curve.name}: proxy (reward model)", x=x, y=proxy))
        series.append(Series(name=f"{curve.name}: gold (judge)", x=x, y=gold))
        rows += [(f"{curve.name}, step {p.step}", *v) for p, *v in zip(known, x, proxy, gold, strict=True)]
    if not series:
        return None
    shown, note = thin(rows)
    return Figure(
        title="Over-optimisation: gold and proxy",
        image=svg.line_chart(
            series,
            title="change of proxy and gold score over the square root of KL",
            x_label="√KL to the start (√nats)",
            y_label="change since the first step",
            include_x=(0.0,),
            rule=0.0,
        ),
        legend=tuple(s.name for s in series),
        caption="The policy is trained on the proxy. Where the proxy goes on rising while gold falls, it learns the "
        "reward model's mistakes. (A KL estimate below 0 is noise and is drawn at 0.)",
        columns=("step", "√KL", "proxy, change", "gold, change"),
        rows=shown,
        note=note,
    )


def _lengths(data: ComparisonReport) -> Figure:
    policies = data.policies
    return Figure(
        title="Length before and after",
        image=svg.bar_chart(
            [Bar(name=p.name, hue=i, value=p.length) for i, p in enumerate(policies)],
            title="; ".join(f"{p.name} {number(p.length)} tokens" for p in policies),
            x_label="mean tokens per answer",
        ),
        caption="Reward models often like length for its own sake; a win that comes with longer answers deserves a "
        "second look at the win rate at equal length.",
        columns=("policy", "mean tokens", "cut at the limit", "distinct-2", "unique answers"),
        rows=tuple(
            (p.name, round(p.length, 1), percent(p.truncated), round(p.distinct_2, 3), percent(p.unique))
            for p in policies
        ),
    )


def _curve(
    name: str, title: str, y_label: str, lines: list[tuple[str, list[float], list[float]]], caption: str
) -> Figure:
    """Lines over the training step, and their table. ``lines``: name, steps, values."""
    series = [Series(name=n, x=a, y=b, markers=False) for n, x, y in lines for a, b in [averaged(x, y)]]
    steps = sorted({int(s) for _, x, _ in lines for s in x})
    columns = {n: dict(zip(x, y, strict=True)) for n, x, y in lines}
    shown, note = thin([(s, *(columns[n].get(s, NAN) for n in columns)) for s in steps])
    return Figure(
        title=f"{name}: {title}",
        image=svg.line_chart(series, title=f"{name}: {title} by step", x_label="step", y_label=y_label),
        legend=tuple(n for n, _, _ in lines) if len(lines) > 1 else (),
        caption=caption,
        columns=("step", *columns),
        rows=shown,
        note=note,
    )


def _training(data: ComparisonReport) -> list[Figure]:
    figures = []
    for run in data.rl:
        steps = [float(p.step) for p in run.points]
        scores = [("proxy", steps, [p.proxy for p in run.points])]
        if any(p.gold is not None for p in run.points):
            known = [p for p in run.points if p.gold is not None]
            scores.append(("gold", [float(p.step) for p in known], [p.gold or 0.0 for p in known]))
        kl, length = [p.kl for p in run.points], [p.length for p in run.points]
        figures += [
            _curve(run.name, "scores", "mean score", scores, "Of the rollouts of each step, before any KL penalty."),
            _curve(run.name, "KL to the start", "nats", [("kl", steps, kl)], "Sampled estimate; it may dip below 0."),
            _curve(run.name, "length", "tokens", [("length", steps, length)], "Mean tokens of the rollouts."),
        ]
    for run in data.preference:
        figures += _preference(run)
    return figures


def _preference(run: PreferenceCurve) -> list[Figure]:
    steps = [float(p.step) for p in run.points]
    first = run.points[0] if run.points else None
    figures = [
        _curve(
            run.name,
            "reward margin",
            "margin (beta × nats)",
            [("margin", steps, [p.margin for p in run.points])],
            "How far the policy prefers chosen to rejected, beyond the start.",
        )
    ]
    if first is not None:
        figures.append(
            _curve(
                run.name,
                "log π of chosen and of rejected",
                "change (nats)",
                [
                    ("chosen", steps, [p.logps_chosen - first.logps_chosen for p in run.points]),
                    ("rejected", steps, [p.logps_rejected - first.logps_rejected for p in run.points]),
                ],
                "Change since the first step, apart. Both may fall while the margin grows; where chosen falls far, "
                "add an NLL term or lower the learning rate.",
            )
        )
    if any(p.accuracy is not None for p in run.points):
        values = [NAN if p.accuracy is None else p.accuracy for p in run.points]
        figures.append(
            _curve(run.name, "pairs ordered right", "share", [("accuracy", steps, values)], "0.5 is chance.")
        )
    return figures


def _quality(data: ComparisonReport) -> list[Figure]:
    quality = data.reward_quality
    if quality is None:
        return []
    curve = quality.calibration
    calibration = Figure(
        title="Reward model: calibration",
        image=svg.line_chart(
            [Series(name="reward model", x=[b.confidence for b in curve], y=[b.accuracy for b in curve])],
            title="accuracy against confidence",
            x_label="confidence σ(|score difference|)",
            y_label="share right",
            include_x=(0.5, 1.0),
            include_y=(0.5, 1.0),
            diagonal=True,
        ),
        caption="On the dashed line a model is as often right as it is sure. "
        f"Expected calibration error {quality.ece:.3f}.",
        columns=("confidence", "share right", "pairs"),
        rows=tuple((b.confidence, b.accuracy, b.n) for b in curve),
    )
    middle = [(b.low + b.high) / 2 for b in quality.by_gap]
    gaps = Figure(
        title="Reward model: accuracy by length gap",
        image=svg.line_chart(
            [
                Series(name="reward model", x=middle, y=[b.accuracy for b in quality.by_gap]),
                Series(name="“longer wins”", x=middle, y=[b.longer_wins for b in quality.by_gap]),
            ],
            title="accuracy by the length gap of chosen and rejected",
            x_label="tokens of chosen − tokens of rejected",
            y_label="share right",
            include_y=(0.0, 1.0),
            rule=0.5,
        ),
        legend=("reward model", "“longer wins”"),
        caption="A reward model that only counts tokens lies on the “longer wins” line.",
        columns=("gap from", "to", "pairs", "reward model", "“longer wins”"),
        rows=tuple((b.low, b.high, b.n, b.accuracy, b.longer_wins) for b in quality.by_gap),
    )
    return [calibration, gaps]
