"""Proximal Policy Optimization of a language model (Schulman 2017; Ziegler 2019) in one file: torch, nothing of Tether.

Written for reading: one rollout at a time, one token at a time, no padding, no masks, no batching. The same functions
are the oracle that Tether's own, vectorised ones are tested against (tests/oracles/test_examples_agree.py).

    python examples/ppo_from_scratch.py

The toy world: a language of the ten digits. A reward counts the even digits of a completion. PPO samples, is told the
reward at the end, and must not stray far from where it started: KL to the reference is taken off the reward.
"""

import copy
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY = 10
PROMPT_LENGTH = 2
COMPLETION_LENGTH = 5


# --- 1. Policy and critic -------------------------------------------------------------------------------------------


class TinyLM(nn.Module):
    """A GRU. ids [1, L] -> [1, L, outputs]: logits of the next token, or (outputs = 1) the value of the state."""

    def __init__(self, outputs: int = VOCABULARY, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embed(ids))
        return self.head(hidden)


def token_logps(model: nn.Module, ids: Tensor, prompt_len: int) -> list[Tensor]:
    """log π(token | everything before it) of every completion token of ``ids`` = prompt + completion."""
    out = model(ids[None])
    logits = (out.logits if hasattr(out, "logits") else out)[0]
    return [torch.log_softmax(logits[i - 1], dim=-1)[ids[i]] for i in range(prompt_len, len(ids))]


def token_values(critic: nn.Module, ids: Tensor, prompt_len: int) -> list[Tensor]:
    """V(s_t) of the state *before* completion token t: the critic has seen the prompt and y_<t, not y_t."""
    values = critic(ids[None])[0, :, 0]
    return [values[i - 1] for i in range(prompt_len, len(ids))]


# --- 2. Rewards: the score at the end, the KL penalty at every token ------------------------------------------------


def shaped_rewards(score: float, logps: list[float], ref_logps: list[float], kl_weight: float) -> list[float]:
    """r_t = -kl_weight · (log π(y_t) - log π_ref(y_t)), plus the score at the last token (Ziegler 2019, eq. 2)."""
    rewards = [-kl_weight * (logp - ref_logp) for logp, ref_logp in zip(logps, ref_logps, strict=True)]
    rewards[-1] += score
    return rewards


# --- 3. Advantages --------------------------------------------------------------------------------------------------


def gae(
    rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float = 0.0
) -> tuple[list[float], list[float]]:
    """Generalised advantage estimation (Schulman 2016, eq. 16); returns (advantages, returns).

    δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1},   return_t = A_t + V_t.
    ``bootstrap`` is V after the last token: 0 where the completion ended by itself.
    """
    advantages = [0.0] * len(rewards)
    next_value, next_advantage = bootstrap, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[t], advantages[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


# --- 4. Losses ------------------------------------------------------------------------------------------------------


def ppo_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A),  ρ = π/π_old of one token   (Schulman 2017, eq. 7)"""
    ratio = torch.exp(logp - old_logp)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """½ max[(V - R)², (V_clip - R)²] with V_clip within ``clip`` of the value at the start of the update."""
    value_clipped = old_value + torch.clamp(value - old_value, -clip, clip)
    return 0.5 * torch.maximum((value - target) ** 2, (value_clipped - target) ** 2)


# --- 5. Rollouts ----------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One sampled completion and everything that stays fixed while the policy is updated on it."""

    ids: Tensor
    score: float
    kl: float
    old_logps: list[float]
    old_values: list[float]
    advantages: list[float]
    returns: list[float]


def reward(completion: list[int]) -> float:
    """How many digits are even."""
    return float(sum(1 for digit in completion if digit % 2 == 0))


@torch.no_grad()
def roll_out(policy, critic, reference, rng: random.Random, kl_weight: float, gamma: float, lam: float) -> Rollout:
    """Draw a prompt and a completion; score it, and work out its advantages."""
    ids = torch.tensor([rng.randrange(VOCABULARY) for _ in range(PROMPT_LENGTH)])
    for _ in range(COMPLETION_LENGTH):
        next_token = torch.distributions.Categorical(logits=policy(ids[None])[0, -1]).sample()
        ids = torch.cat([ids, next_token[None]])
    score = reward(ids[PROMPT_LENGTH:].tolist())
    logps = [float(x) for x in token_logps(policy, ids, PROMPT_LENGTH)]
    ref_logps = [float(x) for x in token_logps(reference, ids, PROMPT_LENGTH)]
    values = [float(x) for x in token_values(critic, ids, PROMPT_LENGTH)]
    rewards = shaped_rewards(score, logps, ref_logps, kl_weight)
    advantages, returns = gae(rewards, values, gamma, lam)
    return Rollout(ids, score, sum(logps) - sum(ref_logps), logps, values, advantages, returns)


def whiten(rollouts: list[Rollout]) -> None:
    """Subtract the mean and divide by the standard deviation, over all tokens of the batch."""
    everything = torch.tensor([a for r in rollouts for a in r.advantages])
    mean, std = float(everything.mean()), float(everything.std(correction=0))
    for r in rollouts:
        r.advantages = [(a - mean) / (std + 1e-8) for a in r.advantages]


# --- 6. Training ----------------------------------------------------------------------------------------------------


def update(policy, critic, optimizer, rollouts: list[Rollout], epochs: int, minibatch: int, rng: random.Random) -> None:
    """Several passes over the same rollouts; the clip keeps the policy near the one that drew them."""
    for _ in range(epochs):
        rng.shuffle(rollouts)
        for start in range(0, len(rollouts), minibatch):
            total, tokens = torch.zeros(()), 0
            for r in rollouts[start : start + minibatch]:
                logps = token_logps(policy, r.ids, PROMPT_LENGTH)
                values = token_values(critic, r.ids, PROMPT_LENGTH)
                for t in range(COMPLETION_LENGTH):
                    old_logp, advantage = torch.tensor(r.old_logps[t]), torch.tensor(r.advantages[t])
                    old_value, target = torch.tensor(r.old_values[t]), torch.tensor(r.returns[t])
                    total = total + ppo_loss(logps[t], old_logp, advantage, clip_low=0.2, clip_high=0.2)
                    total = total + value_loss(values[t], old_value, target, clip=0.5)
                    tokens += 1
            optimizer.zero_grad()
            (total / tokens).backward()
            optimizer.step()


def main(steps: int = 12, rollouts_per_step: int = 24, seed: int = 0) -> tuple[float, float]:
    """Returns the mean score of the first and of the last step's rollouts (of at most 5)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    policy, critic = TinyLM(), TinyLM(outputs=1)
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=1e-2)
    scores = []
    for step in range(1, steps + 1):
        rollouts = [
            roll_out(policy, critic, reference, rng, kl_weight=0.1, gamma=1.0, lam=0.95)
            for _ in range(rollouts_per_step)
        ]
        scores.append(sum(r.score for r in rollouts) / len(rollouts))
        kl = sum(r.kl for r in rollouts) / len(rollouts)
        print(f"step {step}: even digits {scores[-1]:.2f} of {COMPLETION_LENGTH}, KL to the start {kl:.2f} nats")
        whiten(rollouts)
        update(policy, critic, optimizer, rollouts, epochs=2, minibatch=8, rng=rng)
    return scores[0], scores[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
