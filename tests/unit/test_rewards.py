"""Rules against cases done by hand; a user's function held to its contract; how a reward is named."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from decimal import Decimal

import numpy
import pytest
import torch

from method_cases import reward_file
from tether.config.sections import ModelConfig
from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Message, Prompt, Rollout
from tether.methods.judges import open_reward, open_rule
from tether.rewards.compose import Remembering
from tether.rewards.function import FunctionReward, OwnReward
from tether.rewards.model import ScoreScale
from tether.rewards.rules import ExactNumber, Matches, TargetLength, last_number


def rollout(text: str, name: str = "p", **metadata) -> Rollout:
    return Rollout(
        prompt=Prompt(id=name, messages=(Message(role="user", content=f"question {name}"),), metadata=metadata),
        group=0,
        prompt_tokens=torch.tensor([1]),
        tokens=torch.tensor([5]),
        sampled=torch.tensor([True]),
        logprobs=torch.tensor([0.0]),
        text=text,
        finish_reason="stop",
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("none at all", None),
        ("It is 1,234.50.", 1234.5),
        ("12,345,678 apples", 12345678),
        ("first 3, then 4", 4),
        ("1,2,3", 3),
        ("x=-7", -7),
        ("8-3", 3),
        ("pages 3-5", 5),
        ("f(2)-4", 4),
        ("about .5", 0.5),
        ("-0.25!", -0.25),
        ("5.", 5),
        ("$1,000", 1000),
        ("x = 1.5e3", 1500),
        ("6.02E+23", 6.02e23),
        ("1e-05.", 1e-5),
        ("2e\u22123", 0.002),
        ("\u22127", -7),
        ("8\u22123", 3),
        ("3e", 3),
        ("3eggs", 3),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(str(number)))


def test_a_number_too_large_for_anything_is_no_error_and_equals_nothing():
    assert last_number("9" * 400) == 10**400 - 1
    assert last_number("1e999999999999") > 10**400
    for text in ("7e" + "9" * 30, "7e-" + "9" * 30):
        assert last_number(text).is_nan()
        assert ExactNumber()([rollout(text, answer=7), rollout(text, answer=0.0)]).total.tolist() == [0, 0]
        with pytest.raises(RewardFailure, match="holds no number: '7e"):
            ExactNumber()([rollout(text, answer=text)])


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("1000000.5", ["1,000,000.50", "1000000.5", "1.0000005e6"], ["1000000.4999999", "1000000.5000001", "1000000"]),
        (1000000.5, ["1000000.5"], ["1000000.4999999", "1000000.50000001"]),
        ("1e-7", ["0.0000001", "1e-7", ".1e-6"], ["2e-7", "0", "1.0000001e-7"]),
        (1e-7, ["0.0000001", "1e-7"], ["2e-7", "0", "0.00000010000001"]),
        (2**63 + 1, ["9,223,372,036,854,775,809", str(2**63 + 1)], [str(2**63), "9.223372036854776e18"]),
        ("0.1", ["0.1", ".10"], ["0.1000000000000000055511151231257827", "0.10000001"]),
        (0.1, ["0.1", "1e-1"], ["0.1000000000000000055511151231257827", "0.1000001"]),
        (0.0, ["0", "-0.0", "0e5"], ["1e-300", "-1e-9"]),
        (float(2**53 - 1), [str(2**53 - 1)], [str(2**53 - 2)]),
        (1e300, ["1e300", "1" + "0" * 300], ["1e301", "1.000001e300"]),
        # Nobody wrote these: a float's own digits, of which six are enough.
        (1 / 3, ["0.3333333333333333", "0.3333333", "0.33333333333333333333"], ["0.3333", "0.333334", "0.334", "1/3"]),
        (1e6 / 7, ["142857.142857", "142857.1"], ["142857.5", "142858"]),
        (1e-20 / 3, ["3.333333333e-21"], ["0", "3.3334e-21", "1e-6"]),
        (2.0**70, [str(2**70)], ["1e21", "1e999999999999"]),
    ],
)  # fmt: skip
def test_equal_is_the_same_value_to_the_last_digit(answer, right, wrong):
    texts = [*right, *wrong]
    found = ExactNumber()([rollout(t, answer=answer) for t in texts]).total.tolist()
    assert dict(zip(texts, found, strict=True)) == {t: float(t in right) for t in texts}


def test_exact_number_compares_with_the_column():
    rule = ExactNumber(column="answer")
    texts = ["so 42", "42 or 43", "forty-two", "42.0000", "-42", "4,2"]
    assert rule([rollout(t, answer="#### 42") for t in texts]).total.tolist() == [1, 0, 0, 1, 0, 0]
    assert rule([rollout("1000", answer=1000)]).total.tolist() == [1]
    big = [rollout(text, answer=1e16) for text in ("10000000000000000", "1e16", "16")]
    assert rule(big).total.tolist() == [1, 1, 0]


def test_exact_number_without_anything_to_compare_with_is_a_failure_not_a_zero():
    with pytest.raises(RewardFailure, match=r"prompt q has no column 'answer'.*\['gold'\]"):
        ExactNumber()([rollout("3", name="q", gold=3)])
    with pytest.raises(RewardFailure, match="prompt q: its column 'answer' holds no number: 'three'"):
        ExactNumber()([rollout("3", name="q", answer="three")])
    with pytest.raises(RewardFailure, match="prompt q: its column 'answer' holds no number: nan"):
        ExactNumber()([rollout("3", name="q", answer=math.nan)])


@pytest.mark.parametrize("answer", ["3/4", "so #### 3 / 4"])
def test_a_fraction_in_the_column_is_a_failure_and_not_its_last_number(answer):
    with pytest.raises(RewardFailure, match="mathematics"):
        ExactNumber()([rollout("4", answer=answer)])
    assert ExactNumber()([rollout("72", answer="48/2 = <<48/2=24>>24\n#### 72")]).total.tolist() == [1]


def test_matches_finds_the_pattern_anywhere():
    rule = Matches(pattern=r"\bcats?\b")
    assert rule([rollout(t) for t in ["a cat", "cats!", "concat", "Cat", ""]]).total.tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(UserError, match=r"not a regular expression.*'\('"):
        Matches(pattern="(")


def test_target_length_counts_words():
    rule = TargetLength(target=4)
    texts = ["one two three four", "one two", "", "a b c d e f g h"]
    assert rule([rollout(t) for t in texts]).total.tolist() == [0, -0.5, -1, -1]
    with pytest.raises(UserError, match="above 0, got 0"):
        TargetLength(target=0)


# -- a function of the user's own --------------------------------------------------------------------------------------


def scores(function, rollouts=None) -> list[float]:
    given = rollouts or [rollout("a", "p"), rollout("bb", "q")]
    return FunctionReward(function=function, name="my.py:score")(given).total.tolist()


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.0],
        (1, 2),
        torch.tensor([1, 2]),
        torch.tensor([1.0, 2.0], requires_grad=True),
        numpy.array([1.0, 2.0]),
        [numpy.float32(1), torch.tensor(2.0)],
    ],
)
def test_what_counts_as_scores(result):
    assert scores(lambda prompts, completions: result) == [1.0, 2.0]


def test_true_is_one_and_none_or_nan_is_unscored():
    assert scores(lambda prompts, completions: [True, False]) == [1.0, 0.0]
    found = scores(lambda prompts, completions: [None, float("nan")])
    assert all(math.isnan(score) for score in found)


BAD_VALUES = [math.inf, -math.inf, 1e300, 10**400, 1j, "1.0", b"1", [1.0], {}, object()]


@pytest.mark.parametrize("value", BAD_VALUES, ids=[repr(v)[:12] for v in BAD_VALUES[:-1]] + ["object"])
def test_a_value_that_is_no_finite_number_is_named_with_its_sample(value):
    with pytest.raises(RewardFailure) as caught:
        scores(lambda prompts, completions: [0.5, value])
    message = str(caught.value)
    assert "my.py:score returned" in message and "prompt q" in message and "'bb'" in message
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("result", "got"),
    [([1.0], "1 values"), ([1, 2, 3], "3 values"), (None, "NoneType"), (3.0, "float"), ("ab", "str"), ({0: 1}, "dict")],
)
def test_a_result_of_the_wrong_shape_says_what_was_wanted(result, got):
    with pytest.raises(RewardFailure, match=f"must return 2 numbers in a list, got {got}"):
        scores(lambda prompts, completions: result)


def raising(prompts, completions):
    raise KeyError("no such thing")


def leaving(prompts, completions):
    raise SystemExit(3)


@pytest.mark.parametrize(("function", "kind"), [(raising, "KeyError"), (leaving, "SystemExit")])
def test_what_raises_or_exits_is_a_failure_that_names_function_and_sample(function, kind):
    with pytest.raises(RewardFailure, match=rf"my.py:score raised {kind}(?s:.*)prompt p: 'a'"):
        scores(function)


def test_ctrl_c_inside_a_reward_is_no_reward_failure():
    def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(interrupted)


@pytest.mark.parametrize("then", ["returns", "raises"])
def test_the_generators_of_the_run_are_left_alone(then):
    def reseeding(prompts, completions):
        torch.manual_seed(7)
        random.seed(7)
        numpy.random.seed(7)
        if then == "raises":
            raise ValueError
        return [torch.rand(()).item(), random.random()]

    def draws():
        return torch.rand(3).tolist(), random.random(), numpy.random.rand()

    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    expected = draws()
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    numpy.random.set_state(before[2])
    if then == "raises":
        with pytest.raises(RewardFailure):
            scores(reseeding)
    else:
        scores(reseeding)
    assert draws() == expected


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand, lambda: torch.rand(()).item()])
@pytest.mark.parametrize("own", [False, True])
def test_a_reward_that_draws_draws_anew_in_every_step(draw, own):
    """And the same for the same step, as a resumed run asks it again."""

    def drawing(prompts, completions):
        return [draw() for _ in completions]

    reward = FunctionReward(function=drawing, name="drawing")
    if own:
        reward = OwnReward(reward=lambda rs: Scores(total=torch.tensor([draw() for _ in rs])), name="drawing")
    steps = [[replace(rollout("a", "p"), policy_version=version)] for version in (1, 2, 1)]
    first, second, again = (reward(step).total.item() for step in steps)
    assert first == again != second


def test_the_function_gets_what_it_asks_for_and_can_spoil_nothing():
    rollouts = [rollout("a", "p", answer=["1"], level=1), rollout("b", "q", answer=["2"], level=2, extra=0)]
    seen = {}

    def named(prompts, completions, answer):
        seen.update(prompts=list(prompts), completions=list(completions), answer=[list(a) for a in answer])
        prompts.clear()
        completions.append("x")
        answer[0].append("spoiled")
        return [0, 0]

    scores(named, rollouts)
    assert seen == {"prompts": ["question p", "question q"], "completions": ["a", "b"], "answer": [["1"], ["2"]]}
    assert [r.prompt.metadata["answer"] for r in rollouts] == [["1"], ["2"]]
    everything = {}
    scores(lambda prompts, completions, **columns: everything.update(columns) or [0, 0], rollouts)
    assert everything == {"answer": [["1"], ["2"]], "level": [1, 2]}


# -- how a reward is named ---------------------------------------------------------------------------------------------


def test_a_reward_is_a_rule_a_class_or_a_function(tmp_path):
    assert open_rule("target_length") == TargetLength()
    assert open_rule({"type": "target_length", "target": 5}) == TargetLength(target=5)
    own = open_rule(reward_file(tmp_path, "return [len(c) for c in completions]"))
    assert isinstance(own, FunctionReward)
    assert own([rollout("abc")]).total.tolist() == [3.0]
    assert open_rule(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("target_lenght", ["did you mean target_length?", "file.py:function"]),
        ({"type": "target_length", "traget": 3}, ['unknown key "traget"', "did you mean target?"]),
        ({"type": "target_length", "target": 0}, ["above 0"]),
        ({"type": "matchs"}, ["did you mean matches?"]),
        ("matches", ["matches needs pattern"]),
        ("nowhere.py:score", ["no such file: nowhere.py"]),
        ("nowhere.py", ["nowhere.py:FUNCTION"]),
    ],
)
def test_a_wrong_name_says_the_nearest_right_one(spec, words):
    with pytest.raises(UserError) as caught:
        open_rule(spec)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_name_inside_a_file(tmp_path):
    named = reward_file(tmp_path, "return [0] * len(completions)", name="names_inside.py")
    (tmp_path / "names_inside.py").write_text((tmp_path / "names_inside.py").read_text() + "LIMIT = 3\n")
    with pytest.raises(UserError, match="did you mean score"):
        open_rule(named.replace(":score", ":scor"))
    with pytest.raises(UserError, match="no function, it is int"):
        open_rule(named.replace(":score", ":LIMIT"))


def test_a_reward_model_with_another_tokenizer_reads_the_text_anew(tiny_model_folder, tiny_tokenizer, tmp_path):
    """Its scores of sampled tokens are those of the text in its own tokens, by plain transformers."""
    from transformers import AutoModelForSequenceClassification

    from conftest import build_model, build_tokenizer

    other = build_tokenizer()
    other.add_tokens(["cat sat"])
    folder = tmp_path / "rm"
    other.save_pretrained(folder)
    from transformers import LlamaForSequenceClassification

    config = build_model().config
    config.num_labels = 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    reward, scorer = open_reward(str(folder), tiny_tokenizer, ModelConfig(), 100, lambda text: None)
    assert scorer is not None
    rollouts = [rollout("the cat sat", "p"), rollout("no", "q")]
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for r in rollouts:
        text = f"<|im_start|>user\nquestion {r.prompt.id}<|im_end|>\n<|im_start|>assistant\n{r.text}<|im_end|>"
        ids = other(text, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = plain.model(ids).last_hidden_state[0, -1]
            expected.append(float(plain.score(hidden)))
    assert reward(rollouts).total.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("value", [0.1, -1234.567, 1e-9])
def test_equal_scores_keep_their_unit_whatever_their_rounding(value):
    equal = torch.full((101,), value)
    equal[0] = torch.nextafter(equal[0], torch.tensor(math.inf))
    assert ScoreScale.of(equal).std == 1.0
    apart = torch.tensor([value, 3 * value])
    assert ScoreScale.of(apart) == ScoreScale(
        mean=pytest.approx(2 * value), std=pytest.approx(abs(value)), completions=2
    )
    assert ScoreScale.of(torch.tensor([])) == ScoreScale()


MEMORY = """
from dataclasses import dataclass
import torch
from tether.core.protocols import Scores

