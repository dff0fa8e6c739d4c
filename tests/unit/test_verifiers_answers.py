"""Verifiers of an answer against cases done by hand: choice, tags, mathematics, JSON, and where a failure is no 0."""

from __future__ import annotations

import importlib.util
import math
import os
import select
import threading
import time

import pytest

from tether.config.build import build
from tether.core.errors import RewardFailure, UserError
from tether.rewards.rules import RULES, ExactNumber
from tether.rewards.verifiers.base import CannotJudge, inside, last_block, score_each
from tether.rewards.verifiers.choice import MultipleChoice, chosen_letter
from tether.rewards.verifiers.layout import FormatTags
from tether.rewards.verifiers.mathematics import Mathematics, _Worker, _worker
from tether.rewards.verifiers.schema import JsonSchema
from verifier_cases import rollout, scores

# -- multiple choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B) 42 apples", "B"),
        ("(B) 42 apples", "B"),
        ("Answer: B", "B"),
        ("Answer: (B)", "B"),
        ("**Answer:** B", "B"),
        ("Answer: **B**", "B"),
        ("The answer is B.", "B"),
        ("the correct answer is (B), because", "B"),
        ("The answer is $\\boxed{B}$", "B"),
        ("\\boxed{\\text{(B)}} is final", "B"),
        ("Final answer: $B$", "B"),
        ("(A) is wrong and (C) is wrong. So (B) it is", "B"),
        ("The answer is B. Option C is wrong because it is too large.", "B"),
        ("Option C is wrong, so option B", "B"),
        ("Answer: A\nNo, wait.\nAnswer: B", "B"),
        ("A. one\nB. two\n\nThe answer is B", "B"),
        ("Answer: B\n(A) was a trap", "B"),
        ("I think it is a dog", None),
        ("A dog barks", None),
        ("Answer: A or B", None),
        ("Answer: (A) and (B)", None),
        ("The answer is A, B", None),
        ("Answer: I'm not sure", None),
        ("Answer: Apple", None),
        ("Answer: K", None),
        ("A. one\nB. two\nC. three", None),
        ("My answer: I think so", None),
        ("", None),
    ],
)
def test_the_letter_a_text_settles_on(text, letter):
    assert chosen_letter(text) == letter


def test_multiple_choice_reads_the_answer_in_its_usual_spellings():
    for answer in ("B", "(B)", "b", " B. "):
        assert scores(MultipleChoice(), ["Answer: B", "Answer: A", "no idea"], answer=answer) == [1, 0, 0]
    assert scores(MultipleChoice(within="answer"), ["<answer>B</answer>", "B", "<answer>A</answer> B"], answer="B") == [
        1, 0, 0,
    ]  # fmt: skip
    assert scores(MultipleChoice(letters="ABCD"), ["Answer: E"], answer="D") == [0]


def test_multiple_choice_without_a_letter_to_compare_with_is_a_failure():
    for answer in ("Paris", "K", "3", ""):
        with pytest.raises(RewardFailure, match=r"multiple_choice.*prompt q: its column 'answer' must hold one of ABC"):
            MultipleChoice()([rollout("B", name="q", answer=answer)])
    with pytest.raises(UserError, match=r"reward\.letters"):
        MultipleChoice(letters="AAB")


