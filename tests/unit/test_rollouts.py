"""What a step learns from: fresh prompts for groups that teach nothing, greedy baselines, punished length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tether.algorithms import ALGORITHMS, Algorithm
from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.methods.rl_parts import PromptOrder
from tether.rewards.shaping import overlong_penalty
from tether.runs.clock import Split
from tether.training.online import OnlineJob
from tether.training.rollouts import Collector, join, spread

PROMPTS = [Prompt(id=str(i), text=f"{i}") for i in range(10)]


def rollout(prompt: Prompt, group: int, text: str, length: int = 2) -> Rollout:
    return Rollout(
        prompt=prompt,
        group=group,
        prompt_tokens=torch.tensor([1]),
        tokens=torch.ones(length, dtype=torch.long),
        sampled=torch.ones(length, dtype=torch.bool),
        logprobs=torch.zeros(length),
        text=text,
        finish_reason="stop",
    )


class Written:
    """A sampler whose completions say what they were drawn with; sample i has 2 + i tokens."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int, SamplingSettings, int]] = []

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        settings: SamplingSettings,
        seed: int,
        finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        self.calls.append(([p.id for p in prompts], n, settings, seed))
        kind = "greedy" if settings.temperature == 0 else "drawn"
        drawn = [rollout(p, g, f"{kind} {p.id} {i}", 2 + i) for g, p in enumerate(prompts) for i in range(n)]
        for one in drawn if finished is not None else ():
            finished(one)
        return drawn


def by_prompt(score: Callable[[str, str, int], float]) -> Callable[[Sequence[Rollout]], Scores]:
    """A reward of (kind, prompt id, sample index)."""

    def reward(rollouts: Sequence[Rollout]) -> Scores:
        rows = [r.text.split() for r in rollouts]
        total = torch.tensor([score(kind, id, int(i)) for kind, id, i in rows])
        return Scores(total=total, parts={"twice": 2 * total})

    return reward


def collector(algorithm: Algorithm, score: Callable[[str, str, int], float], **more: Any) -> tuple[Collector, Written]:
    sampler = Written()
    made = Collector(
        algorithm=algorithm,
        prompts=lambda first, count: [PROMPTS[at % 10] for at in range(first, first + count)],
        prompts_per_step=3,
        group_size=2,
        sampler=sampler,
        settings=SamplingSettings(max_new_tokens=10, temperature=0.7, stop=("x",)),
        reward=by_prompt(score),
        seed=0,
        split=Split(),
        **more,
    )
    return made, sampler


DYNAMIC = replace(ALGORITHMS["dapo"], overlong_cache=0.0)
PLAIN = ALGORITHMS["rloo"]


def test_groups_that_teach_nothing_are_replaced_by_the_next_prompts() -> None:
    """Prompts 1, 3 and 4 are all right or all wrong."""
    made, sampler = collector(DYNAMIC, lambda _, id, i: float(i if id not in "134" else id == "3"), resample_rounds=3)
    found, counts = made(1)
    assert [ids for ids, *_ in sampler.calls] == [["0", "1", "2"], ["3"], ["4"], ["5"]]
    assert [r.prompt.id for r in found.rollouts] == ["0", "0", "2", "2", "5", "5"]
    assert [r.group for r in found.rollouts] == [0, 0, 1, 1, 2, 2]
    assert found.scores.total.tolist() == [0, 1, 0, 1, 0, 1] and found.scores.parts["twice"].tolist()[1] == 2
    assert (counts["groups/replaced"], counts["groups/rounds"], counts["reward/dropped"]) == (3, 3, 0)
    # A prompt that comes again in another round is answered anew, and the stream goes on where it was left.
    assert len({seed for *_, seed in sampler.calls}) == 4 and made.taken == 6
    made(2)
    assert sampler.calls[4][0] == ["6", "7", "8"]


def test_after_the_last_round_the_step_is_filled_up() -> None:
    made, sampler = collector(DYNAMIC, lambda _, id, i: float(i * (id == "0")), resample_rounds=1)
    found, counts = made(1)
    assert [ids for ids, *_ in sampler.calls] == [["0", "1", "2"], ["3", "4"]]
    assert [r.prompt.id for r in found.rollouts][::2] == ["0", "1", "2"]
    assert (counts["groups/replaced"], counts["groups/rounds"]) == (2, 1)
    assert spread(found.scores.total, [r.group for r in found.rollouts]) == {0: 1.0, 1: 0.0, 2: 0.0}


