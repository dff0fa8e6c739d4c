"""A run whose reward fails: it stops with exit code 5, or leaves the completion out and counts it; never a zero."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from dataclasses import replace
from zlib import crc32

import numpy
import pytest
import torch
from typer.testing import CliRunner

from method_cases import config, go, lines, questions, reward_file, same_weights, series, unclocked
from reward_cases import BROKEN, GOOD
from tether.cli.main import app
from tether.config.sections import ModelConfig
from tether.core.errors import NumericStop, RewardFailure, UserError
from tether.core.text import Prompt, Rollout
from tether.methods.judges import open_reward, open_rule

SMALL = {
    "algorithm": "rloo",
    "steps": 2,
    "prompts_per_step": 2,
    "completions_per_prompt": 2,
    "sampling": {"max_new_tokens": 4},
}


def run(model, folder, body, /, **settings):
    file = reward_file(folder, body, name=f"bad_{crc32(body.encode()):x}.py")
    return config("rl", model, questions(folder), folder / "r", reward=file, **{**SMALL, **settings})


def test_a_reward_that_raises_stops_the_command_with_exit_code_5(tiny_model_folder, tmp_path):
    file = reward_file(tmp_path, "raise RuntimeError('the judge is asleep')", name="asleep.py")
    command = [
        "rloo", "--model", str(tiny_model_folder), "--data", questions(tmp_path), "--out", str(tmp_path / "r"),
        f"reward={file}", "steps=2", "prompts_per_step=2", "sampling.max_new_tokens=4", "-q",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 5
    assert f"error: the reward {file} raised RuntimeError: the judge is asleep" in result.output
    assert "prompts:" in result.output  # the id of a sample
    # Nothing was learnt, so the name stays free for the mended command.
    assert not (tmp_path / "r").exists()


def test_a_reward_that_raises_later_keeps_what_was_recorded(tiny_model_folder, tmp_path):
    body = "import pathlib\nf = pathlib.Path(__file__).with_suffix('.seen')\nold = f.exists()\nf.touch()\n"
    body += "assert not old, 'second call'\nreturn [0.0] * len(completions)"
    with pytest.raises(RewardFailure, match="second call"):
        go(run(tiny_model_folder, tmp_path, body))
    assert len(lines(tmp_path / "r" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_raise_stops_whatever_may_be_skipped(policy, tiny_model_folder, tmp_path):
    with pytest.raises(RewardFailure, match="ZeroDivisionError"):
        go(run(tiny_model_folder, tmp_path, "return [1 / 0 for c in completions]", on_reward_failure=policy))


@pytest.mark.parametrize("unscored", ["None", "float('nan')"])
def test_unscored_completions_stop_the_run_or_are_left_out_and_counted(unscored, tiny_model_folder, tmp_path):
    body = f"return [{unscored} if i == 1 else float(i) for i in range(len(completions))]"
    with pytest.raises(RewardFailure, match=r"1 of 4 completions were left unscored by the reward .*score") as caught:
        go(run(tiny_model_folder, tmp_path, body))
    assert "on_reward_failure=skip" in str(caught.value)
    out = go(run(tiny_model_folder, tmp_path, body, on_reward_failure="skip"))
    assert series(out, "reward/dropped") == [1.0, 1.0]
    assert series(out, "reward/mean") == [pytest.approx(5 / 3)] * 2  # 0, 2 and 3
    assert [row["reward"] for row in lines(out / "samples.jsonl")] == [0.0, 2.0, 3.0] * 2


def test_nothing_left_to_learn_from_stops_even_where_skipping_is_allowed(tiny_model_folder, tmp_path):
    with pytest.raises(RewardFailure, match="no completion of the step is left"):
        go(run(tiny_model_folder, tmp_path, "return [None] * len(completions)", on_reward_failure="skip"))


def test_a_prompt_may_lose_all_its_completions(tiny_model_folder, tmp_path):
    body = "return [None, None, 1.0, 2.0]"
    two_updates = {"minibatches": 2, "loss": "ppo_clip"}
    out = go(run(tiny_model_folder, tmp_path, body, on_reward_failure="skip", overrides=two_updates))
    assert series(out, "reward/dropped") == [2.0, 2.0]
    assert all(torch.isfinite(torch.tensor(series(out, "grad_norm"))))


def test_a_reward_that_reseeds_changes_nothing(tiny_model_folder, tmp_path):
    plain = "return [float(len(c)) for c in completions]"
    reseeding = "import random, torch\ntorch.manual_seed(5)\nrandom.seed(5)\n" + plain
    lora = {"model": {"lora": {"rank": 2}}, "optim": {"learning_rate": 1e-2}}
    a = go(run(tiny_model_folder, tmp_path, plain, **lora, run={"folder": str(tmp_path / "a")}))
    b = go(run(tiny_model_folder, tmp_path, reseeding, **lora, run={"folder": str(tmp_path / "b")}))
    assert same_weights(a, b)


def test_scores_of_the_wrong_shape_from_a_class_of_ones_own(tiny_model_folder, tmp_path):
    (tmp_path / "own_reward.py").write_text(
        "from dataclasses import dataclass\nimport torch\nfrom tether.core.protocols import Scores\n"
        "@dataclass(frozen=True)\nclass One:\n"
        "    def __call__(self, rollouts):\n        return Scores(total=torch.zeros(1))\n"
    )
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward=f"{tmp_path}/own_reward.py:One", **SMALL
    )
    with pytest.raises(RewardFailure, match=r"One gave scores of shape \(1,\) for 4 completions"):
        go(made)


# -- every kind of broken function -------------------------------------------------------------------------------------


def rollouts() -> list[Rollout]:
    none = torch.tensor([])
    return [
        Rollout(
            prompt=Prompt(id=f"rows:{i}", text=f"question {i}", metadata={"answer": [str(i)]}), group=i,
            prompt_tokens=none, tokens=none, sampled=none, logprobs=none, text=f"text {i}", finish_reason="stop",
        )
        for i in range(3)
    ]  # fmt: skip


def opened(folder, body, *, skip=False, said=None, **options):
    """The reward of a file with this body, as a config would open it."""
    spec = reward_file(folder, body, name=f"broken_{crc32(body.encode()):x}.py")
    found, _ = open_reward(
        {"type": spec, **options}, None, ModelConfig(), 1, (said if said is not None else []).append, skip=skip
    )
    return found


def world():
    """What a run has of its own, and what a reward must leave as it is."""
    return (
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()), os.getcwd(),
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), math.isnan,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name, case in BROKEN.items() if case.here])
def test_in_the_process_of_the_run(name, tmp_path, capsys):
    case, given, before = BROKEN[name], rollouts(), world()
    reward = opened(tmp_path, case.body)
    if name == "Ctrl-C inside":  # somebody may well have pressed it
        with pytest.raises(KeyboardInterrupt):
            reward(given)
    elif case.said:
        with pytest.raises(RewardFailure) as caught:
            reward(given)
        _names(str(caught.value), case, case.said, given)
    else:
        assert reward(given).total.tolist() == [0, 1, 2]
    assert world() == before and [r.prompt.metadata["answer"] for r in given] == [["0"], ["1"], ["2"]]
    assert len("".join(capsys.readouterr())) < 50_000


@pytest.mark.parametrize("name", [name for name, case in BROKEN.items() if case.there])
def test_in_a_process_of_its_own(name, tmp_path, capfd):
    case, given, before = BROKEN[name], rollouts(), world()
    said = case.said if case.apart is None else case.apart
    reward = opened(tmp_path, case.body, seconds=1.5 if "limit" in said else 60)
    for _ in range(1 if "limit" in said else 2):  # it can be asked again, whatever has become of its process
        if said:
            with pytest.raises(RewardFailure) as caught:
                reward(given)
            _names(str(caught.value), case, said, given)
        else:
            scores = reward(given).total
            assert scores.tolist() == [0, 1, 2] and not scores.requires_grad
    assert world() == before and [r.prompt.metadata["answer"] for r in given] == [["0"], ["1"], ["2"]]
    assert len("".join(capfd.readouterr())) < 100_000


def _names(message, case, said, given):
    """Function, sample, and what happened."""
    blamed = given[case.sample or 0]
    assert said in message and f"broken_{crc32(case.body.encode()):x}.py:score" in message
    assert f"prompt {blamed.prompt.id}: {blamed.text!r}" in message


@pytest.mark.parametrize("name", [name for name, case in BROKEN.items() if case.sample == 1])
@pytest.mark.parametrize("options", [{}, {"seconds": 60}], ids=["here", "apart"])
def test_where_skipping_is_allowed_a_bad_value_costs_its_completion_only(name, options, tmp_path):
    said: list[str] = []
    found = opened(tmp_path, BROKEN[name].body, skip=True, said=said, **options)(rollouts()).total
    assert found.isnan().tolist() == [False, True, False]
    assert len(said) == 1 and BROKEN[name].said in said[0] and "prompt rows:1: 'text 1'" in said[0]


# -- one completion at a time ------------------------------------------------------------------------------------------


def one_at_a_time(folder, body, **options):
    text = "import os, time\ndef score(prompt, completion, answer):\n"
    text += "".join(f"    {line}\n" for line in body.splitlines())
    (folder / f"single_{crc32(body.encode()):x}.py").write_text(text)
    said: list[str] = []
    skip = options.pop("skip", False)
    spec = {"type": f"{folder}/single_{crc32(body.encode()):x}.py:score", "each": True, **options}
    return open_reward(spec, None, ModelConfig(), 1, said.append, skip=skip)[0], said


@pytest.mark.parametrize("options", [{}, {"seconds": 60}, {"workers": 2}], ids=["here", "limit", "workers"])
def test_a_function_of_one_completion(options, tmp_path):
    reward, _ = one_at_a_time(
        tmp_path, "assert prompt == f'question {answer[0]}'\nreturn 10 * int(completion[-1])", **options
    )
    assert reward(rollouts()).total.tolist() == [0, 10, 20]
    assert reward([]).total.tolist() == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("raise KeyError('x')", "raised KeyError: 'x'"),
        ("return 'much'", "returned 'much'"),
        ("return [1.0]", "returned [1.0]"),
        ("os._exit(1)", "ended the process it ran in (exit code 1)"),
        ("time.sleep(60)", "ran over its limit of 1 s"),
    ],
)
def test_the_one_that_fails_is_named_and_the_others_are_kept(wrong, said, tmp_path):
    body = f"if answer == ['1']:\n    {wrong}\nreturn 1.0"
    reward, _ = one_at_a_time(tmp_path, body, workers=2, seconds=1)
    with pytest.raises(RewardFailure) as caught:
        reward(rollouts())
    assert said in str(caught.value) and "for prompt rows:1: 'text 1'" in str(caught.value)
    reward, told = one_at_a_time(tmp_path, body, workers=2, seconds=1, skip=True)
    found = reward(rollouts()).total
    assert found.isnan().tolist() == [False, True, False] and len(told) == 1 and said in told[0]


def test_what_comes_too_late_is_nobody_elses_score(tmp_path):
    """The process of a call that ran over its time is gone, and its score with it."""
    body = f"""if answer == ['1']:
    open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid()))
    time.sleep(1.2)
    return 100.0
