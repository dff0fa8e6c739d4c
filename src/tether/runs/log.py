"""Append-only JSON lines: ``metrics.jsonl`` and ``samples.jsonl``, one object a line, readable during the run."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tether.core.errors import DataError, StorageError
from tether.runs.storage import disk_error


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What a log holds. ``notes``: what was dropped while reading (print them)."""

    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


def read_lines(path: Path) -> Lines:
    """All rows of a log. A last line without its newline is torn (the writer was killed): dropped and noted.

    Raises DataError (file:line:column) where any other line is not a JSON object. A missing file has no rows.
    """
    if not path.exists():
        return Lines(rows=())
    *whole, rest = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            column = getattr(error, "colno", getattr(error, "start", 0) + 1)
            raise DataError(
                f"{path}:{number}:{column}: not JSON; remove the line or take the file from a copy"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}:1: a JSON object was expected, got {type(row).__name__}")
        rows.append(row)
    notes = (f"{path}:{len(whole) + 1}: the last line is torn ({len(rest)} bytes) and was dropped",) if rest else ()
    return Lines(rows=tuple(rows), notes=notes)


class JsonLog:
    """One growing file. A torn last line of a killed run is cut off on opening; ``notes`` says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._start = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StorageError(f"can't write {path}: {error.strerror}") from error
        self._cut_torn()

    def _cut_torn(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)
            self.notes = (f"{self.path}: the last line was torn ({len(content) - whole} bytes) and was cut off",)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row, whole or not at all. NaN and infinities become null; tensors of one number become numbers."""
        # Times come last, so that two runs' rows can be compared up to them.
        stamped = {
            **plain(row),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(time.monotonic() - self._start, 3),
        }
        line = (json.dumps(stamped, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        start = self.offset
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, start)
            raise disk_error(error, self.path.parent, len(line)) from error

    @property
    def offset(self) -> int:
        """Bytes so far; a checkpoint records it, and ``cut_to`` goes back to it."""
        return os.fstat(self._file).st_size

    def sync(self) -> None:
        """Make the rows durable; called before a checkpoint records ``offset``."""
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class MetricsLog(JsonLog):
    """{"step", "split", "values": {name: number | null}, "time": UTC, "seconds": since opening}."""

    def append(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """One line of numbers. ``split``: "train" or "eval"."""
        self.write({"step": step, "split": split, "values": dict(values)})


class SamplesLog(JsonLog):
    """``samples.jsonl``: {"step", "split", then the sample's own fields}, one completion a line."""

    def append(self, step: int, split: str, sample: Mapping[str, Any]) -> None:
        """One sample, e.g. prompt_id, question, completion, reward, finish_reason, tokens."""
        self.write({"step": step, "split": split, **sample})


def offsets(logs: Iterable[JsonLog]) -> dict[str, int]:
    """File name -> bytes, durable: what a checkpoint's state must hold."""
    logs = list(logs)
    for log in logs:
        log.sync()
    return {log.path.name: log.offset for log in logs}


def cut_to(folder: Path, recorded: Mapping[str, int]) -> list[str]:
    """Cut each log back to where it was at a checkpoint; rows after it are written again by the resumed run.

    Call before opening the logs. Returns what was cut. Raises StorageError where a file is shorter than recorded.
    """
    done = []
    for name, offset in recorded.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            raise StorageError(f"{path} has {size} bytes, but the checkpoint was made at {offset}: rows were lost")
        if size > offset:
            os.truncate(path, offset)
            done.append(f"{name}: {size - offset} bytes written after the checkpoint were cut off")
    return done


def plain(value: Any) -> Any:
    """JSON-able copy: finite floats kept, NaN and infinities to None, one-number tensors to numbers."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
