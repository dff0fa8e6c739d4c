"""Progress: plain lines without a terminal, a panel with one, warnings once, hostile text literally."""

import io

import pytest

from tether.runs import progress as module
from tether.runs.progress import Progress, duration, number, split_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(4, "PPO", stream=out) as progress:
        now[0] = 10.0
        progress.step(1, {"grad_norm": 1.0, "reward/mean": 0.25}, {"sample": 7.5, "train": 2.5})
        progress.note("careful")
        progress.note("careful")
        progress.say("saved [bold]x[/bold]")
    assert out.getvalue().splitlines() == [
        "PPO 1/4  reward/mean 0.25  grad_norm 1  10.0s: sample 75% train 25%  30s left",
        "note: careful",
        "saved [bold]x[/bold]",
    ]


def test_a_resumed_run_estimates_from_its_own_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(10, "SFT", stream=io.StringIO())
    assert progress.remaining() is None
    progress.start_at(6)
    now[0] = 102.0
    progress.step(7, {}, {})
    assert progress.remaining() == pytest.approx(6.0)


def test_quiet_says_warnings_only():
    out = io.StringIO()
    with Progress(2, "PPO", quiet=True, stream=out) as progress:
        progress.step(1, {"reward/mean": 1}, {})
        progress.say("hello")
        progress.note("careful")
    assert out.getvalue() == "note: careful\n"


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_a_panel_and_no_color_is_honoured(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    with Progress(2, "PPO [red]run", stream=out) as progress:
        progress.step(1, {"reward/mean": 0.5}, {"sample": 1.0})
        progress.say("a [b]line[/b]")
    text = out.getvalue()
    assert "PPO [red]run" in text and "reward/mean" in text and "0.5" in text and "a [b]line[/b]" in text
    assert "sample 100%" in text and "1/2" in text and "GiB" in text
    assert ("\x1b[36m" in text) is not no_color  # the cyan border


def test_words_for_numbers():
    assert [duration(s) for s in (0.4, 59.6, 190, 7500)] == ["0s", "1m00s", "3m10s", "2h05m"]
    assert [number(v) for v in (None, float("nan"), 1e-5, 0.123456, 1234.6)] == ["-", "-", "1e-05", "0.1235", "1235"]
    assert split_line({}) == "" and split_line({"a": 1.0, "b": 3.0}) == "4.0s: b 75% a 25%"


def test_headline_puts_the_reward_before_the_loss():
    shown = module.headline({"x": 1.0, "loss": 2.0, "reward/mean": 3.0})
    assert [name for name, _ in shown] == ["reward/mean", "loss", "x"]
