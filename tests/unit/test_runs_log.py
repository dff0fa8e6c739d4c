"""metrics.jsonl and samples.jsonl: whole lines, nulls for NaN, torn ends dropped and said, cut back on resume."""

import json
import math

import pytest
import torch

from tether.core.errors import DataError, StorageError
from tether.runs.clock import Split, peak_memory_bytes
from tether.runs.log import MetricsLog, SamplesLog, cut_to, offsets, read_lines


def test_rows_are_written_and_read_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, "train", {"loss": 0.5, "kl": math.nan, "max": math.inf, "n": torch.tensor(3)})
    row = read_lines(log.path).rows[0]
    assert row["step"] == 1 and row["split"] == "train"
    assert row["values"] == {"loss": 0.5, "kl": None, "max": None, "n": 3}
    assert row["time"].endswith("+00:00") and row["seconds"] >= 0
    assert "NaN" not in log.path.read_text()
    log.close()


def test_samples_keep_any_text(tmp_path):
    log = SamplesLog(tmp_path / "samples.jsonl")
    text = 'one\ntwo\u2028three "quoted" \ud800 é'
    log.append(1, "eval", {"completion": text, "parts": {"a": math.nan}})
    assert len(log.path.read_bytes().splitlines()) == 1
    row = read_lines(log.path).rows[0]
    assert row["completion"] == text.replace("\ud800", "?") and row["parts"] == {"a": None}


def test_a_torn_last_line_is_dropped_and_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "val')
    lines = read_lines(path)
    assert lines.rows == ({"step": 1},) and "metrics.jsonl:2: the last line is torn (16 bytes)" in lines.notes[0]
    log = MetricsLog(path)
    assert "16 bytes" in log.notes[0]
    log.append(2, "train", {})
    assert [r["step"] for r in read_lines(path).rows] == [1, 2] and read_lines(path).notes == ()


@pytest.mark.parametrize(("bad", "where"), [("{nope}", "2:2"), ("[1]", "2:1"), ("\xff", "2:1")])
def test_a_bad_line_inside_is_an_error_with_its_place(tmp_path, bad, where):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bad.encode("latin-1") + b'\n{"a": 2}\n')
    with pytest.raises(DataError, match=f"m.jsonl:{where}"):
        read_lines(path)


def test_cut_back_to_a_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, "train", {"a": 1})
    at = json.loads(json.dumps(offsets([log])))
    log.append(2, "train", {"a": 2})
    log.close()
    assert "cut off" in cut_to(tmp_path, at)[0]
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl").rows] == [1]
    assert cut_to(tmp_path, at) == []
    with pytest.raises(StorageError, match="rows were lost"):
        cut_to(tmp_path, {"metrics.jsonl": 10**6})


def test_a_missing_log_has_no_rows(tmp_path):
    assert read_lines(tmp_path / "none").rows == ()


def test_split_counts_each_second_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    split = Split()
    with split("sample"):
        now[0] += 2
        with split("score"):
            now[0] += 3
        now[0] += 1
    with split("score"):
        now[0] += 4
    assert split.take() == {"sample": 3, "score": 7} and split.take() == {}
    assert split.total == {"sample": 3, "score": 7}


def test_peak_memory_is_in_bytes():
    assert 10 * 2**20 < peak_memory_bytes() < 2**40