@dataclass
class Counting:
    seen: int = 0

    def __call__(self, rollouts):
        n = torch.full((len(rollouts),), float(self.seen))
        return Scores(total=n, parts={"n": n + 1})

    def advance(self, parts):
        torch.rand(3)
        self.seen += len(parts["n"])

    def state(self):
        return {"seen": self.seen}

    def restore(self, state):
        self.seen = state["seen"]

@dataclass
class Plain:
    def __call__(self, rollouts):
        return Scores(total=torch.zeros(len(rollouts)))
"""


def test_a_class_of_the_users_own_keeps_its_memory(tmp_path):
    (tmp_path / "own.py").write_text(MEMORY)
    own, resumed = (open_rule(f"{tmp_path}/own.py:Counting") for _ in range(2))
    assert isinstance(own, Remembering) and isinstance(resumed, Remembering)
    before = torch.get_rng_state()
    own.advance({"n": torch.zeros(2)})
    assert own([rollout("a")]).total.tolist() == [2.0] and torch.equal(torch.get_rng_state(), before)
    resumed.restore(own.state())
    assert resumed([rollout("a")]).total.tolist() == [2.0] and resumed.state() == {"seen": 2}
    with pytest.raises(RewardFailure, match=r"own.py:Counting raised KeyError: 'seen' in its restore"):
        resumed.restore({})
    assert not isinstance(open_rule(f"{tmp_path}/own.py:Plain"), Remembering)
