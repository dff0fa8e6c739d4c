"""(outputs, batch) -> sum and count. Pure: torch, ``core`` and nothing else.

A table per kind of data: the name in a recipe -> the class whose fields are its hyperparameters.
"""

from __future__ import annotations

from tether.losses.average import Average, TokenLoss
from tether.losses.heads import MultiHead
from tether.losses.kl import k1, k2, k3, kl_penalty
from tether.losses.policy import CISPO, GSPO, ClippedRatio, PolicyGradient, PPOClip
from tether.losses.policy_base import PolicyLoss
from tether.losses.preference import DPO, DifferenceLoss, LogRatioLoss, PairLoss, Side
from tether.losses.preference_likelihood import CPO, ORPO, SimPO
from tether.losses.preference_ratios import EXO, IPO, NCA, APODown, APOZero, RobustDPO, SLiC
from tether.losses.reward import BradleyTerry
from tether.losses.reward_rankings import Davidson, PlackettLuce, RankingLoss, RaoKupper
from tether.losses.reward_tokens import Outcome, Process, RightnessLoss
from tether.losses.supervised import CrossEntropy
from tether.losses.unpaired import KTO, UnpairedLoss, kl_baseline, mismatched
from tether.losses.value import ValueLoss

SUPERVISED: dict[str, type] = {"cross_entropy": CrossEntropy}
REWARD: dict[str, type] = {
    "bradley_terry": BradleyTerry,
    "davidson": Davidson,
    "rao_kupper": RaoKupper,
    "plackett_luce": PlackettLuce,
    "outcome": Outcome,
    "process": Process,
}
PREFERENCE: dict[str, type] = {
    "dpo": DPO,
    "robust_dpo": RobustDPO,
    "ipo": IPO,
    "slic": SLiC,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "exo": EXO,
    "nca": NCA,
}
UNPAIRED: dict[str, type] = {"kto": KTO}
POLICY: dict[str, type] = {
    "policy_gradient": PolicyGradient,
    "ppo_clip": PPOClip,
    "gspo": GSPO,
    "cispo": CISPO,
}

__all__ = [
    "CISPO",
    "CPO",
    "DPO",
    "EXO",
    "GSPO",
    "IPO",
    "KTO",
    "NCA",
    "ORPO",
    "POLICY",
    "PREFERENCE",
    "REWARD",
    "SUPERVISED",
    "UNPAIRED",
    "APODown",
    "APOZero",
    "Average",
    "BradleyTerry",
    "ClippedRatio",
    "CrossEntropy",
    "Davidson",
    "DifferenceLoss",
    "LogRatioLoss",
    "MultiHead",
    "Outcome",
    "PPOClip",
    "PairLoss",
    "PlackettLuce",
    "PolicyGradient",
    "PolicyLoss",
    "Process",
    "RankingLoss",
    "RaoKupper",
    "RightnessLoss",
    "RobustDPO",
    "SLiC",
    "Side",
    "SimPO",
    "TokenLoss",
    "UnpairedLoss",
    "ValueLoss",
    "k1",
    "k2",
    "k3",
    "kl_baseline",
    "kl_penalty",
    "mismatched",
]