def test_a_row_without_dynamic_sampling_keeps_every_group() -> None:
    made, sampler = collector(PLAIN, lambda *_: 1.0, resample_rounds=3)
    found, counts = made(1)
    assert len(sampler.calls) == 1 and len(found.rollouts) == 6 and counts == {"reward/dropped": 0}


def test_length_does_not_make_a_group_worth_learning_from() -> None:
    """All wrong, and punished for different lengths: the equation asks for right and wrong answers in one group."""
    made, sampler = collector(replace(DYNAMIC, overlong_cache=1.0), lambda *_: 0.0, resample_rounds=1)
    found, counts = made(1)
    assert counts["groups/replaced"] == 3 and len(sampler.calls) == 2
    # cache = limit = 10 tokens, completions of 2 and 3
    assert found.scores.total.tolist() == pytest.approx([-0.2, -0.3] * 3)
    assert found.scores.parts["overlong"].tolist() == pytest.approx([-0.2, -0.3] * 3)


def test_the_greedy_completion_of_the_same_prompt_is_the_baseline() -> None:
    row = replace(ALGORITHMS["remax"], overlong_cache=1.0)
    made, sampler = collector(row, lambda kind, id, i: (100 if kind == "greedy" else 0) + 10 * int(id) + i)
    found, counts = made(1)
    (_, _, drawn, _), (ids, n, greedy, _) = sampler.calls
    assert (ids, n) == (["0", "1", "2"], 1)
    assert greedy == replace(drawn, temperature=0.0)
    # Its length is punished like that of the others: 2 tokens of 10.
    assert found.baselines is not None
    assert found.baselines.tolist() == pytest.approx([99.8, 99.8, 109.8, 109.8, 119.8, 119.8])
    assert found.scores.total.tolist() == pytest.approx([-0.2, 0.7, 9.8, 10.7, 19.8, 20.7])
    assert counts["reward/greedy"] == pytest.approx(109.8) and counts["rollout/greedy_length"] == 2
    assert {"sample", "reward", "baseline"} <= set(made.split.seconds)


def test_greedy_baselines_follow_the_prompts_that_were_put_in() -> None:
    row = replace(ALGORITHMS["remax"], dynamic_sampling=True, group_size=2)
    made, _ = collector(
        row, lambda k, id, i: int(id) + (0.5 * i if k == "drawn" and id != "1" else 0), resample_rounds=2
    )
    found, _ = made(1)
    assert [r.prompt.id for r in found.rollouts][::2] == ["0", "2", "3"]
    assert found.baselines is not None and found.baselines.tolist() == [0, 0, 2, 2, 3, 3]


NAN = float("nan")


def test_without_a_baseline_a_prompt_is_left_out_where_that_is_allowed() -> None:
    score = lambda kind, id, i: NAN if (kind, id) == ("greedy", "1") or (id, i) == ("2", 1) else float(id)  # noqa: E731
    made, _ = collector(ALGORITHMS["remax"], score, skip_failed_rewards=True)
    found, counts = made(1)
    assert [(r.prompt.id, b) for r, b in zip(found.rollouts, cast(Any, found.baselines).tolist(), strict=True)] == [
        ("0", 0.0),
        ("0", 0.0),
        ("2", 2.0),
    ]
    assert counts["reward/dropped"] == 3
    made, _ = collector(ALGORITHMS["remax"], score)
    with pytest.raises(RewardFailure, match="1 of 6 completions were left unscored"):
        made(1)


def test_where_a_whole_prompt_went_unscored_the_others_keep_their_own_baselines() -> None:
    score = lambda kind, id, i: NAN if (kind, id) == ("drawn", "0") else float(id)  # noqa: E731
    made, sampler = collector(ALGORITHMS["remax"], score, skip_failed_rewards=True)
    found, counts = made(1)
    assert sampler.calls[1][0] == ["1", "2"] and counts["reward/dropped"] == 2
    assert cast(Any, found.baselines).tolist() == [1, 1, 2, 2] == found.scores.total.tolist()


