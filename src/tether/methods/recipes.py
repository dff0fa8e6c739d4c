"""The recipes that come with Tether: ready config files, one per named method."""

from __future__ import annotations

from pathlib import Path

import tether
from tether.core.errors import StorageError, UserError, nearest


def folder() -> Path:
    """Where the recipes lie: inside an installed package, or at the root of a checkout."""
    package = Path(tether.__file__).resolve().parent
    for place in (package / "recipes_data", package.parents[1] / "recipes"):
        if place.is_dir():
            return place
    raise StorageError(
        f"the recipes are missing from {package}; install again: pip install --force-reinstall tether-rlhf"
    )


def summaries() -> dict[str, str]:
    """Name -> the recipe's first comment line, by name."""
    return {path.stem: _summary(path) for path in sorted(folder().glob("*.yaml"))}


def show(name: str) -> str:
    """The text of a recipe. Raises UserError with the nearest name."""
    return _path(name).read_text(encoding="utf-8")


def copy(name: str, to: Path) -> Path:
    """Copy a recipe to a file, or into a folder under its own name; a file that exists is never overwritten."""
    source = _path(name)
    target = to / source.name if to.is_dir() else to
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{target} exists already; name another file: tether recipes cp {source.stem} FILE") from None
    except FileNotFoundError:
        raise UserError(f"no folder {target.parent} to copy into; make it first") from None
    except OSError as error:
        raise StorageError(f"{target} can't be written: {error.strerror}") from error
    return target


def _path(name: str) -> Path:
    known = [path.stem for path in sorted(folder().glob("*.yaml"))]
    stem = name.removesuffix(".yaml")
    if stem not in known:
        raise UserError(f'no recipe "{name}"{nearest(stem, known)} (there are: {", ".join(known)})')
    return folder() / f"{stem}.yaml"


def _summary(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
