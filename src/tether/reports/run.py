"""The page of one run: verdict, curves, samples, time, memory, config."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tether.core.errors import UserError
from tether.reports import svg
from tether.reports.before_after import changes
from tether.reports.page import Figure, averaged, number, render, thin, time_figure
from tether.reports.svg import Series
from tether.reports.verdict import verdict
from tether.runs import glossary
from tether.runs.log import read_lines
from tether.runs.throughput import CEILING, of_steps

# Shown first, in this order, where the run has them. The surrogate loss of policy gradients is not among them.
HEADLINE = (
    "reward/mean", "reward/gold", "kl/reference", "rollout/length", "rollout/truncated", "policy/entropy",
    "groups/zero_variance", "rewards/margins", "rewards/accuracies", "logps/chosen", "accuracy", "margin",
)  # fmt: skip
# Read together, drawn together.
TOGETHER = {
    "reward/gold": ("reward/gold", "reward/proxy"),
    "logps/chosen": ("logps/chosen", "logps/rejected"),
    "rewards/chosen": ("rewards/chosen", "rewards/rejected"),
    "scores/chosen": ("scores/chosen", "scores/rejected"),
    "policy/clip_low": ("policy/clip_low", "policy/clip_high"),
}
SAMPLES_PER_SIDE = 8
# What the ends of a metric's interval are called.
ENDS = ("/low", "/high")
CLOCKED = ("time/", "throughput/")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read. ``train`` and ``held_out``: metric -> (steps, values), NaN where a row has null."""

    name: str
    method: str
    finished: bool
    config: str
    environment: dict[str, Any]
    train: dict[str, tuple[list[float], list[float]]]
    held_out: dict[str, tuple[list[float], list[float]]]
    samples: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        return int(max((x[-1] for x, _ in self.train.values() if x), default=0))


