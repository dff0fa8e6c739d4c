"""Every metric a run writes: what it means, what is healthy, what to do when it is not. A file for each kind of run."""

from tether.runs.glossary.entry import Entry
from tether.runs.glossary.lookup import METRICS, SAME, find

__all__ = ["METRICS", "SAME", "Entry", "find"]
