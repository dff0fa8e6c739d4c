"""What judges were asked in runs without training steps: a row of metrics.jsonl for each time the command ran."""

from __future__ import annotations

from collections.abc import Mapping

from tether.rewards.meter import added
from tether.runs.folder import RunFolder
from tether.runs.log import MetricsLog, read_lines


def record(folder: RunFolder, counts: Mapping[str, float]) -> dict[str, float]:
    """Adds ``counts`` as the next step; returns the sums over every time the command ran in this folder."""
    before = [row["values"] for row in read_lines(folder.metrics).rows]
    if counts:
        metrics = MetricsLog(folder.metrics)
        metrics.append(len(before) + 1, "train", counts)
        metrics.close()
    return added([*before, counts])