# -- format tags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>a\nb</think>\n\n<answer>b</answer>\n", 1),
        ("<think>a < b, x <b> y</think><answer>b</answer>", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><answer></answer>", 0),
        ("<think> \n</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think><answer>b", 0),
        ("so <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> hm <answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> bye", 0),
        ("<Think>a</Think><answer>b</answer>", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_tags_in_order_once_and_not_empty(text, right):
    assert scores(FormatTags(), [text]) == [right]


def test_tags_with_text_around_them_or_started_by_the_prompt():
    around = "so <think>a</think> hm <answer>b</answer> bye"
    backwards = "<answer>b</answer> so <think>a</think>"
    assert scores(FormatTags(whole=False), [around, backwards, around.replace("think>", "thought>")]) == [1, 0, 0]
    started = FormatTags(prefilled=True)
    assert scores(started, ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"]) == [1, 0]
    for tags in ((), ("a", "a"), ("<think>",), ("a b",)):
        with pytest.raises(UserError, match=r"reward\.tags"):
            FormatTags(tags=tags)


# -- mathematics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("\\frac{1}{2}", "so it is $0.5$", 1),
        ("1/2", "\\boxed{\\frac{2}{4}}", 1),
        ("0.5", "\\boxed{50\\%}", 1),
        ("x^2+2x+1", "it is $(x+1)^2$", 1),
        ("x^2+2x+1", "it is $(x+1)^3$", 0),
        ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", 1),
        ("\\sqrt{2}", "\\boxed{1.414}", 0),
        ("$\\{1,2\\}$", "\\boxed{\\{2,1\\}}", 1),
        ("[0,1)", "\\boxed{[0,1]}", 0),
        ("18", "18 dollars", 1),
        ("18", "$1,800$", 0),
        ("18", "\\boxed{18} or \\boxed{19}", 0),
        ("18", "I don't know", 0),
        ("18", "", 0),
    ],
)
def test_mathematics_compares_what_expressions_mean(answer, text, right):
    assert scores(Mathematics(), [text], answer=answer) == [right]


def test_mathematics_works_in_a_thread_and_after_its_process_was_ended():
    from tether.rewards.verifiers.mathematics import _worker

    found = []
    thread = threading.Thread(target=lambda: found.extend(scores(Mathematics(), ["$2$"], answer="2")))
    thread.start()
    thread.join()
    _worker().end()
    assert found == [1] and scores(Mathematics(), ["$2$"], answer="2") == [1]


def test_a_comparison_that_does_not_end_is_undecided_and_ends():
    text = "\\boxed{9^{9^{9^{9}}}}"
    with pytest.raises(RewardFailure, match=r"prompt q: the comparison with '2' ended after 0.5 s"):
        Mathematics(seconds=0.5)([rollout(text, name="q", answer="2")])
    (score,) = scores(Mathematics(seconds=0.5, undecided="unscored"), [text], answer="2")
    assert math.isnan(score)
    assert scores(Mathematics(), ["$2$"], answer="2") == [1]


def test_an_interrupted_comparison_leaves_no_reply_for_the_next(monkeypatch):
    rule = Mathematics()
    assert scores(rule, ["7"], answer="7") == [1]

    def interrupted(process, seconds):
        select.select([process.stdout], [], [], seconds)  # the reply is there, and nobody reads it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Worker, "_line", staticmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            rule([rollout("7", answer="7")])
    assert scores(rule, ["8", "7"], answer="7") == [0, 1]


def test_a_comparing_process_that_was_killed_while_idle_is_started_anew_and_out_of_reach_of_ctrl_c():
    rule = Mathematics()
    assert scores(rule, ["7"], answer="7") == [1]
    process = _worker()._process
    assert process is not None and os.getpgid(process.pid) != os.getpgid(0)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert scores(rule, ["7", "8"], answer="7") == [1, 0]


def test_mathematics_with_an_answer_that_is_no_expression_is_a_failure():
    with pytest.raises(RewardFailure, match=r"prompt q: its column 'answer' holds no expression: ''"):
        Mathematics()([rollout("2", name="q", answer="")])


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (lambda: Mathematics(), "math_verify", "math"),
        (lambda: JsonSchema(), "jsonschema", "json"),
        (lambda: build(RULES, "code_tests", "reward"), "pydantic_monty", "code"),
    ],
)
def test_a_package_that_is_missing_is_named_before_the_run_begins(make, module, extra, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(UserError, match=rf"needs the package {module}: pip install 'tether-rlhf\[{extra}\]'"):
        make()


# -- JSON schema -------------------------------------------------------------------------------------------------------

AGE = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"age": 3}', 1),
        ('Here:\n```json\n{"age": 3}\n```\nDone.', 1),
        ('```\n{"age": 3}\n```', 1),
        ('```json\n{"age": 3}\n```\n```json\n{"age": -3}\n```', 0),
        ('{"age": -3}', 0),
        ('{"age": 3.5}', 0),
        ('{"age": "3"}', 0),
        ('{"age": 3, "x": 1}', 0),
        ('{"age": NaN}', 0),
        ('{"age": 3', 0),
        ('Sure! {"age": 3}', 0),
        ("", 0),
        ("[" * 200_000, 0),
    ],
)
def test_json_of_the_shape_that_was_asked_for(text, right):
    assert scores(JsonSchema(schema=AGE), [text]) == [right]
    assert scores(JsonSchema(), [text], schema=AGE) == [right]


def test_what_python_reads_beyond_json_is_no_json():
    assert scores(JsonSchema(schema={}), ["1e3", "NaN", "[Infinity]", "-Infinity", "'a'"]) == [1, 0, 0, 0, 0]


