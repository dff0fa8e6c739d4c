"""``tether reward evaluate``: how far a reward model can be trusted, beside the rules that cost nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tether.config.sections import ModelConfig
from tether.core.errors import UserError
from tether.core.intervals import Interval
from tether.evals.agreement import Agreement, Ensemble, agreements, ensemble
from tether.evals.model_quality import ModelQuality, model_quality, verdict
from tether.evals.ranking_quality import RankingQuality, ranking_quality
from tether.methods import parts
from tether.methods.ensembles import expand
from tether.methods.reward_scores import Pairs, Scored, pairs_of, read_labelled, score
from tether.runs.log import plain

if TYPE_CHECKING:
    from rich.console import Console

TOKENS_PER_MICRO_BATCH = 8192
SHOWN_LEANINGS = 10


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of one or more models on the same pairs. ``rankings[k]`` where the data is K-wise; ``counts``: rows left out."""

    data: tuple[str, ...]
    models: tuple[ModelQuality, ...]
    rankings: tuple[RankingQuality, ...]
    agreements: tuple[Agreement, ...]
    ensemble: Ensemble | None
    counts: dict[str, int]
    ties: int


def run(
    *,
    models: Sequence[str],
    data: Sequence[str],
    slices: Sequence[str] = (),
    out: str | None = None,
    limit: int | None = None,
    max_bad_rows: float = 0.01,
) -> None:
    """Print the table; with ``out`` write the page there, and the numbers beside it as JSON."""
    page = _page(out)
    say = parts.speaker(False)
    # The folder of an ensemble stands for its members: their agreement is what an ensemble lives on.
    models = [member for name in models for member in expand(name, "--model")]
    labelled = read_labelled(data, slices, limit, max_bad_rows)
    scored = score(labelled, models, ModelConfig(name=models[0]), TOKENS_PER_MICRO_BATCH, say)
    found = evaluate(scored, data)
    from rich.console import Console

    _print(Console(highlight=False), found)
    if page is not None:
        from tether.reports.quality import quality_report

        page.write_text(quality_report(**vars(found)), encoding="utf-8")
        numbers = page.with_suffix(".json")
        numbers.write_text(json.dumps(as_data(found), ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"written: {page}, {numbers}")


def _page(out: str | None) -> Path | None:
    if out is None:
        return None
    page = parts.new_file(out)
    if page.suffix == ".json":
        raise UserError(f"--out {out}: name the page (.html); the numbers are written beside it as .json")
    parts.new_file(str(page.with_suffix(".json")))
    return page


def evaluate(scored: Scored, data: Sequence[str]) -> Evaluation:
    """All numbers, from scores."""
    pairs: Pairs = pairs_of(scored)
    labelled, clusters = scored.labelled, pairs.clusters
    tags = [labelled.tags[i] for i in pairs.ranking_of]
    names = _distinct(scored.names)
    k_wise = any(len(r.completions) > 2 for r in labelled.rankings)
    many = len(names) > 1
    return Evaluation(
        data=tuple(data),
        models=tuple(
            model_quality(name, pairs.comparisons, margin, pairs.length_gap, tags=tags)
            for name, margin in zip(names, pairs.margins, strict=True)
        ),
        rankings=tuple(
            ranking_quality([s.tolist() for s in scores], [r.ranks for r in labelled.rankings])
            for scores in (scored.scores if k_wise else ())
        ),
        agreements=agreements(pairs.margins, names, clusters),
        ensemble=ensemble(pairs.margins, clusters) if many else None,
        counts=dict(labelled.counts),
        ties=pairs.ties,
    )


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Numbered where one stands twice."""
    return tuple(f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names, 1))


def as_data(found: Evaluation) -> dict[str, Any]:
    """As JSON: NaN and infinity become null."""
    made = asdict(found)
    for one, quality in zip(made["models"], found.models, strict=True):
        one["verdict"] = verdict(quality)
        one["leanings"] = [
            {**said, "overdone": leaning.overdone}
            for said, leaning in zip(one["leanings"], quality.leanings, strict=True)
        ]
    return plain(made)


# -- printing ----------------------------------------------------------------------------------------------------------


def share(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _print(console: Console, found: Evaluation) -> None:
    from rich.markup import escape

    first = found.models[0]
    left_out = ", ".join(f"{n} × {cause}" for cause, n in found.counts.items())
    console.print(
        f"{first.pairs} pairs of {first.accuracy.n} prompts"
        + (f", {found.ties} ties left out" if found.ties else "")
        + (escape(f"; left out: {left_out}") if left_out else ""),
        soft_wrap=True,
    )
    _print_accuracy(console, found)
    for k, quality in enumerate(found.models):
        if len(found.models) > 1:
            console.print(f"\n[bold]{escape(quality.name)}[/]")
        _print_slices(console, quality)
        _print_leanings(console, quality)
        if found.rankings:
            _print_ranking(console, found.rankings[k])
        for line in verdict(quality):
            console.print(f"· {escape(line)}")
    _print_agreement(console, found)


def _print_accuracy(console: Console, found: Evaluation) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in ("accuracy", "chosen is shorter", "ECE", "Brier", "nll"):
        table.add_column(name, justify="right")
    for q in found.models:
        c = q.calibration
        ece = f"{c.ece.estimate:.3f} [{c.ece.low:.3f}, {c.ece.high:.3f}]"
        table.add_row(escape(q.name), share(q.accuracy), share(q.chosen_shorter), ece, f"{c.brier:.3f}", f"{c.nll:.3f}")
    table.add_section()
    table.add_row("longer wins", share(found.models[0].longer_wins), "0 %", "", "", "")
    table.add_row("random", "50 %", "50 %", "0", "0.250", "0.693")
    console.print(table)


def _print_slices(console: Console, quality: ModelQuality) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Accuracy by slice", title_justify="left")
    table.add_column("slice")
    for name in ("pairs", "model", "longer wins"):
        table.add_column(name, justify="right")
    for s in quality.slices:
        table.add_row(escape(f"{s.column} = {s.value}"), str(s.pairs), share(s.accuracy), share(s.longer_wins))
    if quality.slices:
        table.add_section()
    for g in quality.gaps:
        what = f"chosen − rejected: {g.low:+.0f} to {g.high:+.0f} tokens"
        table.add_row(what, str(g.n), f"{100 * g.accuracy:.1f} %", f"{100 * g.longer_wins:.1f} %")
    console.print(table)


def _print_leanings(console: Console, quality: ModelQuality) -> None:
    from rich.table import Table

    table = Table(title="What scores go with, within pairs", title_justify="left")
    table.add_column("the better answer is / has")
    for name in ("pairs", "by label", "by score", "correlation", "at equal length"):
        table.add_column(name, justify="right")
    for one in quality.leanings[:SHOWN_LEANINGS]:
        table.add_row(
            f"[bold]{one.words}[/]" if one.overdone else one.words,
            f"{100 * one.decides:.0f} %",
            f"{100 * one.people.estimate:.1f} %",
            f"{100 * one.model.estimate:.1f} %",
            f"{one.within:+.2f}",
            "–" if one.partial.estimate != one.partial.estimate else f"{one.partial.estimate:+.2f}",
        )
    console.print(table)


def _print_ranking(console: Console, found: RankingQuality) -> None:
    tau = "–" if found.tau is None else f"{found.tau.estimate:+.3f} [{found.tau.low:+.3f}, {found.tau.high:+.3f}]"
    console.print(
        f"{found.rankings} rankings: Kendall tau {tau}; best answer on top {share(found.top_1)} (by lot "
        f"{100 * found.top_1_chance:.1f} %); triples in the right order {share(found.triples)} (by chance 16.7 %)"
    )


def _print_agreement(console: Console, found: Evaluation) -> None:
    from rich.markup import escape

    for a in found.agreements:
        console.print(
            escape(f"{a.first} and {a.second}") + f" prefer the same answer in {share(a.same)}, correlation "
            f"{a.correlation:+.2f}; both wrong in {100 * a.both_wrong:.1f} % (independent: {100 * a.by_chance:.1f} %)"
        )
    if found.ensemble is not None:
        e = found.ensemble
        console.print(
            f"mean of all: {share(e.accuracy)}; all agree on {100 * e.unanimous:.0f} % of the pairs, right there in "
            f"{share(e.where_unanimous)}, elsewhere in {share(e.elsewhere)}"
        )
