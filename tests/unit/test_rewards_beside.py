"""Judging beside the sampling: the same scores and failures as alone, real overlap, and nothing that stays behind."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch

from tether.algorithms import ALGORITHMS
from tether.config.sections import ModelConfig
from tether.core.errors import RewardFailure
from tether.core.protocols import Reward, SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.methods.control.play import Player
from tether.methods.control.roles import Agent
from tether.methods.control.tasks import cartpole
from tether.methods.judge_models import Judge
from tether.methods.judges import open_reward
from tether.methods.theory.table import EnumeratedSampler
from tether.methods.theory.world import make_world, read_table
from tether.rewards.beside import Beside, OneByOne, put_beside, sample_beside
from tether.rewards.compose import Gate, GateOptions, Part, PartOptions, Sum
from tether.rewards.function import FunctionReward, OwnReward
from tether.rewards.model import RewardModel
from tether.rewards.rules import RULES, ExactNumber, Matches, TargetLength
from tether.rewards.verifiers.choice import MultipleChoice
from tether.rewards.verifiers.ifeval import IFEval
from tether.rewards.verifiers.layout import FormatTags
from tether.rewards.verifiers.mathematics import Mathematics
from tether.rewards.verifiers.program import CodeTests
from tether.rewards.verifiers.schema import JsonSchema
from tether.runs.clock import Split
from tether.training.rollouts import Collector
from verifier_cases import rollout

LONG = 20.0  # seconds after which a test that waits for something has failed


@dataclass(eq=False)
class Numbers:
    """The number that a completion is, and by whom it was asked about; "bad" is a failure. ``open``: it waits for it
    where a completion says "wait"."""

    beside: int = 1
    open: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    heard: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        total = torch.tensor([self._number(r.text) for r in rollouts])
        return Scores(total=total, parts={"twice": 2 * total})

    def _number(self, text: str) -> float:
        with self.heard:
            self.asked.append(text)
            self.heard.notify_all()
        if text == "bad":
            raise RewardFailure("no number")
        if text.startswith("wait"):
            assert self.open.wait(LONG)
        return float(text.split()[-1])

    def hears(self, text: str, seconds: float = LONG) -> bool:
        """Waits until it was asked about ``text``; False where it is not."""
        with self.heard:
            return self.heard.wait_for(lambda: text in self.asked, seconds)


def rollouts(*texts: str) -> list[Rollout]:
    return [rollout(text, name=f"{i}") for i, text in enumerate(texts)]


def same(found: Scores, wanted: Scores) -> None:
    """To the bit, NaN at the same places, the parts in the same order."""
    assert list(found.parts) == list(wanted.parts)
    for got, want in zip((found.total, *found.parts.values()), (wanted.total, *wanted.parts.values()), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(-9.0), want.nan_to_num(-9.0))


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds before long: a thread lets go of what it judged a moment after the score is there."""
    ends = time.monotonic() + LONG
    while not holds() and time.monotonic() < ends:
        time.sleep(0.001)
    return holds()


def begun(reward: Any, some: Sequence[Rollout]) -> Any:
    for one in some:
        reward.begin(one)
    return reward


# -- the same scores ---------------------------------------------------------------------------------------------------

RIGHT = "def add(a, b):\n    return a + b"
CASES: list[tuple[Any, list[str], dict[str, Any]]] = [
    (ExactNumber(), ["it is 7", "8", "none", "7.0"], {"answer": "7"}),
    (Matches(pattern="a+"), ["aa", "b", "", "ba"], {}),
    (TargetLength(target=3), ["a b c", "a", "a b c d e f g", ""], {}),
    (MultipleChoice(), ["the answer is B", "A", "A or B", "(B)"], {"answer": "B"}),
    (FormatTags(tags=("answer",)), ["<answer>x</answer>", "x", "<answer></answer>", "<answer>y</answer> z"], {}),
    (
        IFEval(score="share"),
        ["one, two", "no", "two words", "three"],
        {
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"num_words": 2, "relation": "at least"}],
        },
    ),
    (JsonSchema(schema={"type": "array"}), ["[1]", "{}", "[", "```json\n[]\n```"], {}),
    (Mathematics(), ["$\\frac{1}{2}$", "0.5", "2", "none"], {"answer": "1/2"}),
    (
        CodeTests(share=True, undecided="unscored", workers=2),
        [RIGHT, "def add(a, b):\n    return a - b", "import string\n" + RIGHT, "add = max"],
        {"tests": ["assert add(1, 2) == 3", "assert add(2, 0) == 2"]},
    ),
]


