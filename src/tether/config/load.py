"""Files and overrides -> one frozen config, or every problem at once with its place.

Layers, later over earlier: the schema's defaults, the files in order (mappings merge), ``key.path=value`` (replaces).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tether.config.schema import METHODS
from tether.config.sections import Section
from tether.config.suggest import describe, nearest_path, schema_paths
from tether.config.yaml import (
    COMMAND_LINE,
    Mark,
    Node,
    assign,
    dump,
    from_plain,
    merge,
    override,
    read,
    resolve,
    show,
)
from tether.core.errors import UserError, nearest
from tether.runs.folder import config_changes

Path_ = tuple[str, ...]
Problem = tuple[Mark, str]


def load(
    method: str,
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    shortcut: str | None = None,
    fixed: Mapping[str, str] | None = None,
) -> Section:
    """The config of ``method``. ``fixed`` holds what the command ``shortcut`` stands for (ppo: algorithm=ppo).

    Raises UserError with one line per problem, each ``file:line:column: what, what was got, what to do``.
    """
    if method not in METHODS:
        raise UserError(f'unknown method "{method}"{nearest(method, list(METHODS))} (known: {", ".join(METHODS)})')
    schema = METHODS[method]
    said: list[str] = []
    root = _gather(files, overrides, said)
    problems: list[Problem] = []
    root = _agree(root, method, problems)
    root = _fix(root, fixed or {}, shortcut or method, problems)
    root = _defaults(root, schema)
    config = None
    try:
        config = schema.model_validate(root.plain, strict=True)
    except ValidationError as error:
        # A file that could not be read whole may hold the key that seems to be missing.
        details = [d for d in error.errors() if not (said and d["type"] == "missing")]
        problems += _explain(details, root, schema, method, str(files[0]) if files else COMMAND_LINE)
    if config is not None:
        problems += _ignored(config, root)
    lines = said + [f"{mark}: {text}" for mark, text in sorted(problems, key=lambda p: _order(p[0], files))]
    if lines or config is None:
        raise UserError("\n".join(lines))
    return config


def resolve_yaml(config: Section) -> str:
    """The whole config, defaults included, as YAML that loads back to an equal config."""
    values = config.model_dump()
    return dump({"method": values.pop("method"), **values})


def json_schema(method: str) -> dict[str, Any]:
    """JSON Schema of a method's config file, for editors."""
    if method not in METHODS:
        raise UserError(f'unknown method "{method}"{nearest(method, list(METHODS))} (known: {", ".join(METHODS)})')
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"tether {method}",
        **{k: v for k, v in METHODS[method].model_json_schema().items() if k != "title"},
    }


def difference(old: Section, new: Section) -> list[str]:
    """One line per setting that differs and matters to a resumed run."""
    return config_changes(resolve_yaml(old), resolve_yaml(new))


def _gather(files: Sequence[Path], overrides: Sequence[str], said: list[str]) -> Node:
    """All files and overrides in one tree."""
    root = Node(value={}, at=Mark(str(files[0]) if files else COMMAND_LINE))
    for file in files:
        root = merge(root, read(file, said))
    seen: set[Path_] = set()
    for text in overrides:
        parsed = override(text, said)
        if parsed is None:
            continue
        path, node = parsed
        if path in seen:
            said.append(f"{COMMAND_LINE}: {'.'.join(path)} is given twice; keep one")
        seen.add(path)
        root = assign(root, path, node)
    return root


def _get(root: Node, path: Sequence[str | int]) -> Node | None:
    """The node at a path; None where the tree does not reach."""
    node: Node = root
    for part in path:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            return None
    return node


def _agree(root: Node, method: str, problems: list[Problem]) -> Node:
    """A ``method:`` that a file names must be the command's."""
    named = _get(root, ("method",))
    if named is None or named.value == method:
        return root
    problems.append((named.at, f'method is {show(named.plain)}, but this command runs "{method}"'))
    return assign(root, ("method",), replace(named, value=method))


def _fix(root: Node, fixed: Mapping[str, str], shortcut: str, problems: list[Problem]) -> Node:
    """Set what a shortcut stands for; a file that says otherwise is refused."""
    for name, value in fixed.items():
        path = tuple(name.split("."))
        given, parent = _get(root, path), _get(root, path[:-1])
        if given is not None and given.value != value:
            problems.append((given.at, f"{name} is {show(given.plain)}, but the command is `tether {shortcut}`"))
        elif parent is None or isinstance(parent.value, dict):
            at = Mark(f"tether {shortcut}")
            root = assign(root, path, Node(value=value, at=at, key=at))
    return root