def test_a_schema_may_be_text_and_a_bad_one_is_a_failure_or_a_user_error():
    assert scores(JsonSchema(), ["3", '"3"'], schema='{"type": "integer"}') == [1, 0]
    with pytest.raises(RewardFailure, match=r"json_schema.*prompt q: not a JSON schema.*nonsense"):
        JsonSchema()([rollout("3", name="q", schema={"type": "nonsense"})])
    with pytest.raises(RewardFailure, match="prompt q has no column 'schema'"):
        JsonSchema()([rollout("3", name="q")])
    with pytest.raises(UserError, match=r"reward\.schema: not a JSON schema"):
        JsonSchema(schema={"type": "nonsense"})
    with pytest.raises(UserError, match=r"reward\.column would be ignored"):
        JsonSchema(schema=AGE, column="other")


def test_json_that_its_schema_can_not_be_followed_through_is_wrong_and_stops_nothing():
    lists = JsonSchema(schema={"type": "array", "items": {"$ref": "#"}})
    assert scores(lists, ["[" * 700 + "]" * 700, "[[], [[]]]"]) == [0, 1]
    halves = JsonSchema(schema={"type": "number", "multipleOf": 0.5})
    assert scores(halves, ["1" + "0" * 400, "1.5", "1.2"]) == [0, 1, 0]
    endless = JsonSchema(schema={"$ref": "#"})
    with pytest.raises(RewardFailure, match="prompt p: its schema refers to itself without end"):
        endless([rollout("[[1]]")])


def test_a_schema_that_refers_to_another_document_fetches_nothing(monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("the network was asked"))
    with pytest.raises(RewardFailure, match="json_schema can't judge"):
        scores(JsonSchema(), ["3"], schema={"$ref": "https://example.com/schema.json"})


# -- what they share ---------------------------------------------------------------------------------------------------


def test_exact_number_inside_a_tag():
    rule = ExactNumber(within="answer")
    texts = ["<answer>42</answer> or 43", "42", "<answer>41</answer> 42", "<answer>1</answer><answer>42</answer>"]
    assert scores(rule, texts, answer="42") == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "held"),
    [("<a>x</a>", "x"), ("<a>x</a><a> y </a>", "y"), ("<a>x", ""), ("x</a>", ""), ("</a><a>", ""), ("<a></a>", "")],
)
def test_what_a_tag_holds(text, held):
    assert inside(text, "a") == held


def test_the_last_block_of_a_language():
    text = "```python\na\n```\n```\nb\n```\n```text\nc\n```\n"
    assert last_block(text, ("python",)) == "b\n"
    assert last_block("```python\na = '```'\n```", ("python",)) == "a = '```'\n"
    assert last_block("```py\ncut off", ("py",)) == "cut off"
    assert last_block("```text\nc\n```", ("python",)) is None
    assert last_block("no block", ("python",)) is None


def test_every_exception_of_a_verifier_names_prompt_and_sample():
    def broken(_):
        return 1 / 0

    with pytest.raises(RewardFailure, match=r"mine can't judge the completion 'abc' of prompt q: ZeroDivisionError"):
        score_each("mine", [rollout("abc", name="q")], broken)


def test_what_can_not_be_judged_is_a_failure_or_unscored_and_never_zero():
    def unsure(_):
        raise CannotJudge("fog")

    with pytest.raises(RewardFailure, match=r"'abc' of prompt q: fog\n.*reward.undecided=unscored"):
        score_each("mine", [rollout("abc", name="q")], unsure)
    assert math.isnan(score_each("mine", [rollout("abc")], unsure, "unscored").item())


def test_the_table_builds_every_verifier_from_its_name_alone_and_says_what_it_means():
    for name, kind in RULES.items():
        assert build(RULES, {"type": name, **({"pattern": "x"} if name == "matches" else {})}, "reward")
        assert kind.__doc__ and "\n" not in kind.__doc__.split(". ")[0].split(":")[0][:60]


def test_long_and_hostile_texts_are_judged_soon():
    pieces = [
        "<",
        "*",
        "```",
        "```\n",
        "(",
        "A ",
        "answer ",
        "\\boxed{",
        "\n",
        " ",
        "_",
        "<answer>",
        "1,",
        "$",
        "A)\n(",
        "[ ",
    ]
    texts = [start + piece * (30_000 // len(piece)) + "x" for piece in pieces for start in ("", "answer", "\\boxed{")]
    for rule, metadata in (
        (MultipleChoice(), {"answer": "B"}),
        (FormatTags(), {}),
        (JsonSchema(schema=AGE), {}),
        (ExactNumber(), {"answer": "7"}),
    ):
        started = time.perf_counter()
        assert scores(rule, texts, **metadata) == [0.0] * len(texts)
        assert time.perf_counter() - started < 5.0  # 48 texts; one that is squared takes as long
