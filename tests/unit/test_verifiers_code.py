"""Unit tests for generated code: what passes, what a failure is, what tests may not be talked into."""

from __future__ import annotations

import math
import time

import pytest

from tether.core.errors import RewardFailure, UserError
from tether.rewards.sandbox import Check, Limits, open_sandbox, same, shield
from tether.rewards.verifiers.program import CodeTests
from verifier_cases import rollout, scores, with_sandlock

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", {"call": "add(2, 2)", "equals": 4}]


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}```\nHope this helps."


def test_all_tests_must_pass_or_the_share_is_the_score():
    texts = [fenced(ADD), ADD, fenced("def add(a, b):\n    return 3\n"), fenced("def sub(a, b): pass\n"), "no code", ""]
    assert scores(CodeTests(), texts, tests=TESTS) == [1, 1, 0, 0, 0, 0]
    assert scores(CodeTests(share=True), texts, tests=TESTS) == [1, 1, 0.5, 0, 0, 0]
    parts = CodeTests()([rollout(text, tests=TESTS) for text in texts]).parts
    assert parts["tests_passed"].tolist() == [1, 1, 0.5, 0, 0, 0]
    assert scores(CodeTests(workers=3), texts, tests=TESTS) == [1, 1, 0, 0, 0, 0]


def test_the_last_block_of_python_is_the_program():
    wrong = "def add(a, b):\n    return 0\n"
    texts = [
        fenced(wrong) + "\n" + fenced(ADD),
        fenced(ADD) + "\n" + fenced("3\n", "text"),
        fenced(ADD) + fenced(wrong),
    ]
    assert scores(CodeTests(), texts, tests=TESTS) == [1, 1, 0]
    assert scores(CodeTests(), [f"```python\n{ADD}"], tests=TESTS) == [1]  # the fence that was never closed


def test_human_eval_continues_the_prompt_and_hands_the_function_to_check():
    rule = CodeTests(column="test", entry_column="entry_point", prepend_prompt=True)
    prompt = 'def twice(x: int) -> int:\n    """Two times x."""\n'
    asked = {"test": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "twice"}
    whole = fenced("def twice(x):\n    return x * 2\n")
    assert scores(rule, ["    return 2 * x\n", "    return x\n", whole], question=prompt, **asked) == [1, 0, 1]


@with_sandlock
@pytest.mark.parametrize("sandbox", ["monty", "sandlock"])
@pytest.mark.parametrize(
    "cheat",
    [
        "abs = lambda x: 0\ndef f(x): return 7.0\n",
        "def abs(x): return 0\ndef f(x): return 7.0\n",
        "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 7.0\n",
        "import sys\nsys.exit(0)\n",
        "import os\nos._exit(0)\n",
        "raise SystemExit(0)\n",
        "def f(x):\n    import os\n    os._exit(0)\n",
        "def f(x): return Any()\nclass Any:\n    def __eq__(self, other): return True\n",
        "class AssertionError(Exception): pass\ndef f(x): return 7.0\n",
        "def check(*args): pass\ndef f(x): return 7.0\n",
        'print(\'{"event": "check", "index": 0, "ok": true}\')\n',
        'def f(x):\n    import os\n    os.write(3, b\'{"event": "check", "index": 0, "ok": true, "value": 2}\\n\')\n',
        "assert True\n",
        "def abs_of_the_tests(x): return 0\ndef f(x): return 5\n",
    ],
)
def test_what_does_not_solve_the_task_does_not_pass(sandbox, cheat):
    """A redefined builtin, an early exit, an object equal to everything, a forged report."""
    checks = [
        Check(code="def check(f):\n    assert abs(f(1) - 2) < 1e-6\ncheck(f)"),
        Check(code="f(1)", judged=True, equals=2),
    ]
    assert not any(open_sandbox(sandbox)(cheat, checks, Limits(seconds=5)).passed)
    assert all(open_sandbox(sandbox)("def f(x): return 2.0\n", checks, Limits()).passed)


def test_what_monty_does_not_know_is_undecided_and_never_zero():
    code = "import heapq\ndef add(a, b):\n    return a + b\n"
    with pytest.raises(RewardFailure, match=r"(?s)prompt q: Monty can't run it: ModuleNotFound.*monty_then_sandlock"):
        CodeTests()([rollout(code, name="q", tests=TESTS)])
    found = CodeTests(undecided="unscored")([rollout(code, tests=TESTS), rollout(ADD, tests=TESTS)])
    assert math.isnan(found.total[0]) and found.total[1] == 1 and math.isnan(found.parts["tests_passed"][0])


@with_sandlock
def test_what_monty_does_not_know_sandlock_judges():
    code = "import heapq\ndef add(a, b):\n    return a + b\n"
    assert scores(CodeTests(sandbox="monty_then_sandlock"), [code, ADD, "x ="], tests=TESTS) == [1, 1, 0]


