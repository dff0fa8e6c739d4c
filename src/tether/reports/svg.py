"""Figures as inline SVG: coloured by the page's style sheet, so that they follow light and dark; no library needed.

Series differ in colour, marker and dash, never in colour alone. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 290
LETTER = 7.6  # width of a bold letter of a name, on average and amply
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
DASHES = ("", "6 4", "2 3", "8 3 2 3", "1 4", "10 4")


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one thing. ``labels``: words beside points. A NaN breaks the line; ``line=False``: markers only.

    ``hue``: number of its colour, marker and dash; by default its place among the series. ``band``: the lower and the
    upper edge of a strip behind the line, finite, one number of each per point.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    hue: int | None = None
    labels: Sequence[str] = ()
    line: bool = True
    markers: bool = True
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar, and its interval where there is one. ``hue``: number of its colour."""

    name: str
    value: float
    hue: int = 0
    low: float | None = None
    high: float | None = None


def finite(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def span(values: Sequence[float], include: Sequence[float] = ()) -> tuple[float, float]:
    """The range to draw; widened where all values are equal, (0, 1) where there are none."""
    known = finite([*values, *include])
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    return low, high


def words(value: float | None) -> str:
    """A number for people: 4 significant digits, thousands apart, "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.4g}"


def shorten(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def marker(index: int, x: float, y: float, size: float = 4) -> str:
    """Circle, square, triangle, diamond, in turn."""
    kind = index % 4
    common = f'class="m s{index % 6}"'
    if kind == 0:
        return f'<circle {common} cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    if kind == 1:
        return f'<rect {common} x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"/>'
    corners = [(0, -1.25), (1.15, 0.9), (-1.15, 0.9)] if kind == 2 else [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)]
    points = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return f'<polygon {common} points="{points}"/>'


def swatch(index: int) -> str:
    """The key of a legend: line and marker of series ``index``."""
    dash = DASHES[index % len(DASHES)]
    return (
        '<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">'
        f'<line class="l s{index % 6}" x1="1" y1="6" x2="29" y2="6" stroke-dasharray="{dash}"/>'
        f"{marker(index, 15, 6, 3.5)}</svg>"
    )


def _open(title: str, height: float) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>"
    )


def _text(kind: str, x: float, y: float, words_: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words_)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


@dataclass(frozen=True)
class _Axes:
    x0: float
    x1: float
    y0: float
    y1: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        across, up = (x - self.x0) / (self.x1 - self.x0), (y - self.y0) / (self.y1 - self.y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    include_x: Sequence[float] = (),
    include_y: Sequence[float] = (),
    rule: float | None = None,
    diagonal: bool = False,
) -> str:
    """Lines and points over two axes. ``rule``: a horizontal reference line; ``diagonal``: y = x."""
    xs, ys = [v for s in series for v in s.x], [v for s in series for v in s.y]
    ys += [v for s in series for edge in s.band or () for v in edge]
    rules = [] if rule is None else [rule]
    x_ticks = ticks(*span(xs, include_x))
    y_ticks = ticks(*span(ys, [*include_y, *rules]))
    axes = _Axes(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    out = [_open(title, HEIGHT), *_grid(axes, x_ticks, y_ticks, x_label, y_label)]
    if rule is not None:
        out.append(_line("rule", *axes.at(axes.x0, rule), *axes.at(axes.x1, rule)))
    if diagonal:
        low, high = max(axes.x0, axes.y0), min(axes.x1, axes.y1)
        out.append(_line("rule", *axes.at(low, low), *axes.at(high, high)))
    taken: list[tuple[float, float]] = []
    for index, one in enumerate(series):
        out += _draw(axes, index if one.hue is None else one.hue, one, taken)
    return "".join([*out, "</svg>"])


def _grid(axes: _Axes, x_ticks: list[float], y_ticks: list[float], x_label: str, y_label: str) -> list[str]:
    out = []
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in y_ticks:
        y = axes.at(axes.x0, value)[1]
        out += [_line("grid", LEFT, y, right, y), _text("tick", LEFT - 7, y + 4, words(value), "end")]
    for value in x_ticks:
        x = axes.at(value, axes.y0)[0]
        out += [_line("axis", x, bottom, x, bottom + 4), _text("tick", x, bottom + 17, words(value), "middle")]
    out.append(_line("axis", LEFT, bottom, right, bottom))
    out.append(_text("label", (LEFT + right) / 2, HEIGHT - 8, x_label, "middle"))
    turned = f"translate(13 {(TOP + bottom) / 2}) rotate(-90)"
    out.append(f'<text class="label" transform="{turned}" text-anchor="middle">{escape(y_label)}</text>')
    return out


def _draw(axes: _Axes, index: int, one: Series, taken: list[tuple[float, float]]) -> list[str]:
    out, runs, run = [], [], []
    for x, y in zip(one.x, one.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            run.append(axes.at(x, y))
        elif run:
            runs, run = [*runs, run], []
    runs = [r for r in [*runs, run] if r]
    if one.band is not None:
        low, high = ([axes.at(x, y) for x, y in zip(one.x, edge, strict=True)] for edge in one.band)
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*low, *reversed(high)])
        out.append(f'<polygon class="band s{index % 6}" points="{outline}"/>')
    if one.line:
        for piece in runs:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
            dash = DASHES[index % len(DASHES)]
            out.append(f'<polyline class="l s{index % 6}" points="{points}" stroke-dasharray="{dash}"/>')
    if one.markers or not one.line:
        out += [marker(index, x, y) for piece in runs for x, y in piece]
    elif runs:
        # A lone point draws no line, and the last one says where the run stands.
        out.append(marker(index, *runs[-1][-1]))
    for text, x, y in zip(one.labels, one.x, one.y, strict=False):
        if text and math.isfinite(x) and math.isfinite(y):
            out.append(_label(text, *axes.at(x, y), taken))
    return out


def _label(text: str, x: float, y: float, taken: list[tuple[float, float]]) -> str:
    """A word beside a point, moved up or down until it hides no other word."""
    anchor, shift = ("end", -8) if x > WIDTH - RIGHT - 70 else ("start", 8)
    places = [y + 4, y - 9, y + 17, y - 22, y + 30]
    clear = [
        p for p in places if TOP < p < HEIGHT - BOTTOM and all(abs(p - b) > 12 or abs(x - a) > 75 for a, b in taken)
    ]
    place = clear[0] if clear else places[0]
    taken.append((x, place))
    return _text("name", x + shift, place, text, anchor)


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    x_label: str,
    percent: bool = False,
    limits: Sequence[float] = (0.0,),
    rule: float | None = None,
    names: int = 16,
) -> str:
    """Horizontal bars with intervals; ``rule``: a vertical reference line; ``limits``: values the axis must hold;
    ``names``: characters of a name that are shown at most."""
    row, right = 34, 60
    shown = [shorten(bar.name, names) for bar in bars]
    left = max(118.0, 14 + LETTER * max(map(len, shown), default=0))  # the bars give way to long names
    height = TOP + row * max(len(bars), 1) + BOTTOM
    ends = [v for b in bars for v in finite([b.value, b.low, b.high])]
    marks = ticks(*span(ends, [*limits, *([] if rule is None else [rule])]))
    scale = (WIDTH - left - right) / (marks[-1] - marks[0])

    def at(value: float) -> float:
        return left + (value - marks[0]) * scale

    def say(value: float) -> str:
        return f"{100 * value:.0f} %" if percent else words(float(f"{value:.4g}"))

    bottom = height - BOTTOM
    out = [_open(title, height)]
    for value in marks:
        out += [
            _line("grid", at(value), TOP, at(value), bottom),
            _text("tick", at(value), bottom + 17, say(value), "middle"),
        ]
    start = at(min(max(0.0, marks[0]), marks[-1]))
    values = []
    for i, bar in enumerate(bars):
        y, middle = TOP + row * i + 6, TOP + row * (i + 0.5)
        out.append(_text("name", left - 8, middle + 4, shown[i], "end"))
        if not math.isfinite(bar.value):
            continue
        x1, x2 = sorted((start, at(bar.value)))
        place = f'x="{x1:.1f}" y="{y:.1f}" width="{x2 - x1:.1f}" height="{row - 12}"'
        out.append(f'<rect class="bar s{bar.hue % 6}" {place} rx="3"/>')
        tip = x2
        if bar.low is not None and bar.high is not None:
            low, high = at(bar.low), at(bar.high)
            out.append(_line("whisker", low, middle, high, middle))
            out += [_line("whisker", end, middle - 5, end, middle + 5) for end in (low, high)]
            tip = max(tip, high)
        values.append(_text("value", tip + 6, middle + 4, say(bar.value), "start"))
    if rule is not None:
        out.append(_line("rule", at(rule), TOP - 6, at(rule), bottom))
    out += values  # over the rule, which would cross a number out
    out.append(_text("label", (left + WIDTH - right) / 2, height - 8, x_label, "middle"))
    return "".join([*out, "</svg>"])


def stack(parts: Sequence[tuple[str, float]], *, title: str) -> str:
    """One bar cut into shares, in order; the legend names them."""
    total = sum(v for _, v in parts) or 1.0
    out, x = [f'<svg class="stack" viewBox="0 0 {WIDTH} 26" preserveAspectRatio="none" role="img" '
              f'aria-label="{escape(title, quote=True)}"><title>{escape(title)}</title>'], 0.0  # fmt: skip
    for index, (_, value) in enumerate(parts):
        width = WIDTH * value / total
        out.append(f'<rect class="bar s{index % 6}" x="{x:.1f}" y="0" width="{max(width - 1, 0.5):.1f}" height="26"/>')
        x += width
    return "".join([*out, "</svg>"])
