"""Log-probs kept on disk: what a frozen model said of given tokens, for the runs that ask again."""

from __future__ import annotations

import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tether.core.errors import StorageError
from tether.runs.storage import check_space

# Part of a folder's name: files of another format are never opened, and go when room is needed.
FORMAT = 1
KEY_BYTES = 16
# A file is replaced whole by a longer one with every step, up to this size; then another one is begun.
FILE_BYTES = 2**20
CAP_BYTES = 2 * 2**30
# What a killed process left half-written is removed after this time: another one may be writing now.
STALE_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an entry stands: values[start:end] of a file, with their checksum."""

    path: Path
    values: Tensor
    start: int
    end: int
    check: int


@dataclass(kw_only=True, eq=False)
class LogprobStore:
    """The log-probs of one model: 16 bytes (whose tokens) -> [n] float32.

    A writer has files of its own, each written beside its place and renamed: a kill leaves the file before, and
    writers at the same time never meet. Every entry has a checksum: one that is broken, of a wrong length or not
    finite is dropped, and said. ``root`` holds the folders of all models, at most ``cap`` bytes of them: the files that
    were used least recently go first. A disk that refuses costs the cache and not the run.
    """

    root: Path
    model: str
    say: Callable[[str], None]
    cap: int = CAP_BYTES
    _places: dict[bytes, _Place] = field(default_factory=dict)
    _mine: dict[bytes, Tensor] = field(default_factory=dict)
    _writes: bool = True

    @property
    def folder(self) -> Path:
        return self.root / f"v{FORMAT}-{self.model}"

    def __post_init__(self) -> None:
        self._sweep()
        self._begin()
        # By name, which is by time: what was computed anew stands before what was found broken.
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def read(self, lengths: Mapping[bytes, int]) -> dict[bytes, Tensor]:
        """Those of the keys in ``lengths`` that are known, with as many values as it says."""
        found: dict[bytes, Tensor] = {}
        places = {key: self._places[key] for key in lengths if key in self._places}
        for key, place in places.items():
            row = place.values[place.start : place.end].clone()
            if len(row) == lengths[key] and _checksum(key, row) == place.check and bool(row.isfinite().all()):
                found[key] = row
            else:
                del self._places[key]
        if len(found) < len(places):
            self.say(
                f"reference log-probs: {len(places) - len(found)} broken entries of the cache dropped, to be computed "
                "anew"
            )
        for path in {places[key].path for key in found}:
            with suppress(OSError):
                os.utime(path)
        return found

    def add(self, rows: Mapping[bytes, Tensor]) -> None:
        """Keep ``rows`` ([n] float32 each). What is not finite is left out: a later run would not believe it."""
        new = {key: row for key, row in rows.items() if bool(row.isfinite().all())}
        if not (new and self._writes):
            return
        self._mine |= new
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_space(self.folder, FILE_BYTES)
            self._write()
        except (OSError, SafetensorError, StorageError) as error:
            self._writes = False
            self.say(f"note: reference log-probs can't be kept in {self.folder}: {error}; going on without")
            return
        if sum(row.nbytes for row in self._mine.values()) >= FILE_BYTES:
            self._begin()

    def _begin(self) -> None:
        """The next ``add`` begins another file."""
        self._mine = {}
        self._path = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.safetensors"
        self._evict()

    def _write(self) -> None:
        rows = list(self._mine.values())
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(self._mine)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "ends": torch.tensor([len(row) for row in rows]).cumsum(0),
            "checks": torch.tensor([_checksum(key, row) for key, row in self._mine.items()]),
            "values": torch.cat(rows),
        }
        beside = self._path.with_suffix(".part")
        try:
            # No fsync: what a power cut spoils, the checksums find.
            save_file(tensors, beside)
            beside.replace(self._path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                keys, ends, checks, values = (file.get_tensor(n) for n in ("keys", "ends", "checks", "values"))
            shapes = [keys.shape, ends.shape, checks.shape]
            if shapes != [(len(ends), KEY_BYTES), (len(ends),), (len(ends),)] or values.dtype != torch.float32:
                raise ValueError("no file of ours")
        except FileNotFoundError:  # another process made room
            return
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            with suppress(OSError):
                path.unlink()
            self.say(f"reference log-probs: {path} is broken, removed: {error}")
            return
        names, start = keys.numpy().tobytes(), 0
        for i, (end, check) in enumerate(zip(ends.tolist(), checks.tolist(), strict=True)):
            key = names[i * KEY_BYTES : (i + 1) * KEY_BYTES]
            self._places[key] = _Place(path=path, values=values, start=start, end=end, check=check)
            start = end

    def _sweep(self) -> None:
        for left in self.root.glob("*/*.part"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()

    def _evict(self) -> None:
        files = sorted(_facts(self.root))
        over = sum(size for _, size, _ in files) - self.cap
        removed = 0
        for _, size, path in files:
            if over <= 0:
                break
            with suppress(OSError):
                path.unlink()
                removed += 1
            over -= size
        if removed:
            self.say(
                f"reference log-probs: the cache {self.root} was over {self.cap / 2**30:.3g} GiB: its {removed} oldest "
                "files were removed"
            )


def _facts(root: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, path) of every file in the store; another process may remove some meanwhile."""
    for path in root.glob("*/*.safetensors"):
        with suppress(OSError):
            stat = path.stat()
            yield stat.st_mtime, stat.st_size, path


def _checksum(key: bytes, row: Tensor) -> int:
    """Of an entry's values and of whose they are."""
    return zlib.crc32(row.numpy().tobytes(), zlib.crc32(key))
