"""Several heads on one trunk: their loss, their draws of the data, their folder, and the reward that they make."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from model_cases import RAGGED, backbone
from tether.backends.local.learner import AdamWSettings, LocalLearner, evaluate
from tether.config.sections import ModelConfig
from tether.core.batches import Batch, Group, Outputs, PreferenceBatch, RankingBatch
from tether.core.errors import UserError
from tether.core.metrics import Mean, Spread, merge, values
from tether.core.protocols import Loss, Scores
from tether.core.text import Prompt, Rollout
from tether.losses import BradleyTerry, Davidson, MultiHead, PlackettLuce
from tether.methods.ensembles import bootstrap_heads
from tether.methods.judges import open_reward
from tether.methods.parts import Data
from tether.models.adapters import adapter_parameters, add_adapter
from tether.models.load import check_can_be_saved, load_backbone, load_scorer, save_scorer
from tether.models.reading import LAST, Reading
from tether.models.roles import Scorer, new_head
from tether.models.shared import load_shared_scorer, save_adapter
from tether.rewards.model import FILE, ScoreScale

EXACT = {"atol": 1e-12, "rtol": 1e-12}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
K = 3
# Of five units, how often each of three heads draws each: one that nobody draws, one that one head alone draws.
DRAWS = torch.tensor([[1, 2, 0], [0, 0, 0], [3, 1, 1], [0, 2, 0], [1, 0, 4]])


def groups(sizes: Sequence[int], draws: Tensor | None = None, *, margin: bool = False, ranks: bool = False) -> Any:
    """One group of ragged completions per entry of ``sizes``."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, n in enumerate(sizes):
        lengths = torch.randint(1, 6, (n,), generator=generator).tolist()
        made.append(
            Group(
                id=str(i),
                prompt=torch.randint(3, 90, (2 + i % 3,), generator=generator),
                completions=tuple(torch.randint(3, 90, (m,), generator=generator) for m in lengths),
                loss_masks=tuple(torch.ones(m, dtype=torch.bool) for m in lengths),
                margin=0.3 * i if margin else None,
                ranks=tuple(min(j, 2) for j in range(n)) if ranks else None,
                draws=None if draws is None else tuple(draws[i].tolist()),
            )
        )
    return made


def pairs(draws: Tensor | None = None, margin: bool = True) -> PreferenceBatch:
    made = groups([2] * 5, draws, margin=margin)
    return PreferenceBatch.from_groups(made, margin=torch.tensor([g.margin for g in made]) if margin else None)


def rankings(draws: Tensor | None = None) -> RankingBatch:
    made = groups([3, 2, 4, 2, 3], draws, ranks=True)
    return RankingBatch.from_groups(made, ranks=torch.tensor([r for g in made for r in g.ranks]))


