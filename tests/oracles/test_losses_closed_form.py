"""Every loss against the paper's equation, written again in NumPy loops, one token and one pair at a time (float64)."""

import math

import numpy as np
import pytest
import torch

from loss_cases import AVERAGES, PER_TOKEN, case, gradients, noise, outputs
from tether.core.batches import Batch, Outputs, PolicyBatch, PreferenceBatch
from tether.core.metrics import values
from tether.losses import DPO, BradleyTerry, CrossEntropy, PolicyGradient, PPOClip, ValueLoss

CLOSE = {"rel": 1e-9, "abs": 1e-12}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def tokens(batch: Batch) -> list[tuple[int, int]]:
    mask = batch.loss_mask.numpy()
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]


def averaged(per_token: dict[tuple[int, int], float], average: str, fixed_length: int | None = None) -> float:
    """The three averages from their words, with lists."""
    rows: dict[int, list[float]] = {}
    for (b, _), value in per_token.items():
        rows.setdefault(b, []).append(value)
    if average == "token":
        return sum(per_token.values()) / len(per_token)
    if average == "sequence":
        return sum(sum(r) / len(r) for r in rows.values()) / len(rows)
    assert fixed_length is not None
    return sum(sum(r) / fixed_length for r in rows.values()) / len(rows)


def one_token(kind: type, options: dict, batch: Batch, leaves: dict, at: tuple[int, int]) -> float:
    """What one token costs, from the equations."""
    pi = float(leaves["logprobs"][at].detach())
    if kind is CrossEntropy:
        return -pi
    assert isinstance(batch, PolicyBatch)
    assert batch.returns is not None and batch.values is not None and batch.ref_logprobs is not None

    def value(clip: float | None) -> float:
        v, r, v_old = (float(x[at].detach()) for x in (leaves["values"], batch.returns, batch.values))
        cost = (v - r) ** 2
        if clip is not None:
            v_clipped = min(max(v, v_old - clip), v_old + clip)
            cost = max(cost, (v_clipped - r) ** 2)
        return cost / 2

    if kind is ValueLoss:
        return value(options.get("clip"))
    advantage, old, ref = (float(x[at]) for x in (batch.advantages, batch.old_logprobs, batch.ref_logprobs))
    rho = math.exp(pi) / math.exp(old)
    if kind is PolicyGradient:
        cost = -advantage * pi
    else:
        low, high = 1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.2)
        cost = -min(rho * advantage, max(low, min(rho, high)) * advantage)
    if "value_weight" in options:
        cost += options["value_weight"] * value(options.get("value_clip"))
    if "kl_weight" in options:
        r = math.exp(ref) / math.exp(pi)
        k3 = r - 1 - math.log(r)
        penalty = {"k2": 0.5 * math.log(r) ** 2, "k3": k3, "k3_corrected": rho * k3}
        cost += options["kl_weight"] * penalty[options.get("kl_estimator", "k3_corrected")]
    if "entropy_weight" in options:
        cost -= options["entropy_weight"] * float(leaves["entropy"][at].detach())
    return cost


@pytest.mark.parametrize("how", AVERAGES, ids=[a["average"] for a in AVERAGES])
@pytest.mark.parametrize("name", list(PER_TOKEN))
def test_per_token_losses(name: str, how: dict) -> None:
    kind, options = PER_TOKEN[name]
    loss = kind(**options, **how)
    batch, leaves = case(loss)
    expected = averaged({at: one_token(kind, options, batch, leaves, at) for at in tokens(batch)}, **how)
    found, grads = gradients(loss, batch, leaves)
    assert found == pytest.approx(expected, **CLOSE)
    # The gradient of the same sum, by central differences of the equations at four tokens.
    for at in tokens(batch)[::9]:
        for part, grad in grads.items():
            slope = 0.0
            for sign in (1, -1):
                moved = {k: v.detach().clone() for k, v in leaves.items()}
                moved[part][at] += sign * 1e-5
                slope += sign * one_token(kind, options, batch, moved, at) / 2e-5
            weights = {i: 1.0 if i == at else 0.0 for i in tokens(batch)}
            assert float(grad[at]) == pytest.approx(slope * averaged(weights, **how), rel=1e-6, abs=1e-9), (part, at)


