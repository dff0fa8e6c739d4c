"""Writing that survives a kill or a power cut: beside the target first, then fsync, then one rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tether.core.errors import StorageError, UserError

# Room that is left on the disk beyond what a save needs, for logs and for what else the machine writes.
SPARE_BYTES = 16 * 2**20


def inside(root: Path, name: str) -> Path:
    """``root/name``, refused where it would lie outside ``root`` ("../x", absolute paths, links that lead away)."""
    top = root.resolve()
    target = top if "\0" in name else (top / name).resolve()
    if target == top or not target.is_relative_to(top):
        raise UserError(f"the name {name!r} leads outside {root}; give a plain name without '..' or a leading '/'")
    return target


def folder_bytes(path: Path) -> int:
    """Bytes of all files below ``path``."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def check_space(path: Path, need: int) -> None:
    """Raise StorageError unless the disk that holds ``path`` has room for ``need`` bytes and a little more."""
    free = shutil.disk_usage(path).free
    if free < need + SPARE_BYTES:
        raise StorageError(_full(path, need, free))


def disk_error(error: BaseException, path: Path, need: int) -> StorageError:
    """The error a person reads when writing below ``path`` failed. ``path`` must exist."""
    # safetensors and tokenizers raise errors of their own that carry the system's words only.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
        return StorageError(_full(path, need, shutil.disk_usage(path).free))
    return StorageError(f"can't write to {path}: {error}")


def _full(path: Path, need: int, free: int) -> str:
    return (
        f"not enough space to save in {path}: {megabytes(need)} needed, {megabytes(free)} free; "
        "free some space and go on with --resume (what was saved before is whole)"
    )


def megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """fsync every file and folder below ``path``, inner ones first, then ``path``."""
    for child in sorted(path.rglob("*"), key=lambda p: len(p.parts), reverse=True):
        if child.is_dir():
            sync_folder(child)
        elif child.is_file():
            with child.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(path)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8): a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".tmp-{path.name}")
    try:
        with beside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise disk_error(error, path.parent, len(text)) from error


def write_folder(target: Path, write: Callable[[Path], None], *, need: int = 0) -> None:
    """Let ``write(folder)`` fill a folder beside ``target``, make it durable, and rename it to ``target``.

    ``need``: bytes expected; checked before anything is written. An existing ``target`` is replaced, and comes back
    by ``sweep`` if the process dies between the two renames. Raises StorageError; ``target`` is then as it was.
    """
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"can't make the folder {parent}: {error.strerror}") from error
    sweep(parent)
    check_space(parent, need)
    beside = parent / f".tmp-{target.name}"
    beside.mkdir()
    try:
        write(beside)
        sync_tree(beside)
        _rename(beside, target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error) or "os error 28" in str(error):
            raise disk_error(error, parent, need) from error
        raise


def _rename(beside: Path, target: Path) -> None:
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        target.rename(old)
    beside.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that looks like the folder."""
    trash = path.with_name(f".trash-{path.name}")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(parent: Path) -> list[str]:
    """Clear what a killed process left in ``parent``: half-written and half-removed folders. Returns what was done."""
    done = []
    for left in sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []:
        original = left.with_name(left.name.removeprefix(".old-"))
        if left.name.startswith(".old-") and not original.exists():
            left.rename(original)
            done.append(f"{original.name}: put back, its replacement had not been finished")
        elif left.name.startswith((".tmp-", ".trash-", ".old-")):
            shutil.rmtree(left, ignore_errors=True)
            done.append(f"{left.name}: left by a run that was killed, removed")
    return done
