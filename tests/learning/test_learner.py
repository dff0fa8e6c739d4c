"""The learner: gradients that no division into micro-batches changes, a step that is AdamW, a state that continues."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from model_cases import RAGGED, backbone, random_batch
from tether.backends.local.learner import AdamWSettings, LocalLearner, evaluate, packed_tokens
from tether.core.batches import Batch, PolicyBatch, PreferenceBatch
from tether.core.errors import NumericStop
from tether.core.metrics import Mean, values
from tether.core.protocols import LossOutput
from tether.losses import DPO, BradleyTerry, CrossEntropy, PPOClip
from tether.models.adapters import add_adapter
from tether.models.roles import ActorCritic, Policy, Role, Scorer, new_head

SETTINGS = AdamWSettings(learning_rate=lambda step: 0.01)
PAIRS = random_batch((6, 3, 8), [(1, 4), (1, 7), (0, 2), (0, 2), (2, 9), (2, 1), (0, 5), (0, 3)], seed=1)


def noise(batch: Batch, seed: int) -> torch.Tensor:
    return torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed))


def policy_batch() -> PolicyBatch:
    fields = {name: getattr(RAGGED, name) for name in ("prompts", "prompt_of", "tokens", "lengths")}
    mask = RAGGED.loss_mask & (noise(RAGGED, 9) > -1)  # some tokens are a tool's
    return PolicyBatch(
        **fields,
        loss_mask=mask,
        old_logprobs=noise(RAGGED, 1) - 6,
        advantages=noise(RAGGED, 2),
        returns=noise(RAGGED, 3),
        values=noise(RAGGED, 4),
        ref_logprobs=noise(RAGGED, 5) - 6,
    )


def preference_batch() -> PreferenceBatch:
    fields = {name: getattr(PAIRS, name) for name in ("prompts", "prompt_of", "tokens", "lengths", "loss_mask")}
    margin = torch.tensor([0.1, 0.2, 0.3, 0.4])
    return PreferenceBatch(**fields, ref_logprobs=noise(PAIRS, 1) - 6, margin=margin)


def actor_critic(kind: str) -> ActorCritic:
    """``head``: one trunk; ``adapter``: an adapter each on one backbone; ``separate``: a network each."""
    ours = backbone("qwen2")
    names: tuple[str | None, str | None] = (None, None)
    if kind == "adapter":
        names = ("policy", "critic")
        for name in names:
            add_adapter(ours.hf, name, rank=2, alpha=4.0)
    torch.manual_seed(5)
    theirs = backbone("qwen2", seed=3) if kind == "separate" else ours
    critic = Scorer(backbone=theirs, head=new_head(theirs, zero=False), adapter=names[1])
    return ActorCritic(policy=Policy(backbone=ours, adapter=names[0]), critic=critic)


def scorer() -> Scorer:
    torch.manual_seed(5)
    ours = backbone("llama")
    return Scorer(backbone=ours, head=new_head(ours, zero=False))


PPO = PPOClip(value_weight=0.5, value_clip=0.2, entropy_weight=0.1, kl_weight=0.2)
CASES = {
    "cross_entropy": (lambda: Policy(backbone=backbone("llama_tied")), CrossEntropy(), lambda: RAGGED),
    "dpo": (lambda: Policy(backbone=backbone("mistral_window")), DPO(beta=0.2), preference_batch),
    "bradley_terry": (scorer, BradleyTerry(center=0.1), preference_batch),
    **{f"ppo-{kind}": (partial(actor_critic, kind), PPO, policy_batch) for kind in ("head", "adapter", "separate")},
}


def learner(role: Role, tokens: int = 10_000, **changes) -> LocalLearner:
    return LocalLearner(role, replace(SETTINGS, **changes), tokens_per_micro_batch=tokens)


def gradients(learner: LocalLearner) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.parameters.items()}


def weights(learner: LocalLearner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner.parameters.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, value in left.items():
        scale = float(right[name].abs().max()) + 1e-4
        torch.testing.assert_close(value / scale, right[name] / scale, atol=3e-4, rtol=0, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_neither_gradients_nor_metrics(name: str):
    role, loss, batch = CASES[name]
    whole = learner(role())
    numbers = values(whole.forward_backward(batch(), loss))
    right = gradients(whole)
    assert sum(bool(g.any()) for g in right.values()) >= len(right) / 2
    for budget in (1, 25):
        parts = learner(role(), budget)
        again = values(parts.forward_backward(batch(), loss))
        close(gradients(parts), right)
        assert again == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def test_the_gradient_is_that_of_the_mean():
    ours = learner(Policy(backbone=backbone("llama")), 20)
    metrics = ours.forward_backward(RAGGED, CrossEntropy(), weight=0.5)
    plain = Policy(backbone=backbone("llama"))
    for parameter in plain.parameters().values():
        parameter.requires_grad_(True)
    mean = -plain(RAGGED).logprobs.sum() / float(RAGGED.lengths.sum())
    (0.5 * mean).backward()
    close(gradients(ours), {n: p.grad for n, p in plain.parameters().items()})
    assert metrics["loss"].value() == pytest.approx(float(mean.detach()), rel=1e-5)


def test_a_policys_entropy_is_measured_in_every_update():
    batch = policy_batch()
    found = learner(Policy(backbone=backbone("llama"))).forward_backward(batch, PPOClip())
    exact = evaluate(Policy(backbone=backbone("llama")), batch, 10_000, entropy=True).entropy
    assert exact is not None
    assert found["policy/entropy"].value() == pytest.approx(float(exact[batch.loss_mask].mean()), rel=1e-5)


def test_two_calls_add_up():
    ours = learner(Policy(backbone=backbone("llama")))
    ours.forward_backward(RAGGED, CrossEntropy(), weight=0.25)
    first = gradients(ours)
    ours.forward_backward(PAIRS, CrossEntropy())
    alone = learner(Policy(backbone=backbone("llama")))
    alone.forward_backward(PAIRS, CrossEntropy())
    close(gradients(ours), {n: first[n] + g for n, g in gradients(alone).items()})


def test_a_batch_that_counts_nothing_adds_nothing():
    ours = learner(Policy(backbone=backbone("llama")))
    assert ours.forward_backward(replace(RAGGED, loss_mask=torch.zeros_like(RAGGED.loss_mask)), CrossEntropy()) == {}
    assert not any(g.any() for g in gradients(ours).values()) and ours.tokens_seen == 0


@pytest.mark.parametrize("budget", [12, 10_000])
def test_tokens_seen_counts_every_prompt_once_however_the_batch_is_cut(budget: int):
    ours = learner(Policy(backbone=backbone("llama")))
    ours.tokens_per_micro_batch = budget
    ours.forward_backward(RAGGED, CrossEntropy())
    used = [len(RAGGED.prompts[p]) for p in set(RAGGED.prompt_of.tolist())]
    assert ours.tokens_seen == sum(used) + int(RAGGED.lengths.sum()) == packed_tokens(RAGGED)


@pytest.mark.parametrize("clip", [0.01, 1e6], ids=["clipped", "free"])
def test_a_step_is_adamw_on_the_clipped_gradient(clip: float):
    """Against torch's plain AdamW and torch's own clipping, with decay on matrices alone, over three steps."""
    options = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6, "clip_norm": clip}
    ours = learner(Policy(backbone=backbone("qwen2")), learning_rate=lambda step: 0.02 / (step + 1), **options)
    plain = learner(Policy(backbone=backbone("qwen2")))
    matrices, vectors = ([p for p in plain.parameters.values() if (p.dim() > 1) == big] for big in (True, False))
    assert matrices and vectors
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    for step in range(3):
        ours.forward_backward(RAGGED, CrossEntropy())
        numbers = ours.optim_step()
        plain.forward_backward(RAGGED, CrossEntropy())
        norm = torch.nn.utils.clip_grad_norm_(list(plain.parameters.values()), clip)
        for group in reference.param_groups:
            group["lr"] = 0.02 / (step + 1)
        reference.step()
        reference.zero_grad()
        assert numbers["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        assert numbers["learning_rate"] == 0.02 / (step + 1) and numbers["skipped_steps"] == 0
    assert ours.step == 3 and all(p.grad is None for p in ours.parameters.values())
    for name, mine in weights(ours).items():
        torch.testing.assert_close(mine, weights(plain)[name], atol=2e-4, rtol=1e-3)


def test_a_factor_is_for_the_critic_alone():
    slow, fast = (learner(actor_critic("separate"), factors=factors) for factors in (None, {"critic.": 10.0}))
    start = weights(slow)
    for ours in (slow, fast):
        ours.forward_backward(policy_batch(), PPO)
        ours.optim_step()
    for name, before in start.items():
        moved, moved_fast = (weights(ours)[name] - before for ours in (slow, fast))
        factor = 10.0 if name.startswith("critic.") else 1.0
        torch.testing.assert_close(moved_fast, factor * moved, atol=3e-5, rtol=1e-3)
    assert any(name.startswith("critic.") for name in start)


class Broken:
    """Cross-entropy whose total is NaN on micro-batches that hold ``bad``, a token."""

    needs = frozenset()

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def count(self, batch: Batch) -> float:
        return CrossEntropy().count(batch)

    def __call__(self, outputs, batch: Batch) -> LossOutput:
        output = CrossEntropy()(outputs, batch)
        if not (batch.tokens == self.bad).any():
            return output
        return LossOutput(loss=Mean(output.loss.total * float("nan"), output.loss.count))


def test_a_loss_that_is_not_finite_skips_the_step_and_leaves_no_trace():
    ours, clean = (learner(Policy(backbone=backbone("llama")), 8) for _ in range(2))
    bad = int(RAGGED.tokens[0, 0])
    start = weights(ours)
    ours.forward_backward(RAGGED, Broken(bad))
    assert any(g.any() for g in gradients(ours).values()), "the other micro-batches left gradients"
    assert ours.optim_step()["skipped_steps"] == 1 and same(weights(ours), start)
    assert all(p.grad is None for p in ours.parameters.values())
    clean.step = 1
    for each in (ours, clean):
        each.forward_backward(PAIRS, CrossEntropy())
        assert each.optim_step()["skipped_steps"] == 0
    assert same(weights(ours), weights(clean)) and ours.nonfinite_in_a_row == 0


def test_a_gradient_that_is_not_finite_skips_the_step():
    ours = learner(Policy(backbone=backbone("llama")))
    start = weights(ours)
    ours.forward_backward(RAGGED, CrossEntropy())
    next(iter(ours.parameters.values())).grad[0, 0] = float("inf")
    assert ours.optim_step()["skipped_steps"] == 1 and same(weights(ours), start)


def test_several_in_a_row_stop_and_a_good_step_starts_the_count_anew():
    ours = learner(Policy(backbone=backbone("llama")), nonfinite_limit=2)
    bad = Broken(int(RAGGED.tokens[0, 0]))
    for batch_loss in (bad, CrossEntropy(), bad):
        ours.forward_backward(RAGGED, batch_loss)
        ours.optim_step()
    ours.forward_backward(RAGGED, bad)
    with pytest.raises(NumericStop, match=r"2 steps in a row \(at step 3\)") as caught:
        ours.optim_step()
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["head", "adapter", "separate"])
def test_a_saved_learner_goes_on_bit_for_bit(kind: str, tmp_path: Path):
    def advance(ours: LocalLearner, steps: int) -> None:
        for _ in range(steps):
            ours.forward_backward(policy_batch(), PPO)
            ours.optim_step()

    settings = {"learning_rate": lambda step: 0.01 / (step + 1), "weight_decay": 0.1, "factors": {"critic.": 3.0}}
    through = learner(actor_critic(kind), 30, **settings)
    advance(through, 2)
    through.save(tmp_path)
    halfway = weights(through)
    advance(through, 2)

    again = learner(actor_critic(kind), 30, **settings)
    again.load(tmp_path)
    assert same(weights(again), halfway) and again.step == 2
    advance(again, 2)
    assert same(weights(again), weights(through))
    assert (again.step, again.tokens_seen) == (through.step, through.tokens_seen)
    assert not same(weights(again), halfway)


def test_outputs_in_micro_batches_are_those_of_the_whole_and_in_its_order():
    role = actor_critic("adapter")
    with torch.no_grad():
        whole = role(RAGGED, entropy=True)
    for budget in (1, 25):
        parts = evaluate(role, RAGGED, budget, entropy=True)
        for name in ("logprobs", "entropy", "values", "scores"):
            got = getattr(parts, name)
            assert not got.requires_grad
            torch.testing.assert_close(got, getattr(whole, name), atol=1e-4, rtol=1e-4)
    ours = learner(role, 25)
    torch.testing.assert_close(ours.logprobs(RAGGED), whole.logprobs, atol=1e-4, rtol=1e-4)
    assert ours.outputs(RAGGED).entropy is None and evaluate(scorer(), RAGGED, 9).logprobs is None


@pytest.mark.parametrize("kind", ["head", "adapter", "separate"])
def test_policy_and_critic_say_the_same_alone_as_together(kind: str, monkeypatch: pytest.MonkeyPatch):
    ours, batch = learner(actor_critic(kind), 20), policy_batch()
    both = ours.outputs(batch)
    asked: list[str] = []
    for part in (Policy, Scorer):
        read = part.__call__
        monkeypatch.setattr(part, "__call__", lambda self, *a, read=read, **k: asked.append("") or read(self, *a, **k))
    assert torch.equal(ours.logprobs(batch), both.logprobs) and torch.equal(ours.values(batch), both.values)
    assert bool(asked) == (kind != "head")


def test_training_learns_a_batch_by_heart():
    ours = learner(Policy(backbone=backbone("llama")), 40)
    first = values(ours.forward_backward(PAIRS, CrossEntropy()))["loss"]
    ours.optim_step()
    for _ in range(40):
        last = values(ours.forward_backward(PAIRS, CrossEntropy()))["loss"]
        ours.optim_step()
    assert first > 4 and last < 0.5
