"""``read``: a file or a hub data set -> records, with every row that was kept out counted by cause."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.core.errors import DataError
from tether.data.columns import Kind, Place, Record, to_records
from tether.data.files import BadRowError, RawRow, fingerprint, is_hub_id, open_rows
from tether.data.importers import to_standard

SHOWN_ERRORS = 5


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What was read. ``counts``: rows kept out, by cause; ``fingerprint``: sha256 (hex) of the source's bytes.

    ``total``: rows looked at; ``errors``: the first rows kept out, as file:line:column: what, what to do;
    ``notes``: formats that were recognised, in words.
    """

    records: tuple[Any, ...]
    counts: Mapping[str, int]
    source: str
    fingerprint: str
    total: int
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bad(self) -> int:
        return sum(self.counts.values())


def read(
    path: str, kind: Kind, *, limit: int | None = None, max_bad_rows: float = 0.01, system: str | None = None
) -> Rows:
    """Read the rows of ``path`` (JSONL, JSON, Parquet, or hub id[:split]) as records of ``kind``.

    ``limit``: look at the first N rows only. ``system``: a system message for conversations that have none. A row
    that can't be used is kept out and counted; DataError where their share is over ``max_bad_rows``, or where the
    source holds no rows. A record's id is <file stem>:<line>, the same in every run.
    """
    hub = is_hub_id(path)
    stem = path.replace(":", "-").split("/")[-1] if hub else Path(path).name.split(".")[0]
    digest = hashlib.sha256()
    records: list[Record] = []
    counts: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    errors: list[str] = []
    total = 0
    for raw in open_rows(path):
        if limit is not None and total >= limit:
            break
        total += 1
        if hub:
            digest.update(json.dumps(raw.value, sort_keys=True, default=str).encode())
        place = Place(id=f"{stem}:{raw.number}", source=f"{path}:{raw.number}", system=system)
        try:
            found, format_name = _records(raw, kind, place)
        except BadRowError as bad:
            counts[bad.cause] += 1
            if len(errors) < SHOWN_ERRORS:
                errors.append(f"{path}:{raw.number}:{bad.column or raw.column_of(bad.key)}: {bad.what}")
            continue
        records += found
        if format_name is not None:
            formats[format_name] += 1
    rows = Rows(
        records=tuple(records),
        counts=dict(counts),
        source=path,
        fingerprint=digest.hexdigest() if hub else fingerprint(path),
        total=total,
        errors=tuple(errors),
        notes=tuple(f"{n} rows recognised as {name}" for name, n in formats.items()),
    )
    _check(rows, max_bad_rows)
    return rows


def _records(raw: RawRow, kind: Kind, place: Place) -> tuple[list[Record], str | None]:
    if raw.problem is not None:
        raise raw.problem
    if not isinstance(raw.value, dict):
        raise BadRowError("not an object", f"the row is a {type(raw.value).__name__}, expected an object with columns")
    row, format_name = to_standard({k: v for k, v in raw.value.items() if v is not None})
    return to_records(row, kind, place), format_name


def _check(rows: Rows, max_bad_rows: float) -> None:
    if rows.total == 0:
        raise DataError(f"{rows.source}: the file holds no rows; check that it was written completely")
    if rows.bad > max_bad_rows * rows.total:
        causes = "; ".join(f"{n} {cause}" for cause, n in sorted(rows.counts.items(), key=lambda c: -c[1]))
        first = "\n".join(f"  {error}" for error in rows.errors)
        raise DataError(
            f"{first.lstrip()}\n{rows.bad} of {rows.total} rows of {rows.source} can't be used ({causes}): over "
            f"data.max_bad_rows={max_bad_rows:g}. Mend the rows, or raise it to go on without them "
            f"(`tether data inspect {rows.source}` shows more)"
        )