@pytest.mark.parametrize(("rule", "texts", "columns"), CASES, ids=[type(rule).__name__ for rule, *_ in CASES])
def test_a_verifier_beside_the_sampling_gives_what_it_gives_alone(
    rule: Any, texts: list[str], columns: dict[str, Any]
) -> None:
    given = [rollout(text, name=f"{i}", **columns) for i, text in enumerate(texts)]
    alone = rule(given)
    assert len(set(alone.total.nan_to_num(-9.0).tolist())) > 1
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    beside = put_beside(rule)
    assert isinstance(beside, Beside) and beside.name == type(rule).__name__
    same(begun(beside, [given[2], given[0], given[3]])(given), alone)  # in another order, and one was not begun
    same(beside(given), alone)
    same(begun(beside, given)(given[:0]), rule([]))
    same(begun(beside, given)([given[3], given[1]]), rule([given[3], given[1]]))
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_all_verifiers_and_rules_can_begin_and_nothing_else_does() -> None:
    assert {type(rule) for rule, *_ in CASES} == set(RULES.values())
    others: list[Reward] = [
        Judge(model="x"),
        RewardModel(batch_of=lambda rows: rows, score=lambda batch: batch),  # type: ignore[arg-type, return-value]
        FunctionReward(function=lambda prompts, completions: [], name="f"),
        OwnReward(reward=ExactNumber(), name="mine"),  # it gets copies, between which the run's generators are restored
        Sum(parts={"x": Part(reward=ExactNumber())}),  # begins by itself
    ]
    for other in others:
        assert not isinstance(other, OneByOne) and put_beside(other) is other


def test_what_a_config_names_is_put_beside() -> None:
    opened = lambda spec: open_reward(spec, None, ModelConfig(), 1, print)[0]  # noqa: E731
    alone = opened("exact_number")
    assert isinstance(alone, Beside) and alone.reward == ExactNumber()
    made = opened(
        {
            "type": "sum",
            "gates": {"form": {"reward": {"type": "matches", "pattern": "7"}, "otherwise": -1.0}},
            "parts": {
                "right": "exact_number",
                "in": {"type": "sum", "parts": {"n": "target_length"}},
                "end": "missing_eos_penalty",
            },
        }
    )
    assert isinstance(made, Sum) and isinstance(made.parts["in"].reward, Sum)
    places = [made.gates["form"], made.parts["right"], made.parts["in"].reward.parts["n"], made.parts["end"]]
    assert [isinstance(place.reward, Beside) for place in places] == [True, True, True, False]


# -- sums and gates ----------------------------------------------------------------------------------------------------


def gated(wrap: Callable[[Any], Reward], *found: Numbers) -> Sum:
    """Two gates, a part of its own weight, a normalised one, a sum inside, and one that nothing can begin."""
    first, second, part = found
    length = lambda rows: Scores(total=torch.tensor([float(len(r.text)) for r in rows]))  # noqa: E731
    inner = Sum(
        gates={"small": Gate(reward=wrap(Matches(pattern="[0-3]$")), options=GateOptions(otherwise=-0.5))},
        parts={"again": Part(reward=wrap(TargetLength(target=1)))},
    )
    return Sum(
        gates={
            "first": Gate(reward=wrap(first), options=GateOptions(otherwise=-1.0)),
            "second": Gate(reward=wrap(second), options=GateOptions(otherwise=-2.0)),
        },
        parts={
            "part": Part(reward=wrap(part), options=PartOptions(weight=2.0, clip=3.0)),
            "scaled": Part(reward=wrap(TargetLength(target=3)), options=PartOptions(normalise=True)),
            "inner": Part(reward=inner),
            "length": Part(reward=length),
        },
    )


