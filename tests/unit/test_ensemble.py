"""Several reward models as one: hand numbers, a member that disagrees, and what would be ignored is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tether.config.build import build
from tether.config.sections import ModelConfig
from tether.core.batches import Group
from tether.core.errors import UserError
from tether.core.protocols import Scores
from tether.core.text import Prompt, Rollout
from tether.methods.ensembles import bootstrap, find_members
from tether.methods.judges import open_reward, open_rule
from tether.methods.parts import Data
from tether.rewards.ensemble import Ensemble, EnsembleOptions, disagreement
from tether.rewards.model import ScoreScale

EXACT = {"atol": 1e-9, "rtol": 1e-9}
# Three members (rows) and four completions, in float64.
SCORES = torch.tensor([[1.0, 0.0, 2.0, -1.0], [1.0, 3.0, 2.0, 1.0], [1.0, 6.0, -4.0, 0.0]], dtype=torch.float64)
# By hand: means 1, 3, 0, 0; squared deviations (0, 0, 0), (9, 0, 9), (4, 4, 16), (1, 1, 0), each sum over 3.
MEANS = torch.tensor([1.0, 3.0, 0.0, 0.0], dtype=torch.float64)
STDS = torch.tensor([0.0, math.sqrt(6), math.sqrt(8), math.sqrt(2 / 3)], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Scores that are given, for as many rollouts."""

    scores: Tensor

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=self.scores[: len(rollouts)], parts={"unscaled": self.scores})


def ensemble(scores: Tensor, **options: Any) -> Ensemble:
    names = tuple(f"member-{i}" for i in range(len(scores)))
    members = {name: Fixed(scores=row) for name, row in zip(names, scores, strict=True)}
    return Ensemble(options=EnsembleOptions(members=names, **options), members=members)


def scored(scores: Tensor, **options: Any) -> Scores:
    rollouts: Any = [None] * scores.shape[1]
    return ensemble(scores, **options)(rollouts)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, MEANS),
        ({"combine": "minimum"}, torch.tensor([1.0, 0.0, -4.0, -1.0], dtype=torch.float64)),
        ({"combine": "mean_minus_std"}, MEANS - STDS),
        ({"combine": "mean_minus_std", "c": 2.5}, MEANS - 2.5 * STDS),
    ],
    ids=["mean", "minimum", "mean_minus_std", "c"],
)
def test_hand_numbers(options: dict[str, Any], expected: Tensor):
    found = scored(SCORES, **options)
    torch.testing.assert_close(found.total, expected, **EXACT)
    assert list(found.parts) == ["member-0", "member-1", "member-2", "disagreement"]
    torch.testing.assert_close(found.parts["disagreement"], STDS, **EXACT)
    for i in range(3):
        torch.testing.assert_close(found.parts[f"member-{i}"], SCORES[i], **EXACT)


def test_two_members_less_one_std_are_their_minimum():
    """(a + b) / 2 - |a - b| / 2 = min(a, b): the population's std, which the sample's would miss by a factor √2."""
    pair = SCORES[1:]
    torch.testing.assert_close(
        scored(pair, combine="mean_minus_std").total, scored(pair, combine="minimum").total, **EXACT
    )


@pytest.mark.parametrize("combine", ["mean", "minimum", "mean_minus_std"])
def test_members_that_agree_are_one_reward_model(combine: str):
    same = scored(SCORES[:1].expand(3, -1), combine=combine)
    torch.testing.assert_close(same.total, SCORES[0], **EXACT)
    assert not same.parts["disagreement"].any()


def test_a_member_that_is_fooled_shows_and_is_damped():
    """Two members tell good from bad; the third falls for the trick in completion 2, which the mean then prefers."""
    honest = torch.tensor([1.0, -1.0, -1.0])
    fooled = torch.tensor([1.0, -1.0, 6.0])
    scores = torch.stack([honest, honest, fooled])
    by_mean = scored(scores)
    assert by_mean.total.argmax() == 2
    assert by_mean.parts["disagreement"].tolist() == pytest.approx([0.0, 0.0, 7 * math.sqrt(2) / 3])
    for options in ({"combine": "minimum"}, {"combine": "mean_minus_std"}):
        cautious = scored(scores, **options).total
        assert cautious.argmax() == 0, options
        torch.testing.assert_close(cautious[:2], honest[:2])


@pytest.mark.parametrize("combine", ["mean", "minimum", "mean_minus_std"])
def test_what_one_member_left_unscored_is_unscored(combine: str):
    scores = SCORES.clone()
    scores[1, 2] = math.nan
    found = scored(scores, combine=combine)
    assert found.total.isnan().tolist() == [False, False, True, False]
    assert found.parts["disagreement"].isnan().tolist() == [False, False, True, False]


def test_one_member_alone_does_not_disagree():
    assert disagreement(SCORES[:1]).tolist() == [0.0] * 4


WRONG = [
    ({"members": []}, "members is empty"),
    ({"members": ["a", "b"], "c": 1.0}, "c would be ignored with combine=mean"),
    ({"members": ["a", "b"], "combine": "minimum", "c": 0.5}, "c would be ignored with combine=minimum"),
    ({"members": ["a", "b"], "combine": "mean_minus_std", "c": 0.0}, "c is a finite number above 0"),
    ({"members": ["a", "b"], "combine": "mean_minus_std", "c": -1.0}, "c is a finite number above 0"),
    ({"members": ["a", "b"], "combine": "mean_minus_std", "c": math.inf}, "c is a finite number above 0"),
    ({"members": ["a", "b"], "combine": "median"}, "combine must be"),
    ({"members": ["a", "b"], "lambda": 1.0}, 'unknown key "lambda"'),
    ({"members": ["exact_number", "b"]}, "a member is a reward model, exact_number is a rule"),
    ({"members": ["a", "mine.py:score"]}, "a member is a reward model, mine.py:score is a rule"),
    ({}, "ensemble needs members"),
]


