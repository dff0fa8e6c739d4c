"""(outputs, batch) -> sum and count. Pure: torch, ``core`` and nothing else.

A table per kind of data: the name in a recipe -> the class whose fields are its hyperparameters.
"""

from __future__ import annotations

from tether.losses.average import Average, TokenLoss
from tether.losses.kl import k1, k2, k3, kl_penalty
from tether.losses.policy import PolicyGradient, PolicyLoss, PPOClip
from tether.losses.preference import DPO, PairLoss, Side
from tether.losses.reward import BradleyTerry
from tether.losses.supervised import CrossEntropy
from tether.losses.value import ValueLoss

SUPERVISED: dict[str, type] = {"cross_entropy": CrossEntropy}
REWARD: dict[str, type] = {"bradley_terry": BradleyTerry}
PREFERENCE: dict[str, type] = {"dpo": DPO}
POLICY: dict[str, type] = {"policy_gradient": PolicyGradient, "ppo_clip": PPOClip}

__all__ = [
    "DPO",
    "POLICY",
    "PREFERENCE",
    "REWARD",
    "SUPERVISED",
    "Average",
    "BradleyTerry",
    "CrossEntropy",
    "PPOClip",
    "PairLoss",
    "PolicyGradient",
    "PolicyLoss",
    "Side",
    "TokenLoss",
    "ValueLoss",
    "k1",
    "k2",
    "k3",
    "kl_penalty",
]
