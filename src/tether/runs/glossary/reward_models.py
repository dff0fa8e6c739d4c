"""Metrics of the training of reward models."""

from __future__ import annotations

from tether.runs.glossary.entry import Entry

REWARD_MODELS: dict[str, Entry] = {
    "margin": Entry(
        "mean score of the chosen minus that of the rejected (reward models)",
        "above 0 and rising, with an accuracy that rises too",
        "rising on training rows alone: fewer epochs; growing without end: loss.center",
    ),
    "scores/chosen": Entry(
        "mean score of the chosen completions; only differences mean something, the zero is arbitrary",
        "above scores/rejected",
        "below it: look for swapped labels (tether data inspect)",
    ),
    "scores/rejected": Entry(
        "mean score of the rejected completions; only differences mean something, the zero is arbitrary",
        "below scores/chosen",
        "above it: look for swapped labels (tether data inspect)",
    ),
    "accuracy/best": Entry(
        "share of rankings whose highest score is of a best-ranked completion (reward models from rankings)",
        "above 1 / the number of completions, and rising",
        "below it: look for ranks that count the other way (0 must be the best)",
    ),
    "heads/accuracy_spread": Entry(
        "accuracy of the best head less that of the worst (reward models of several heads); accuracy is of their mean",
        "0 to 0.1, falling",
        "larger: some heads have learned little yet; more epochs, or a higher optim.learning_rate",
    ),
    "heads/disagreement": Entry(
        "mean standard deviation over the heads of a completion's score, less each head's mean of the pair or ranking",
        "well below margin, and higher on eval/ than on training rows",
        "near 0 (a hundredth of margin): the heads are one, and say nothing of doubt; bootstrap, or members",
    ),
    "accuracy/final": Entry(
        "share of completions whose outcome is foretold right at their last token (outcome reward models)",
        "above the share of the commoner label; above accuracy, which counts every token",
        "no better than that share: more data, or a larger model; the steps may not tell",
    ),
    "ties/share": Entry(
        "share of the pairs of a ranking that people call a tie",
        "whatever the data says; steady",
        "0 throughout: plackett_luce or bradley_terry will do",
    ),
    "ties/gap": Entry(
        "mean difference of score between completions that are tied",
        "well under margin",
        "as large as margin: the scores do not know ties; see ties/expected",
    ),
    "ties/expected": Entry(
        "mean probability of a tie that the model gives to a pair (davidson, rao_kupper)",
        "near ties/share",
        "below it: raise loss.nu (or loss.theta); above it: lower it",
    ),
    "probability/right": Entry(
        "mean probability of being right that the model gives to what is right: steps (process), answers (outcome)",
        "above probability/wrong, the gap growing on held-out rows too",
        "not above it: look for swapped labels (tether data inspect)",
    ),
    "probability/wrong": Entry(
        "mean probability of being right that the model gives to what is wrong: steps (process), answers (outcome)",
        "below probability/right, the gap growing on held-out rows too",
        "as high as probability/right: wrong ones are rare or look alike; more of them",
    ),
    "first_error/found": Entry(
        "share of solutions with a wrong step whose first doubted one (probability at most 0.5) is the first wrong one",
        "above 1 / the number of steps, and rising; with first_error/none it makes ProcessBench's F1",
        "near 0 while first_error/none is near 1: the model doubts nothing; more wrong steps in the data",
    ),
    "first_error/none": Entry(
        "share of solutions without a wrong step in which the model doubts no step",
        "rising together with first_error/found",
        "near 0: the model doubts everything; see probability/right",
    ),
}
