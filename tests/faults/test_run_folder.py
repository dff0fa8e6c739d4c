"""Kills and second owners: a checkpoint is whole or not there, and a dead owner blocks nobody."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tether.core.errors import StorageError, UserError
from tether.runs.checkpoints import latest, verify
from tether.runs.folder import RunFolder
from tether.runs.log import MetricsLog, read_lines
from tether.runs.storage import sweep

# Saves as fast as it can, with torn-prone metrics beside; prints each step once it is saved.
SAVER = """
import sys
from pathlib import Path
from tether.runs.checkpoints import latest, save
from tether.runs.folder import RunFolder
from tether.runs.log import MetricsLog

folder = RunFolder.create(Path(sys.argv[1]), config_yaml="a: 1", method="sft", resume=True)
found = latest(folder, lambda text: None)
step = found.step if found else 0
log = MetricsLog(folder.metrics)
while True:
    step += 1
    log.append(step, "train", {"loss": 1.0})
    save(folder, step, lambda p: [(p / f"w{i}").write_bytes(bytes(50_000)) for i in range(3)] and None,
         {"step": step}, keep=1)
    print(step, flush=True)
"""


def start(path, code=SAVER):
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


def test_kill_9_at_any_instant_of_saving_and_pruning(tmp_path):
    chance = random.Random(0)
    path, reached = tmp_path / "run", 0
    for _ in range(8):
        process = start(path)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().splitlines()] or [first]
        process.wait()
        with RunFolder.create(path, config_yaml="a: 1", method="sft", resume=True) as folder:
            found = latest(folder, lambda text: pytest.fail(text) if "damaged" in text else None)
            assert found is not None and found.step >= max(reached, said[-1]) and found.state == {"step": found.step}
            assert verify(found.path) == []
            MetricsLog(folder.metrics).close()
            assert read_lines(folder.metrics).rows[-1]["step"] >= found.step
            reached = found.step
            left = [p.name for p in folder.checkpoints.iterdir() if p.name.startswith(".")]
            assert left == [], "what the kill left is swept"


HOLDER = """
import sys, time
from pathlib import Path
from tether.runs.folder import RunFolder
folder = RunFolder.create(Path(sys.argv[1]), config_yaml="a: 1", method="sft", resume=False)
print("held", flush=True)
time.sleep(60)
"""


def test_a_live_owner_is_refused_by_name_and_a_dead_one_is_taken_over(tmp_path):
    path = tmp_path / "run"
    process = start(path, HOLDER)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is in .*pid {process.pid} on host "):
        RunFolder.create(path, config_yaml="a: 1", method="sft", resume=True)
    process.kill()
    process.wait()
    with RunFolder.create(path, config_yaml="a: 1", method="sft", resume=True) as folder:
        assert any(f"pid {process.pid}" in note and "taken over" in note for note in folder.notes)
        with pytest.raises(UserError, match=f"pid {os.getpid()}"):
            RunFolder.create(path, config_yaml="a: 1", method="sft", resume=True)
    with RunFolder.create(path, config_yaml="a: 1", method="sft", resume=True) as folder:
        assert folder.notes == ()


def test_a_replaced_folder_comes_back_when_its_replacement_was_not_finished(tmp_path):
    (tmp_path / ".old-step-000001").mkdir()
    (tmp_path / ".old-step-000001" / "x").write_text("x")
    (tmp_path / ".tmp-step-000001").mkdir()
    (tmp_path / ".trash-step-000000").mkdir()
    done = sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"] and len(done) == 3


def test_a_row_on_a_full_disk_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, "train", {"loss": 1.0})
    write, calls = os.write, []

    def half_then_full(handle, data):
        calls.append(len(data))
        if len(calls) == 1:
            return write(handle, data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="not enough space"):
        patch.setattr(os, "write", half_then_full)
        log.append(2, "train", {"loss": 1.0})
    assert len(calls) == 2
    log.append(3, "train", {"loss": 1.0})
    lines = read_lines(log.path)
    assert [row["step"] for row in lines.rows] == [1, 3] and lines.notes == ()