time.sleep(0.5)
return 1.0"""
    reward, _ = one_at_a_time(tmp_path, body, seconds=1, skip=True)
    assert str(reward(rollouts()).total.tolist()) == "[1.0, nan, 1.0]"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_workers_work_at_the_same_time(tmp_path):
    """Three sleeps of half a second each in three processes take less than two of them."""
    reward, _ = one_at_a_time(tmp_path, "time.sleep(0.5)\nreturn os.getpid()", workers=3)
    reward(rollouts())  # the start of the processes is not what is timed
    before = time.monotonic()
    found = reward(rollouts()).total.tolist()
    assert time.monotonic() - before < 1.0 and len(set(found)) == 3 and os.getpid() not in found


@pytest.mark.parametrize("options", [{"seconds": 60}, {"workers": 2}])
def test_draws_in_a_process_of_its_own_can_be_repeated(options, tmp_path):
    """Whichever process a completion reaches, and however often the run was resumed."""
    body = "import random\nreturn random.random()"
    first, second = (one_at_a_time(tmp_path, body, **options)[0](rollouts()).total.tolist() for _ in range(2))
    assert first == second and len(set(first)) == 3


def test_a_failing_call_is_made_again_and_counted(tmp_path):
    flaky = f"""import pathlib
mark = pathlib.Path({str(tmp_path)!r}, completion)
calls = len(mark.read_text()) if mark.exists() else 0
mark.write_text('x' * (calls + 1))
if calls < int(answer[0]):
    raise OSError('busy')
