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
    "throughput/trained_tokens_per_s": Entry(
        "tokens through forward and backward per second of update time; a prompt counts once for all its completions",
        "steady; see throughput/share_of_ceiling for how much more the machine could do",
        "falling: other processes, or longer rows (attention grows with their length)",
    ),
    "throughput/sampled_tokens_per_s": Entry(
        "tokens drawn per second of sampling time",
        "steady; higher with more completions at once (prompts_per_step x completions_per_prompt)",
        "falling: longer completions, or a few long ones at the end that run alone",
    ),
    "throughput/share_of_ceiling": Entry(
        "useful arithmetic of the updates per second, as a share of throughput/ceiling_gflops; attention not counted",
        "above 0.5 on a CPU; above 1 where the machine was busier when the ceiling was measured",
        "low: raise optim.tokens_per_micro_batch, or set run.threads to the number of physical cores",
    ),
    "throughput/ceiling_gflops": Entry(
        "GFLOP/s of plain matrix products in the type that the run computes in, measured as this process began",
        "a constant of the machine: the same in all runs",
        "lower than in other runs: other processes were busy; see run.threads",
    ),
    "time/*": Entry(
        "seconds of this step spent in one part: sampling, reward, learning, ...",
        "sampling is usually the largest part of rl; the parts sum to the step",
        "sampling too large: fewer sampling.max_new_tokens; learning too large: fewer updates per rollout",
    ),
    "memory/peak_gib": Entry(
        "largest memory the process has held, in GiB",
        "flat after the first steps, and under the machine's memory",
        "lower optim.tokens_per_micro_batch; then optim.checkpoint_activations, or model.lora: adapters only",
    ),
    "memory/peak_gpu_gib": Entry(
        "most that tensors have held on the GPU, in GiB",
        "flat after the first steps, and under the GPU's memory",
        "lower optim.tokens_per_micro_batch; optim.checkpoint_activations; model.lora",
    ),
    "eval/*": Entry(
        "the same metric on held-out rows",
        "moving with the training metric",
        "training improves while this worsens: over-fitting; fewer epochs, or an earlier checkpoint",
    ),
}
