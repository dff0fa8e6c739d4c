"""Tether through its own objects: losses and advantages as they stand in the tables, the local learner, the methods."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tether
from conformance import data
from conformance.adapters.tether_runs import Died, dying_at, final_weights, run_one_step, train
from conformance.protocol import Adapter, EncodedChat, EncodedPair, Judged, NotOffered, Pairs, Tokens
from tether import advantages
from tether.backends.local.learner import AdamWSettings, LocalLearner
from tether.core.batches import Batch, Group, JudgementBatch, Outputs, PolicyBatch, PreferenceBatch
from tether.core.protocols import LossOutput
from tether.core.text import Demonstration, Message, Prompt
from tether.data.chat import ChatTokenizer
from tether.evals.best_of_n import best_of_n, kl_bound, pass_at_k
from tether.evals.reward_quality import reward_quality
from tether.evals.statistics import bradley_terry, length_controlled_win_rate, wilson, win_rate
from tether.kl_control import AdaptiveKL
from tether.losses import POLICY, PREFERENCE, UNPAIRED, BradleyTerry, CrossEntropy, ValueLoss, kl
from tether.models.backbone import Backbone
from tether.models.roles import Policy

# kind -> name in the table and the fields that make it that kind. "weight" and "label_smoothing" are passed on below.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "cdpo": ("dpo", {}),
    "dpo_reference_free": ("dpo", {"reference_free": True}),
    "rpo_sequence": ("dpo", {}),
    "robust_dpo": ("robust_dpo", {}),
    "ipo": ("ipo", {}),
    "slic": ("slic", {}),
    "simpo": ("simpo", {}),
    "orpo": ("orpo", {}),
    "orpo_odds_ratio": ("orpo", {"nll_weight": 0.0}),
    "cpo": ("cpo", {"nll_weight": 0.0}),
    "exo": ("exo", {}),
    "nca": ("nca", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
}
KL = {"exact": "k3_corrected", "k2": "k2", "k3": "k3", "k1": "k1"}


def mean(output: LossOutput) -> Tensor:
    return torch.as_tensor(output.loss.total) / output.loss.count


def rows(mask: Tensor) -> dict[str, Any]:
    """Fields of a Batch around a mask; prompts and tokens are never read by a loss."""
    size, width = mask.shape
    return {
        "prompts": (torch.tensor([1]),),
        "prompt_of": torch.zeros(size, dtype=torch.long),
        "tokens": torch.zeros(size, width, dtype=torch.long),
        "lengths": torch.full((size,), width),
        "loss_mask": mask,
    }


def interleaved(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Row 2i chosen, 2i + 1 rejected."""
    return torch.stack([chosen, rejected], dim=1).flatten(0, 1)