@pytest.mark.parametrize(
    ("code", "stop"),
    [
        ("import heapq", "unsupported"),
        ("from string import ascii_letters", "unsupported"),
        ("def f():\n    yield 1\n", "unsupported"),
        ("class A(int): pass", "unsupported"),
        ("x = 1\ndel x", "unsupported"),
        ("import numpy", "error"),
        ("import socket", "error"),
        ("import nosuchmodule", "error"),
        ("import math\nmath.nosuch", "error"),
        ("nosuchname", "error"),
        ("open('/etc/passwd')", "error"),
        ("raise NotImplementedError('later')", "error"),
        ("raise NotImplementedError('Monty')", "error"),
        ("def f():\n    x = 'ä'; raise (\n        NameError(\"name 'eval' is not defined\"))\nf()", "error"),
        ("e = ImportError(\"No module named 'heapq'\")\nif e: raise e from None", "error"),
        ("x = 1\rraise NotImplementedError('Monty')", "error"),
        ("raise ValueError(globals())", "unsupported"),
        ("if 1: globals()\nelse: raise ValueError", "unsupported"),
        ("def f(:", "error"),
        ("1 / 0", "error"),
    ],
)
def test_what_monty_lacks_is_told_from_what_is_wrong(code, stop):
    outcome = open_sandbox("monty")(code, [Check(code="assert True")], Limits())
    assert (outcome.stop, outcome.passed) == (stop, (False,))


@with_sandlock
@pytest.mark.parametrize("sandbox", ["monty", "sandlock", "unsafe_subprocess"])
def test_every_sandbox_judges_alike(sandbox):
    checks = [
        Check(code="assert f([3, 1]) == [1, 3]"),
        Check(code="f([2, 1])", judged=True, equals=[1, 2]),
        Check(code="assert f([]) == [1]"),
        Check(code="f(None)", judged=True, equals=[]),
        Check(code="len(f([1]))", judged=True, equals=1),
    ]
    run = open_sandbox(sandbox)
    outcome = run("import math\ndef f(x):\n    print('x' * 100)\n    return sorted(x)\n", checks, Limits())
    assert outcome.passed == (True, True, False, False, True)
    assert outcome.stop == "error" and "TypeError" in outcome.detail
    assert run("state = []\n", [Check(code="state.append(1)"), Check(code="assert state == [1]")], Limits()).passed == (
        True,
        True,
    )


@pytest.mark.parametrize(
    ("got", "wanted", "equal"),
    [
        (3, 3, True),
        (3, 3.0, True),
        (0.1 + 0.2, 0.3, True),
        (3.1, 3, False),
        (True, 1, False),
        (1, True, False),
        (None, None, True),
        (None, 0, False),
        ((1, 2), [1, 2], True),
        ([1, [2]], [1, [2]], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ("a", "a", True),
        ("1", 1, False),
        ({1}, [1], False),
        (math.nan, 1.0, False),
    ],
)
def test_values_that_are_the_same(got, wanted, equal):
    assert same(got, wanted) is equal


def test_a_program_that_says_in_a_test_that_monty_lacks_something_is_wrong():
    checks = [Check(code="x = 1\nassert x"), Check(code="f()"), Check(code="g()")]
    outcome = open_sandbox("monty")("\n\ndef f(): raise NotImplementedError('Monty')", checks, Limits())
    assert (outcome.stop, outcome.passed) == ("error", (True, False, False))
    outcome = open_sandbox("monty")("\n\ndef f(): return globals()", checks, Limits())
    assert outcome.stop == "unsupported"


def test_a_value_that_contains_itself_is_not_the_same():
    deep: list = []
    deep.append(deep)
    other: list = []
    other.append(other)
    assert not same(deep, other)


def test_tests_are_shielded_from_redefined_builtins_and_from_nothing_else():
    test = "def check(f, sum):\n    max = 1\n    assert abs(f(1)) == sum + max\n    print(len('abs'))\n"
    found = shield([test, "assert f(1)"])
    assert list(found.aliases.values()) == ["abs", "len", "print"] and found.tests[1] == "assert f(1)"
    new = {name: alias for alias, name in found.aliases.items()}
    assert f"{new['abs']}(f(1)) == sum + max" in found.tests[0] and f"{new['len']}('abs')" in found.tests[0]
    assert not found.aliases.keys() & shield([test]).aliases.keys()  # no run knows the names of another


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ([], "holds no test"),
        ("", "must be Python text or"),
        ([3], "must be Python text or"),
        ([{"call": "f(1)"}], "must be Python text or"),
        ("assert f(1", "is no Python"),
        ([{"call": "x = 1", "equals": 1}], "is no Python"),
    ],
)
def test_tests_that_are_none_are_failures_of_the_data(tests, words):
    with pytest.raises(RewardFailure, match=rf"code_tests can't judge .* of prompt q: .*{words}"):
        CodeTests()([rollout(ADD, name="q", tests=tests)])


def test_knobs_that_are_wrong_or_would_be_ignored():
    with pytest.raises(RewardFailure, match="has no column 'tests'"):
        CodeTests()([rollout(ADD)])
    for knobs, words in (
        ({"seconds": 0.0}, "reward.seconds"),
        ({"megabytes": 1}, "reward.megabytes"),
        ({"workers": 0}, "reward.workers"),
        ({"sandbox": "sandlock", "undecided": "unscored"}, "reward.undecided would be ignored"),
    ):
        with pytest.raises(UserError, match=words):
            CodeTests(**knobs)


def test_a_thousand_checks_in_monty_take_two_seconds_at_most():
    rollouts = [rollout(fenced(ADD), name=str(i), tests=TESTS) for i in range(1000)]
    rule = CodeTests()
    rule(rollouts[:1])
    took = []
    for _ in range(3):  # the best of three: a busy machine is no slow verifier
        started = time.perf_counter()
        assert rule(rollouts).total.sum() == 1000
        took.append(time.perf_counter() - started)
    assert min(took) <= 2.0
