"""Metrics of policy-gradient runs: the policy, its distance from the reference, its rollouts and its critic."""

from __future__ import annotations

from tether.runs.glossary.entry import Entry

RL: dict[str, Entry] = {
    "kl/penalty": Entry(
        "the KL to the reference that the loss penalises, nats per token",
        "small and rising slowly",
        "rising fast: raise overrides.loss.kl_weight or lower optim.learning_rate",
    ),
    "kl/reference": Entry(
        "KL(policy || reference) summed over a completion, in nats: how far the policy has moved",
        "a slow rise; 1 to 20 nats by the end; an estimate may dip below 0",
        "running away: raise kl_weight or kl_in_reward (overrides), or lower optim.learning_rate",
    ),
    "kl/reference_gap": Entry(
        "mean |log-prob under the policy - log-prob under the reference| per sampled token, in nats",
        "0 at step 1, then growing slowly with kl/reference",
        "not 0 at step 1: the reference is another model than the start, or dropout is on",
    ),
    "kl/reference_per_token": Entry(
        "KL(policy || reference) per completion token, in nats",
        "below 0.1 for most runs",
        "as for kl/reference; if only this one rises, completions are getting shorter",
    ),
    "kl/coefficient": Entry(
        "the coefficient of the KL in the reward at this step (kl_in_reward, moved by kl_control)",
        "constant where kl_control is fixed; else settling where kl/reference meets its target",
        "rising without end: the target is below what the reward asks for; swinging: a longer kl_control.horizon",
    ),
    "kl/step": Entry(
        "KL between the policy before and after this step's updates, per token, in nats",
        "0.0001 to 0.02",
        "larger: lower optim.learning_rate, or fewer updates per rollout; smaller: the steps do nothing",
    ),
    "policy/entropy": Entry(
        "mean entropy of the next-token distribution over completion tokens during the update, in nats",
        "falling slowly, well above 0",
        "near 0: the policy has collapsed on one answer; raise the KL weight or sampling.temperature",
    ),
    "policy/clip_low": Entry(
        "share of tokens whose ratio fell below 1 - clip_low and so gave no gradient (cispo: one of bounded weight)",
        "below 0.2 together with policy/clip_high",
        "larger: fewer updates per rollout, or a lower optim.learning_rate; always 0 with several updates: too timid",
    ),
    "policy/clip_high": Entry(
        "share of tokens whose ratio rose above 1 + clip_high and so gave no gradient (cispo: one of bounded weight)",
        "below 0.2 together with policy/clip_low",
        "larger: fewer updates per rollout, or a lower optim.learning_rate",
    ),
    "policy/clip_dual": Entry(
        "share of tokens with a negative advantage whose ratio rose above dual_clip and so gave no gradient",
        "below 0.01",
        "larger: the policy is far from its rollouts; fewer updates per rollout, or a lower optim.learning_rate",
    ),
    "policy/ratio_max": Entry(
        "largest ratio of new to old probability of any token in this step",
        "1 in the first update of a step; below 10 after it",
        "above 1 in the first update: sampler and learner disagree (see sampler/gap); else lower optim.learning_rate",
    ),
    "policy/ratio": Entry(
        "mean ratio of new to old token probability", "within 0.01 of 1", "lower optim.learning_rate"
    ),
    "value/loss": Entry(
        "mean squared error of the critic against the returns",
        "falling, then steady",
        "rising: raise critic.learning_rate; compare with value/explained_variance, which has no unit",
    ),
    "value/explained_variance": Entry(
        "1 - Var(returns - values) / Var(returns): how much of the return the critic foresees",
        "above 0 after some steps; 0.3 to 0.9 is good; 1 is perfect",
        "negative: the critic does harm; raise critic.learning_rate or use an algorithm without one (rloo, grpo)",
    ),
    "value/clipped": Entry(
        "share of values whose change was clipped", "below 0.2", "larger: lower critic.learning_rate"
    ),
    "groups/zero_variance": Entry(
        "share of prompts whose completions all got the same reward: they teach nothing",
        "below 0.5",
        "larger: prompts too easy or too hard; change them, sample hotter, or more completions_per_prompt",
    ),
    "groups/replaced": Entry(
        "prompts of this step that were replaced by fresh ones, as their rewards were all equal (dynamic sampling)",
        "below half of prompts_per_step",
        "larger: as for groups/zero_variance; every replaced prompt costs its rollouts",
    ),
    "groups/rounds": Entry(
        "rounds of fresh prompts that dynamic sampling took in this step",
        "0 to 1",
        "always at resample_rounds: prompts too easy or too hard for this policy; change them",
    ),
    "ptx/nll": Entry(
        "negative log-likelihood of the pretraining text, nats per token (ppo_ptx)",
        "flat: what the model knew is kept",
        "rising: raise overrides.ptx_weight; falling far: text that the model had not seen, or too large a weight",
    ),
    "rollout/greedy_length": Entry(
        "mean length of the greedy completions that are the baseline, in tokens; time/baseline is what they cost",
        "near rollout/length",
        "far larger: the policy repeats itself where nothing is drawn; see the samples",
    ),
    "rollout/length": Entry(
        "mean length of a completion, in tokens",
        "near where it began, unless length is what the reward asks for",
        "climbing with the reward: the reward pays for length; see the report's length chart",
    ),
    "pass@k": Entry(
        "share of held-out prompts that one of k answers gets right: mean over prompts, unbiased (verify; Chen 2021)",
        "rising from step 0 by more than the interval from pass@k/low to pass@k/high is wide",
        "within it: no measurable change; more verify.prompts, more steps; pass@1 up and pass@k down: less is explored",
    ),
    "pass@k/*": Entry(
        "an end of the 95 % interval of pass@k: Wilson's, at the effective sample size of the prompts",
        "near to pass@k",
        "far away: more verify.prompts narrow it, more verify.samples only a little",
    ),
    "rollout/truncated": Entry(
        "share of completions cut at sampling.max_new_tokens",
        "below 0.1",
        "larger: raise sampling.max_new_tokens; growing: the policy forgets to stop",
    ),
    "rollout/unique": Entry(
        "share of completions in this step that are different texts",
        "near 1",
        "falling: collapse; raise sampling.temperature or the KL weight",
    ),
    "rollout/distinct_2": Entry(
        "different token pairs / all token pairs of this step's completions",
        "steady; it falls, too, as completions grow longer",
        "falling at a steady length: collapse; raise sampling.temperature or the KL weight, or a repetition_penalty",
    ),
    "sampler/gap": Entry(
        "mean |log-prob(learner) - log-prob(sampler)| of the sampled tokens, in nats",
        "below 0.001 in float32, below 0.02 in bfloat16",
        "larger: the two see different weights or masks; the run stops at max_logprob_gap",
    ),
    "sampler/gap_max": Entry("largest such gap of any token, in nats", "below 0.1 in float32", "as for sampler/gap"),
    "sampler/trusted": Entry(
        "1 where the sampler's log-probs served as those before the update, 0 where the learner scored all anew",
        "1 in float32 (sampler/gap is then of what was checked); 0 with old_logprobs=learner or critic.kind=head",
        "0 otherwise: the two differ by more than 1e-4 nats; a pass more a step",
    ),
    "sampler/weight": Entry(
        "mean weight learner/sampler that sampler_correction puts on a token, after the cut",
        "within 0.05 of 1",
        "lower: much is cut, see sampler/cut and sampler/gap",
    ),
    "sampler/cut": Entry(
        "share of tokens whose weight was capped (truncate), or that were left out (mask)",
        "below 0.01",
        "larger: sampler and learner disagree; look for the cause (sampler/gap) before raising loss.sampler_cap",
    ),
    "sampler/effective": Entry(
        "effective share of the tokens after weighting: 1 / mean squared weight, before the cut",
        "above 0.9; 1 where sampler and learner agree",
        "lower: fresher weights in the sampler, or the same precision on both sides",
    ),
}