return 5.0"""
    reward, _ = one_at_a_time(tmp_path, flaky, retries=2)
    found = reward(rollouts())
    assert found.total.tolist() == [5, 5, 5] and found.parts["retried"].tolist() == [0, 1, 2]
    for i in range(3):
        (tmp_path / f"text {i}").unlink()
    reward, told = one_at_a_time(tmp_path, flaky, retries=1, skip=True)
    found = reward(rollouts())
    assert found.total.isnan().tolist() == [False, False, True] and "OSError: busy" in told[0]
    assert [len((tmp_path / f"text {i}").read_text()) for i in range(3)] == [1, 2, 2]


def test_columns_that_can_not_travel_are_named(tmp_path):
    given = [replace(r, prompt=replace(r.prompt, metadata={"answer": {1, 2}})) for r in rollouts()]
    reward, _ = one_at_a_time(tmp_path, "return 1.0", seconds=60)
    with pytest.raises(RewardFailure, match="can't be sent there as JSON: Object of type set"):
        reward(given)


def test_threads_that_pile_up_are_a_failure(tmp_path):
    body = "import threading\nreturn leave(completions)\n"
    file = reward_file(tmp_path, body, name="threads_left.py")
    (tmp_path / "threads_left.py").write_text(
        "import threading\nGO = threading.Event()\n"
        "def leave(completions):\n    for _ in range(150):\n        threading.Thread(target=GO.wait).start()\n"
        "    return [0.0] * len(completions)\n" + (tmp_path / "threads_left.py").read_text()
    )
    reward = open_reward(file, None, ModelConfig(), 1, print)[0]
    try:
        reward(rollouts()), reward(rollouts())
        with pytest.raises(RewardFailure, match=r"leaves threads running: 300 more than after its first call"):
            reward(rollouts())
    finally:
        sys.modules["threads_left"].GO.set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 2}, "workers would be ignored"),
        ({"workers": 0}, "workers is 1 or more"),
        ({"retries": -1}, "retries 0 or more"),
        ({"seconds": 0}, "seconds is a time above 0, got 0"),
        ({"second": 5}, "did you mean seconds?"),
    ],
)
def test_options_of_a_function_are_checked(options, words, tmp_path):
    with pytest.raises(UserError) as caught:
        opened(tmp_path, GOOD, **options)
    assert words in str(caught.value)


def test_a_file_that_only_loads_here_is_said_to(tmp_path):
    body = f"return [0.0] * len(completions)\nimport os\nassert os.getpid() == {os.getpid()}"
    spec = reward_file(tmp_path, body, name="only_here.py")
    file = tmp_path / "only_here.py"
    file.write_text(f"import os\nassert os.getpid() == {os.getpid()}, 'not here'\n" + file.read_text())
    reward = open_reward({"type": spec, "seconds": 60}, None, ModelConfig(), 1, print)[0]
    with pytest.raises(RewardFailure, match="can't be loaded in a process of its own: AssertionError: not here"):
        reward(rollouts())


# -- a class of one's own ----------------------------------------------------------------------------------------------

OWN = """from dataclasses import dataclass
import torch
from tether.core.protocols import Scores
@dataclass(frozen=True, kw_only=True)
class Mine:
    scale: float = 1.0
    def __call__(self, rollouts):
        {}
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no')", "raised ValueError: no"),
        ("raise SystemExit(2)", "raised SystemExit: 2"),
        ("return [1.0, 2.0, 3.0]", r"must give Scores\(total=..., parts=...\), got list"),
        ("return Scores(total=[1.0, 2.0, 3.0])", "its total is list"),
        ("return Scores(total=torch.zeros(3, 1))", r"gave scores of shape \(3, 1\) for 3 completions"),
        ("return Scores(total=torch.zeros(3), parts={'a': torch.zeros(2)})", r"gave a part a of shape \(2,\)"),
        ("return Scores(total=torch.zeros(3, dtype=torch.complex64))", "its total is torch.complex64"),
        ("return Scores(total=torch.tensor([0.0, float('inf'), 0.0]))", "gave inf\n  for prompt rows:1: 'text 1'"),
        ("return Scores(total=torch.tensor([0, 0, 1e300], dtype=torch.float64))", "gave 1e.300\n  for prompt rows:2"),
    ],
)
def test_a_class_of_ones_own_that_breaks_its_word(body, said, tmp_path):
    name = f"mine_{crc32(body.encode()):x}.py"
    (tmp_path / name).write_text(OWN.format(body))
    reward = open_rule({"type": f"{tmp_path}/{name}:Mine", "scale": 2.0})
    before = world()
    with pytest.raises(RewardFailure, match=said) as caught:
        reward(rollouts())
    assert f"{name}:Mine" in str(caught.value) and caught.value.exit_code == 5 and world() == before


