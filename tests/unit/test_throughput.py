"""The throughput line: tokens of a phase over the seconds of that phase, arithmetic over the ceiling, one last line."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from method_cases import config, go, lines, questions, reward_file
from tether.backends.local import ceiling
from tether.core.errors import NumericStop
from tether.reports.run import run_report
from tether.runs import progress
from tether.runs.folder import RunFolder
from tether.runs.glossary import find
from tether.runs.throughput import Throughput, of_steps
from tether.training.session import Session

FAKE = {"seconds": {"sample": 4.0, "update": 2.0, "save": 1.0}, "trained": 600, "sampled": 100, "flops": 3e9}


def test_each_speed_is_over_its_own_phase():
    assert Throughput(**FAKE, ceiling=6e9).metrics() == {
        "throughput/trained_tokens_per_s": 300.0,
        "throughput/sampled_tokens_per_s": 25.0,
        "throughput/share_of_ceiling": 0.25,
        "throughput/ceiling_gflops": 6.0,
    }
    assert all(find(name) for name in Throughput(**FAKE, ceiling=6e9).metrics())


def test_what_did_not_happen_has_no_speed():
    assert "throughput/sampled_tokens_per_s" not in Throughput(seconds={"update": 1.0}, trained=5).metrics()
    assert Throughput(seconds={"score": 1.0}, ceiling=1e9).metrics() == {}
    assert list(Throughput(**FAKE).metrics()) == ["throughput/trained_tokens_per_s", "throughput/sampled_tokens_per_s"]


def test_the_line():
    assert Throughput(**FAKE, ceiling=6e9).line(3.14) == (
        "trained 300 tokens/s (25% of the matrix-multiply ceiling of 6 GFLOP/s), sampled 25 tokens/s; "
        "7.0s: sample 57% update 29% save 14%; peak 3.1 GiB"
    )
    assert Throughput(**FAKE).line(1.0).startswith("trained 300 tokens/s, sampled 25 tokens/s; 7.0s")
    fast = {**FAKE, "trained": 2_400_000}
    assert "trained 1,200,000 tokens/s (0% of the matrix-multiply ceiling of 612 TFLOP/s)" in Throughput(
        **fast, ceiling=6.12e14
    ).line(1.0)


def test_recorded_steps_add_up_to_what_was_done():
    """Steps of different lengths, one without an update, and a resumed run that found another ceiling."""
    done = [
        Throughput(seconds={"sample": 1.0, "update": 2.0}, trained=100, sampled=10, flops=4e9, ceiling=4e9),
        Throughput(seconds={"sample": 3.0}, sampled=50, ceiling=4e9),
        Throughput(seconds={"sample": 1.0, "update": 6.0}, trained=500, sampled=40, flops=9e9, ceiling=2e9),
    ]
    rows = {
        float(i): {**one.metrics(), **{f"time/{k}": v for k, v in one.seconds.items()}} for i, one in enumerate(done)
    }
    whole = of_steps(rows)
    assert whole.seconds == {"sample": 5.0, "update": 8.0}
    assert (whole.trained, whole.sampled, whole.flops) == pytest.approx((600, 100, 13e9))
    # At the ceilings of their time, 2 s and 6 s would have done this much.
    assert whole.ceiling == pytest.approx((2 * 4e9 + 6 * 2e9) / 8)
    assert of_steps({}).line(1.0) == "peak 1.0 GiB"


class Clockwork:
    """A learner whose step takes 5 s of sampling (20 tokens) and 2 s of updating (100 tokens, 4 GFLOP)."""

    step = 0
    tokens_seen, flops_seen = 1000, 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def one_step(self, session: Session, fail_at: int = 0):
        def step(number: int) -> dict[str, float]:
            if number == fail_at:
                raise NumericStop("enough")
            with session.split("sample"):
                self.now += 5
                session.split.tokens["sample"] += 20
            with session.split("update"):
                self.now += 2
                self.tokens_seen += 100
                self.flops_seen += 4e9
            return {"loss": 1.0}

        return step


def clockwork(
    path: Path, monkeypatch: pytest.MonkeyPatch, out: io.StringIO, **options: Any
) -> tuple[Clockwork, Session]:
    learner = Clockwork(monkeypatch)
    monkeypatch.setattr(progress.sys, "stdout", out)
    folder = RunFolder.create(path / "run", config_yaml="method: rl\n", method="rl", resume=False)

    def save(final: Path) -> None:
        learner.now += 1
        final.mkdir(exist_ok=True)
        (final / "weights").write_text("0")

    session = Session(folder=folder, learner=learner, save_model=save, total_steps=3, title="RL", **options)  # type: ignore[arg-type]
    return learner, session


def test_a_run_records_its_speed_and_sums_up_at_the_end(tmp_path, monkeypatch):
    out = io.StringIO()
    learner, session = clockwork(tmp_path, monkeypatch, out, ceiling=4e9)
    session.run(learner.one_step(session))
    for row in lines(tmp_path / "run" / "metrics.jsonl"):
        assert row["values"]["throughput/trained_tokens_per_s"] == 50
        assert row["values"]["throughput/sampled_tokens_per_s"] == 4
        assert row["values"]["throughput/share_of_ceiling"] == 0.5
        assert "tokens_per_second" not in row["values"]
    last = out.getvalue().splitlines()[-1]
    assert last.startswith(
        "trained 50 tokens/s (50% of the matrix-multiply ceiling of 4 GFLOP/s), sampled 4 tokens/s; "
        "22.0s: sample 68% update 27% save 5%; peak "
    )
    html = run_report(tmp_path / "run")
    assert "Trained 50 tokens/s (50% of the matrix-multiply ceiling of 4 GFLOP/s), sampled 4 tokens/s; 21.0s" in html
    assert "<h3>throughput/share_of_ceiling" in html and "<h3>throughput/ceiling" not in html, "a constant is no curve"


def test_a_run_that_stops_early_sums_up_too_and_one_without_a_ceiling_tells_no_share(tmp_path, monkeypatch):
    out = io.StringIO()
    learner, session = clockwork(tmp_path, monkeypatch, out)
    with pytest.raises(NumericStop):
        session.run(learner.one_step(session, fail_at=3))
    assert out.getvalue().splitlines()[-1].startswith("trained 50 tokens/s, sampled 4 tokens/s; 14.0s: sample 71%")


def test_a_quiet_run_prints_nothing(tmp_path, monkeypatch):
    out = io.StringIO()
    learner, session = clockwork(tmp_path, monkeypatch, out, quiet=True)
    session.run(learner.one_step(session))
    assert out.getvalue() == ""


def test_an_online_run_counts_every_token_it_drew(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tether.methods.parts.matmul_rate", lambda *machine: 1e12)
    given = config(
        "rl",
        tiny_model_folder,
        questions(tmp_path),
        tmp_path / "run",
        algorithm="grpo",
        reward=reward_file(tmp_path, "return [float(len(c)) for c in completions]"),
        steps=2,
        prompts_per_step=2,
        completions_per_prompt=3,
        sampling={"max_new_tokens": 12},
    )
    run = go(given)
    drawn: dict[int, int] = {}
    for row in lines(run / "samples.jsonl"):
        drawn[row["step"]] = drawn.get(row["step"], 0) + row["tokens"]
    for row in lines(run / "metrics.jsonl"):
        numbers = row["values"]
        tokens = numbers["throughput/sampled_tokens_per_s"] * numbers["time/sample"]
        assert tokens == pytest.approx(drawn[row["step"]], rel=0.1)  # recorded seconds are rounded
        assert 0 < numbers["throughput/share_of_ceiling"] < 1 and numbers["throughput/ceiling_gflops"] == 1000


def test_the_ceiling_is_that_of_the_best_product_and_measured_once(monkeypatch):
    """On a machine where our products take 10 ms and PyTorch's own 20 ms, whatever is multiplied."""
    now, products = [0.0], []

    def takes(seconds: float):
        def multiply(x: torch.Tensor, weight: torch.Tensor) -> None:
            now[0] += seconds
            products.append((*x.shape, weight.shape[0]))

        return multiply

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "ones", lambda *shape, **kind: torch.empty(*shape, device="meta"))
    monkeypatch.setattr(ceiling, "product", takes(0.01))
    monkeypatch.setattr(ceiling.nn.functional, "linear", takes(0.02))
    ceiling._matmul_rate.cache_clear()
    cpu = torch.device("cpu")
    try:
        assert ceiling.matmul_rate(cpu, torch.float32, 64) == pytest.approx(2 * 2048**3 / 0.01)
        assert set(products) == {(1024, 64, 256), (2048, 2048, 2048)}
        count = len(products)
        assert ceiling.matmul_rate(cpu, torch.float32, 64) and len(products) == count
        assert ceiling.matmul_rate(cpu, torch.float32, 4096) == pytest.approx(2 * 1024 * 4096 * 4 * 4096 / 0.01)
    finally:
        ceiling._matmul_rate.cache_clear()