def one_pair_sums(batch: PreferenceBatch, logprobs: torch.Tensor, pair: int) -> tuple[float, float, float, float]:
    assert batch.ref_logprobs is not None
    found = []
    for row in (2 * pair, 2 * pair + 1):
        keep = batch.loss_mask[row].numpy()
        found += [float(np.sum(x[row].detach().numpy()[keep])) for x in (logprobs, batch.ref_logprobs)]
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize("free", [False, True], ids=["reference", "free"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.05, 1.0, 4.0])
def test_dpo(beta: float, epsilon: float, free: bool) -> None:
    """Rafailov 2023, eq. 7, and its gradient, −β·σ(−βh)·(∇log π_w − ∇log π_l), eq. after it; Mitchell 2023 for ε."""
    loss = DPO(beta=beta, label_smoothing=epsilon, reference_free=free)
    batch, leaves = case(loss)
    assert isinstance(batch, PreferenceBatch)
    costs, slopes, rewards_w, rewards_l, right = [], [], [], [], 0
    for pair in range(8):
        pi_w, ref_w, pi_l, ref_l = one_pair_sums(batch, leaves["logprobs"], pair)
        if free:
            ref_w = ref_l = 0.0
        h = (pi_w - ref_w) - (pi_l - ref_l)
        costs.append(-(1 - epsilon) * log_sigmoid(beta * h) - epsilon * log_sigmoid(-beta * h))
        slopes.append(beta * (-(1 - epsilon) * sigmoid(-beta * h) + epsilon * sigmoid(beta * h)))
        rewards_w.append(beta * (pi_w - ref_w))
        rewards_l.append(beta * (pi_l - ref_l))
        right += h > 0
    found, grads = gradients(loss, batch, leaves)
    assert found == pytest.approx(np.mean(costs), **CLOSE)
    for pair in range(8):
        for row, sign in ((2 * pair, 1), (2 * pair + 1, -1)):
            expected = np.where(batch.loss_mask[row].numpy(), sign * slopes[pair] / 8, 0.0)
            np.testing.assert_allclose(grads["logprobs"][row].numpy(), expected, rtol=1e-9, atol=1e-12)
    told = values(loss(outputs(leaves), batch).metrics)
    assert told["rewards/chosen"] == pytest.approx(np.mean(rewards_w), **CLOSE)
    assert told["rewards/rejected"] == pytest.approx(np.mean(rewards_l), **CLOSE)
    assert told["rewards/margins"] == pytest.approx(np.mean(rewards_w) - np.mean(rewards_l), **CLOSE)
    assert told["rewards/accuracies"] == right / 8
    sums = [one_pair_sums(batch, leaves["logprobs"], pair) for pair in range(8)]
    assert told["logps/chosen"] == pytest.approx(np.mean([s[0] for s in sums]), **CLOSE)
    assert told["logps/rejected"] == pytest.approx(np.mean([s[2] for s in sums]), **CLOSE)


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    loss = DPO(beta=0.7)
    batch, _ = case(loss)
    assert isinstance(batch, PreferenceBatch) and batch.ref_logprobs is not None
    made = loss(Outputs(logprobs=batch.ref_logprobs.clone()), batch)
    assert made.loss.value() == pytest.approx(math.log(2), rel=1e-15)
    assert values(made.metrics)["rewards/accuracies"] == 0.0


def test_cdpo_is_a_mixture_of_both_labels_and_not_robust_dpo() -> None:
    batch, leaves = case(DPO())
    assert isinstance(batch, PreferenceBatch)
    swapped = torch.arange(16).view(8, 2).flip(1).reshape(-1)
    mine = gradients(DPO(beta=1.0, label_smoothing=0.2), batch, leaves)[0]
    one = gradients(DPO(beta=1.0), batch, leaves)[0]
    flipped = DPO(beta=1.0)(outputs(leaves, swapped, 7), batch.select(swapped)).loss.detach().value()
    assert mine == pytest.approx(0.8 * one + 0.2 * flipped, rel=1e-12)
    assert mine != pytest.approx((0.8 * one - 0.2 * flipped) / 0.6, rel=1e-3)


@pytest.mark.parametrize("use", ["use", "ignore"])
@pytest.mark.parametrize("center", [0.0, 0.3])
def test_bradley_terry(center: float, use: str) -> None:
    """−log σ(r_w − r_l − m) + c·(r_w + r_l)² and its gradient."""
    loss = BradleyTerry(center=center, margin=use)  # type: ignore[arg-type]
    batch, leaves = case(loss)
    assert isinstance(batch, PreferenceBatch) and batch.margin is not None
    r = leaves["scores"].detach().numpy()
    costs, slopes = [], np.zeros(16)
    for pair in range(8):
        r_w, r_l, m = r[2 * pair], r[2 * pair + 1], float(batch.margin[pair]) if use == "use" else 0.0
        costs.append(-log_sigmoid(r_w - r_l - m) + center * (r_w + r_l) ** 2)
        pull = -sigmoid(-(r_w - r_l - m))
        slopes[2 * pair], slopes[2 * pair + 1] = pull + 2 * center * (r_w + r_l), -pull + 2 * center * (r_w + r_l)
    found, grads = gradients(loss, batch, leaves)
    assert found == pytest.approx(np.mean(costs), **CLOSE)
    np.testing.assert_allclose(grads["scores"].numpy(), slopes / 8, rtol=1e-9, atol=1e-12)
    told = values(loss(outputs(leaves), batch).metrics)
    assert told == pytest.approx(
        {
            "accuracy": np.mean(r[0::2] > r[1::2]),
            "margin": np.mean(r[0::2] - r[1::2]),
            "scores/chosen": np.mean(r[0::2]),
            "scores/rejected": np.mean(r[1::2]),
        }
    )