class Passing(Numbers):
    """A gate: the ``place``-th letter of a completion, "1" passes."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def _number(self, text: str) -> float:
        super()._number(text)
        return float(text[self.place])


TEXTS = ["11 2", "10 3", "01 1", "11 5", "00 0", "11 1"]


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1:3], TEXTS[:1]])
def test_a_gated_sum_gives_what_it_gives_alone_and_asks_nothing_behind_a_gate(texts: list[str]) -> None:
    lonely, ahead = ((Passing(0), Passing(1), Numbers()) for _ in range(2))
    alone, beside = gated(lambda reward: reward, *lonely), gated(put_beside, *ahead)
    given = rollouts(*texts)
    for _ in range(2):  # the second step is normalised by the first
        found = begun(beside, given[::-1])(given)
        wanted = alone(given)
        same(found, wanted)
        for reward in (alone, beside):
            reward.advance(wanted.parts)
    same(begun(beside, given[:2])(given), alone(given))
    assert beside.state() == alone.state()
    for one, other in zip(ahead, lonely, strict=True):
        assert sorted(one.asked) == sorted(other.asked)


def test_what_is_behind_the_gates_has_begun_before_anybody_asks() -> None:
    first, second, part = Passing(0), Passing(1), Numbers()
    reward = begun(gated(put_beside, first, second, part), given := rollouts("11 2", "10 3", "01 1", "11 5"))
    assert part.hears("11 5") and (part.asked, second.asked) == (["11 2", "11 5"], ["11 2", "10 3", "11 5"])
    same(reward(given), gated(lambda inner: inner, Passing(0), Passing(1), Numbers())(given))
    assert part.asked == ["11 2", "11 5"] and len(first.asked) == 4


def test_nothing_is_begun_behind_a_gate_that_cannot_begin() -> None:
    part = Numbers()
    gate = lambda rows: Scores(total=torch.ones(len(rows)))  # noqa: E731
    for reward in (gate, Sum(parts={"in": Part(reward=put_beside(Matches(pattern="")))})):
        whole = Sum(
            gates={"g": Gate(reward=reward, options=GateOptions(otherwise=0.0))},
            parts={"x": Part(reward=put_beside(part))},
        )
        given = rollouts("1", "2")
        begun(whole, given).forget()
        assert part.asked == []
        assert whole(given).total.tolist() == [1, 2]
        part.asked.clear()


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failure_is_the_one_of_the_first_completion_asked_for() -> None:
    rule = ExactNumber()
    good, no_column, no_number = rollout("7", answer="7"), rollout("7", name="a"), rollout("7", name="b", answer="x")
    for asked in ([good, no_column, no_number], [good, no_number, no_column]):
        with pytest.raises(RewardFailure) as alone:
            rule(asked)
        for first in (asked, asked[::-1], asked[1:2], asked[2:]):  # the last two: one of the failing was not begun
            with pytest.raises(RewardFailure) as beside:
                begun(put_beside(rule), first)(asked)
            assert str(beside.value) == str(alone.value) and type(beside.value.__cause__) is type(alone.value.__cause__)


def test_a_failure_in_a_sum_names_the_part() -> None:
    made = [
        Sum(parts={"ok": Part(reward=wrap(Matches(pattern="b"))), "n": Part(reward=wrap(Numbers()))})
        for wrap in (put_beside, lambda reward: reward)
    ]
    told = []
    for reward in made:
        with pytest.raises(RewardFailure) as caught:
            begun(reward, given := rollouts("1", "bad"))(given)
        told.append(str(caught.value))
    assert told[0] == told[1] == "no number\n  (the part n of the reward)"
    same(made[0](given[:1]), made[1](given[:1]))  # what failed does not come back


def test_a_failing_completion_that_is_dropped_before_asking_raises_nothing() -> None:
    for reward in (put_beside(Numbers()), Sum(parts={"n": Part(reward=put_beside(Numbers()))})):
        given = rollouts("1", "bad", "3")
        assert begun(reward, given)([given[0], given[2]]).total.tolist() == [1, 3]
        assert begun(reward, given)([]).total.tolist() == []
        assert reward(given[2:]).total.tolist() == [3]


# -- nothing stays -----------------------------------------------------------------------------------------------------


def test_the_same_text_in_another_step_is_judged_anew_and_nothing_is_kept() -> None:
    numbers = Numbers()
    parts = {"x": Part(reward=put_beside(numbers)), "y": Part(reward=put_beside(TargetLength(target=2)))}
    reward = Sum(
        gates={"g": Gate(reward=put_beside(Matches(pattern="")), options=GateOptions(otherwise=0))}, parts=parts
    )
    for step in range(1, 4):
        given = rollouts("1", "2", "3")
        begun(reward, given)(given[:2])  # the third is dropped
        reward(given[:1])
        assert numbers.asked.count("1") == 2 * step
        refs = [weakref.ref(one) for one in given]
        del given
        assert soon(lambda refs=refs: all(ref() is None for ref in refs))


@pytest.mark.parametrize("texts", [("1", "1"), ("1", "bad")])
def test_a_sum_that_is_asked_for_nothing_or_fails_at_its_gate_keeps_nothing(texts: tuple[str, str]) -> None:
    part = Numbers()
    reward = Sum(
        gates={"g": Gate(reward=put_beside(Numbers()), options=GateOptions(otherwise=0))},
        parts={"x": Part(reward=put_beside(part))},
    )
    given = rollouts(*texts)
    refs = [weakref.ref(one) for one in given]
    begun(reward, given)
    assert part.hears("1")
    try:
        reward(given if "bad" in texts else [])
    except RewardFailure as error:
        error.__traceback__ = None
    else:
        assert "bad" not in texts
    del given
    gc.collect()  # a failure holds the frames that it went through
    assert soon(lambda: refs[0]() is None)


def test_what_is_queued_and_not_asked_for_is_not_judged_and_what_runs_has_ended() -> None:
    gate, part = Passing(0), Numbers()
    reward = Sum(
        gates={"g": Gate(reward=put_beside(gate), options=GateOptions(otherwise=0))},
        parts={"x": Part(reward=put_beside(part))},
    )
    gate._number = lambda text: (Numbers._number(gate, f"wait {text}"), float(text[0]))[1]  # type: ignore[method-assign]
    begun(reward, rollouts("1", "1 2", "1 3"))
    assert gate.hears("wait 1")  # it runs; two are queued
    threading.Timer(0.05, gate.open.set).start()
    reward.forget()
    assert gate.asked == ["wait 1"] and gate.open.is_set()
    assert reward([]).total.tolist() == [] and part.asked in ([], ["1"])
    asked = list(part.asked)
    assert reward(given := rollouts("1 4")).total.tolist() == [4] and part.asked == [*asked, given[0].text]


def test_a_sampler_that_fails_leaves_nothing_to_judge() -> None:
    numbers = Numbers()
    numbers.open.set()

    class Stopped:
        def sample(self, prompts: Any, *, n: int, settings: Any, seed: int, finished: Any = None) -> list[Rollout]:
            numbers.open.clear()
            for one in rollouts("wait 1", "2", "3"):
                finished(one)
            assert numbers.hears("wait 1")
            threading.Timer(0.05, numbers.open.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_beside(Stopped(), put_beside(numbers), [], n=1, settings=SamplingSettings(), seed=0)
    assert numbers.asked == ["wait 1"] and numbers.open.is_set()


# -- at the same time --------------------------------------------------------------------------------------------------


class Slow:
    """A sampler that goes on only when the completion before the last one was judged."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.overlapped = 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        settings: SamplingSettings,
        seed: int,
        finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        assert finished is not None
        kind = "greedy" if settings.temperature == 0 else "drawn"
        made = []
        for group, prompt in enumerate(prompts):
            for index in range(n):
                one = rollout(f"{kind} {prompt.id} {group * n + index}", name=prompt.id)
                made.append(one := Rollout(**{**vars(one), "group": group}))
                finished(one)
                self.overlapped += self.numbers.hears(one.text)
        return made


