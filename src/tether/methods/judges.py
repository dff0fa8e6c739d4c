"""What judges completions: a reward model, a rule, or the user's own function, named the same way everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tether.config.build import build, find
from tether.config.schema import ModelConfig
from tether.core.protocols import Reward
from tether.methods import parts
from tether.methods.parts import Say
from tether.models.load import load_scorer, resolve
from tether.models.roles import Scorer
from tether.rewards.function import FunctionReward
from tether.rewards.model import RewardModel
from tether.rewards.rules import RULES


def open_reward(
    spec: Mapping[str, Any] | str, policy_tokenizer: Any, model: ModelConfig, tokens_per_micro_batch: int, say: Say
) -> tuple[Reward, Scorer | None]:
    """The reward that ``spec`` names, and the reward model behind it where there is one: a folder or hub id, a row of
    the rule table with its options, or the user's own function."""
    if isinstance(spec, str) and (spec in RULES or ":" in spec):
        found = find(RULES, spec, "reward")
        if isinstance(found, type):
            return build(RULES, spec, "reward"), None
        return FunctionReward(function=found, name=spec), None
    if isinstance(spec, Mapping):
        return build(RULES, spec, "reward"), None
    scorer = load_scorer(resolve(spec, say=say), dtype=model.dtype, device=model.device, say=say)
    say(f"reward model: {spec}")
    return model_reward(scorer, policy_tokenizer, tokens_per_micro_batch), scorer


def model_reward(scorer: Scorer, policy_tokenizer: Any, tokens_per_micro_batch: int) -> RewardModel:
    return RewardModel(
        batch_of=parts.rollouts_for(scorer, policy_tokenizer), score=parts.scores_of(scorer, tokens_per_micro_batch)
    )