def test_bradley_terry_far_out_is_finite() -> None:
    """−log σ(±1000) is 0 and 1000; the log-exp form overflows."""
    batch = case(BradleyTerry())[0].select(torch.arange(4))
    scores = torch.tensor([1000.0, 0.0, -1000.0, 0.0], requires_grad=True)
    made = BradleyTerry(margin="ignore")(Outputs(scores=scores), batch).loss
    assert isinstance(made.total, torch.Tensor)
    made.total.backward()
    assert float(made.total.detach()) == 1000.0
    assert scores.grad is not None and scores.grad.tolist() == [0.0, 0.0, -1.0, 1.0]


PPO_CELLS = [  # advantage, ratio, loss, d loss / d log π: pessimistic on both sides (Schulman 2017, figure 1)
    (1.0, 0.5, -0.5, -0.5),
    (1.0, 1.1, -1.1, -1.1),
    (1.0, 1.5, -1.3, 0.0),
    (-1.0, 0.5, 0.9, 0.0),
    (-1.0, 1.1, 1.1, 1.1),
    (-1.0, 1.5, 1.5, 1.5),
    (0.0, 1.5, 0.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "cost", "slope"), PPO_CELLS)
def test_ppo_by_hand(advantage: float, ratio: float, cost: float, slope: float) -> None:
    one = case(PPOClip())[0].select(torch.tensor([1]))
    old = torch.full((1, 1), -2.0, dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    batch = PolicyBatch(
        **{f: getattr(one, f) for f in ("prompts", "prompt_of", "tokens", "lengths", "loss_mask")},
        old_logprobs=old,
        advantages=torch.full_like(old, advantage),
    )
    made = PPOClip(clip_low=0.1, clip_high=0.3)(Outputs(logprobs=new), batch)
    assert isinstance(made.loss.total, torch.Tensor)
    made.loss.total.backward()
    assert float(made.loss.total.detach()) == pytest.approx(cost)
    assert new.grad is not None and float(new.grad) == pytest.approx(slope)
    told = values(made.metrics)
    assert told["policy/clip_low"] == float(advantage < 0 and ratio < 0.9)
    assert told["policy/clip_high"] == float(advantage > 0 and ratio > 1.3)
    assert told["policy/ratio"] == told["policy/ratio_max"] == pytest.approx(ratio)
    assert told["kl/step"] == pytest.approx(ratio - 1 - math.log(ratio))


def test_metrics_of_the_policy_and_the_critic() -> None:
    loss = PPOClip(value_weight=0.5, value_clip=0.3, kl_weight=0.2)
    batch, leaves = case(loss)
    assert isinstance(batch, PolicyBatch)
    assert batch.values is not None and batch.returns is not None and batch.ref_logprobs is not None
    keep = batch.loss_mask.numpy()
    new, old, ref = (x.detach().numpy()[keep] for x in (leaves["logprobs"], batch.old_logprobs, batch.ref_logprobs))
    v, v_old, target = (x.detach().numpy()[keep] for x in (leaves["values"], batch.values, batch.returns))
    rho, r = np.exp(new - old), np.exp(ref - new)
    told = values(loss(outputs(leaves), batch).metrics)
    assert told == pytest.approx(
        {
            "policy/clip_low": np.mean((rho < 0.8) & (batch.advantages.numpy()[keep] < 0)),
            "policy/clip_high": np.mean((rho > 1.2) & (batch.advantages.numpy()[keep] > 0)),
            "policy/ratio": rho.mean(),
            "policy/ratio_max": rho.max(),
            "kl/step": np.mean(rho - 1 - np.log(rho)),
            "kl/penalty": np.mean(rho * (r - 1 - np.log(r))),
            "policy/entropy": leaves["entropy"].detach().numpy()[keep].mean(),
            "value/loss": np.mean((v - target) ** 2),
            "value/clipped": np.mean(np.abs(v - v_old) > 0.3),
        },
        rel=1e-6,
    )


def test_cross_entropy_is_torchs_own() -> None:
    """From logits, against torch.nn.functional.cross_entropy with ignore_index."""
    logits = torch.randn(16, 7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch, _ = case(CrossEntropy())
    targets = batch.tokens.masked_fill(~batch.loss_mask, -100)
    logprobs = logits.log_softmax(-1).gather(2, batch.tokens[:, :, None]).squeeze(2)
    mine = CrossEntropy()(Outputs(logprobs=logprobs), batch)
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), targets.reshape(-1), ignore_index=-100)
    assert mine.loss.value() == pytest.approx(float(expected), rel=1e-12)
    assert values(mine.metrics)["nll"] == pytest.approx(float(expected), rel=1e-12)


def test_float32_is_close_to_float64() -> None:
    """The same losses in the precision that training runs in."""
    loss = DPO(beta=0.1)
    batch, leaves = case(loss)
    assert isinstance(batch, PreferenceBatch) and batch.ref_logprobs is not None
    exact = gradients(loss, batch, leaves)[0]
    single = PreferenceBatch(
        **{f: getattr(batch, f) for f in ("prompts", "prompt_of", "tokens", "lengths", "loss_mask")},
        ref_logprobs=batch.ref_logprobs.float(),
    )
    made = loss(Outputs(logprobs=leaves["logprobs"].detach().float()), single).loss
    assert made.value() == pytest.approx(exact, rel=1e-6)
    assert noise(1).dtype == torch.float64
