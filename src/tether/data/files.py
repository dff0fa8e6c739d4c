"""Files -> raw rows with their place in the file: JSON lines, gzip, JSON arrays, Parquet, the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.core.errors import DataError, UserError, nearest

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".parquet")
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%+-]+))?")
HUB_TIMEOUT_SECONDS = 5.0
FIX_JSON = "every line must be one JSON object; mend or delete it"


class BadRowError(Exception):
    """A row that can't be used. ``cause`` is counted; ``what`` is said; ``key`` is the column, ``column`` the place."""

    def __init__(self, cause: str, what: str, *, key: str | None = None, column: int | None = None) -> None:
        super().__init__(what)
        self.cause, self.what, self.key, self.column = cause, what, key, column


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row as it stands in the file. ``number`` counts from 1 (the line, where there are lines).

    ``text``: the line, for columns of errors; ``problem``: why there is no ``value``.
    """

    number: int
    value: Any = None
    text: str = ""
    problem: BadRowError | None = None

    def column_of(self, key: str | None) -> int:
        """Where ``key`` stands in the line (1-based); 1 where that can't be told."""
        at = self.text.find(json.dumps(key)) if key else -1
        return at + 1 if at >= 0 else 1


def is_hub_id(path: str) -> bool:
    """Whether ``path`` names a data set on the hub: org/name or org/name:split, and no file of that name."""
    if Path(path).expanduser().exists() or path.endswith(SUFFIXES) or path.startswith((".", "/", "~")):
        return False
    return HUB_ID.fullmatch(path) is not None and not Path(path).parent.is_dir()


def open_rows(path: str) -> Iterator[RawRow]:
    """The rows of a file or hub data set, lazily. Raises DataError where the source can't be opened at all."""
    if is_hub_id(path):
        return _hub_rows(path)
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(_missing(path, file))
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"{path}: can't tell the format; give a file that ends in {', '.join(SUFFIXES)}")
    if file.name.endswith(".parquet"):
        return _parquet_rows(file)
    return _text_rows(file)


def fingerprint(path: str) -> str:
    """sha256 (hex) of the bytes of a local file."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(path: str, file: Path) -> str:
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.name.endswith(SUFFIXES))
        return f"{path} is a folder; give one file" + (f" of it: {', '.join(inside[:5])}" if inside else "")
    if not file.parent.is_dir():
        return f"{path}: no such file, and no folder {file.parent}; a hub data set is written org/name:split"
    import difflib

    here = [p.name for p in file.parent.iterdir() if p.name.endswith(SUFFIXES)]
    close = difflib.get_close_matches(file.name, here, n=3, cutoff=0.4) or sorted(here)[:5]
    found = f"; the folder holds {', '.join(close)}" if close else f"; {file.parent} holds no data files"
    return f"{path}: no such file{found}"


def _text_rows(file: Path) -> Iterator[RawRow]:
    """JSON lines or a JSON array, gzipped or not: told by the first character, not by the name."""
    with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as stream:
        first = b""
        try:
            while not first.strip(b"\xef\xbb\xbf \t\r\n") and (block := stream.read(64)):
                first += block
            is_array = first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
            stream.seek(0)
            yield from _array_rows(file, stream.read()) if is_array else _line_rows(stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{file}: the gzip file is broken ({error}); fetch or compress it again") from None


def _line_rows(stream: Any) -> Iterator[RawRow]:
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {line[error.start]:#04x}); save the file as UTF-8"
            yield RawRow(number=number, problem=BadRowError("not UTF-8", what, column=error.start + 1))
            continue
        if not text.strip():
            continue
        try:
            yield RawRow(number=number, value=json.loads(text), text=text)
        except json.JSONDecodeError as error:
            what = f"not JSON: {error.msg}; {FIX_JSON}"
            yield RawRow(number=number, text=text, problem=BadRowError("not JSON", what, column=error.colno))
        except RecursionError:
            yield RawRow(number=number, text=text, problem=BadRowError("not JSON", f"nested too deeply; {FIX_JSON}"))


def _array_rows(file: Path, content: bytes) -> Iterator[RawRow]:
    """The items of one JSON array, each numbered by the line it begins on."""
    try:
        text = content.decode("utf-8-sig")
        rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}:{error.colno}: not JSON: {error.msg}; mend the file") from None
    decoder = json.JSONDecoder()
    blank = re.compile(r"[\s,]*")
    at, line, counted = text.index("[") + 1, 1, 0
    for value in rows:
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, at)
        counted = at
        _, end = decoder.raw_decode(text, at)
        yield RawRow(number=line, value=value, text=text[at:end] if "\n" not in text[at:end] else "")
        at = end


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for block in table.iter_batches():
            for value in block.to_pylist():
                number += 1
                # Parquet gives every row every column; an absent one is None, as it would be missing in JSON.
                yield RawRow(number=number, value={k: v for k, v in value.items() if v is not None})
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}); write or fetch it again") from None


def _hub_rows(path: str) -> Iterator[RawRow]:
    match = HUB_ID.fullmatch(path)
    assert match is not None
    name, split = match["name"], match["split"] or "train"
    local = f"or save it as a file and give its path, e.g. data.train={name.split('/')[1]}.jsonl"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{path} is no file here, and reading it from the hub needs a package that is not installed: "
            f"pip install 'tether-rlhf[hub]', {local}"
        ) from None
    if not _offline():
        _ask_hub_once(name, local)
    try:
        rows = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"{path}: can't be loaded ({_first_line(error)}); check the name and the split, {local}"
        ) from None
    for number, value in enumerate(rows, 1):
        yield RawRow(number=number, value={k: v for k, v in dict(value).items() if v is not None})


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "TRUE", "YES", "ON"}


def _ask_hub_once(name: str, local: str) -> None:
    """One short question, so that an unreachable hub is an answer in seconds and not minutes of retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError:
        raise DataError(
            f"{name}: the hub has no such data set (or it needs a login); check the name, {local}"
        ) from None
    except Exception as error:
        raise DataError(
            f"{name}: the hub can't be reached ({_first_line(error)}); "
            f"set HF_HUB_OFFLINE=1 to use a copy fetched earlier, {local}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def suggest_column(row: dict[str, Any], wanted: list[str]) -> str:
    """'the row has: a, b, did you mean ...?' for a missing column."""
    have = ", ".join(list(row)[:8]) or "nothing"
    hints = [f"'{w}'{nearest(w, list(row))}" for w in wanted if w not in row and nearest(w, list(row))]
    return f"the row has: {have}" + (f" ({hints[0]})" if hints else "")
