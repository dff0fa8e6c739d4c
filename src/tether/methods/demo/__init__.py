"""The demo: the whole of RLHF on a real model, on questions of its own, with a disclosed simulated judge."""

from __future__ import annotations

from pathlib import Path


def run(*, out: str | None, quick: bool, overoptimise: bool, seed: int) -> Path:
    """Sample, compare, train a reward model, PPO, DPO, evaluate, report. Returns the path of report.html."""
    from tether.methods.demo.pipeline import run as run_pipeline

    return run_pipeline(out=out, quick=quick, overoptimise=overoptimise, seed=seed)
