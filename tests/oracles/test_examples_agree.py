"""Two implementations, one number: Tether's vectorised code against the plain loops of examples/, in float64."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tether.advantages import GAE
from tether.core.batches import Batch, Group, Outputs, PolicyBatch, PreferenceBatch, pad_rows
from tether.losses.policy import PPOClip
from tether.losses.preference import DPO

EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTHS = (5, 1, 3, 4)


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


dpo, ppo = load_example("dpo_from_scratch"), load_example("ppo_from_scratch")


def noise(seed: int, scale: float = 1.0) -> torch.Tensor:
    """[4, 5] float64; the slots after each row's end hold NaN, which nobody may read."""
    values = scale * torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(seed)).double()
    present = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return values.masked_fill(~present, float("nan"))


def fields() -> dict:
    rows = [torch.arange(n) + 3 for n in LENGTHS]
    return {
        "prompts": (torch.tensor([7, 8]), torch.tensor([9])),
        "prompt_of": torch.tensor([0, 0, 1, 1]),
        "tokens": pad_rows(rows),
        "lengths": torch.tensor(LENGTHS),
        "loss_mask": pad_rows([torch.ones(n, dtype=torch.bool) for n in LENGTHS]),
    }


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_dpo_and_its_gradient(beta: float):
    policy, reference = noise(1, 3.0).requires_grad_(), noise(2, 3.0)
    batch = PreferenceBatch(**fields(), ref_logprobs=reference)
    ours = DPO(beta=beta)(Outputs(logprobs=policy), batch).loss
    (gradient,) = torch.autograd.grad(ours.total / ours.count, policy)

    again = noise(1, 3.0).requires_grad_()
    sums = [again[i, :n].sum() for i, n in enumerate(LENGTHS)]
    refs = [reference[i, :n].sum() for i, n in enumerate(LENGTHS)]
    pairs = [dpo.dpo_loss(sums[i], sums[i + 1], refs[i], refs[i + 1], beta) for i in (0, 2)]
    theirs = sum(pairs) / len(pairs)
    (expected,) = torch.autograd.grad(theirs, again)
    assert ours.detach().value() == pytest.approx(float(theirs.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
def test_gae_and_returns(gamma: float, lam: float, cut: bool):
    rewards, values = noise(3), noise(4)
    bootstrap = torch.tensor([0.3, -1.0, 0.7, 2.0], dtype=torch.float64) if cut else None
    mask, groups = fields()["loss_mask"], torch.arange(len(LENGTHS))
    estimator = GAE(gamma=gamma, lam=lam)
    advantages = estimator(rewards, mask, groups, values, bootstrap)
    returns = estimator.returns(rewards, mask, groups, values, bootstrap)
    for i, n in enumerate(LENGTHS):
        after = float(bootstrap[i]) if bootstrap is not None else 0.0
        expected = ppo.gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam, after)
        assert advantages[i, :n].tolist() == pytest.approx(expected[0], rel=1e-12)
        assert returns[i, :n].tolist() == pytest.approx(expected[1], rel=1e-12)
        assert not advantages[i, n:].any()


def test_ppo_with_a_clipped_critic_and_its_gradients():
    logprobs, old = noise(5, 0.5), noise(6, 0.5)
    values, old_values, returns, advantages = noise(7), noise(8), noise(9), noise(10)
    low, high, value_clip, value_weight = 0.1, 0.3, 0.2, 0.5
    batch = PolicyBatch(**fields(), old_logprobs=old, advantages=advantages, returns=returns, values=old_values)
    loss = PPOClip(clip_low=low, clip_high=high, value_weight=value_weight, value_clip=value_clip)
    a, b = logprobs.clone().requires_grad_(), values.clone().requires_grad_()
    ours = loss(Outputs(logprobs=a, values=b), batch).loss
    gradients = torch.autograd.grad(ours.total / ours.count, (a, b))

    c, d = logprobs.clone().requires_grad_(), values.clone().requires_grad_()
    slots = [(i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
    terms = [ppo.ppo_loss(c[s], old[s], advantages[s], low, high) for s in slots]
    terms += [value_weight * ppo.value_loss(d[s], old_values[s], returns[s], value_clip) for s in slots]
    theirs = sum(terms) / len(slots)
    expected = torch.autograd.grad(theirs, (c, d))
    assert ours.detach().value() == pytest.approx(float(theirs.detach()), rel=1e-12)
    for mine, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    assert 0 < sum(float(g) == 0 for g in (expected[0][s] for s in slots)) < len(slots), "some are clipped, some not"


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_log_probs_of_a_real_architecture(layout: str, tiny_model_folder: Path):
    """The forward pass of `models`, prompts shared, against one plain pass per completion."""
    from transformers import AutoModelForCausalLM

    from tether.models.load import load_backbone
    from tether.models.roles import Policy

    backbone = load_backbone(str(tiny_model_folder), attention_layout=layout, device="cpu", say=lambda text: None)
    assert backbone.mode == layout
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, (4, 1, 7)), (3, (2, 2)))
    groups = [
        Group(
            id=str(p),
            prompt=torch.randint(3, 300, (p,), generator=generator),
            completions=tuple(torch.randint(3, 300, (c,), generator=generator) for c in cs),
            loss_masks=tuple(torch.ones(c, dtype=torch.bool) for c in cs),
        )
        for p, cs in sizes
    ]
    with torch.no_grad():
        logprobs = Policy(backbone=backbone)(Batch.from_groups(groups)).logprobs
    assert logprobs is not None
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    row = 0
    for group in groups:
        for completion in group.completions:
            ids = torch.cat([group.prompt, completion])
            with torch.no_grad():
                each = torch.stack(dpo.token_logps(plain, ids, len(group.prompt)))
                total = dpo.sequence_logps(plain, ids, len(group.prompt))
            torch.testing.assert_close(logprobs[row, : len(completion)], each, rtol=1e-4, atol=1e-5)
            assert float(logprobs[row].sum()) == pytest.approx(float(total), abs=1e-4)
            row += 1
