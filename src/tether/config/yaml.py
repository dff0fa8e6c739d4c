"""YAML that remembers where everything stood.

Read with YAML 1.2's core schema: ``1e-5`` is a number, ``on``, ``off``, ``yes`` and ``no`` are text, ``0o17`` is 15.
Duplicate keys, tags, anchors and aliases are refused. Every problem of a file is collected, none stops the reading
except broken syntax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml import events

Scalar = str | int | float | bool | None

COMMAND_LINE = "command line"
MAX_DEPTH = 50

INT = re.compile(r"[-+]?[0-9]+")
OCTAL = re.compile(r"0o[0-7]+")
HEX = re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
NAN = re.compile(r"\.(nan|NaN|NAN)")
NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place a person can go to: ``run.yaml:6:3`` (line and column from 1), or ``command line``."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A value with its place. ``value``: a scalar, a list of nodes, or a dict of nodes; ``key`` is its key's place."""

    value: Scalar | list[Node] | dict[str, Node]
    at: Mark
    key: Mark | None = None

    @property
    def plain(self) -> Any:
        """The value as Python objects; lists become tuples, because what is loaded is frozen."""
        if isinstance(self.value, dict):
            return {name: node.plain for name, node in self.value.items()}
        if isinstance(self.value, list):
            return tuple(node.plain for node in self.value)
        return self.value


class _UnreadableError(Exception):
    """The rest of this text can't be read."""


