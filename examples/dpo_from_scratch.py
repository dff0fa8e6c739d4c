"""Direct Preference Optimization (Rafailov 2023) in one file: torch, and nothing of Tether.

Written for reading: one pair at a time, one token at a time, no padding, no masks, no batching. The same functions are
the oracle that Tether's own, vectorised loss is tested against (tests/oracles/test_examples_agree.py).

    python examples/dpo_from_scratch.py

The toy world: a language of the ten digits. Somebody compares two completions of a prompt and tends to prefer the one
with more even digits. DPO must find that out from the comparisons alone, without a reward model and without sampling
during training.
"""

import copy
import math
import random

import torch
from torch import Tensor, nn

VOCABULARY = 10
PROMPT_LENGTH = 2
COMPLETION_LENGTH = 5


# --- 1. A language model: anything that maps the tokens so far to logits over the next token ------------------------


class TinyLM(nn.Module):
    """A GRU. ids [1, L] -> logits [1, L, V]; position i sees tokens 0..i and predicts token i + 1."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embed(ids))
        return self.head(hidden)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [L, V] of one sequence [L]; takes this file's model, and a Hugging Face one."""
    out = model(ids[None])
    return (out.logits if hasattr(out, "logits") else out)[0]


@torch.no_grad()
def complete(model: nn.Module, prompt: Tensor, length: int) -> Tensor:
    """Draw ``length`` tokens after ``prompt``, one by one; returns the completion only."""
    ids = prompt
    for _ in range(length):
        next_token = torch.distributions.Categorical(logits=logits_of(model, ids)[-1]).sample()
        ids = torch.cat([ids, next_token[None]])
    return ids[len(prompt) :]


# --- 2. log π(y | x): the sum of the completion tokens' log-probs ---------------------------------------------------


def token_logps(model: nn.Module, ids: Tensor, prompt_len: int) -> list[Tensor]:
    """log π(token | everything before it) of every completion token of ``ids`` = prompt + completion."""
    logits = logits_of(model, ids)
    logps = []
    for position in range(prompt_len, len(ids)):
        # The token at `position` was predicted one place earlier.
        distribution = torch.log_softmax(logits[position - 1], dim=-1)
        logps.append(distribution[ids[position]])
    return logps


def sequence_logps(model: nn.Module, ids: Tensor, prompt_len: int) -> Tensor:
    """log π(completion | prompt) = Σ_t log π(y_t | x, y_<t). Prompt tokens are context; they do not count."""
    total = torch.zeros(())
    for logp in token_logps(model, ids, prompt_len):
        total = total + logp
    return total


# --- 3. The loss ----------------------------------------------------------------------------------------------------


def dpo_loss(policy_logps_w: Tensor, policy_logps_l: Tensor, ref_logps_w: Tensor, ref_logps_l: Tensor, beta: float):
    """-log σ(β [(log π(y_w|x) - log π_ref(y_w|x)) - (log π(y_l|x) - log π_ref(y_l|x))])   (Rafailov 2023, eq. 7)

    w: the winner of the comparison, l: the loser. β · log(π/π_ref) is the reward that the policy implies, so this is
    logistic regression on a difference of implied rewards: Bradley-Terry with the reward model left out.
    """
    implied_reward_w = beta * (policy_logps_w - ref_logps_w)
    implied_reward_l = beta * (policy_logps_l - ref_logps_l)
    return -nn.functional.logsigmoid(implied_reward_w - implied_reward_l)


# --- 4. Data: comparisons by a simulated person ---------------------------------------------------------------------


def taste(completion: Tensor) -> float:
    """What the person likes, and DPO is never told: how many digits are even."""
    return float(sum(1 for digit in completion.tolist() if digit % 2 == 0))


def make_pairs(model: nn.Module, count: int, rng: random.Random) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(prompt, winner, loser); P(a beats b) = σ(taste(a) - taste(b)), so the person is sometimes wrong."""
    pairs = []
    while len(pairs) < count:
        prompt = torch.tensor([rng.randrange(VOCABULARY) for _ in range(PROMPT_LENGTH)])
        a = complete(model, prompt, COMPLETION_LENGTH)
        b = complete(model, prompt, COMPLETION_LENGTH)
        a_wins = rng.random() < 1 / (1 + math.exp(taste(b) - taste(a)))
        pairs.append((prompt, a, b) if a_wins else (prompt, b, a))
    return pairs


# --- 5. Training ----------------------------------------------------------------------------------------------------


def train(policy: nn.Module, reference: nn.Module, pairs: list, *, beta: float, epochs: int, batch: int, lr: float):
    """Minimise the mean DPO loss over batches of pairs; the reference never moves."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    for epoch in range(epochs):
        losses = []
        for start in range(0, len(pairs), batch):
            total = torch.zeros(())
            chunk = pairs[start : start + batch]
            for prompt, winner, loser in chunk:
                ids_w, ids_l = torch.cat([prompt, winner]), torch.cat([prompt, loser])
                with torch.no_grad():
                    ref_w = sequence_logps(reference, ids_w, len(prompt))
                    ref_l = sequence_logps(reference, ids_l, len(prompt))
                policy_w = sequence_logps(policy, ids_w, len(prompt))
                policy_l = sequence_logps(policy, ids_l, len(prompt))
                total = total + dpo_loss(policy_w, policy_l, ref_w, ref_l, beta)
            optimizer.zero_grad()
            (total / len(chunk)).backward()
            optimizer.step()
            losses.append(float(total.detach()) / len(chunk))
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f} (chance: {math.log(2):.3f})")


def mean_taste(model: nn.Module, count: int, rng: random.Random) -> float:
    """Average taste of fresh completions: what training was for."""
    total = 0.0
    for _ in range(count):
        prompt = torch.tensor([rng.randrange(VOCABULARY) for _ in range(PROMPT_LENGTH)])
        total += taste(complete(model, prompt, COMPLETION_LENGTH))
    return total / count


def main(pairs: int = 200, epochs: int = 3, seed: int = 0) -> tuple[float, float]:
    """Returns the mean taste before and after (of at most 5)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    policy = TinyLM()
    reference = copy.deepcopy(policy).eval()
    comparisons = make_pairs(reference, pairs, rng)
    before = mean_taste(policy, 200, rng)
    train(policy, reference, comparisons, beta=0.5, epochs=epochs, batch=10, lr=5e-3)
    after = mean_taste(policy, 200, rng)
    print(f"even digits per completion: {before:.2f} before, {after:.2f} after (of {COMPLETION_LENGTH})")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
