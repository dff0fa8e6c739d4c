"""``tether data inspect``: what a file holds, what is wrong with it, and what it would teach."""

from __future__ import annotations

from collections import defaultdict
from itertools import repeat
from typing import TYPE_CHECKING, Any

from tether.core.text import Demonstration, Judgement, Preference, Prompt, Ranking, StepLabels
from tether.data.audit import PERCENTILES, Audit, Schema, audit, detect, percentiles
from tether.data.readers import Rows, read

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_CHARACTERS = 400


def run(path: str, *, model: str | None = None, rows: int = 3) -> None:
    """Print the schema of ``path``, ``rows`` examples, bad rows by cause, and an audit; lengths in tokens of ``model``.

    Raises DataError where the source can't be read at all; malformed rows are shown and do not stop it.
    """
    from rich.console import Console

    console = Console(highlight=False)
    schema = detect(path)
    found = read(path, schema.kind, max_bad_rows=1.0)
    _print_schema(console, path, schema, found)
    _print_bad(console, found)
    if not found.records:
        return
    _print_examples(console, found, rows)
    report = audit(found)
    _print_audit(console, report)
    _print_lengths(console, "Length in characters", report.characters)
    if model is not None:
        _print_tokens(console, model, found)


def _print_schema(console: Console, path: str, schema: Schema, found: Rows) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"{escape(path)}: {found.total} rows, read as {schema.kind}", soft_wrap=True)
    table = Table()
    table.add_column("column")
    table.add_column("holds")
    for name, types in schema.columns.items():
        table.add_row(escape(name), escape(" or ".join(types)))
    console.print(table)
    for note in found.notes:
        console.print(escape(note))
    console.print(f"{len(found.records)} records; sha256 {found.fingerprint[:16]}…")


def _print_bad(console: Console, found: Rows) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not found.bad:
        console.print("no malformed rows")
        return
    console.print(f"{found.bad} of {found.total} rows kept out ({found.bad / found.total:.2%})")
    table = Table()
    table.add_column("cause")
    table.add_column("rows", justify="right")
    for cause, count in sorted(found.counts.items(), key=lambda item: -item[1]):
        table.add_row(escape(cause), str(count))
    console.print(table)
    for error in found.errors:
        console.print(escape(error), soft_wrap=True)


def _print_examples(console: Console, found: Rows, rows: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    for record in found.records[:rows]:
        identity = record.id if hasattr(record, "id") else record.prompt.id
        table = Table(title=escape(identity), title_justify="left", show_header=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for part, text in _dialogue(record):
            table.add_row(escape(part), escape(_shorten(text)))
        console.print(table)


def _dialogue(record: Any) -> list[tuple[str, str]]:
    """The record line by line, as a person would read it."""
    match record:
        case Demonstration(messages=()):
            return [("prompt", record.prompt), ("completion", record.completion)]
        case Demonstration():
            return [(m.role, m.content) for m in record.messages]
        case Prompt():
            return _asked(record)
        case Preference():
            return [*_asked(record.prompt), ("chosen", record.chosen), ("rejected", record.rejected)]
        case Ranking():
            marks = [f"rank {rank}" for rank in record.ranks]
            return _asked(record.prompt) + list(zip(marks, record.completions, strict=True))
        case Judgement():
            return [*_asked(record.prompt), ("desirable" if record.desirable else "undesirable", record.completion)]
        case StepLabels():
            marks = ["right" if label else "wrong" for label in record.labels]
            return _asked(record.prompt) + list(zip(marks, record.steps, strict=True))
    raise TypeError(f"not a record: {type(record).__name__}")


def _asked(prompt: Prompt) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in prompt.messages] or [("prompt", prompt.text or "")]


def _shorten(text: str) -> str:
    text = text.strip("\n")
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… (+{len(text) - SHOWN_CHARACTERS})"


def _print_audit(console: Console, report: Audit) -> None:
    from rich.markup import escape

    for warning in report.warnings:
        console.print(f"[yellow]![/] {escape(warning)}")
    for finding in report.findings:
        console.print(f"· {escape(finding)}")


def _print_lengths(console: Console, title: str, lengths: Any) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for p in PERCENTILES:
        table.add_column({0: "least", 50: "median", 100: "most"}.get(p, f"{p} %"), justify="right")
    for part, values in lengths.items():
        table.add_row(part, *(str(v) for v in values))
    console.print(table)


def _print_tokens(console: Console, model: str, found: Rows) -> None:
    """Token lengths as training would see them, the preflight, and one example with its loss mask."""
    from rich.markup import escape

    from tether.data.chat import ChatTokenizer
    from tether.data.groups import tokenise
    from tether.models.load import load_tokenizer

    chat = ChatTokenizer(load_tokenizer(model))
    for message in chat.preflight():
        console.print(f"[yellow]![/] {escape(message)}")
    lengths: dict[str, list[int]] = defaultdict(list)
    if isinstance(found.records[0], Prompt | StepLabels):
        for record in found.records:
            lengths["prompt"].append(len(chat.prompt(record if isinstance(record, Prompt) else record.prompt)))
            if isinstance(record, StepLabels):
                lengths["step"] += [len(chat.encode(step).ids) for step in record.steps]
    else:
        everything = tokenise(found.records, chat, max_prompt_tokens=2**31, max_completion_tokens=2**31)
        pair = isinstance(found.records[0], Preference)
        for group in everything.groups:
            lengths["prompt"].append(len(group.prompt))
            for name, tokens in zip(
                ("chosen", "rejected") if pair else repeat("completion"), group.completions, strict=False
            ):
                lengths[name].append(len(tokens))
        for cause, count in everything.counts.items():
            console.print(f"{count} {escape(cause)}")
        console.print(escape(chat.token_table(everything.groups[0])), soft_wrap=True)
    _print_lengths(console, f"Length in tokens ({escape(model)})", {k: percentiles(v) for k, v in lengths.items()})
