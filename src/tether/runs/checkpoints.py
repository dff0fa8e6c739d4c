"""Checkpoints that are whole or not there: a folder, a SHA-256 manifest, one rename."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.core.errors import StorageError
from tether.runs.folder import RunFolder
from tether.runs.storage import folder_bytes, remove_folder, sweep, sync_tree, write_folder, write_text

MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: its folder, the step it was made after, and the loop's state."""

    path: Path
    step: int
    state: dict[str, Any]


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def save(
    folder: RunFolder,
    step: int,
    write: Callable[[Path], None],
    state: Mapping[str, Any],
    keep: int,
    *,
    need: int | None = None,
) -> Path:
    """Write ``checkpoints/step-000010``: ``write(path)`` puts the model there, ``state`` (JSON-able) goes beside it.

    Order: files, fsync, manifest last, fsync, rename, fsync of the parent; a kill at any point leaves the checkpoint
    before. Then all but the newest ``keep`` are removed, and any later than ``step`` (of a future given up by a
    resume). ``need``: bytes expected, by default the size of the newest checkpoint; room is checked before writing.
    Raises StorageError with path, need and free space.
    """
    existing = _paths(folder.checkpoints)
    if need is None:
        need = folder_bytes(existing[-1]) if existing else 0
    text = json.dumps(dict(state), allow_nan=False)

    def fill(path: Path) -> None:
        write(path)
        (path / STATE).write_text(text, encoding="utf-8")
        seal(path, step)

    target = folder.checkpoints / f"step-{step:06d}"
    write_folder(target, fill, need=need)
    paths = _paths(folder.checkpoints)
    later = [p for p in paths if _step(p) > step]
    earlier = [p for p in paths if _step(p) <= step]
    for path in later + earlier[: max(0, len(earlier) - max(keep, 1))]:
        remove_folder(path)
    return target


def seal(path: Path, step: int) -> None:
    """Make the files durable, then write ``manifest.json``: size and SHA-256 of each."""
    sync_tree(path)
    files = {
        f.relative_to(path).as_posix(): {"bytes": f.stat().st_size, "sha256": _sha256(f)}
        for f in sorted(path.rglob("*"))
        if f.is_file()
    }
    write_text(path / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint: missing files, wrong sizes, wrong hashes. Empty: it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest["step"]:
            return [f"{MANIFEST} speaks of step {manifest['step']}"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} can't be read: {error}"]
    faults = [] if STATE in files else [f"{MANIFEST} does not list {STATE}"]
    for name, facts in files.items():
        file = path / name
        try:
            if not file.is_file():
                faults.append(f"{name} is missing")
            elif file.stat().st_size != facts["bytes"]:
                faults.append(f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}")
            elif _sha256(file) != facts["sha256"]:
                faults.append(f"{name} is not the file that was saved (SHA-256 differs)")
        except (OSError, KeyError, TypeError) as error:
            faults.append(f"{name} can't be checked: {error}")
    return faults


def latest(folder: RunFolder, say: Callable[[str], None] = say_on_stderr) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever made.

    Damaged ones are passed over and ``say`` is told which and why. Raises StorageError when all are damaged:
    starting again from nothing is the user's decision.
    """
    for line in sweep(folder.checkpoints):
        say(f"{folder.checkpoints}: {line}")
    paths = _paths(folder.checkpoints)
    for path in reversed(paths):
        faults = verify(path)
        if not faults:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            return Checkpoint(path=path, step=_step(path), state=state)
        say(f"WARNING: checkpoint {path} is damaged and is not used: {'; '.join(faults[:3])}")
    if paths:
        raise StorageError(
            f"none of the {len(paths)} checkpoints in {folder.checkpoints} is whole; "
            "put one back from a copy, or start again in another folder: run.folder=NAME"
        )
    return None


def listing(path: Path) -> list[tuple[Path, list[str]]]:
    """Every checkpoint of the run folder ``path``, oldest first, with what is wrong with it."""
    return [(p, verify(p)) for p in _paths(path / "checkpoints")]


def _paths(parent: Path) -> list[Path]:
    found = [p for p in parent.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if parent.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
