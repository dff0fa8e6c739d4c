"""Ctrl-C and SIGTERM sent to a real process: the step is finished and saved, exit code 130, and --resume goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tether
from method_cases import config, demonstrations, go, lines, same_weights, unclocked

SOURCE = str(Path(tether.__file__).parents[1])
# Long enough that the signal always meets a running step.
SETTINGS = {"epochs": 20.0, "prompts_per_step": 2, "optim": {"learning_rate": 1e-3}}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on(number, tiny_model_folder, tmp_path):
    data, out = demonstrations(tmp_path), tmp_path / "r"
    made = config("sft", tiny_model_folder, data, out, **SETTINGS)
    from tether.config.load import resolve_yaml

    (tmp_path / "run.yaml").write_text(resolve_yaml(made))
    # A real step of a real model takes longer than one of the tiny model: the signal shall come in the middle of a run.
    slow = (
        "import time, sys\nfrom tether.backends.local import learner\nreal = learner.LocalLearner.optim_step\n"
        "def step(self):\n    time.sleep(0.1)\n    return real(self)\n"
        "learner.LocalLearner.optim_step = step\nfrom tether.cli.main import main\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "sft", "-c", str(tmp_path / "run.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    steps = len(lines(metrics))
    assert process.returncode == 130, errors
    assert f"stopped after step {steps} of 80, saved" in errors and "--resume" in errors
    assert "Traceback" not in output + errors
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{steps:06d}"]
    assert not (out / "final").exists()
    if number == signal.SIGINT:
        go(made, resume=True)
        straight = go(config("sft", tiny_model_folder, data, tmp_path / "straight", **SETTINGS))
        assert same_weights(straight, out) and unclocked(straight) == unclocked(out)
