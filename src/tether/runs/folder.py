"""The run folder: made once, locked while a run is in it, never reused in silence.

config.yaml  environment.json  metrics.jsonl  samples.jsonl  checkpoints/step-000010/  final/  report.html
"""

from __future__ import annotations

import difflib
import json
import os
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tether.core.errors import StorageError, UserError
from tether.runs import environment
from tether.runs.storage import inside, write_text

# What a resumed run may change: where it lies and how it is kept, nothing that touches the numbers.
FREE_TO_CHANGE = frozenset({"run.folder", "run.keep_checkpoints", "run.report"})


def new_path(method: str, root: Path = Path("runs")) -> Path:
    """``runs/<method>-<UTC time>``, the place of a run that was given none."""
    return root / f"{method}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's folder, locked until ``close``. ``notes``: what the user should be told (print them).

    ``resumed``: there was a run here, and this one goes on with it.
    """

    path: Path
    method: str
    resumed: bool
    notes: tuple[str, ...] = ()
    lock: IO[str] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def create(cls, path: Path, *, config_yaml: str, method: str, resume: bool) -> RunFolder:
        """Make (or, with ``resume``, reopen) the folder ``path`` and lock it.

        Raises UserError: the folder exists, another run is in it, or the config differs from the one it was begun
        with. Raises StorageError: it can't be written.
        """
        path = Path(path)
        _make(path, resume)
        lock, notes = _lock(path)
        try:
            known = (path / "config.yaml").is_file()
            if known:
                notes += _check_same(path, config_yaml, method)
            else:
                if resume:
                    notes.append(f"{path}: no run to resume, starting from the beginning")
                facts = {"method": method, **environment.facts(), "resumed": []}
                write_text(path / "environment.json", json.dumps(facts, indent=2))
                # Written last: a folder without it holds no run yet.
                write_text(path / "config.yaml", config_yaml)
        except BaseException:
            lock.close()
            raise
        return cls(path=path, method=method, resumed=known, notes=tuple(notes), lock=lock)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def file(self, name: str) -> Path:
        """A file of this run by name; a name that leads outside the folder is refused."""
        return inside(self.path, name)

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self.lock is not None and not self.lock.closed:
            # Emptied, so that the next run does not take it for the lock of a run that died.
            self.lock.truncate(0)
            self.lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make(path: Path, resume: bool) -> None:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.is_dir():
            raise UserError(f"{path} is a file; name another folder with run.folder=NAME") from None
        if not resume and any(path.iterdir()):
            raise UserError(
                f"{path} exists already and is never overwritten; "
                f"go on with it: --resume; or name another folder: run.folder={path}-2"
            ) from None
    except OSError as error:
        raise StorageError(f"can't make the run folder {path}: {error.strerror}") from error


def _lock(path: Path) -> tuple[IO[str], list[str]]:
    """Hold ``path/lock``. The kernel frees it when the process ends, however it ends, so a dead owner can't block."""
    import fcntl

    try:
        handle = (path / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"can't write in the run folder {path}: {error.strerror}") from error
    handle.seek(0)
    owner = handle.read().strip()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UserError(
            f"another run is in {path} ({owner or 'starting'}); wait for it, stop it, "
            f"or name another folder: run.folder={path}-2"
        ) from None
    except OSError as error:
        handle.close()
        raise StorageError(f"can't lock {path}/lock: {error.strerror}; does its file system support locks?") from error
    handle.truncate(0)
    handle.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
    handle.flush()
    return handle, [f"the run that held {path} ({owner}) is gone; its lock was taken over"] if owner else []


def _check_same(path: Path, config_yaml: str, method: str) -> list[str]:
    """Refuse another config or method; note changed package versions. Returns notes."""
    try:
        before = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/environment.json can't be read ({error}); is this a run folder of Tether?") from error
    if before.get("method") != method:
        raise UserError(f"{path} holds a run of {before.get('method')!r}, not of {method!r}; name another folder")
    changes = config_changes((path / "config.yaml").read_text(encoding="utf-8"), config_yaml)
    if changes:
        raise UserError(
            f"{path} was begun with another config; a resumed run must keep it:\n  "
            + "\n  ".join(changes)
            + f"\nundo these changes, or name another folder: run.folder={path}-2"
        )
    now = environment.facts()
    held = dict(before.get("packages", {}))
    if "compiler" in before:
        held["the C++ compiler"] = before["compiler"]
    found = {**now["packages"], "the C++ compiler": now["compiler"]}
    notes = [
        f"{name} was {old or 'absent'} and is now {found.get(name) or 'absent'}: the run goes on, but not bit for bit"
        for name, old in held.items()
        if old != found.get(name)
    ]
    before.setdefault("resumed", []).append(now)
    write_text(path / "environment.json", json.dumps(before, indent=2))
    return notes


def config_changes(before: str, after: str) -> list[str]:
    """One line per key that differs between two configs (YAML), e.g. ``optim.learning_rate: 1e-05 -> 2e-05``."""
    import yaml

    if before == after:
        return []
    try:
        old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(after))
    except yaml.YAMLError:
        return [line for line in difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_TO_CHANGE and old.get(key, absent) != new.get(key, absent)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and value:
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for name, child in items for k, v in _flat(child, f"{prefix}.{name}" if prefix else name).items()}
