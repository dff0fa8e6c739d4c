"""All entries as one table, and the way from a name in ``metrics.jsonl`` to its entry."""

from __future__ import annotations

import re

from tether.runs.glossary.entry import Entry
from tether.runs.glossary.every import EVERY
from tether.runs.glossary.preference import PREFERENCE
from tether.runs.glossary.reward_models import REWARD_MODELS
from tether.runs.glossary.rewards import REWARDS
from tether.runs.glossary.rl import RL

METRICS: dict[str, Entry] = {**EVERY, **REWARD_MODELS, **PREFERENCE, **REWARDS, **RL}

# Other names of the same thing.
SAME = {"kl/ref": "kl/reference", "entropy": "policy/entropy", "rewards/accuracy": "rewards/accuracies"}


def find(name: str) -> Entry | None:
    """The entry of a metric: its own, or that of its family (``time/*``); ``eval/X`` is explained as held-out X, and
    ``reward/NAME.X`` as reward/X, of the part NAME; ``pass@8`` as pass@k."""
    name = re.sub(r"^pass@\d+", "pass@k", SAME.get(name, name))
    family, inner = name.split("/")[0], name.rsplit(".", 1)[-1]
    return METRICS.get(name) or METRICS.get(f"{family}/{inner}") or METRICS.get(f"{family}/*")