@dataclass(kw_only=True)
class Library(Adapter):
    name: str = "Tether"

    def __post_init__(self) -> None:
        self.versions = {"tether-rlhf": tether.__version__, "torch": torch.__version__}
        self.called = {
            "losses": "the classes of tether.losses' tables, called on Outputs and a Batch",
            "advantages": "the classes of tether.advantages, tether.training.online.train for the rewards of a step",
            "tokens and models": "ChatTokenizer.group and .demonstration; Policy on a packed Backbone",
            "training": "LocalLearner.forward_backward under a token budget; the front doors of tether.methods",
            "evaluation": "the functions of tether.evals",
        }

    # -- losses -----------------------------------------------------------------------------------------------------

    def _pairs(self, loss: Any, pairs: Pairs) -> LossOutput:
        mask = interleaved(pairs.chosen_mask, pairs.rejected_mask)
        batch = PreferenceBatch(**rows(mask), ref_logprobs=interleaved(pairs.ref_chosen, pairs.ref_rejected))
        return loss(Outputs(logprobs=interleaved(pairs.chosen, pairs.rejected)), batch)

    def pair_loss(self, kind: str, pairs: Pairs, **options: float) -> Tensor:
        if kind not in PAIRS:
            raise NotOffered
        name, fixed = PAIRS[kind]
        if "weight" in options:
            options["odds_weight"] = options.pop("weight")
        return mean(self._pairs(PREFERENCE[name](**{**fixed, **options}), pairs))

    def pair_rewards(self, pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
        metrics = self._pairs(PREFERENCE["dpo"](beta=beta), pairs).metrics
        return tuple(
            torch.tensor(metrics[f"rewards/{side}"].value(), dtype=torch.float64) for side in ("chosen", "rejected")
        )  # type: ignore[return-value]

    def kto_loss(self, judged: Judged, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
        loss = UNPAIRED["kto"](beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        batch = JudgementBatch(
            **rows(judged.mask),
            desirable=judged.desirable,
            ref_logprobs=judged.ref_logprobs,
            kl_baseline=torch.full((len(judged.mask),), judged.baseline, dtype=torch.float64),
        )
        return mean(loss(Outputs(logprobs=judged.logprobs), batch))

    def reward_loss(
        self, chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float = 0.0
    ) -> Tensor:
        mask = torch.ones(2 * len(chosen), 1, dtype=torch.bool)
        batch = PreferenceBatch(**rows(mask), margin=margin)
        return mean(BradleyTerry(center=center)(Outputs(scores=interleaved(chosen, rejected)), batch))

    def sft_loss(self, logprobs: Tensor, mask: Tensor, average: str) -> Tensor:
        return mean(CrossEntropy(average=average)(Outputs(logprobs=logprobs), Batch(**rows(mask))))  # type: ignore[arg-type]

    def _policy_output(self, kind: str, tokens: Tokens, **options: Any) -> LossOutput:
        estimator = options.pop("kl", None)
        if estimator is not None:
            options["kl_estimator"] = KL[estimator]
        loss = POLICY[kind](**options)
        batch = PolicyBatch(
            **rows(tokens.mask), old_logprobs=tokens.old, advantages=tokens.advantages, ref_logprobs=tokens.ref
        )
        return loss(Outputs(logprobs=tokens.logprobs), batch)

    def policy_loss(
        self, kind: str, tokens: Tokens, *, average: str = "token", fixed_length: int | None = None, **options: object
    ) -> Tensor:
        return mean(self._policy_output(kind, tokens, average=average, fixed_length=fixed_length, **options))

    def accumulated_loss(
        self, kind: str, tokens: Tokens, parts: list[list[int]], *, average: str, fixed_length: int | None = None
    ) -> Tensor:
        options = {"average": average, "fixed_length": fixed_length}
        loss = POLICY[kind](**options)  # as the learner does: the count of the whole first, then sums
        count = loss.count(Batch(**rows(tokens.mask)))
        outputs = [self._policy_output(kind, tokens.rows(part), **options) for part in parts]
        return torch.stack([torch.as_tensor(output.loss.total) for output in outputs]).sum() / count

    def value_loss(
        self, values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None, average: str = "token"
    ) -> Tensor:
        batch = PolicyBatch(**rows(mask), old_logprobs=old, advantages=old, returns=returns, values=old)
        return mean(ValueLoss(clip=clip, average=average)(Outputs(values=values), batch))  # type: ignore[arg-type]

    def kl_estimate(self, kind: str, logprobs: Tensor, ref: Tensor) -> Tensor:
        return {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[kind](logprobs, ref)

    def adaptive_kl(self, coefficient: float, kl: float, *, target: float, horizon: float, rollouts: int) -> float:
        return AdaptiveKL(target=target, horizon=horizon).next(coefficient, coefficient, kl, rollouts, 0.5)

    # -- advantages -------------------------------------------------------------------------------------------------

    def gae(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        *,
        gamma: float,
        lam: float,
        bootstrap: Tensor | None = None,
    ) -> Tensor:
        groups = torch.arange(len(mask))
        return advantages.GAE(gamma=gamma, lam=lam)(rewards, mask, groups, values, bootstrap)

    def gae_returns(self, rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
        return advantages.GAE(gamma=gamma, lam=lam).returns(rewards, mask, torch.arange(len(mask)), values)

    def whiten(self, values: Tensor, mask: Tensor) -> Tensor:
        return advantages.whiten(values, mask)

    def rewards_to_go(self, rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
        return advantages.RewardsToGo(gamma=gamma)(rewards, mask, torch.arange(len(mask)))

    def group_advantages(self, kind: str, scores: Tensor, groups: Tensor, **options: Any) -> Tensor:
        kinds: dict[str, Any] = {
            "rloo": lambda: advantages.RLOO(),
            "grpo": lambda: advantages.GroupNormalised(eps=options["eps"]),
            "dr_grpo": lambda: advantages.GroupNormalised(std=False),
            "batch_mean": lambda: advantages.BatchMean(),
            "remax": lambda: advantages.ReMax(),
            "max_rl": lambda: advantages.MaxRL(),
        }
        if kind not in kinds:
            raise NotOffered
        mask = torch.ones(len(scores), 1, dtype=torch.bool)
        return kinds[kind]()(scores[:, None], mask, groups, None, None, options.get("baselines"))[:, 0]

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, *, coefficient: float
    ) -> Tensor:
        """One step of the online loop with stand-ins for model, sampler and reward; what it hands to the update has
        the rewards to go as its advantages, and the rewards are their differences."""
        seen: list[PolicyBatch] = []
        run_one_step(seen, scores, logprobs, ref, mask, coefficient)
        to_go = torch.nn.functional.pad(seen[0].advantages, (0, mask.shape[1] + 1 - seen[0].advantages.shape[1]))
        return torch.where(mask, to_go[:, :-1] - to_go[:, 1:], 0.0)

    # -- tokens and models ------------------------------------------------------------------------------------------

    def logits_to_logprobs(self, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        from tether.models.logprobs import token_logprobs

        vocabulary = logits.shape[-1]
        head = torch.eye(vocabulary, dtype=logits.dtype)  # hidden · Iᵀ: the logits themselves
        out = token_logprobs(logits.reshape(-1, vocabulary), head, tokens.flatten(), temperature=temperature).logprobs
        return out.view(tokens.shape)

    def sequence_logprobs(self, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        batch = grouped(prompts, [[c] for c in completions])
        with torch.no_grad():
            logprobs = tiny_policy()(batch).logprobs
        assert logprobs is not None
        return logprobs.double().sum(1).tolist()

    def encode_pair(self, prompt: str, chosen: str, rejected: str, **options: bool) -> EncodedPair:
        chat = ChatTokenizer(data.tiny_tokenizer(**options))
        group = chat.group(Prompt(id="pair", text=prompt), [chosen, rejected], id="pair")
        (a, b), (mask_a, mask_b) = group.completions, group.loss_masks
        return EncodedPair(
            prompt=group.prompt.tolist(),
            chosen=a.tolist(),
            rejected=b.tolist(),
            chosen_mask=mask_a.tolist(),
            rejected_mask=mask_b.tolist(),
        )

    def encode_chat(self, messages: list[dict[str, str]]) -> EncodedChat:
        return encoded(Demonstration(id="chat", messages=tuple(Message(**m) for m in messages)))

    def encode_completion(self, prompt: str, completion: str) -> EncodedChat:
        return encoded(Demonstration(id="text", prompt=prompt, completion=completion))

    # -- training ---------------------------------------------------------------------------------------------------

    def batch_gradient(self, method: str, rows_per_micro_batch: int) -> Tensor:
        policy = tiny_policy()
        # The learner is given tokens, not rows: a budget that holds one, about two, or all of them.
        budget = {1: 1, 2: 18, 4: 10_000}[rows_per_micro_batch]
        learner = LocalLearner(policy, AdamWSettings(learning_rate=lambda step: 0.0), tokens_per_micro_batch=budget)
        if method == "sft":
            learner.forward_backward(grouped(data.PROMPTS, [[c] for c in data.COMPLETIONS]), CrossEntropy())
        else:
            sides = [list(pair) for pair in zip(data.COMPLETIONS, data.REJECTED, strict=True)]
            plain = grouped(data.PROMPTS, sides)
            with torch.no_grad():
                reference = tiny_policy(seed=1)(plain).logprobs
            fields = {name: getattr(plain, name) for name in Batch.__dataclass_fields__}
            learner.forward_backward(PreferenceBatch(**fields, ref_logprobs=reference), PREFERENCE["dpo"](beta=0.1))
        named = sorted(policy.parameters().items())
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for _, p in named])

    def resume(self, method: str) -> tuple[Tensor, Tensor]:
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
            folder = Path(name)
            straight = final_weights(train(method, folder, "straight"))
            with dying_at(3), contextlib.suppress(Died):
                train(method, folder, "stopped")
            return straight, final_weights(train(method, folder, "stopped", resume=True))

    # -- evaluation -------------------------------------------------------------------------------------------------

    def statistic(self, kind: str, **arguments: Any) -> float | list[float]:
        def tensor(name: str) -> Tensor:
            return torch.as_tensor(arguments[name], dtype=torch.float64)

        if kind == "best_of_n_kl":
            return kl_bound(arguments["n"])
        if kind == "best_of_n_mean":
            return best_of_n(tensor("proxy")[None], tensor("gold")[None], [arguments["n"]])[0].gold
        if kind == "wilson":
            interval = wilson(arguments["wins"], arguments["n"])
            return [interval.low, interval.high]
        if kind == "strengths":
            return bradley_terry(tensor("wins")).tolist()
        if kind == "pass_at_k":
            return pass_at_k(**arguments)
        if kind == "win_rate":
            return win_rate(tensor("outcomes")).estimate
        if kind == "length_controlled":
            return length_controlled_win_rate(tensor("outcomes"), tensor("difference")).estimate
        if kind in ("reward_accuracy", "calibration"):
            chosen, rejected = tensor("chosen"), tensor("rejected")
            quality = reward_quality(chosen, rejected, torch.ones_like(chosen), torch.ones_like(rejected))
            return quality.accuracy.estimate if kind == "reward_accuracy" else quality.ece
        raise NotOffered


def encoded(demonstration: Demonstration) -> EncodedChat:
    group = ChatTokenizer(data.tiny_tokenizer()).demonstration(demonstration)
    prompt = group.prompt.tolist()
    return EncodedChat(
        ids=prompt + group.completions[0].tolist(), mask=[False] * len(prompt) + group.loss_masks[0].tolist()
    )


def grouped(prompts: list[list[int]], completions: list[list[list[int]]]) -> Batch:
    groups = [
        Group(
            id=str(i),
            prompt=torch.tensor(prompt),
            completions=tuple(torch.tensor(c) for c in cs),
            loss_masks=tuple(torch.ones(len(c), dtype=torch.bool) for c in cs),
        )
        for i, (prompt, cs) in enumerate(zip(prompts, completions, strict=True))
    ]
    return Batch.from_groups(groups)


def tiny_policy(seed: int = 0) -> Policy:
    from tether.models.attention import NAME

    model = data.tiny_llama(seed).requires_grad_(False)
    model.set_attn_implementation(NAME)
    return Policy(backbone=Backbone(hf=model, tokenizer=None, name="tiny", mode="packed"))
