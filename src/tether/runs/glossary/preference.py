"""Metrics of preference objectives, of DPO to KTO, and of the pairs of online rounds."""

from __future__ import annotations

from tether.runs.glossary.entry import Entry

PREFERENCE: dict[str, Entry] = {
    "pairs/made": Entry(
        "pairs of best and worst answer that a round trained on",
        "near the number of prompts of a round",
        "few: see pairs/tied; more rounds.completions, or a reward that tells answers apart",
    ),
    "pairs/tied": Entry(
        "pairs left out of a round because best and worst scored alike",
        "few, and not rising",
        "many: the reward can't tell the answers apart, or all are alike; raise sampling.temperature",
    ),
    "pairs/gap": Entry(
        "mean reward of the chosen minus that of the rejected over a round's pairs",
        "well above 0, shrinking as the policy settles",
        "near 0: the pairs say little; more rounds.completions",
    ),
    "rewards/chosen": Entry(
        "beta (log policy - log reference) of the chosen completions: DPO's implicit reward",
        "above rewards/rejected; its own sign matters less",
        "falling far below 0: lower optim.learning_rate, add an SFT term, or train SFT on the chosen rows first",
    ),
    "rewards/rejected": Entry(
        "beta (log policy - log reference) of the rejected completions",
        "falling, below rewards/chosen",
        "not falling: raise optim.learning_rate, or the pairs are too alike (tether data inspect)",
    ),
    "rewards/margins": Entry(
        "rewards/chosen minus rewards/rejected",
        "rising from 0; 0.5 to 3 at the end",
        "far larger: memorising; fewer epochs or a larger beta",
    ),
    "rewards/accuracies": Entry(
        "share of pairs with rewards/chosen above rewards/rejected",
        "0 at the first step for ties, then 0.6 to 0.9",
        "below 0.5: chosen and rejected may be swapped; near 1 early: look for a give-away such as length",
    ),
    "logps/chosen": Entry(
        "log-probability of the chosen completions under the policy, summed over tokens, in nats",
        "often falls a little even when DPO works, as long as logps/rejected falls faster",
        "falling fast: a lower optim.learning_rate, an SFT term on the chosen side, or smaller beta steps",
    ),
    "logps/rejected": Entry(
        "log-probability of the rejected completions under the policy, summed over tokens, in nats",
        "falling faster than logps/chosen",
        "as for logps/chosen",
    ),
    "rewards/desirable": Entry(
        "beta (log policy - log reference) of the desirable completions, summed over tokens (kto)",
        "above rewards/undesirable and rising",
        "falling with rewards/undesirable: lower optim.learning_rate, or raise loss.desirable_weight",
    ),
    "rewards/undesirable": Entry(
        "beta (log policy - log reference) of the undesirable completions, summed over tokens (kto)",
        "below rewards/desirable and falling",
        "not falling: raise optim.learning_rate or loss.undesirable_weight; swapped labels: tether data inspect",
    ),
    "kl/baseline": Entry(
        "KL(policy || reference) that judgements are measured against, from mismatched pairs, in nats (kto)",
        "0 at the first step, then small and noisy; never below 0",
        "far above 10: lower optim.learning_rate or raise loss.beta; always 0: more prompts_per_step",
    ),
    "nll/chosen": Entry(
        "negative log-likelihood of the chosen completions, nats per token, mean over pairs (loss.nll_weight)",
        "falling or level",
        "rising: raise loss.nll_weight or lower optim.learning_rate",
    ),
}