def read_run(folder: Path) -> Run:
    """Raises UserError where ``folder`` is no run folder, DataError where a log is damaged."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder (it has no config.yaml); give the folder of a run")
    metrics, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/environment.json can't be read: {error}") from error
    return Run(
        name=folder.resolve().name,
        method=str(environment.get("method", "run")),
        finished=(folder / "final").is_dir(),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        environment=environment,
        train=_columns(r for r in metrics.rows if r.get("split") == "train"),
        held_out=_columns(r for r in metrics.rows if r.get("split") != "train"),
        samples=samples.rows,
        notes=metrics.notes + samples.notes,
    )


def _columns(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.get("values", {}).items():
            if value is None or isinstance(value, (int, float)):
                steps, values = columns.setdefault(name.removeprefix("eval/"), ([], []))
                steps.append(float(row["step"]))
                values.append(float("nan") if value is None else float(value))
    return columns


def run_report(folder: Path) -> str:
    """One self-contained HTML page about the run in ``folder``; a run that still goes on can be reported, too."""
    run = read_run(Path(folder))
    figures = _figures(run)
    whole = of_steps(_clocked(run))
    seconds = whole.seconds
    memory = [m for n, (_, v) in run.train.items() if n.startswith("memory/") for m in svg.finite(v)]
    first, last = _samples(run.samples)
    found = changes(run.held_out)
    told = [verdict(run.method, run.finished, run.train, run.held_out), *(one.sentence for one in found)]
    return render(
        "run.html",
        run=run,
        verdict=" ".join(told),
        changes=found,
        notes=[*run.notes, *_unfinite(run)],
        headline=[f for leads, f in figures if leads],
        rest=[f for leads, f in figures if not leads],
        first=first,
        last=last,
        time=time_figure("Time by part", seconds, "Of the training steps, wall clock.") if seconds else None,
        throughput=whole.line(max(memory)) if seconds and memory else None,
        memory=f"{max(memory):.2f} GiB" if memory else None,
        facts=_facts(run.environment),
    )


def _clocked(run: Run) -> dict[float, dict[str, float]]:
    """step -> what the clock said of it."""
    steps: dict[float, dict[str, float]] = {}
    for name, (at, values) in run.train.items():
        if name.startswith(CLOCKED):
            for step, value in zip(at, values, strict=True):
                if math.isfinite(value):
                    steps.setdefault(step, {})[name] = value
    return steps


def _unfinite(run: Run) -> list[str]:
    """Metrics that were NaN or infinite in some rows: said, because a line only shows a gap."""
    return [
        f"{name} was not a finite number in {sum(map(math.isnan, values))} of {len(values)} rows"
        for name, (_, values) in run.train.items()
        if any(map(math.isnan, values))
    ]


def _figures(run: Run) -> list[tuple[bool, Figure]]:
    """(is it a headline, figure), headlines first, in their order."""
    ends = {f"{n}{end}" for n in run.held_out for end in ENDS if f"{n}{end}" in run.held_out}
    leading = [n for n in run.held_out if n.startswith("pass@") and n not in ends]
    leading += [n for n in HEADLINE if n in run.train or n in run.held_out]
    if run.method != "rl" and "loss" in run.train | run.held_out:
        leading.insert(0, "loss")
    names = leading + [n for n in {**run.train, **run.held_out} if n not in leading]
    drawn: set[str] = set(ends)  # an interval is drawn around its metric
    figures = []
    for name in names:
        if name in drawn or name.startswith(("time/", "memory/", CEILING)):
            continue
        group = [n for n in TOGETHER.get(name, (name,)) if n in run.train or n in run.held_out]
        drawn |= set(group)
        figures.append((name in leading, _figure(run, group)))
    return figures


def _figure(run: Run, names: Sequence[str]) -> Figure:
    lines: list[tuple[str, list[float], list[float]]] = []
    for name in names:
        for label, columns in (("", run.train), (" (held out)", run.held_out)):
            if name in columns:
                lines.append((name + label, *columns[name]))
    series = [Series(name=label, x=a, y=b, markers=len(x) <= 12) for label, x, y in lines for a, b in [averaged(x, y)]]
    if (edges := [run.held_out.get(f"{names[0]}{end}", ([], []))[1] for end in ENDS]) and all(edges):
        low, high = (averaged(lines[0][1], edge)[1] for edge in edges)
        series[0] = replace(series[0], band=(low, high))
    table = {label: dict(zip(x, y, strict=True)) for label, x, y in lines}
    steps = sorted({s for _, x, _ in lines for s in x})
    shown, note = thin([(int(s), *(table[n].get(s) for n in table)) for s in steps])
    if any(len(x) > 200 for _, x, _ in lines):
        note = "Drawn: means of equal stretches. " + note
    entry = glossary.find(names[0])
    label = names[0] if len(names) == 1 else names[0].split("/")[0]
    latest = ", ".join(f"{n} {number(next(iter(svg.finite(y[::-1])), None))}" for n, _, y in lines)
    return Figure(
        title=" and ".join(names),
        image=svg.line_chart(series, title=f"{' and '.join(names)} by step", x_label="step", y_label=label),
        legend=tuple(label for label, _, _ in lines) if len(lines) > 1 else (),
        caption=f"{_sentence(entry.meaning)} Latest: {latest}." if entry else f"Latest: {latest}.",
        advice=(("Healthy", _sentence(entry.healthy)), ("Else", _sentence(entry.action))) if entry else (),
        columns=("step", *table),
        rows=shown,
        note=note,
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def _samples(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Some samples of the first sampled step and some of the last, spread from best to worst."""
    steps = sorted({r["step"] for r in rows if "step" in r})
    if not steps:
        return [], []
    last = _spread([r for r in rows if r.get("step") == steps[-1]])
    return (_spread([r for r in rows if r.get("step") == steps[0]]) if len(steps) > 1 else []), last


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ordered = sorted(rows, key=lambda r: -(r["reward"] if isinstance(r.get("reward"), (int, float)) else -math.inf))
    return [row for (row,) in thin([(r,) for r in ordered], SAMPLES_PER_SIDE)[0]]


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Label -> fact, flat."""
    facts = []
    for name, value in environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        elif name == "resumed":
            value = ", ".join(str(r.get("time")) for r in value)
        elif name == "memory_bytes" and value:
            name, value = "memory", f"{value / 2**30:.1f} GiB"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            facts.append((name.replace("_", " "), str(value)))
    return facts
