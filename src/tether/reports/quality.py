"""The page of ``tether reward evaluate``: accuracy, calibration, slices, and what the scores lean on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tether.evals.model_quality import ModelQuality, verdict
from tether.reports import svg
from tether.reports.page import Figure, percent, render
from tether.reports.svg import Bar, Series

if TYPE_CHECKING:
    from tether.core.intervals import Interval
    from tether.evals.agreement import Agreement, Ensemble
    from tether.evals.ranking_quality import RankingQuality

SHOWN_SLICES = 24
SHOWN_LEANINGS = 10
NAMES = 25  # characters of a slice or feature


def quality_report(
    *,
    data: Sequence[str],
    models: Sequence[ModelQuality],
    rankings: Sequence[RankingQuality],
    agreements: Sequence[Agreement],
    ensemble: Ensemble | None,
    counts: Mapping[str, int],
    ties: int,
) -> str:
    """One self-contained HTML page."""
    figures = [_accuracy(models, ensemble), _calibration(models), _gaps(models)]
    # Like beside like: figures of one height leave no holes in the page.
    figures += [figure for quality in models for figure in _slices(quality)]
    figures += [_leanings(quality) for quality in models]
    return render(
        "quality.html",
        data=data,
        pairs=models[0].pairs,
        prompts=models[0].accuracy.n,
        ties=ties,
        counts=counts,
        verdicts=[(q.name, verdict(q)) for q in models],
        figures=figures,
        tables=[*_rankings(models, rankings), *_agreements(agreements, ensemble)],
    )


def share(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    ends = f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f"{percent(interval.estimate, 1)} {ends}"


def _bar(name: str, interval: Interval, hue: int) -> Bar:
    return Bar(name=name, value=interval.estimate, low=interval.low, high=interval.high, hue=hue)


def _accuracy(models: Sequence[ModelQuality], ensemble: Ensemble | None) -> Figure:
    bars = [_bar(q.name, q.accuracy, i) for i, q in enumerate(models)]
    rows = [(q.name, share(q.accuracy), share(q.chosen_shorter), share(q.gain)) for q in models]
    if ensemble is not None:
        bars.append(_bar("mean of all", ensemble.accuracy, len(models)))
        rows.append(("mean of all", share(ensemble.accuracy), "–", "–"))
    bars.append(_bar("longer wins", models[0].longer_wins, 5))
    rows.append(("longer wins", share(models[0].longer_wins), "0 %", "–"))
    return Figure(
        title="Accuracy",
        image=svg.bar_chart(bars, title="share of pairs in the right order", x_label="right", percent=True, rule=0.5),
        caption="Dashed: a coin. Intervals: 95 %, by prompt.",
        columns=("", "accuracy", "where the better answer is shorter", "more than “longer wins”"),
        rows=tuple(rows),
    )


def _calibration(models: Sequence[ModelQuality]) -> Figure:
    series = [
        Series(name=q.name, x=[b.confidence for b in q.calibration.bins], y=[b.accuracy for b in q.calibration.bins])
        for q in models
    ]
    return Figure(
        title="Calibration",
        image=svg.line_chart(
            series,
            title="share right against confidence",
            x_label="confidence σ(|score difference|)",
            y_label="share right",
            include_x=(0.5, 1.0),
            include_y=(0.5, 1.0),
            diagonal=True,
        ),
        legend=tuple(q.name for q in models),
        caption="On the dashed line a model is as often right as it is sure; below it, it is too sure. Each point "
        "holds about as many pairs as the next.",
        columns=("", "ECE", "from", "to", "by chance up to", "Brier", "nll", "best temperature", "nll there"),
        rows=tuple(
            (
                q.name,
                *(f"{v:.3f}" for v in (ece.estimate, ece.low, ece.high, c.by_chance, c.brier, c.nll)),
                svg.words(c.temperature),
                f"{c.nll_scaled:.3f}",
            )
            for q in models
            for c in [q.calibration]
            for ece in [c.ece]
        ),
    )


def _gaps(models: Sequence[ModelQuality]) -> Figure:
    gaps = models[0].gaps
    middle = [(b.low + b.high) / 2 for b in gaps]
    series = [Series(name=q.name, x=middle, y=[b.accuracy for b in q.gaps]) for q in models]
    longer = Series(name="“longer wins”", x=middle, y=[b.longer_wins for b in gaps], hue=5)
    return Figure(
        title="Accuracy by length gap",
        image=svg.line_chart(
            [*series, longer],
            title="accuracy by the length gap of chosen and rejected",
            x_label="tokens of chosen − tokens of rejected",
            y_label="share right",
            include_y=(0.0, 1.0),
            rule=0.5,
        ),
        legend=(*(q.name for q in models), "“longer wins”"),
        hues=(*range(len(models)), 5),
        caption="A reward model that only counts tokens lies on the “longer wins” line.",
        columns=("gap from", "to", "pairs", *(q.name for q in models), "“longer wins”"),
        rows=tuple(
            (g.low, g.high, g.n, *(percent(q.gaps[i].accuracy, 1) for q in models), percent(g.longer_wins, 1))
            for i, g in enumerate(gaps)
        ),
    )


def _slices(quality: ModelQuality) -> list[Figure]:
    if not quality.slices:
        return []
    shown = quality.slices[:SHOWN_SLICES]
    return [
        Figure(
            title=f"{quality.name}: accuracy by slice",
            image=svg.bar_chart(
                [_bar(s.value, s.accuracy, 0) for s in shown],
                title="accuracy by slice",
                x_label="right",
                percent=True,
                rule=0.5,
                names=NAMES,
            ),
            caption="" if len(shown) == len(quality.slices) else f"{len(shown)} of {len(quality.slices)} slices.",
            columns=("column", "value", "pairs", "model", "“longer wins”"),
            rows=tuple((s.column, s.value, s.pairs, share(s.accuracy), share(s.longer_wins)) for s in quality.slices),
        )
    ]


def _leanings(quality: ModelQuality) -> Figure:
    shown = quality.leanings[:SHOWN_LEANINGS]
    bars = [bar for one in shown for bar in (_bar(one.feature, one.model, 0), _bar("label", one.people, 1))]
    return Figure(
        title=f"{quality.name}: what its scores lean on",
        image=svg.bar_chart(
            bars,
            title="how often the better answer has more of it",
            x_label="the better answer has more",
            percent=True,
            limits=(0.0, 1.0),
            rule=0.5,
            names=NAMES,
        ),
        legend=("by score", "by label"),
        caption="Of the pairs whose two answers differ in it. Where the score goes further than the labels, a policy "
        "that is optimised against it goes further still.",
        columns=(
            "feature",
            "the better answer has / is",
            "pairs",
            "by label",
            "by score",
            "correlation",
            "at equal length",
            "overdone",
        ),
        rows=tuple(
            (
                one.feature,
                one.words,
                percent(one.decides),
                share(one.people),
                share(one.model),
                f"{one.within:+.2f}",
                "–" if one.partial.estimate != one.partial.estimate else f"{one.partial.estimate:+.2f}",
                "yes" if one.overdone else "",
            )
            for one in quality.leanings
        ),
    )


Table = tuple[str, str, tuple[str, ...], tuple[tuple[str, ...], ...]]


def _rankings(models: Sequence[ModelQuality], rankings: Sequence[RankingQuality]) -> list[Table]:
    if not rankings:
        return []
    rows = tuple(
        (q.name, "–" if r.tau is None else f"{r.tau.estimate:+.3f}", share(r.top_1), share(r.triples))
        for q, r in zip(models, rankings, strict=True)
    )
    lot = percent(rankings[0].top_1_chance, 1)
    words = (
        f"{rankings[0].rankings} rankings. By lot the best answer is on top in {lot}, and a triple in order in 16.7 %."
    )
    return [("Rankings", words, ("", "Kendall τ", "best answer on top", "triples in order"), rows)]


def _agreements(agreements: Sequence[Agreement], ensemble: Ensemble | None) -> list[Table]:
    if ensemble is None:
        return []
    rows = tuple(
        (
            f"{a.first} / {a.second}",
            share(a.same),
            f"{a.correlation:+.2f}",
            percent(a.both_wrong, 1),
            percent(a.by_chance, 1),
        )
        for a in agreements
    )
    words = (
        f"All agree on {percent(ensemble.unanimous)} of the pairs and are right there in "
        f"{share(ensemble.where_unanimous)}; elsewhere their mean is right in {share(ensemble.elsewhere)}."
    )
    columns = ("", "prefer the same answer", "correlation", "both wrong", "if independent")
    return [("Agreement", words, columns, rows)]