def test_a_round_without_any_score_is_not_the_end_but_a_step_without_any_is() -> None:
    """Prompt 3, drawn alone in the second round, goes unscored; 4 and 5 come in its place."""
    made, sampler = collector(
        DYNAMIC,
        lambda _, id, i: NAN if id == "3" else float(i * (id != "2")),
        resample_rounds=2,
        skip_failed_rewards=True,
    )
    found, counts = made(1)
    assert [ids for ids, *_ in sampler.calls] == [["0", "1", "2"], ["3"], ["4"]]
    assert [r.prompt.id for r in found.rollouts][::2] == ["0", "1", "4"] and counts["reward/dropped"] == 2
    for row in (DYNAMIC, PLAIN, ALGORITHMS["remax"]):
        made, _ = collector(row, lambda *_: NAN, resample_rounds=1, skip_failed_rewards=True)
        with pytest.raises(RewardFailure, match="no completion of the step is left"):
            made(1)


def test_rounds_are_joined_and_a_part_that_a_round_lacks_is_unknown_there() -> None:
    made, _ = collector(PLAIN, lambda _, id, i: float(id))
    one, _ = made(1)
    other = replace(one, scores=Scores(total=one.scores.total + 1, parts={"else": one.scores.total}))
    both = join([one, other])
    assert [r.group for r in both.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert both.scores.total.tolist() == [0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3]
    parts = {name: part.nan_to_num(-1.0).tolist() for name, part in both.scores.parts.items()}
    assert parts == {
        **{name: [*part.tolist(), *[-1.0] * 6] for name, part in one.scores.parts.items()},
        "else": [*[-1.0] * 6, *one.scores.total.tolist()],
    }


@pytest.mark.parametrize(
    ("length", "punished"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (130, -1.0)]
)
def test_overlong_penalty_is_equation_13(length: int, punished: float) -> None:
    assert float(overlong_penalty(torch.tensor([length]), 100, 20)) == pytest.approx(punished, abs=1e-7)


@pytest.mark.parametrize("cache", [0, 101])
def test_a_cache_that_is_no_part_of_the_limit_is_refused(cache: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the limit of 100 tokens"):
        overlong_penalty(torch.tensor([1]), 100, cache)


def test_the_stream_of_prompts_can_be_taken_in_any_pieces() -> None:
    whole = [p.id for p in PromptOrder(PROMPTS, seed=3)(0, 30)]
    pieces = PromptOrder(PROMPTS, seed=3)
    taken = [p.id for first, count in ((0, 7), (7, 1), (8, 12), (20, 10)) for p in pieces(first, count)]
    assert [id.split("#")[0] for id in whole] == [id.split("#")[0] for id in taken]
    assert sorted(taken[:7]) != sorted(taken[20:27])


def job(algorithm: Algorithm, **more: Any) -> OnlineJob:
    nothing: Any = SimpleNamespace()
    return OnlineJob(
        algorithm=algorithm, group_size=2, prompts=nothing, prompts_per_step=1, sampler=nothing,
        settings=SamplingSettings(), reward=nothing, watch=None, reference=more.pop("reference", None), seed=0,
        max_logprob_gap=1.0, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("rloo", {}, "rloo needs reference, and none was given"),
        ("ppo", {"reference": object()}, "ppo needs critic, and none"),
        ("ppo_ptx", {"reference": object(), "critic": True}, "ppo_ptx needs pretraining, and none"),
        ("ppo_ptx", {}, "ppo_ptx needs critic, pretraining, reference, and none"),
    ],
)
def test_a_missing_part_is_named_before_the_first_rollout(name: str, given: dict[str, Any], missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        job(ALGORITHMS[name], **given).check()


def test_every_row_runs_with_the_parts_that_it_names() -> None:
    for row in ALGORITHMS.values():
        job(row, reference=object(), critic=True, pretraining=lambda number: None).check()


def test_what_nobody_gives_and_a_history_that_nobody_keeps_are_refused() -> None:
    class Odd(type(ALGORITHMS["rloo"].advantage)):  # type: ignore[misc]
        needs = frozenset({"oracle"})

    class Forgetful(type(ALGORITHMS["rloo"].advantage)):  # type: ignore[misc]
        needs = frozenset({"history"})

    plain = replace(ALGORITHMS["rloo"], kl_in_reward=0.0)
    with pytest.raises(UserError, match="rloo needs oracle, and none was given"):
        job(replace(plain, advantage=Odd())).check()
    with pytest.raises(UserError, match=r"Forgetful needs history: give it a method next"):
        job(replace(plain, advantage=Forgetful())).check()
