"""Metrics of the reward that a policy is trained on or chosen by, and of the guards around it."""

from __future__ import annotations

from tether.runs.glossary.entry import Entry

REWARDS: dict[str, Entry] = {
    "reward/mean": Entry(
        "mean reward of the rollouts of this step, any punishment of length included, before any KL penalty",
        "rising slowly; faster than kl/reference",
        "flat: see groups/zero_variance and optim.learning_rate; leaping up: read samples.jsonl for a trick",
    ),
    "reward/std": Entry(
        "standard deviation of the reward over this step's rollouts",
        "above 0, and shrinking slowly",
        "0: the reward can't tell completions apart, so nothing is learned; raise sampling.temperature",
    ),
    "reward/proxy": Entry(
        "the reward that is optimised (a reward model's score), where a gold score exists beside it",
        "rising together with reward/gold",
        "rising while reward/gold falls is over-optimisation (Gao 2022): stop earlier, or raise the KL weight",
    ),
    "reward/gold": Entry(
        "the score that is meant, known only where the judge is disclosed; never trained on",
        "rising with reward/proxy",
        "past its peak: use an earlier checkpoint; more pairs for the reward model; a stronger KL anchor",
    ),
    "reward/dropped": Entry(
        "rollouts left out of this step because their reward failed",
        "0",
        "read the reward's error in the log; on_reward_failure=stop ends the run at the first one",
    ),
    "reward/unscaled": Entry(
        "mean score as the reward model gives it; reward/mean is the same in standard deviations of its training pairs",
        "rising with reward/mean: they differ by a fixed shift and factor (score_scale.json beside the model)",
        "scale_reward=false trains on these scores instead; kl_in_reward is then in their units",
    ),
    "reward/greedy": Entry(
        "mean reward of the greedy completions, one a prompt, that are the baseline (remax)",
        "near reward/mean, usually a little above it, and rising with it",
        "far above reward/mean: most samples count as worse than expected; lower sampling.temperature",
    ),
    "reward/baseline": Entry(
        "running mean of earlier steps' returns (KL penalty included) that this step's are compared with",
        "following reward/mean at a distance of some steps",
        "lagging far behind: lower overrides.advantage.decay",
    ),
    "reward/overlong": Entry(
        "mean soft punishment of length, 0 to -1, that is part of the reward (overlong_cache)",
        "0 to -0.1",
        "larger: completions come near sampling.max_new_tokens; raise the limit, or see rollout/truncated",
    ),
    "reward/best": Entry(
        "mean over prompts of the highest reward among the answers to one (online rounds)",
        "above reward/mean, and rising with it",
        "rising while reward/mean stands still: the pairs are not learned; raise optim.learning_rate",
    ),
    "reward/worst": Entry(
        "mean over prompts of the lowest reward among the answers to one (online rounds)",
        "below reward/mean, and rising",
        "as high as reward/best: the answers are alike; raise sampling.temperature",
    ),
    "reward/disagreement": Entry(
        "mean standard deviation of the reward over the members of an ensemble (of one completion, population)",
        "level, well below 0.6 (two members) or 0.8 (four): there scaled scores agree no more than by chance",
        "rising with reward/mean: the policy finds what some members are fooled by; combine: minimum, or a higher c",
    ),
    "reward/raw": Entry(
        "NAME.raw: mean of a part's own value, before clip, normalise and weight; of a gate, the share that passes",
        "rising where its weight is above 0; steady for a gate, near 1",
        "a gate near 0: no completion is asked about further; sample hotter, or begin from a model that can pass it",
    ),
    "reward/retried": Entry(
        "mean number of times that the reward function was asked again about a completion (reward.retries)",
        "0",
        "above 0.1: the function fails often; see its messages with retries taken out",
    ),
    "reward/gold_error": Entry(
        "standard error of the held-out reward/gold: what so few prompts can tell",
        "well below the changes of reward/gold",
        "as large as they are: more rows in data.eval",
    ),
    "reward/gold_dropped": Entry(
        "answers to held-out prompts that the held-out judge or the reward left unscored; they are in no mean of it",
        "0",
        "many: reward/gold is of the easier answers only; read the judge's error in the log",
    ),
    "reward/watched": Entry(
        "mean score of a second judge on the step's first rollouts; logged and never trained on",
        "rising with reward/mean",
        "falling while reward/mean rises: as for reward/gold",
    ),
    "guard/best_step": Entry(
        "the step whose policy the held-out judge (guards.judge) likes best so far; it is kept in best/",
        "near the latest evaluation",
        "far behind: the reward is over-optimised; use best/, see reward/gold",
    ),
    "guard/stopped": Entry(
        "1 where a guard ended the run (guards.action=stop)",
        "absent",
        "see which guard/* was crossed, or reward/gold; the policy before that is in best/ or in a checkpoint",
    ),
    "guard/*": Entry(
        "1 where the limit of this name (guards.*) is crossed in this step",
        "0",
        "1 for many steps: a stronger KL anchor, a lower optim.learning_rate, or another limit",
    ),
    "judge/requests": Entry(
        "questions that a judge (a language model) was asked in this step; judges in one reward are counted together",
        "two for each pair and one for each scored completion, less what was in the cache",
        "many more: a wide rubric with verdict=logprob asks once a criterion",
    ),
    "judge/cached": Entry(
        "questions of this step whose answer was in the judge's cache, so that nothing was asked",
        "0 where the policy learns; most of them after a resume",
        "most of them in every step: the policy repeats itself; see rollout/unique",
    ),
    "judge/refused": Entry(
        "questions that the judge left without a text: refused, or too long for it",
        "0",
        "sampling.max_new_tokens may be too large for the judge's context; else read the endpoint's own log",
    ),
    "judge/unparsed": Entry(
        "answers of the judge in which no verdict was found, from the cache or not; they are never a score",
        "below 1 % of judge/requests + judge/cached",
        "more: a judge that follows a format, a larger max_new_tokens, or verdict=logprob (local judges)",
    ),
    "judge/prompt_tokens": Entry(
        "tokens that the judge read in this step, as it counts them; those of cached answers are not among them",
        "steady",
        "rising: the completions grow; see rollout/length",
    ),
    "judge/completion_tokens": Entry(
        "tokens that the judge wrote in this step",
        "steady, far below judge/prompt_tokens",
        "many: a smaller max_new_tokens, unless judge/unparsed rises by it",
    ),
    "judge/cost": Entry(
        "what this step's tokens cost by the endpoint's price_in and price_out, in their currency",
        "as planned: times the steps that are left, it is what the run will still cost",
        "too much: fewer completions_per_prompt, a cheaper judge, or a reward model trained on its verdicts",
    ),
    "writer/*": Entry(
        "the same as judge/*, of the model that answers, criticises and revises (tether constitutional)",
        "one request an answer, and two a revision",
        "as for judge/*",
    ),
    "reward/*": Entry(
        "mean of what one named part (or gate) adds to the reward",
        "the parts that are meant to rise do, and no part pays for the others",
        "one part grows alone: change its weight in the reward",
    ),
}
