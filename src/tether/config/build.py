"""``{type: dpo, beta: 0.2}`` -> the frozen dataclass of that name, or of the user's own file.

A key that the dataclass does not have would be ignored, and is therefore refused with the nearest name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from tether.config.suggest import in_words
from tether.config.yaml import show
from tether.core.errors import UserError, nearest


def build(table: Mapping[str, type], spec: Mapping[str, Any] | str, what: str) -> Any:
    """The dataclass that ``spec`` names, made with its other keys.

    ``spec``: ``{type: NAME, ...}`` or just ``NAME``, where NAME is a row of ``table``, ``package.module:Class`` or
    ``file.py:Class``. ``what`` is the config path, for messages. Raises UserError that lists every wrong key.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"type": spec}
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise UserError(f"{what}.type must name one of {', '.join(table)}, or file.py:Class, got {show(name)}")
    kind = find(table, name, f"{what}.type")
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise UserError(f"{what}.type: {name} is not a dataclass; its fields are what the config may set")
    known = {f.name: f for f in fields(kind) if f.init}
    problems = _problems(kind, known, options, name, what)
    for field in known.values():
        if field.name not in options and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{what}: {name} needs {field.name}")
    if problems:
        raise UserError("\n".join(problems))
    return _make(lambda: kind(**options), what)


def change(instance: Any, changes: Mapping[str, Any], what: str, tables: Mapping[str, Mapping[str, type]]) -> Any:
    """A frozen dataclass with some fields changed, as ``dataclasses.replace``; a mapping changes a field's own fields.

    ``{loss: {clip_high: 0.28}}`` keeps the loss and changes its clip; ``{loss: {type: ...}}`` builds another from
    ``tables["loss"]``. Raises UserError that lists every wrong key.
    """
    known = {f.name: f for f in fields(instance) if f.init}
    options: dict[str, Any] = {}
    built: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in changes.items():
        old = getattr(instance, name, None)
        path = f"{what}.{name}"
        try:
            if name in known and name in tables and (isinstance(value, str) or _names_type(value)):
                built[name] = build(tables[name], value, path)
            elif name in known and isinstance(value, Mapping) and is_dataclass(old):
                built[name] = change(old, value, path, {})
            else:
                options[name] = value
        except UserError as error:
            problems.append(str(error))
    problems += _problems(type(instance), known, options, type(instance).__name__, what)
    if problems:
        raise UserError("\n".join(problems))
    return _make(lambda: replace(instance, **options, **built), what)


def find(table: Mapping[str, Any], name: str, what: str) -> Any:
    """The object of this name: a row of ``table``, or ``file.py:name`` / ``package.module:name`` of the user's own."""
    if name in table:
        return table[name]
    module, colon, attribute = name.rpartition(":")
    if not colon:
        known = f" (known: {', '.join(table)}; or file.py:Class of your own)"
        raise UserError(f'{what}: unknown "{name}"{nearest(name, list(table))}{known}')
    if not module or not attribute:
        raise UserError(f"{what}: expected file.py:Class or package.module:Class, got {show(name)}")
    loaded = _load_file(Path(module), what) if module.endswith(".py") else _load_module(module, what)
    if not hasattr(loaded, attribute):
        public = [n for n in vars(loaded) if not n.startswith("_")]
        raise UserError(f"{what}: {module} has no {attribute}{nearest(attribute, public)}")
    return getattr(loaded, attribute)


def _load_file(file: Path, what: str) -> Any:
    path = file.expanduser().resolve()
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if not path.is_file():
        raise UserError(f"{what}: no such file: {file} (looked for it as {path})")
    # The plain name lets the file's dataclasses find their own module; a name that is taken gets one of its own.
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{zlib.crc32(str(path).encode()):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{what}: {file} can't be loaded: {type(error).__name__}: {error}") from error
    return module


def _load_module(module: str, what: str) -> Any:
    # An installed command does not look in the folder it was typed in; `python -m` does.
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise UserError(f"{what}: no module {module} here or installed; a file is named as file.py:Class") from None
        raise UserError(f"{what}: {module} can't be loaded: {error}") from error
    except Exception as error:
        raise UserError(f"{what}: {module} can't be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _names_type(value: Any) -> bool:
    return isinstance(value, Mapping) and "type" in value


def _problems(kind: type, known: Mapping[str, Any], options: dict[str, Any], name: str, what: str) -> list[str]:
    """Unknown keys and values of the wrong type. ``options`` is changed where a value is read as its field's type."""
    problems = []
    try:
        hints = get_type_hints(kind)
    except (NameError, TypeError):  # annotations that exist for the type checker only: the class itself must check
        hints = {}
    for key, value in list(options.items()):
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            problems.append(
                f'{what}: unknown key "{key}" for {name}{nearest(key, list(known))} ({takes}); it would be ignored'
            )
        elif key in hints:
            options[key], wanted = _fit(hints[key], value)
            if wanted:
                problems.append(f"{what}.{key} must be {wanted}, got {show(value)}")
    return problems


def _fit(hint: Any, value: Any) -> tuple[Any, str]:
    """``value`` as ``hint`` holds it, and "" or what would fit. Types that pydantic does not know are not checked."""
    if any(isinstance(kind, type) and is_dataclass(kind) for kind in (hint, *get_args(hint))):
        return value, ""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True))
    except PydanticSchemaGenerationError:
        return value, ""
    # A YAML list arrives as a tuple; a field may want either.
    forms = [value, list(value), tuple(value)] if isinstance(value, list | tuple) else [value]
    for form in forms:
        try:
            return adapter.validate_python(form), ""
        except ValidationError:
            continue
    try:
        return value, in_words(adapter.json_schema())
    except PydanticInvalidForJsonSchema:
        return value, str(hint)


def _make(make: Any, what: str) -> Any:
    """The dataclass's own checks (``__post_init__``) speak as errors for people."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: {error}") from error
