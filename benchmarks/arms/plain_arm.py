"""What one writes without a library: ``generate`` for sampling, and PPO as a plain loop over padded rows with four
networks (policy, critic, reference, reward model), the arithmetic being that of Tether's row ``ppo``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from benchmarks.arms.common import LEARNING_RATE, Conversation, perturb, score_weight, serve, sketch

GAMMA, LAMBDA, KL_WEIGHT, CLIP, VALUE_CLIP, VALUE_WEIGHT, CLIP_NORM = 1.0, 0.95, 0.05, 0.2, 0.2, 0.1, 1.0


class Plain:
    """The policy, its tokenizer, and left-padded prompts, each as often as it is answered."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work = work
        self.tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
        self.policy: Any = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32).eval()
        texts = [text for text in work["prompts"] for _ in range(work["group"])]
        made = self.tokenizer(texts, padding=True, return_tensors="pt")
        self.ids, self.mask = made["input_ids"], made["attention_mask"]
        self.facts: dict[str, Any] = {"prompt_tokens": self.mask.sum(1)[:: work["group"]].tolist()}

    def generate(self, new_tokens: int) -> Tensor:
        """[B, ``new_tokens``]; no token ends a completion: every arm draws the same number of tokens."""
        never = len(self.tokenizer)
        with torch.no_grad():
            out = self.policy.generate(
                input_ids=self.ids, attention_mask=self.mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=new_tokens, eos_token_id=never, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        return out[:, self.ids.shape[1] :]

    def inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Prompts and completions [B, C] as one padded batch."""
        mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": torch.cat([self.ids, tokens], 1), "attention_mask": mask, "position_ids": positions}

    def logprobs(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """[B, C] of the completion tokens."""
        count = tokens.shape[1]
        logits = model(**self.inputs(tokens), use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2)


class Sampling(Plain):
    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The log-probs of the tokens that the other arm has drawn."""
        tokens = torch.tensor(given["tokens"])
        with torch.no_grad():
            return {"logprobs": self.logprobs(self.policy, tokens).tolist()}

    def steps(self, conversation: Conversation) -> None:
        while True:
            conversation.begin_step()
            tokens = self.generate(self.work["new_tokens"])
            conversation.end_step(drawn=tokens.shape[1])


class Scorer(nn.Module):
    """A trunk and a scalar head."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.trunk = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.score = nn.Linear(self.trunk.config.hidden_size, 1, bias=False)
        with torch.no_grad():
            self.score.weight.copy_(score_weight(self.score.in_features))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, N] of the state at each position."""
        return self.score(self.trunk(**inputs, use_cache=False).last_hidden_state).squeeze(2)


class PPO(Plain):
    def __init__(self, work: dict[str, Any]) -> None:
        super().__init__(work)
        self.reference = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32).eval()
        self.judge, self.critic = Scorer(work["model"]), Scorer(work["model"])
        for frozen in (self.reference, self.judge):
            frozen.requires_grad_(False)
        perturb(self.policy.named_parameters())
        perturb(self.critic.trunk.named_parameters())
        self.trained = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def values(self, tokens: Tensor) -> Tensor:
        """[B, C] of the state before each completion token."""
        return self.critic(self.inputs(tokens))[:, -tokens.shape[1] - 1 : -1]

    @torch.no_grad()
    def evidence(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the update holds fixed, [B, C] each."""
        old, reference = self.logprobs(self.policy, tokens), self.logprobs(self.reference, tokens)
        values = self.values(tokens)
        rewards = -KL_WEIGHT * (old - reference)
        rewards[:, -1] += self.judge(self.inputs(tokens))[:, -1]
        advantages, ahead = torch.zeros_like(rewards), torch.zeros(len(rewards))
        after = torch.zeros(len(rewards))
        for t in reversed(range(rewards.shape[1])):
            ahead = rewards[:, t] + GAMMA * after - values[:, t] + GAMMA * LAMBDA * ahead
            advantages[:, t], after = ahead, values[:, t]
        whitened = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        return {"old": old, "values": values, "returns": advantages + values, "advantages": whitened}

    def loss(self, tokens: Tensor, fixed: dict[str, Tensor]) -> Tensor:
        ratio = torch.exp(self.logprobs(self.policy, tokens) - fixed["old"])
        advantages = fixed["advantages"]
        surrogate = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        values = self.values(tokens)
        near = fixed["values"] + (values - fixed["values"]).clamp(-VALUE_CLIP, VALUE_CLIP)
        error = torch.maximum((values - fixed["returns"]) ** 2, (near - fixed["returns"]) ** 2)
        return (surrogate + VALUE_WEIGHT * 0.5 * error).mean()

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        tokens = torch.tensor([row for group in self.work["completions"] for row in group])
        loss = self.loss(tokens, self.evidence(tokens))
        loss.backward()
        critic = ((f"critic.{n.removeprefix('trunk.')}", p) for n, p in self.critic.named_parameters())
        found = {"loss": float(loss.detach()), "gradient": sketch([*self.policy.named_parameters(), *critic])}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def steps(self, conversation: Conversation) -> None:
        while True:
            conversation.begin_step()
            tokens = self.generate(self.work["new_tokens"])
            fixed = self.evidence(tokens)
            for _ in range(self.work["epochs"]):
                self.loss(tokens, fixed).backward()
                nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            conversation.end_step(drawn=tokens.shape[1])


if __name__ == "__main__":
    serve(lambda work: {"sampling": Sampling, "ppo": PPO}[work["kind"]](work))
