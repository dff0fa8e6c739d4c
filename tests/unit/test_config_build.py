"""Tables of dataclasses: built by name or from the user's own file; what would be ignored is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tether.config.build import build, change
from tether.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Hinge:
    beta: float
    words: tuple[str, ...] = ()
    names: list[str] | None = None
    kind: Literal["hard", "soft"] = "hard"
    score: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")


@dataclass(frozen=True, kw_only=True)
class Plain:
    pass


@dataclass(frozen=True, kw_only=True)
class Row:
    loss: Any
    group_size: int = 1


TABLE = {"hinge": Hinge, "plain": Plain}
TAKES = "(it takes beta, words, names, kind, score); it would be ignored"


def test_a_name_and_its_options() -> None:
    built = build(TABLE, {"type": "hinge", "beta": 2, "words": ("a",), "names": ("b",)}, "loss")
    assert built == Hinge(beta=2.0, words=("a",), names=["b"])
    assert isinstance(built.beta, float)
    assert build(TABLE, "plain", "loss") == Plain()


WRONG: list[tuple[Any, list[str]]] = [
    (
        {"type": "hing"},
        ['loss.type: unknown "hing", did you mean hinge? (known: hinge, plain; or file.py:Class of your own)'],
    ),
    ({"beta": 1}, ["loss.type must name one of hinge, plain, or file.py:Class, got null"]),
    ({"type": 3}, ["loss.type must name one of hinge, plain, or file.py:Class, got 3"]),
    ("hinge", ["loss: hinge needs beta"]),
    ({"type": "hinge", "bata": 1, "beta": 1}, [f'loss: unknown key "bata" for hinge, did you mean beta? {TAKES}']),
    ({"type": "plain", "beta": 1}, ['loss: unknown key "beta" for plain (it takes none); it would be ignored']),
    ({"type": "hinge", "beta": "x"}, ['loss.beta must be a number, got "x"']),
    ({"type": "hinge", "beta": True}, ["loss.beta must be a number, got true"]),
    ({"type": "hinge", "beta": 1, "kind": "so"}, ['loss.kind must be one of "hard", "soft", got "so"']),
    ({"type": "hinge", "beta": -1}, ["loss: beta must be > 0, got -1.0"]),
    (
        {"type": "hinge", "beat": 1, "words": 3},
        [
            f'loss: unknown key "beat" for hinge, did you mean beta? {TAKES}',
            "loss.words must be a list of text, got 3",
            "loss: hinge needs beta",
        ],
    ),
]


@pytest.mark.parametrize(("spec", "lines"), WRONG, ids=[lines[0][:45] for _, lines in WRONG])
def test_what_is_wrong_is_told(spec: Any, lines: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(TABLE, spec, "loss")
    assert str(caught.value).splitlines() == lines


OWN = """from __future__ import annotations
from dataclasses import dataclass
@dataclass(frozen=True, kw_only=True)
class Mine:
    beta: float = 1.0
class NoDataclass: pass
def function(): pass
"""


def test_a_class_of_the_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "my_own_losses.py"
    file.write_text(OWN)
    built = build(TABLE, {"type": f"{file}:Mine", "beta": 3}, "loss")
    assert (type(built).__name__, built.beta) == ("Mine", 3.0)
    # The same file twice is the same class.
    assert build(TABLE, {"type": f"{file}:Mine", "beta": 3}, "loss") == built
    with pytest.raises(UserError, match=r'unknown key "bta".*did you mean beta\?'):
        build(TABLE, {"type": f"{file}:Mine", "bta": 3}, "loss")


def test_a_file_named_like_a_known_module_shadows_nothing(tmp_path: Path) -> None:
    import json

    file = tmp_path / "json.py"
    file.write_text(OWN)
    assert type(build({}, f"{file}:Mine", "loss")).__name__ == "Mine"
    assert sys.modules["json"] is json


def test_a_module_in_the_folder_where_the_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert type(build({}, "my_module_losses:Mine", "loss")).__name__ == "Mine"
    assert sys.path == before


def test_what_is_wrong_with_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "own_losses.py"
    file.write_text(OWN)
    broken = tmp_path / "broken_losses.py"
    broken.write_text("1 / 0\n")
    needs = tmp_path / "needs_losses.py"
    needs.write_text("import not_installed_anywhere\n")
    for name, said in {
        f"{file}:Mie": "has no Mie, did you mean Mine?",
        f"{file}:NoDataclass": "is not a dataclass",
        f"{file}:function": "is not a dataclass",
        f"{tmp_path}/none.py:A": "no such file",
        f"{broken}:A": "can't be loaded: ZeroDivisionError: division by zero",
        f"{needs}:A": "can't be loaded: ModuleNotFoundError: No module named 'not_installed_anywhere'",
        "no_such_module_here:A": "no module no_such_module_here here or installed",
        ":A": "expected file.py:Class",
    }.items():
        with pytest.raises(UserError) as caught:
            build(TABLE, {"type": name}, "loss")
        assert said in str(caught.value)
    assert "broken_losses" not in sys.modules


def test_a_row_is_changed_field_by_field() -> None:
    row = Row(loss=Hinge(beta=1.0, kind="soft"))
    tables = {"loss": TABLE}
    assert change(row, {}, "overrides", tables) == row
    assert change(row, {"group_size": 4}, "overrides", tables) == Row(loss=row.loss, group_size=4)
    # Without a type the row's own loss is changed; with one, another is built.
    assert change(row, {"loss": {"beta": 2}}, "overrides", tables).loss == Hinge(beta=2.0, kind="soft")
    assert change(row, {"loss": {"type": "hinge", "beta": 2}}, "overrides", tables).loss == Hinge(beta=2.0)
    assert change(row, {"loss": "plain"}, "overrides", tables).loss == Plain()


def test_wrong_changes_are_told_all_at_once() -> None:
    row = Row(loss=Hinge(beta=1.0))
    with pytest.raises(UserError) as caught:
        change(row, {"loss": {"bta": 2}, "group_sise": 1, "group_size": "x"}, "overrides", {"loss": TABLE})
    assert str(caught.value).splitlines() == [
        f'overrides.loss: unknown key "bta" for Hinge, did you mean beta? {TAKES}',
        'overrides: unknown key "group_sise" for Row, did you mean group_size? (it takes loss, group_size); '
        "it would be ignored",
        'overrides.group_size must be a whole number, got "x"',
    ]
