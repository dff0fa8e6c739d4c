"""The numbers as a table for the terminal and as RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.machine import BUSY
from benchmarks.measures import Ratio, in_words, paired_ratio

COLUMNS = (
    "work", "against", "Tether", "rival", "ratio (spread)", "wanted", "default settings", "tokens/s", "of the ceiling",
    "peak memory",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |"
RULE = "|---|---|" + "---:|" * 8

READING = f"""How to read it. A ratio is rival / Tether within one pair of steps, one process each, taken in
alternating order; given are the median over the pairs and (smallest–largest). Seconds are medians, and
mean nothing across rows or machines. A row whose sides do not agree on loss and gradient (of sampling:
on the log-probs of the same tokens) is **void** and not timed. *Default settings*: the ratio against
TRL as it comes (bfloat16, activation checkpointing), Tether in bfloat16 beside it (`optim.autocast`,
`sampling.autocast`). *Tokens/s*: Tether / rival, useful tokens: every prompt once and every completion,
the same number for both; of sampling, drawn tokens. *Of the ceiling*: operations that the useful tokens
need, attention to what they see included, against a float32 matrix product measured between the pairs;
of drawing (behind the slash, where a step does both), the floor of its steps (all weights read once, or
all rows computed, whichever takes longer) against the time they took. *Peak memory*: Tether / rival,
each process's high-water mark over the timed steps. A row is marked † where other processes took more
than {BUSY:.0%} of a core during its pairs, and ‡ where the two sides together nearly filled the memory, so
that both gave free memory back between their steps."""


def page(raw: Mapping[str, Any], order: Sequence[str]) -> str:
    """RESULTS.md."""
    lines = ["# Benchmarks: results", "", "This file is generated; README.md beside it says what is measured.", ""]
    if raw["rows"]:
        lines += [*table(raw["rows"], order), "", READING, "", "## Agreement", ""]
        lines += list(_agreements(raw["rows"], order))
        lines += ["", "## How it was run", "", *_about(row["about"] for row in raw["rows"].values())]
    if raw["growth"]:
        lines += ["", "## How cost grows", "", *_growth(raw["growth"])]
    if raw["losses"]:
        lines += ["", "## What losses cost", "", *_losses(raw["losses"])]
    if raw["scoring"]:
        lines += ["", "## What scoring costs", "", *_scoring(raw["scoring"])]
    return "\n".join(lines) + "\n"


def table(rows: Mapping[str, Any], order: Sequence[str]) -> list[str]:
    return [HEADER, RULE, *(_row(rows[name]) for name in order if name in rows)]


def _row(row: Mapping[str, Any]) -> str:
    best = row["best"]
    title = row["title"] + (f" ({row['model']})" if row["model"] != "smollm2-135m" else "")
    wanted = f"{row['target']:.1f}" if row["target"] else ""
    if best["void"]:
        return f"| {title} | {best['rival']} | | | **void**: {best['void']} | {wanted} | | | | |"
    ours, theirs = (median(pair[i] for pair in best["pairs"]) for i in (0, 1))
    tokens = best["tokens"]["decoded" if row["kind"] == "sampling" else "useful"]
    mine, other = (best["peak"][side] / 2**30 for side in ("ours", "theirs"))
    cells = [
        title + marks(best),
        best["rival"],
        f"{ours:.2f} s",
        f"{theirs:.2f} s",
        spread(paired_ratio(best["pairs"])),
        wanted,
        _default(row),
        f"{tokens / ours:.0f} / {tokens / theirs:.0f}",
        shares(row, ours),
        f"{mine:.1f} / {other:.1f} GiB ({mine / other:.2f})",
    ]
    return "| " + " | ".join(cells) + " |"


def marks(best: Mapping[str, Any]) -> str:
    return (" †" if max(best["load"]) > BUSY else "") + (" ‡" if best["gave_memory_back"] else "")


def spread(ratio: Ratio) -> str:
    if ratio.pairs == 1:
        return f"{ratio.middle:.2f} (one pair)"
    return f"**{ratio.middle:.2f}** ({ratio.low:.2f}–{ratio.high:.2f})"


def _default(row: Mapping[str, Any]) -> str:
    found = row.get("default")
    if found is None:
        return ""
    return f"void: {found['void']}" if found["void"] else spread(paired_ratio(found["pairs"]))


def shares(row: Mapping[str, Any], seconds: float) -> str:
    """Of the ceiling: of the matrix product for training; for drawing the floor of its steps over the time."""
    best = row["best"]
    flops, bandwidth = (median(pair[i] for pair in best["ceilings"]) for i in (0, 1))
    drawing = median(best["drawing"]) if best["drawing"] else seconds if row["kind"] == "sampling" else 0.0
    found = [best["operations"]["training"] / flops / (seconds - drawing)] if seconds > drawing else []
    found += [decode_floor(best, flops, bandwidth) / drawing] if drawing else []
    return " / ".join(f"{share:.0%}" for share in found)


def decode_floor(best: Mapping[str, Any], flops: float, bandwidth: float) -> float:
    """Seconds that the steps need at the least: to read all weights in each, or to compute all rows."""
    return max(best["tokens"]["steps"] * best["weight_bytes"] / bandwidth, best["operations"]["drawing"] / flops)


def _agreements(rows: Mapping[str, Any], order: Sequence[str]) -> Iterator[str]:
    for name in order:
        for column in ("best", "default"):
            found = rows.get(name, {}).get(column)
            if found and "agreement" in found:
                yield f"- `{name}`, {found['rival']}: {found['agreement']['said']}"


def _about(entries: Any) -> list[str]:
    """Each different way in which rows were run, once."""
    lines: list[str] = []
    for entry in entries:
        settings = " ".join(f"{name}={value}" for name, value in entry["settings"].items())
        versions = "; ".join(
            f"{side}: " + ", ".join(f"{n} {v}" for n, v in found.items()) for side, found in entry["versions"].items()
        )
        line = f"- `{entry['command']}`, {entry['date']}, on {entry['machine']}. {versions}. Every arm: `{settings}`."
        if entry["busy"]:
            line += f" **Not a quiet machine: {entry['busy']}.**"
        if line not in lines:
            lines.append(line)
    return lines


def _growth(curves: Mapping[str, Any]) -> Iterator[str]:
    for curve in curves.values():
        yield f"**{curve['title']}**: {in_words(curve['slope'])}."
        if curve["expected"]:
            yield f"By the count of operations the exponent is {curve['expected']:.2f}."
        yield f"\n| {curve['size']} | seconds a step | useful tokens/s |\n|---:|---:|---:|"
        for point in curve["points"]:
            yield f"| {point['label']} | {point['seconds']:.2f} | {point['tokens'] / point['seconds']:.0f} |"
        yield ""
    yield "Medians of Tether alone; a slope is fitted to the logarithms by least squares.\n"
    yield from _about(curve["about"] for curve in curves.values())


def _losses(found: Mapping[str, Any]) -> Iterator[str]:
    worst = sorted(found["shares"].items(), key=lambda item: -item[1])
    yield f"Loss and gradient by the outputs, as a share of {found['step']} ({found['seconds']:.2f} s):\n"
    yield ", ".join(f"{name} {100 * value:.2f} %" for name, value in worst) + ".\n"
    yield from _about([found["about"]])


def _scoring(found: Mapping[str, Any]) -> Iterator[str]:
    ratios = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
    yield f"A reward model scores 1,000 completions of 100 prompts ({found['tokens']} tokens, prompts counted once) in"
    yield f"**{median(found['ratios']):.2f}** times the packed forward pass alone ({found['seconds']:.1f} s)."
    yield f"Pairs: {ratios}.\n"
    yield from _about([found["about"]])