def test_a_class_of_ones_own_gets_copies_and_its_scores_are_plain(tmp_path):
    body = (
        "torch.manual_seed(3); [r.tokens.fill_(7) for r in rollouts]; "
        "return Scores(total=torch.ones(3, dtype=torch.float64, requires_grad=True), parts={'a': torch.ones(3)})"
    )
    (tmp_path / "polite.py").write_text(OWN.format(body))
    given = [replace(r, tokens=torch.tensor([1, 2])) for r in rollouts()]
    before = world()
    found = open_rule(f"{tmp_path}/polite.py:Mine")(given)
    assert found.total.tolist() == [1, 1, 1] and not found.total.requires_grad and found.total.dtype == torch.float32
    assert world() == before and all(r.tokens.tolist() == [1, 2] for r in given)


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_a_reward_that_hangs_once_leaves_a_run_that_can_be_resumed(tiny_model_folder, tmp_path):
    """The third call hangs where a file says so; without it, the run goes on and is the undisturbed run."""
    body = (
        "import pathlib, time\nhere = pathlib.Path(__file__)\ncount = here.with_suffix('.count')\n"
        "n = int(count.read_text()) if count.exists() else 0\ncount.write_text(str(n + 1))\n"
        "if here.with_suffix('.hang').exists() and n == 2: time.sleep(60)\n"
        "return [float(len(c)) for c in completions]"
    )
    file = reward_file(tmp_path, body, name="hangs_once.py")

    def made(folder):
        lora = {"model": {"lora": {"rank": 2}}, "optim": {"learning_rate": 1e-2}}
        settings = {**SMALL, **lora, "steps": 3, "run": {"checkpoint_every": 1}, "data": {}}
        reward = {"type": file, "seconds": 2}
        return config("rl", tiny_model_folder, questions(tmp_path), tmp_path / folder, reward=reward, **settings)

    straight = go(made("straight"))
    (tmp_path / "hangs_once.count").unlink()
    (tmp_path / "hangs_once.hang").touch()
    with pytest.raises(RewardFailure, match="ran over its limit of 2 s"):
        go(made("stopped"))
    (tmp_path / "hangs_once.hang").unlink()
    go(made("stopped"), resume=True)
    assert same_weights(straight, tmp_path / "stopped") and unclocked(straight) == unclocked(tmp_path / "stopped")


