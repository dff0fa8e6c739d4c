"""Episodes of a policy, and what they were truly worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import torch
from torch import Tensor

from tether.backends.local.draw import draw, scores, uniforms
from tether.core.protocols import SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.methods.control.roles import Agent
from tether.methods.control.tasks import Task, Trajectory


@dataclass(kw_only=True, eq=False)
class _Episode:
    """One that is being played."""

    env: gymnasium.Env[Any, Any]
    seen: list[list[float]]
    rewards: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass(kw_only=True, eq=False)
class Player:
    """The sampler: plays all episodes side by side, one call of the policy per step of time."""

    agent: Agent
    policy_version: Callable[[], int] = lambda: 0
    _envs: list[gymnasium.Env[Any, Any]] = field(default_factory=list)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        settings: SamplingSettings,
        seed: int,
        finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """``n`` episodes from each start, group by group; a draw depends on (seed, prompt id, its number) alone."""
        task = self.agent.task
        asked = [(group, prompt, index) for group, prompt in enumerate(prompts) for index in range(n)]
        while len(self._envs) < len(asked):
            self._envs.append(task.make())
        episodes = []
        for env, (_, prompt, _) in zip(self._envs, asked, strict=False):
            episodes.append(_Episode(env=env, seen=[task.look(env.reset(seed=prompt.metadata["seed"])[0], 0)]))
        dice = torch.stack([uniforms(seed, prompt.id, index, settings.max_new_tokens) for _, prompt, index in asked])
        made: list[Rollout | None] = [None] * len(episodes)
        playing = list(range(len(episodes)))
        for step in range(settings.max_new_tokens):
            seen = torch.tensor([episodes[i].seen[-1] for i in playing])
            tokens, logprobs = draw(scores(self.agent.logits(seen), settings), dice[playing, step])
            for i, token, logprob in zip(playing, tokens.tolist(), logprobs.tolist(), strict=True):
                self._act(episodes[i], token, logprob, step)
            last = step + 1 == settings.max_new_tokens
            for i in [i for i in playing if last or episodes[i].finish_reason == "stop"]:
                playing.remove(i)
                made[i] = rollout = self._rollout(episodes[i], *asked[i])
                if finished is not None:
                    finished(rollout)
            if not playing:
                break
        return [rollout for rollout in made if rollout is not None]

    def _act(self, episode: _Episode, token: int, logprob: float, step: int) -> None:
        observation, reward, ended, _, _ = episode.env.step(token)
        episode.seen.append(self.agent.task.look(observation, step + 1))
        episode.rewards.append(float(reward))
        episode.tokens.append(token)
        episode.logprobs.append(logprob)
        if ended:
            episode.finish_reason = "stop"

    def _rollout(self, episode: _Episode, group: int, prompt: Prompt, index: int) -> Rollout:
        played = Trajectory(
            seen=torch.tensor(episode.seen[:-1]),
            rewards=torch.tensor(episode.rewards),
            ended=episode.finish_reason == "stop",
        )
        self.agent.task.remember(prompt.metadata["seed"], tuple(episode.tokens), played)
        return Rollout(
            prompt=prompt,
            group=group,
            prompt_tokens=torch.tensor([prompt.metadata["seed"]]),
            tokens=torch.tensor(episode.tokens),
            sampled=torch.ones(len(episode.tokens), dtype=torch.bool),
            logprobs=torch.tensor(episode.logprobs),
            text="".join(self.agent.task.actions[a] for a in episode.tokens),
            finish_reason=episode.finish_reason,
            policy_version=self.policy_version(),
        )


def true_returns(task: Task, rollouts: Sequence[Rollout]) -> Tensor:
    """[N] float32: the sum of the environment's own rewards."""
    played = [task.replay(int(r.prompt_tokens[0]), tuple(r.tokens.tolist())) for r in rollouts]
    return torch.stack([t.rewards.sum() for t in played])


@dataclass(frozen=True, kw_only=True, eq=False)
class TrueReward:
    """The environment's own return, as a share of the horizon: what nobody has when there are only preferences."""

    task: Task

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        returns = true_returns(self.task, rollouts)
        return Scores(total=returns / self.task.horizon, parts={"unscaled": returns})
