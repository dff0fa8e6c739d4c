"""`tether explain METRIC`: the glossary, as text."""

from __future__ import annotations

from tether.core.errors import UserError, nearest
from tether.runs.glossary import METRICS, find


def explain(metric: str | None) -> str:
    """What a metric means, its healthy range and what to do; all names and meanings where ``metric`` is None."""
    if metric is None:
        width = max(map(len, METRICS))
        return "\n".join(f"{name:<{width}}  {entry.meaning}" for name, entry in METRICS.items())
    entry = find(metric)
    if entry is None:
        known = nearest(metric, list(METRICS))
        raise UserError(f'no metric "{metric}"{known} (`tether explain` lists all)')
    return f"{metric}\n  meaning  {entry.meaning}\n  healthy  {entry.healthy}\n  action   {entry.action}"