@pytest.mark.parametrize(("spec", "says"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_would_be_ignored_is_refused_before_a_model_is_opened(spec: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        open_rule({"type": "ensemble", **spec})


def test_an_ensemble_is_a_model_not_a_rule_and_may_be_part_of_a_sum():
    spec = {"type": "ensemble", "members": ["runs/a", "runs/b"], "combine": "mean_minus_std", "c": 1}
    assert open_rule(spec) is None
    assert open_rule({"type": "sum", "parts": {"liked": spec, "short": {"type": "target_length", "target": 3}}}) is None
    with pytest.raises(UserError, match=r"reward\.parts\.liked: c would be ignored"):
        open_rule({"type": "sum", "parts": {"liked": {**spec, "combine": "mean"}}})


# -- where the members are ---------------------------------------------------------------------------------------------


def folder(path: Path, *, scale: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if scale:
        ScoreScale(mean=1.0, std=2.0, completions=4).save(path)
    return path


def found(members: Sequence[Path], **options: Any) -> list[Path]:
    spec = {"type": "ensemble", "members": [str(m) for m in members], **options}
    return find_members(build({"ensemble": EnsembleOptions}, spec, "reward"), "reward", lambda text: None)


def test_members_are_found_in_the_folder_of_a_run_too(tmp_path: Path):
    run = tmp_path / "run"
    trained = [folder(run / f"member-{i}" / "final") for i in range(11)]
    other = folder(tmp_path / "other")
    assert found([run, other]) == [*trained, other]  # member-10 after member-9
    (run / "member-11").mkdir()
    with pytest.raises(UserError, match="member-11: not trained to the end"):
        found([run])


def test_members_that_can_not_be_combined_are_named(tmp_path: Path):
    a, bare = folder(tmp_path / "a" / "final"), folder(tmp_path / "bare", scale=False)
    with pytest.raises(UserError, match=f"no score_scale.json in {bare},"):
        found([a, bare])
    assert found([a, bare], scale=False) == [a, bare]
    with pytest.raises(UserError, match="named twice"):
        found([tmp_path / "a", a])
    with pytest.raises(UserError, match="two members or more"):
        found([a])
    with pytest.raises(UserError, match="no such folder"):
        found([a, tmp_path / "nothing"])


# -- models ------------------------------------------------------------------------------------------------------------


def rollout(group: int, tokens: list[int]) -> Rollout:
    return Rollout(
        prompt=Prompt(id=str(group), text="what"),
        group=group,
        prompt_tokens=torch.tensor([5, 6 + group]),
        tokens=torch.tensor(tokens),
        sampled=torch.ones(len(tokens), dtype=torch.bool),
        logprobs=torch.zeros(len(tokens)),
        text="",
        finish_reason="stop",
    )


def reward_model(folder: Path, tokenizer: Any, seed: int, scale: ScoreScale) -> Path:
    from transformers import LlamaForSequenceClassification

    from conftest import build_model

    config = build_model().config
    config.num_labels = 1
    torch.manual_seed(seed)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    scale.save(folder)
    return folder


def test_members_are_scored_in_their_own_scales(tiny_tokenizer, tmp_path: Path):
    """Against each one opened alone: reward model by reward model, with the numbers of its own score_scale.json."""
    scales = [ScoreScale(mean=0.1 * i, std=0.5 + i, completions=8) for i in range(3)]
    folders = [reward_model(tmp_path / f"m{i}", tiny_tokenizer, i, s) for i, s in enumerate(scales)]
    rollouts = [rollout(0, [7, 8, 9]), rollout(0, [11]), rollout(1, [12, 2])]
    model = ModelConfig(device="cpu")

    def opened(spec: Any, **options: Any) -> Scores:
        reward, scorer = open_reward(spec, tiny_tokenizer, model, 100, lambda text: None, **options)
        assert (scorer is None) == isinstance(spec, dict)
        return reward(rollouts)

    alone = torch.stack([opened(str(f)).total for f in folders])
    scaled = torch.stack([(row - s.mean) / s.std for row, s in zip(alone, scales, strict=True)])
    spec = {"type": "ensemble", "members": [str(f) for f in folders], "combine": "mean_minus_std", "c": 0.5}
    for asked in (True, False):  # whatever else is scaled in the run
        got = opened(spec, scaled=asked)
        torch.testing.assert_close(got.total, scaled.mean(0) - 0.5 * scaled.std(0, correction=0))
        torch.testing.assert_close(got.parts["member-2"], scaled[2])
        raw = opened({**spec, "combine": "minimum", "c": None, "scale": False}, scaled=asked)
        torch.testing.assert_close(raw.total, alone.amin(0))


def test_a_bootstrap_draws_with_replacement_by_the_seed():
    groups = tuple(Group(id=str(i), prompt=torch.tensor([i]), completions=(), loss_masks=()) for i in range(200))
    data = Data(train=groups, held_out=groups[:3], fingerprint="f")
    drawn = bootstrap(data, 5)
    assert bootstrap(data, 5).train == drawn.train != bootstrap(data, 6).train
    assert drawn.held_out == data.held_out and len(drawn.train) == 200
    assert len({g.id for g in drawn.train}) == pytest.approx(200 * (1 - 1 / math.e), abs=15)