def test_a_bad_value_in_a_run_is_left_out_and_counted_or_stops_it(tiny_model_folder, tmp_path):
    body = "return [float('inf') if i == 1 else float(i) for i in range(len(completions))]"
    with pytest.raises(RewardFailure, match=r"returned inf\n  for prompt"):
        go(run(tiny_model_folder, tmp_path, body))
    out = go(run(tiny_model_folder, tmp_path, body, on_reward_failure="skip"))
    assert series(out, "reward/dropped") == [1.0, 1.0] and series(out, "reward/mean") == [pytest.approx(5 / 3)] * 2


# -- what else must stop a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"top_p": 0.9}}, "top_p and sampling.top_k cut the tail"),
        ({"sampling": {"top_k": 5}}, "top_p and sampling.top_k cut the tail"),
        ({"sampling": {"temperature": 0}}, "temperature=0 draws nothing to learn from"),
        ({"algorithm": "ppo", "critic": {"kind": "adapter"}}, "critic.kind=adapter needs model.lora"),
        ({"critic": {"kind": "head"}}, "critic.* would be ignored: rloo has no critic"),
        ({"critic": {"learning_rate": 1e-3}}, "critic.* would be ignored"),
        ({"overrides": {"kl_in_reward": 0.0}, "reference": {"name": "x"}}, "reference.name would be ignored"),
        ({"completions_per_prompt": 1}, "rloo compares the completions of one prompt"),
        ({"overrides": {"minibatches": 3}}, "minibatches=3 is more than prompts_per_step=2"),
        ({"model": {"lora": {"rank": 2, "dropout": 0.1}}}, "model.lora.dropout=0.1"),
        ({"reward": "target_lenght"}, "did you mean target_length?"),
        ({"algorithm": "grop"}, "did you mean grpo?"),
        ({"data": {"max_prompt_tokens": 3}}, "no prompts are left; the shortest has"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_a_folder_is_made(settings, words, tiny_model_folder, tmp_path):
    made = config(
        "rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", **{**SMALL, "reward": "target_length", **settings}
    )
    with pytest.raises(UserError) as caught:
        go(made)
    assert words in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_sampler_that_draws_from_another_distribution_stops_the_run(tiny_model_folder, tmp_path, monkeypatch):
    from dataclasses import replace

    from tether.backends.local.sampler import LocalSampler

    real = LocalSampler.sample

    def lying(self, *args, **kwargs):
        return [replace(r, logprobs=r.logprobs - 0.2) for r in real(self, *args, **kwargs)]

    monkeypatch.setattr(LocalSampler, "sample", lying)
    made = config("rl", tiny_model_folder, questions(tmp_path), tmp_path / "r", reward="target_length", **SMALL)
    with pytest.raises(NumericStop, match=r"differ by 0.2 nats a token") as caught:
        go(made)
    assert caught.value.exit_code == 4