def collector(numbers: Numbers, reward: Reward, algorithm: str) -> tuple[Collector, Slow]:
    sampler = Slow(numbers)
    made = Collector(
        algorithm=ALGORITHMS[algorithm],
        prompts=lambda first, count: [Prompt(id=f"{i}", text="?") for i in range(count)],
        prompts_per_step=2,
        group_size=4,
        sampler=sampler,
        settings=SamplingSettings(),
        reward=reward,
        seed=0,
        split=Split(),
    )
    return made, sampler


@pytest.mark.parametrize("inside", [False, True])
def test_a_step_is_judged_while_it_is_drawn_and_so_are_its_greedy_completions(inside: bool) -> None:
    numbers = Numbers()
    one = put_beside(numbers)
    made, sampler = collector(numbers, Sum(parts={"x": Part(reward=one)}) if inside else one, "remax")
    found, _ = made(1)
    assert sampler.overlapped == 10 and len(numbers.asked) == 10  # 2 · 4 drawn and 2 greedy, each judged once
    assert found.scores.total.tolist() == [float(i) for i in range(8)]
    assert found.baselines is not None and found.baselines.tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_are_judged_at_once_as_the_verifier_says(threads: int) -> None:
    numbers = Numbers(beside=threads)
    given = rollouts(*(f"wait {i}" for i in range(6)))
    reward = begun(put_beside(numbers), given)
    assert numbers.hears(f"wait {threads - 1}") and not numbers.hears(f"wait {threads}", 0.05)
    numbers.open.set()
    assert reward(given).total.tolist() == [0, 1, 2, 3, 4, 5]
    assert CodeTests(workers=threads).beside == threads


# -- samplers ----------------------------------------------------------------------------------------------------------


def test_samplers_that_are_no_language_models_tell_of_each_rollout_too() -> None:
    world = make_world()
    table = EnumeratedSampler(world=world, logprobs=lambda batch: read_table(world.reference, batch))
    told: list[Rollout] = []
    made = table.sample(world.prompts, n=2, settings=SamplingSettings(), seed=3, finished=told.append)
    assert [id(one) for one in told] == [id(one) for one in made] and len(made) == 2 * len(world.prompts)
    task, told = cartpole(), []
    starts = [task.start(i) for i in range(6)]
    player = Player(agent=Agent(task=task))
    made = player.sample(starts, n=4, settings=task.settings, seed=0, finished=told.append)
    ends = [len(one.tokens) for one in told]
    assert ends == sorted(ends) and len(set(ends)) > 1 and {id(one) for one in told} == {id(one) for one in made}
    assert [one.prompt.id for one in made] == [start.id for start in starts for _ in range(4)]