def outputs_for(batch: Batch) -> tuple[Outputs, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(batch.size, K, generator=generator, dtype=torch.float64).requires_grad_()
    logprobs = (-torch.rand(batch.tokens.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    return Outputs(head_scores=scores, scores=scores.mean(1), logprobs=logprobs), scores, logprobs


CASES: dict[str, tuple[Loss, Any]] = {
    "bradley_terry": (BradleyTerry(center=0.1), pairs),
    "language": (BradleyTerry(nll_weight=0.5, margin="ignore"), pairs),
    "plackett_luce": (PlackettLuce(), rankings),
    "davidson": (Davidson(center=0.05), rankings),
}


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_mean_of_the_losses_of_single_heads(name: str):
    loss, batch_of = CASES[name]
    batch = batch_of()
    outputs, scores, logprobs = outputs_for(batch)
    found = MultiHead(loss=loss)(outputs, batch).loss
    assert found.count == loss.count(batch) == 5 == MultiHead(loss=loss).count(batch)
    got = torch.autograd.grad(found.total, [scores, logprobs], allow_unused=True)
    alone = [loss(replace(outputs, scores=scores[:, k]), batch).loss.total for k in range(K)]
    expected = (alone[0] + alone[1] + alone[2]) / 3
    torch.testing.assert_close(found.total, expected, **EXACT)
    for mine, right in zip(got, torch.autograd.grad(expected, [scores, logprobs], allow_unused=True), strict=True):
        if right is None:  # the log-probs, which only the language loss reads
            assert mine is None and name != "language"
        else:
            torch.testing.assert_close(mine, right, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_a_draw_is_the_data_that_it_holds(name: str):
    """Against batches in which what a head draws n times stands n times, as groups of its own."""
    loss, batch_of = CASES[name]
    batch = batch_of(DRAWS)
    outputs, scores, logprobs = outputs_for(batch)
    found = MultiHead(loss=loss)(outputs, batch).loss
    assert found.count == 5  # whatever was drawn
    plain = batch_of()
    starts = [0, *torch.unique(plain.unit_of, return_counts=True)[1].cumsum(0).tolist()]
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(K):
        for unit in range(5):
            rows = torch.arange(starts[unit], starts[unit + 1])
            one = plain.select(rows)
            seen = Outputs(scores=scores[rows, k], logprobs=logprobs[rows, : one.tokens.shape[1]])
            for _ in range(int(DRAWS[unit, k])):
                expected = expected + torch.as_tensor(loss(seen, one).loss.total) / K
    torch.testing.assert_close(found.total, expected, **EXACT)
    got, right = (torch.autograd.grad(x, scores)[0] for x in (found.total, expected))
    torch.testing.assert_close(got, right, **EXACT)
    assert not got[starts[1] : starts[2]].any() and got[starts[3] : starts[4], 1].all()
    once = MultiHead(loss=loss)(outputs, replace(batch, draws=torch.ones_like(batch.draws))).loss.total
    torch.testing.assert_close(once, MultiHead(loss=loss)(outputs, plain).loss.total, **EXACT)


def test_bradley_terry_by_hand():
    batch = pairs(DRAWS, margin=False)
    outputs, scores, _ = outputs_for(batch)
    found = MultiHead(loss=BradleyTerry())(outputs, batch)
    r = scores.detach().numpy()
    gaps = r[0::2] - r[1::2]  # [5, K]
    assert found.loss.detach().value() == pytest.approx(float((DRAWS.numpy() * np.log1p(np.exp(-gaps))).sum() / K / 5))
    metrics = values(found.metrics)
    assert metrics["accuracy"] == (gaps.mean(1) > 0).mean() and metrics["margin"] == pytest.approx(gaps.mean())
    each = (gaps > 0).mean(0)
    assert metrics["heads/accuracy_spread"] == pytest.approx(each.max() - each.min()) and each.max() > each.min()
    # Of a pair's two completions, each is half the gap away from their mean.
    assert metrics["heads/disagreement"] == pytest.approx((gaps / 2).std(axis=1).mean())


def test_what_a_head_adds_to_every_score_is_no_disagreement():
    batch = rankings()
    outputs, scores, _ = outputs_for(batch)
    shifted = replace(outputs, head_scores=scores + torch.tensor([0.0, 5.0, -9.0]))
    one, other = (values(MultiHead(loss=PlackettLuce())(o, batch).metrics) for o in (outputs, shifted))
    assert one["heads/disagreement"] == pytest.approx(other["heads/disagreement"]) and one["heads/disagreement"] > 0.1
    same = replace(outputs, head_scores=scores[:, :1].expand(-1, K) + torch.tensor([0.0, 5.0, -9.0]))
    assert values(MultiHead(loss=PlackettLuce())(same, batch).metrics)["heads/disagreement"] == pytest.approx(0)


def test_a_spread_is_of_sums_not_of_parts():
    parts = [{"s": Spread((Mean(0.0, 1), Mean(1.0, 1)))}, {"s": Spread((Mean(3.0, 3), Mean(0.0, 3)))}]
    assert values(merge(parts))["s"] == pytest.approx(3 / 4 - 1 / 4)  # not the mean of 1 and 1


def test_where_nothing_is_drawn_there_is_nothing_to_learn():
    batch = pairs(torch.zeros(5, K, dtype=torch.long))
    outputs, scores, _ = outputs_for(batch)
    found = MultiHead(loss=BradleyTerry())(outputs, batch).loss
    assert float(found.total.detach()) == 0 and not torch.autograd.grad(found.total, scores)[0].any()


def test_heads_that_do_not_fit_are_refused():
    outputs, _, _ = outputs_for(pairs())
    with pytest.raises(ValueError, match=r"needs outputs\.head_scores"):
        MultiHead(loss=BradleyTerry())(replace(outputs, head_scores=None), pairs())
    with pytest.raises(ValueError, match=r"batch\.draws is of 2 heads, and outputs\.head_scores of 3"):
        MultiHead(loss=BradleyTerry())(outputs, pairs(DRAWS[:, :2]))


# -- the draws ---------------------------------------------------------------------------------------------------------


def test_each_head_draws_the_size_of_the_data():
    made = tuple(groups([2] * 200))
    data = Data(train=made, held_out=tuple(made[:3]), fingerprint="f")
    drawn = bootstrap_heads(data, 4, 5)
    counts = torch.tensor([g.draws for g in drawn.train])
    assert counts.shape == (200, 4) and counts.sum(0).tolist() == [200] * 4
    assert len({tuple(c) for c in counts.T.tolist()}) == 4  # the heads differ
    for k in range(4):  # 1/e of the data is in no draw, as it is with replacement
        assert int((counts[:, k] == 0).sum()) == pytest.approx(200 / math.e, abs=15)
    assert [g.id for g in drawn.train] == [g.id for g in made] and drawn.held_out == data.held_out
    again, other = (tuple(g.draws for g in bootstrap_heads(data, 4, seed).train) for seed in (5, 6))
    assert again == tuple(g.draws for g in drawn.train) != other


def test_draws_stay_with_their_rows():
    """Rows of a selection keep their counts, also where completions are shorter than there are heads."""
    batch = pairs(DRAWS)
    assert batch.draws is not None
    assert torch.equal(batch.draws, DRAWS.repeat_interleave(2, 0))
    part = batch.select(torch.tensor([4, 5, 8, 9]))
    assert part.draws is not None and torch.equal(part.draws, DRAWS[[2, 2, 4, 4]])
    short = replace(batch, lengths=torch.ones_like(batch.lengths)).select(torch.tensor([0, 1]))
    assert short.tokens.shape[1] == 1 and short.draws is not None and short.draws.shape == (2, K)
    assert pairs().draws is None


# -- the model ---------------------------------------------------------------------------------------------------------


def scorer_of(tokenizer: Any, *, heads: int = K, reading: Reading = LAST, lora: bool = False, seed: int = 0) -> Scorer:
    ours = backbone("llama")
    ours.tokenizer = tokenizer
    torch.manual_seed(seed)
    head = new_head(ours, zero=False, heads=heads, bias=reading.has_bias)
    if lora:
        adapted(ours.hf)
    return Scorer(backbone=ours, head=head, reading=reading, adapter="reward" if lora else None)


def adapted(hf: Any) -> None:
    add_adapter(hf, "reward", rank=2, alpha=4.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(hf, "reward").values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_heads_begin_apart_and_by_the_seed(tiny_tokenizer):
    one, again, other = (scorer_of(tiny_tokenizer, seed=s).head.weight for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.linalg.matrix_rank(one) == K


@torch.no_grad()
def test_one_pass_gives_what_each_head_gives_alone(tiny_tokenizer, monkeypatch):
    scorer = scorer_of(tiny_tokenizer)
    passes: list[int] = []
    real = type(scorer.backbone).hidden
    monkeypatch.setattr(type(scorer.backbone), "hidden", lambda *a: (passes.append(1), real(*a))[1])
    together = scorer(RAGGED)
    assert together.head_scores is not None and len(passes) == 1
    for k in range(K):
        head = new_head(scorer.backbone, zero=True)
        head.weight.copy_(scorer.head.weight[k : k + 1])
        alone = Scorer(backbone=scorer.backbone, head=head)(RAGGED)
        torch.testing.assert_close(together.head_scores[:, k], alone.scores, atol=1e-6, rtol=1e-6)
        assert alone.head_scores is None
    torch.testing.assert_close(together.scores, together.head_scores.mean(1))
    whole, parts = evaluate(scorer, RAGGED, 10**6), evaluate(scorer, RAGGED, 12)
    torch.testing.assert_close(whole.head_scores, together.head_scores, **CLOSE)
    torch.testing.assert_close(parts.head_scores, together.head_scores, **CLOSE)


@pytest.mark.parametrize("reading", [LAST, Reading(kind="mean")], ids=["last", "mean"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@torch.no_grad()
def test_saved_and_reopened_by_transformers_and_by_us(reading: Reading, lora: bool, tiny_tokenizer, tmp_path: Path):
    scorer = scorer_of(tiny_tokenizer, reading=reading, lora=lora)
    check_can_be_saved(scorer)
    before = scorer(RAGGED)
    assert before.head_scores is not None and before.scores is not None
    save_scorer(scorer, tmp_path)
    auto = AutoModelForTokenClassification if reading.per_token else AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == K and plain.config.id2label == {0: "head-0", 1: "head-1", 2: "head-2"}
    for i, (p, n) in enumerate(zip(RAGGED.prompt_of.tolist(), RAGGED.lengths.tolist(), strict=True)):
        row = torch.cat([RAGGED.prompts[p], RAGGED.tokens[i, :n]])
        logits = plain(input_ids=row[None]).logits[0]
        expected = logits if reading is LAST else (logits[-n:].mean(0) if n else logits[-1])
        torch.testing.assert_close(before.head_scores[i], expected, **CLOSE)
        torch.testing.assert_close(before.scores[i], expected.mean(), **CLOSE)
    again = load_scorer(str(tmp_path), device="cpu", say=pytest.fail)
    assert again.heads == K and again.reading == reading
    torch.testing.assert_close(again(RAGGED).head_scores, before.head_scores, **CLOSE)
    one = Scorer(backbone=again.backbone, head=new_head(again.backbone, zero=False))
    save_scorer(one, tmp_path / "one")  # what was said of the heads is not said of the next model
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert load_scorer(str(tmp_path / "one"), device="cpu").heads == 1 and "tether_heads" not in config


@torch.no_grad()
def test_as_an_adapter_of_a_shared_backbone(tiny_model_folder: Path, tmp_path: Path):
    ours = load_backbone(str(tiny_model_folder))
    adapted(ours.hf)
    scorer = Scorer(backbone=ours, head=new_head(ours, zero=False, heads=K), adapter="reward")
    save_adapter(scorer, tmp_path)
    shared = load_shared_scorer(tmp_path, load_backbone(str(tiny_model_folder)), "held")
    torch.testing.assert_close(shared(RAGGED).head_scores, scorer(RAGGED).head_scores)


def test_labels_that_are_no_heads_are_refused(tiny_tokenizer, tmp_path: Path):
    save_scorer(scorer_of(tiny_tokenizer), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tether_heads": 3', '"tether_heads": 4'))
    with pytest.raises(UserError, match="no linear head `score` with 4 outputs, as tether_heads"):
        load_scorer(str(tmp_path), device="cpu")


def test_any_division_into_micro_batches_is_the_same_gradient(tiny_tokenizer):
    batch = pairs(DRAWS)
    found: list[dict[str, Tensor]] = []
    said: list[dict[str, float]] = []
    for budget in (10**6, 1):
        settings = AdamWSettings(learning_rate=lambda step: 1e-3)
        learner = LocalLearner(scorer_of(tiny_tokenizer), settings, tokens_per_micro_batch=budget)
        said.append(values(learner.forward_backward(batch, MultiHead(loss=BradleyTerry()))))
        found.append({n: p.grad for n, p in learner.parameters.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]["score.weight"].any(1).all()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
    assert said[0] == pytest.approx(said[1], rel=1e-5, abs=1e-6)


# -- the reward --------------------------------------------------------------------------------------------------------


def rollout(group: int, tokens: list[int]) -> Rollout:
    return Rollout(
        prompt=Prompt(id=str(group), text="what"), group=group, prompt_tokens=torch.tensor([5, 6 + group]),
        tokens=torch.tensor(tokens), sampled=torch.ones(len(tokens), dtype=torch.bool),
        logprobs=torch.zeros(len(tokens)), text="", finish_reason="stop",
    )  # fmt: skip


ROLLOUTS = [rollout(0, [7, 8, 9]), rollout(0, [11]), rollout(1, [12, 2]), rollout(1, [40, 41, 42, 43])]


@pytest.fixture
def trained(tiny_tokenizer, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A folder of three heads with a scale, and their raw scores of ROLLOUTS [K, N] by plain transformers."""
    folder = tmp_path / "trained"
    save_scorer(scorer_of(tiny_tokenizer), folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [plain(input_ids=torch.cat([r.prompt_tokens, r.tokens])[None]).logits[0] for r in ROLLOUTS]
    scores = torch.stack(rows)
    measured = torch.cat([scores, 2 * scores + torch.tensor([0.5, -1.0, 2.0])])
    ScoreScale.of(measured).save(folder)
    return folder, scores.T.double().numpy()


def opened(spec: Any, tokenizer: Any, **options: Any) -> Scores:
    model = ModelConfig(device="cpu")
    reward, scorer = open_reward(spec, tokenizer, model, 100, lambda text: None, **options)
    assert (scorer is None) == isinstance(spec, dict)
    return reward(ROLLOUTS)


def test_a_scale_for_each_head_and_for_their_mean(trained, tmp_path: Path):
    scores = torch.tensor([[0.0, 1.0, 7.0], [2.0, 1.0, -7.0], [4.0, 4.0, 3.0]])
    scale = ScoreScale.of(scores)
    assert (scale.mean, scale.completions) == (pytest.approx(15 / 9), 3)
    assert [one.mean for one in scale.heads] == [2.0, 2.0, 1.0]
    assert scale.heads[0].std == pytest.approx(math.sqrt(8 / 3))
    scale.save(tmp_path)
    assert ScoreScale.load(tmp_path) == scale
    ScoreScale(mean=1.0, std=2.0, completions=4).save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == {"mean": 1.0, "std": 2.0, "completions": 4}


@pytest.mark.parametrize("combine", ["mean", "minimum", "mean_minus_std"])
@pytest.mark.parametrize("scale", [True, False])
def test_heads_are_combined_as_members_are(combine: str, scale: bool, trained, tiny_tokenizer):
    folder, raw = trained
    spec = {"type": "ensemble", "members": [str(folder)], "combine": combine, "scale": scale}
    found = opened(spec | ({"c": 0.7} if combine == "mean_minus_std" else {}), tiny_tokenizer)
    facts = json.loads((folder / FILE).read_text())["heads"]
    r = np.stack([(raw[k] - f["mean"]) / f["std"] for k, f in enumerate(facts)]) if scale else raw
    apart = np.sqrt(((r - r.mean(0)) ** 2).mean(0))
    right = {"mean": r.mean(0), "minimum": r.min(0), "mean_minus_std": r.mean(0) - 0.7 * apart}[combine]
    np.testing.assert_allclose(found.total.numpy(), right, atol=1e-5)
    assert list(found.parts) == ["head-0", "head-1", "head-2", "disagreement"]
    np.testing.assert_allclose(found.parts["disagreement"].numpy(), apart, atol=1e-5)
    np.testing.assert_allclose(found.parts["head-1"].numpy(), r[1], atol=1e-5)


def test_named_plainly_it_is_the_mean_of_its_heads(trained, tiny_tokenizer):
    folder, raw = trained
    facts = json.loads((folder / FILE).read_text())
    bare = opened(str(folder), tiny_tokenizer)
    np.testing.assert_allclose(bare.total.numpy(), raw.mean(0), atol=1e-5)
    np.testing.assert_allclose(bare.parts["disagreement"].numpy(), raw.std(0), atol=1e-5)
    assert list(bare.parts) == ["disagreement"]
    scaled = opened(str(folder), tiny_tokenizer, scaled=True)
    np.testing.assert_allclose(scaled.total.numpy(), (raw.mean(0) - facts["mean"]) / facts["std"], atol=1e-5)
    np.testing.assert_allclose(scaled.parts["unscaled"].numpy(), raw.mean(0), atol=1e-5)
    own = np.stack([(raw[k] - f["mean"]) / f["std"] for k, f in enumerate(facts["heads"])])
    np.testing.assert_allclose(scaled.parts["disagreement"].numpy(), own.std(0), atol=1e-5)


def test_what_does_not_go_together_is_refused(trained, tiny_tokenizer, tmp_path: Path):
    folder, _ = trained
    other = tmp_path / "other"
    save_scorer(scorer_of(tiny_tokenizer, heads=1), other)
    ScoreScale(completions=4).save(other)
    with pytest.raises(UserError, match=f"{folder} has 3 heads, which are an ensemble by themselves; name it alone"):
        opened({"type": "ensemble", "members": [str(other), str(folder)]}, tiny_tokenizer)
    with pytest.raises(UserError, match="two members or more"):
        opened({"type": "ensemble", "members": [str(other)]}, tiny_tokenizer)
    ScoreScale(completions=4).save(folder)
    with pytest.raises(UserError, match=r"3 heads, and score_scale\.json has a scale for 0"):
        opened(str(folder), tiny_tokenizer, scaled=True)
    (folder / FILE).unlink()
    with pytest.raises(UserError, match=rf"no score_scale\.json in {folder}"):
        opened({"type": "ensemble", "members": [str(folder)]}, tiny_tokenizer)
    assert list(opened(str(folder), tiny_tokenizer, scaled=True).parts) == ["disagreement"]
