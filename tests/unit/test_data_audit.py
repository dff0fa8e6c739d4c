"""What the audit says of data whose faults are planted."""

from __future__ import annotations

import json

import pytest

from tether.core.errors import DataError
from tether.data.audit import audit, detect, percentiles
from tether.data.readers import read
from tether.methods import inspect


def write(folder, rows, name="rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(file)


def pairs(*sides):
    return [{"prompt": f"p{i}", "chosen": c, "rejected": r} for i, (c, r) in enumerate(sides)]


def audit_of(folder, rows, kind="preferences"):
    return audit(read(write(folder, rows), kind))


def test_a_length_give_away_is_a_warning(tmp_path):
    found = audit_of(tmp_path, pairs(*[(f"long answer {i}", f"a {i}") for i in range(9)], ("b", "ccc")))
    assert any("chosen is longer in 90.0%, shorter in 10.0%" in w for w in found.warnings)


def test_even_lengths_are_a_finding_only(tmp_path):
    found = audit_of(tmp_path, pairs(("aa", "b"), ("c", "dd")))
    assert found.warnings == ("chosen begins with 'aa' 50% of all pairs more often than the other side",)
    assert any("longer in 50.0%" in f for f in found.findings)


def test_an_opening_word_give_away_is_a_warning(tmp_path):
    found = audit_of(tmp_path, pairs(*[(f"Sure {i:03d}", f"w{i} nope") for i in range(10)]))
    assert any("chosen begins with 'Sure' 100%" in w for w in found.warnings)


def test_doubles_and_contradictions_are_counted(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    found = audit_of(tmp_path, [row, row, {**row, "chosen": "b", "rejected": "a"}])
    assert any(w.startswith("1 of 3 records are exact doubles") for w in found.warnings)
    assert any(w.startswith("1 pairs stand in both orders") for w in found.warnings)
    assert any("1 different prompts; the most frequent one stands 3 times" in f for f in found.findings)


def test_lengths_are_percentiles_that_occur(tmp_path):
    assert percentiles(list(range(1, 101))) == (1, 50, 90, 99, 100)
    assert percentiles([7]) == (7, 7, 7, 7, 7)
    found = audit_of(tmp_path, pairs(("a", "bbb"), ("aa", "bbbb")))
    assert found.characters["chosen"] == (1, 1, 2, 2, 2)
    assert found.characters["rejected"] == (3, 3, 4, 4, 4)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "preferences"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "demonstrations"),
        ({"instruction": "a", "output": "b"}, "demonstrations"),
        ({"prompt": "a", "answer": "3"}, "prompts"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]}, "rankings"),
        ({"prompt": "a", "completion": "b", "label": True}, "judgements"),
        ({"prompt": "a", "steps": ["b"], "first_error": 0}, "steps"),
    ],
)
def test_kinds_are_told_from_columns(tmp_path, row, kind, capsys):
    path = write(tmp_path, [row, "{", row])
    schema = detect(path)
    assert schema.kind == kind and set(schema.columns) == set(row)
    inspect.run(path, model=None, rows=1)
    shown = capsys.readouterr().out
    assert f"3 rows, read as {kind}" in shown.replace("\n", "")
    assert "1 of 3 rows kept out (33.33%)" in shown and "not JSON" in shown
    assert "rows:1" in shown and "rows:3" not in shown


def test_columns_nobody_knows_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"can't tell what these rows are \(colour, size\)"):
        detect(write(tmp_path, [{"colour": "red", "size": 3}]))


def test_inspect_survives_a_file_without_a_good_row(tmp_path, capsys):
    path = write(tmp_path, pairs(("a", "a"), ("", "b")))
    inspect.run(path, model=None, rows=3)
    shown = capsys.readouterr().out
    assert "2 of 2 rows kept out" in shown and "equal sides" in shown and "empty side" in shown


def test_markup_in_the_data_is_shown_as_it_is(tmp_path, capsys):
    inspect.run(write(tmp_path, pairs(("[bold]a[/bold] [/x]", "b"))), model=None, rows=1)
    assert "[bold]a[/bold] [/x]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "the cat", "chosen": "q", "rejected": "zzz"}, ["prompt", "chosen", "rejected"]),
        ({"prompt": "the cat"}, ["prompt"]),
        ({"prompt": "the cat", "completions": ["q", "zz"], "ranks": [0, 1]}, ["prompt", "completion"]),
        ({"prompt": "the cat", "completions": ["q", "zz"], "labels": [True, False]}, ["prompt", "step"]),
    ],
)
def test_token_lengths_are_those_of_training(tmp_path, row, parts, tiny_model_folder, capsys):
    inspect.run(write(tmp_path, [row]), model=str(tiny_model_folder), rows=0)
    shown = capsys.readouterr().out.partition("Length in tokens")[2]
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("│")] == parts
