"""Metrics of every run: the step, its speed, and held-out rows."""

from __future__ import annotations

from tether.runs.glossary.entry import Entry

EVERY: dict[str, Entry] = {
    "loss": Entry(
        "what the optimizer minimises; for policy losses a surrogate whose level means nothing",
        "falling for sft, reward and preference; anywhere near 0 for rl",
        "for rl look at reward/mean and kl/reference instead; elsewhere, if it rises, halve optim.learning_rate",
    ),
    "nll": Entry(
        "mean negative log-likelihood of the trained tokens, nats per token (sft)",
        "falling and levelling off; on held-out rows not rising again",
        "held-out rising while training falls: fewer epochs, or more data",
    ),
    "skipped_steps": Entry(
        "1 where the step was skipped because its loss or gradient was not finite",
        "0",
        "lower optim.learning_rate; after optim.nonfinite_limit in a row the run stops",
    ),
    "accuracy": Entry(
        "share of trained tokens (sft), or of pairs, steps or tokens (reward, as loss.type reads), that come out right",
        "rising; for pairs 0.6 to 0.8, as people themselves agree on about 3 of 4",
        "near 0.5 on pairs: look for swapped labels (tether data inspect); near 1: look for a give-away such as length",
    ),
    "grad_norm": Entry(
        "global norm of the gradient before clipping",
        "steady, within a few times optim.clip_norm",
        "spikes: lower optim.learning_rate or lengthen optim.warmup; always 0: nothing is being trained",
    ),
    "learning_rate": Entry(
        "the step size at this step, after warm-up and schedule",
        "as the schedule says: up during optim.warmup, then down to 0 or constant",
        "change optim.learning_rate, optim.warmup or optim.schedule",
    ),
    "tokens_per_second": Entry(
        "tokens trained or sampled per second of wall time",
        "steady; compare with the share of the machine's ceiling",
        "falling: other processes, or longer rows; see time/* for where the time goes",
    ),
    "share_of_ceiling": Entry(
        "achieved arithmetic as a share of what this machine's matrix products reach",
        "above 0.5 for training on a CPU",
        "low: raise optim.tokens_per_micro_batch, or set run.threads to the number of physical cores",
    ),
    "time/*": Entry(
        "seconds of this step spent in one part: sampling, reward, learning, ...",
        "sampling is usually the largest part of rl; the parts sum to the step",
        "sampling too large: fewer sampling.max_new_tokens; learning too large: fewer updates per rollout",
    ),
    "memory/peak_gib": Entry(
        "largest memory the process has held, in GiB",
        "flat after the first steps, and under the machine's memory",
        "lower optim.tokens_per_micro_batch; then model.lora, which trains adapters only",
    ),
    "eval/*": Entry(
        "the same metric on held-out rows",
        "moving with the training metric",
        "training improves while this worsens: over-fitting; fewer epochs, or an earlier checkpoint",
    ),
}
