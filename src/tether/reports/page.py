"""The page around the figures: one file, no script, nothing fetched; every text of a model is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tether.reports import svg

# Longer answers are cut in the page, and the page says so; the run folder has them whole.
TEXT_LIMIT = 3000
TABLE_ROWS = 60


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing, what it says, and the table behind it. ``image`` is SVG made by ``svg``; the rest is plain text.

    ``legend``: names in the order of their colours; ``hues``: their colours, where those are not 0, 1, 2, ...
    """

    title: str
    image: str
    legend: tuple[str, ...] = ()
    hues: tuple[int, ...] = ()
    caption: str = ""
    advice: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    note: str = ""


def render(template: str, **values: Any) -> str:
    """One template of ``templates/`` with autoescape on."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tether.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "score": score,
        "cut": cut,
        "left_out": left_out,
        "time": duration,
    }
    environment.globals |= {"swatch": lambda i: Markup(svg.swatch(i)), "drawn": Markup}
    return environment.get_template(template).render(**values)


def number(value: Any) -> str:
    return svg.words(value) if isinstance(value, (int, float)) else "–" if value is None else str(value)


def score(value: Any) -> str:
    """Two decimals: more would claim more than a score of one answer knows."""
    return f"{value:.2f}" if isinstance(value, (int, float)) else number(value)


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


def cut(text: str) -> str:
    return text[:TEXT_LIMIT]


def left_out(text: str) -> int:
    return max(0, len(text) - TEXT_LIMIT)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def thin(rows: Sequence[tuple[Any, ...]], most: int = TABLE_ROWS) -> tuple[tuple[tuple[Any, ...], ...], str]:
    """Evenly chosen rows, first and last among them, and a sentence that says so."""
    if len(rows) <= most:
        return tuple(rows), ""
    picked = sorted({round(i * (len(rows) - 1) / (most - 1)) for i in range(most)})
    return tuple(
        rows[i] for i in picked
    ), f"{len(picked)} of {len(rows)} rows, evenly chosen; all are in the run folder."


def averaged(x: Sequence[float], y: Sequence[float], most: int = 200) -> tuple[list[float], list[float]]:
    """At most ``most`` points: means of equal stretches, so that no spike hides between two drawn points."""
    if len(x) <= most:
        return list(x), list(y)
    xs, ys = [], []
    for i in range(most):
        piece = range(i * len(x) // most, (i + 1) * len(x) // most)
        known = svg.finite([y[j] for j in piece])
        xs.append(x[piece[-1]])
        ys.append(sum(known) / len(known) if known else float("nan"))
    return xs, ys


def time_figure(title: str, parts: Mapping[str, float], caption: str = "") -> Figure:
    """Where the time went, largest part first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    total = sum(parts.values()) or 1.0
    shown = ordered[:5] + ([("other", sum(v for _, v in ordered[5:]))] if len(ordered) > 5 else [])
    return Figure(
        title=title,
        image=svg.stack(shown, title=", ".join(f"{n} {100 * v / total:.0f} %" for n, v in shown)),
        legend=tuple(f"{name} {100 * seconds / total:.0f} %" for name, seconds in shown),
        caption=caption,
        columns=("part", "time", "share"),
        rows=tuple((name, duration(v), percent(v / total, 1)) for name, v in ordered),
    )