def _defaults(root: Node, schema: type[Section]) -> Node:
    """A section or table given in part keeps the method's own defaults for the rest.

    ``optim: {warmup: 0.1}`` keeps the method's learning rate, ``loss: {beta: 0.2}`` speaks of the default type.
    """
    for name, field in schema.model_fields.items():
        node = _get(root, (name,))
        if node is None or not isinstance(node.value, dict):
            continue
        if isinstance(field.default, Section):
            own = field.default.model_dump(exclude_unset=True)
        elif isinstance(field.default, dict) and "type" in field.default:
            own = {"type": field.default["type"]}
        else:
            continue
        root = assign(root, (name,), merge(from_plain(own, node.at), node))
    return root


def _explain(
    details: Sequence[ErrorDetails], root: Node, schema: type[Section], method: str, source: str
) -> list[Problem]:
    """pydantic's findings in our words, one per path."""
    known = schema_paths(schema)
    problems: dict[Path_, Problem] = {}
    for detail in details:
        loc = detail["loc"]
        if detail["type"] == "extra_forbidden":
            path = tuple(str(part) for part in loc)
            node = _get(root, loc)
            at = (node.key or node.at) if node else root.at
            problems[path] = (at, _unknown(path, known, method))
        elif detail["type"] == "missing":
            for path, text in _missing(tuple(str(part) for part in loc), known):
                parent = _get(root, path[:-1]) if len(path) > 1 else None
                problems[path] = ((parent.key or parent.at) if parent else Mark(source), text)
        else:
            path = _within(loc, known)
            node = _get(root, loc) or _get(root, path) or root
            whole = _get(root, path)
            # A rule over several sections has no path, and says all in its own words.
            own_words = detail["msg"].removeprefix("Value error, ")
            problems[path] = (node.at, _wrong(path, known, whole.plain if whole else None) if path else own_words)
    return list(problems.values())


def _within(loc: tuple[str | int, ...], known: Mapping[Path_, Any]) -> Path_:
    """The part of pydantic's location that is a path of the schema."""
    for size in range(len(loc), 0, -1):
        path = tuple(str(part) for part in loc[:size])
        if path in known:
            return path
    return ()


def _unknown(path: Path_, known: Mapping[Path_, Any], method: str) -> str:
    name = ".".join(path)
    others = [m for m, schema in METHODS.items() if path in schema_paths(schema)]
    if others:
        return f'unknown key "{name}" for {method} (it belongs to {", ".join(others)})'
    if near := nearest_path(path, known):
        return f'unknown key "{name}", did you mean {near}?'
    here = [p[-1] for p in known if p[:-1] == path[:-1]]
    return f'unknown key "{name}" (known here: {", ".join(here)})'


def _missing(path: Path_, known: Mapping[Path_, Any]) -> list[tuple[Path_, str]]:
    """A missing section is told by the keys it needs."""
    leaves = [p for p, field in known.items() if p[: len(path)] == path and field.is_required()]
    inner = [p for p in leaves if not any(q != p and q[: len(p)] == p for q in leaves)]
    return [
        (p, f"missing {'.'.join(p)} ({known[p].description}); add it, or give {'.'.join(p)}=... on the command line")
        for p in inner
    ]


def _wrong(path: Path_, known: Mapping[Path_, Any], got: Any) -> str:
    wanted = describe(known[path])
    hint = ""
    if isinstance(got, str) and "number" in wanted and isinstance(resolve(got), int | float):
        hint = " (text; take the quotes away)"
    return f"{'.'.join(path)} must be {wanted}, got {show(got)}{hint}"


# Settings that some value elsewhere leaves without effect: (path, has it an effect?, why not).
EFFECTS = (
    ("data.last_turn_only", lambda c: c.method == "sft", "only sft uses it"),
    ("data.eval_fraction", lambda c: c.data.eval is None, "data.eval names the held-out rows"),
    ("critic.name", lambda c: c.critic.kind == "separate", "only critic.kind=separate loads a model of its own"),
)


def _ignored(config: Section, root: Node) -> list[Problem]:
    """What was set and would be ignored is refused."""
    problems = []
    for name, used, why in EFFECTS:
        path = tuple(name.split("."))
        node = _get(root, path)
        field = schema_paths(type(config)).get(path)
        if node is not None and field is not None and node.plain != field.default and not used(config):
            problems.append((node.key or node.at, f"{name} would be ignored: {why}; take it out"))
    return problems


def _order(mark: Mark, files: Sequence[Path]) -> tuple[int, int, int]:
    names = [str(file) for file in files]
    rank = names.index(mark.source) if mark.source in names else len(names)
    return rank, mark.line or 0, mark.column or 0