@dataclass
class _Reader:
    """Builds nodes out of PyYAML's events; collects ``problems``."""

    source: str
    problems: list[str] = field(default_factory=list)

    def mark(self, place: yaml.Mark) -> Mark:
        if self.source == COMMAND_LINE:
            return Mark(COMMAND_LINE)
        return Mark(self.source, place.line + 1, place.column + 1)

    def document(self, text: str) -> Node | None:
        """The one document in ``text``; None where it is empty."""
        stream = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        root = None
        documents = 0
        for event in stream:
            if isinstance(event, events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _UnreadableError(
                        f"{self.mark(event.start_mark)}: a second document (---); a config file holds one"
                    )
                root = self.node(next(stream), stream, depth=0)
        return root

    def node(self, event: Any, stream: Iterator[Any], depth: int) -> Node:
        at = self.mark(event.start_mark)
        if depth > MAX_DEPTH:
            raise _UnreadableError(f"{at}: nested more than {MAX_DEPTH} deep")
        if isinstance(event, events.AliasEvent):
            self.problems.append(f"{at}: aliases (*{event.anchor}) are not read; write the value out")
            return Node(value=None, at=at)
        if event.anchor is not None:
            self.problems.append(f"{at}: anchors (&{event.anchor}) are not read; write the value out")
        if event.tag is not None:
            self.problems.append(f"{at}: tags ({event.tag}) are not read; write a plain value")
        if isinstance(event, events.ScalarEvent):
            quoted = event.style is not None or event.tag is not None
            return Node(value=event.value if quoted else self.scalar(event.value, at), at=at)
        if isinstance(event, events.SequenceStartEvent):
            return Node(value=self.items(stream, depth), at=at)
        return Node(value=self.pairs(stream, depth), at=at)

    def items(self, stream: Iterator[Any], depth: int) -> list[Node]:
        items = []
        while not isinstance(event := next(stream), events.SequenceEndEvent):
            items.append(self.node(event, stream, depth + 1))
        return items

    def pairs(self, stream: Iterator[Any], depth: int) -> dict[str, Node]:
        pairs: dict[str, Node] = {}
        while not isinstance(event := next(stream), events.MappingEndEvent):
            key = self.node(event, stream, depth + 1)
            node = self.node(next(stream), stream, depth + 1)
            name = key.value
            if not isinstance(name, str):
                self.problems.append(f"{key.at}: a key must be text, got {show(key.plain)}")
            elif name in pairs:
                self.problems.append(f'{key.at}: duplicate key "{name}", first given at {pairs[name].key}; remove one')
            else:
                pairs[name] = Node(value=node.value, at=node.at, key=key.at)
        return pairs

    def scalar(self, text: str, at: Mark) -> Scalar:
        try:
            return resolve(text)
        except ValueError:  # Python refuses integers of thousands of digits
            self.problems.append(f"{at}: a number of {len(text)} digits is not read")
            return None


def resolve(text: str) -> Scalar:
    """What an unquoted scalar means in YAML 1.2's core schema (§10.3.2)."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text):
        return int(text)
    if OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if HEX.fullmatch(text):
        return int(text[2:], 16)
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITE.fullmatch(text):
        return float("-inf") if text[0] == "-" else float("inf")
    return float("nan") if NAN.fullmatch(text) else text


def show(value: Any) -> str:
    """A value as it would be written in YAML, cut to a readable length."""
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, tuple | list):
        text = "[" + ", ".join(show(v) for v in value) + "]"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str):
        text = f'"{value}"'
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse(text: str, source: str, problems: list[str]) -> Node | None:
    """The node of one YAML document; None where it is empty or unreadable. Adds to ``problems``."""
    reader = _Reader(source, problems)
    try:
        return reader.document(text)
    except _UnreadableError as error:
        problems.append(str(error))
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        problems.append(f"{reader.mark(place) if place else source}: not YAML: {said}")
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        at = Mark(source, before.count("\n") + 1, error.position - before.rfind("\n"))
        problems.append(f"{at}: the character {chr(int(error.character))!r} is not allowed in YAML; remove it")
    return None


def read(path: Path, problems: list[str]) -> Node:
    """The mapping in a file. A file that is missing or holds something else adds to ``problems``."""
    empty = Node(value={}, at=Mark(str(path), 1, 1))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problems.append(f"{path}: no such config file; `tether recipes ls` lists ready ones")
        return empty
    except IsADirectoryError:
        problems.append(f"{path}: a folder, not a config file")
        return empty
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8")
        return empty
    except OSError as error:
        problems.append(f"{path}: can't be read: {error.strerror}")
        return empty
    node = parse(text, str(path), problems)
    if node is None or node.value is None:
        return empty
    if not isinstance(node.value, dict):
        problems.append(f"{node.at}: a config file is a mapping (key: value), got {show(node.plain)}")
        return empty
    return node


def override(text: str, problems: list[str]) -> tuple[tuple[str, ...], Node] | None:
    """``key.path=value`` -> path and node. The value is a scalar, ``[a, b]``, ``{a: 1}`` or quoted text."""
    path, equals, value = text.partition("=")
    names = tuple(path.strip().split("."))
    if not equals or not all(names):
        problems.append(f"{COMMAND_LINE}: expected key.path=value, got {show(text)}")
        return None
    value = value.strip()
    here = Mark(COMMAND_LINE)
    if value[:1] in ("[", "{", '"', "'"):
        node = parse(value, COMMAND_LINE, problems)
        return None if node is None else (names, Node(value=node.value, at=here, key=here))
    # Anything else is one plain scalar as it stands, so that `data.system=Be kind: always # and brief` needs no quotes.
    reader = _Reader(COMMAND_LINE, problems)
    return names, Node(value=reader.scalar(value, here), at=here, key=here)


def from_plain(value: Any, at: Mark) -> Node:
    """Python objects as nodes, all at one place."""
    if isinstance(value, Mapping):
        return Node(value={name: from_plain(v, at) for name, v in value.items()}, at=at, key=at)
    if isinstance(value, list | tuple):
        return Node(value=[from_plain(v, at) for v in value], at=at)
    return Node(value=value, at=at, key=at)


def merge(below: Node, above: Node) -> Node:
    """``above`` over ``below``: mappings merge key by key, anything else is replaced."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for name, node in above.value.items():
        merged[name] = merge(merged[name], node) if name in merged else node
    return Node(value=merged, at=above.at if above.at.line is not None else below.at, key=above.key or below.key)


def assign(root: Node, path: Sequence[str], node: Node) -> Node:
    """``root`` with the value at ``path`` set: a mapping on the command line replaces, it does not merge."""
    if not path:
        return node
    here = root.value if isinstance(root.value, dict) else {}
    old = here.get(path[0], Node(value={}, at=node.at, key=node.key))
    return Node(value={**here, path[0]: assign(old, path[1:], node)}, at=root.at, key=root.key)


class _Dumper(yaml.SafeDumper):
    """Quotes text by the rules it will be read back with, which are not PyYAML's YAML 1.1 rules."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012 (PyYAML's own)
        None: [
            ("tag:yaml.org,2002:null", re.compile(f"(?:{NULL.pattern})$")),
            ("tag:yaml.org,2002:bool", re.compile(f"(?:{BOOL.pattern})$")),
            ("tag:yaml.org,2002:int", re.compile(f"(?:{INT.pattern}|{OCTAL.pattern}|{HEX.pattern})$")),
            ("tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern}|{INFINITE.pattern}|{NAN.pattern})$")),
        ]
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Quoted with escapes where a character is a kind of line break or can't be seen: PyYAML folds some of them away.
_Dumper.add_representer(
    str,
    lambda dumper, data: dumper.represent_scalar(
        "tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"'
    ),
)
_Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data))
_Dumper.add_representer(
    float,
    lambda dumper, data: dumper.represent_scalar(
        "tag:yaml.org,2002:float",
        repr(data) if abs(data) < float("inf") else ".nan" if data != data else ".inf" if data > 0 else "-.inf",
    ),
)


def dump(value: Mapping[str, Any]) -> str:
    """Block-style YAML that reads back as the same values."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
