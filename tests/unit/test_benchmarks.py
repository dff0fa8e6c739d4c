"""The benchmark's arithmetic and manners, on arms that are a few lines of Python."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench, machine, report  # noqa: E402
from benchmarks.arms import common  # noqa: E402
from benchmarks.compare import Bench, compare  # noqa: E402
from benchmarks.measures import agreement, in_words, paired_ratio, slope  # noqa: E402
from benchmarks.processes import ArmFailed, Process  # noqa: E402
from benchmarks.works import BEST, Work, demonstrations, operations, pairs, token_counts, works  # noqa: E402

# -- statistics --------------------------------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_pairs_and_not_of_the_medians():
    # The machine was slow in the last two pairs: medians of the columns would give 12 / 2 = 6.
    ratio = paired_ratio([(1, 2), (1, 3), (2, 12), (10, 20), (10, 25)])
    assert (ratio.middle, ratio.low, ratio.high, ratio.pairs) == (2.5, 2, 6, 5)


def test_slopes_are_exponents_and_words_say_what_doubling_costs():
    assert slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert slope([10, 20], [7, 7]) == pytest.approx(0)
    with pytest.raises(ValueError, match="two different sizes"):
        slope([3, 3], [1, 2])
    assert "in proportion (exponent 1.00: twice the size costs 2.00" in in_words(1.0)
    assert "more slowly" in in_words(0.5) and "faster" in in_words(1.5) and "hardly" in in_words(0.05)


def parameters(*grads: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    found = []
    for number, grad in enumerate(grads):
        parameter = torch.zeros_like(grad).requires_grad_()
        parameter.grad = grad
        found.append((f"layer.{number}", parameter))
    return found


def answer(loss: float, *grads: torch.Tensor) -> dict[str, Any]:
    return {"loss": loss, "gradient": common.sketch(parameters(*grads))}


def test_a_sketch_knows_the_distance_of_gradients():
    torch.manual_seed(0)
    one = [torch.randn(40, 30) for _ in range(60)]
    other = [g + 0.03 * torch.randn(40, 30) for g in one]
    found = agreement(answer(1.0, *one), answer(1.0, *other), rounded=True)
    a, b = torch.cat([g.flatten() for g in one]), torch.cat([g.flatten() for g in other])
    assert found.numbers["gradient"] == pytest.approx(float((a - b).norm() / b.norm()), rel=0.2)
    assert found.numbers["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=3e-4)
    assert not found.void


def test_sketches_of_two_libraries_meet_under_one_name():
    ours, theirs = parameters(torch.ones(3))[0][1], parameters(torch.ones(3))[0][1]
    assert common.sketch([("layers.0.w", ours)]) == common.sketch([("module.model.layers.0.w", theirs)])


def test_sides_that_differ_are_void():
    torch.manual_seed(0)
    grads = [torch.randn(50) for _ in range(8)]
    same = answer(2.0, *grads)
    assert agreement(same, same, rounded=False).void == ""
    assert "loss differs" in agreement(answer(2.001, *grads), same, rounded=False).void
    assert agreement(answer(2.001, *grads), same, rounded=True).void == ""
    # The same directions, twice as long: no cosine would see it.
    assert "gradient differs" in agreement(answer(2.0, *(2 * g for g in grads)), same, rounded=False).void
    one_wrong = [*grads[:-1], -grads[-1]]
    wrong = agreement(answer(2.0, *one_wrong), same, rounded=False)
    assert "worst differs" in wrong.void and wrong.worst_name == "layer.7"
    assert "loss differs" in agreement(answer(math.nan, *grads), same, rounded=False).void
    assert "one side only: layer.7" in agreement(answer(2.0, *grads[:-1]), same, rounded=False).void
    assert "gradient differs" in agreement(answer(2.0), answer(2.0), rounded=False).void


def test_log_probs_of_the_same_tokens_are_compared_one_by_one():
    same = {"logprobs": [[-1.0, -2.0], [-3.0, -4.0]]}
    assert not agreement(same, {"logprobs": [[-1.0, -2.0], [-3.0, -4.0005]]}, rounded=False).void
    found = agreement(same, {"logprobs": [[-1.0, -2.0], [-3.0, -4.1]]}, rounded=False)
    assert found.numbers["logprobs"] == pytest.approx(0.1) and "logprobs differs" in found.void


# -- counts ------------------------------------------------------------------------------------------------------------


def test_operations_follow_from_useful_tokens():
    known = works()
    rows = [{"prompt": [1] * 10, "completions": [[1] * 3, [1] * 4]}]
    dpo = Work(name="", title="", kind="dpo", rival=BEST, spec={"rows": rows}, scored=1)
    tokens = token_counts(dpo, ())
    assert (tokens.useful, tokens.completion) == (17, 7)
    # Forward 2, backward 4, the reference's forward 2 operations a weight.
    assert operations(dpo, tokens, trunk=100, head=50) == (8 * (17 * 100 + 7 * 50), 0)
    # Ten tokens see one to ten; three see eleven to thirteen; four see eleven to fourteen.
    assert tokens.seen == 55 + 36 + 50
    assert operations(dpo, tokens, trunk=0, head=0, attention=12) == (4 * 141 * 12, 0)
    grpo = known["grpo-64"]
    tokens = token_counts(grpo, [240, 241])
    assert (tokens.prompt, tokens.decoded, tokens.steps) == (481, 16 * 64, 64)
    assert tokens.seen == 240 * 241 // 2 + 241 * 242 // 2 + 8 * (64 * 481 + 2 * 64 * 65 // 2)
    assert operations(grpo, tokens, trunk=1, head=0) == (6 * (481 + 1024), 2 * (481 + 1024))
    ppo = known["ppo"]
    tokens = token_counts(ppo, [60, 150, 240])
    # Policy and critic forward and backward; critic, reward model and reference forward. Policy and reference have such
    # a head.
    assert operations(ppo, tokens, trunk=1, head=0)[0] == (6 + 6 + 3 * 2) * (450 + 6 * 64)
    assert operations(ppo, tokens, trunk=0, head=1)[0] == (6 + 2) * 6 * 64
    sampling = known["sampling-64x32"]
    assert token_counts(sampling, [60] * 8).decoded == 64 * 32
    assert operations(sampling, token_counts(sampling, [0] * 8), trunk=1, head=1) == (0, 4 * 64 * 32)


def test_rows_are_the_same_every_time_and_as_long_as_promised():
    assert pairs(4, 230, 56, 120) == pairs(4, 230, 56, 120)
    lengths = [len(c) for row in pairs(4, 230, 56, 120) for c in row["completions"]]
    assert min(lengths) >= 56 and max(lengths) <= 120
    assert [len(r["prompt"]) + len(r["completions"][0]) for r in demonstrations([20, 450])] == [20, 450]


# -- a quiet machine ---------------------------------------------------------------------------------------------------


def fake_proc(folder: Path, busy_ticks: int, processes: dict[int, tuple[int, int]]) -> Path:
    """``processes``: id -> (parent, ticks)."""
    folder.mkdir()
    (folder / "stat").write_text(f"cpu  {busy_ticks} 0 0 999 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
    for pid, (parent, ticks) in processes.items():
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 0 0 0 0 0 0 0 0 0 {ticks} 0 0 0")
    return folder


def test_only_the_load_of_others_counts(tmp_path: Path):
    arm, its_child, stranger = 70_001, 70_002, 70_003
    before = fake_proc(tmp_path / "a", 1000, {arm: (1, 10), its_child: (arm, 20), stranger: (1, 30)})
    after = fake_proc(tmp_path / "b", 1350, {arm: (1, 110), its_child: (arm, 220), stranger: (1, 80)})
    one, two = machine.read_load([arm], before), machine.read_load([arm], after)
    two = machine.Reading(at=one.at + 10, everybody=two.everybody, ours=two.ours)
    # Of 350 ticks 100 are the arm's and 200 those of its child.
    assert machine.other_load(one, two) == pytest.approx(50 / machine.TICKS / 10)


def test_a_busy_machine_is_refused_unless_told_otherwise():
    assert bench.refuse_when_busy(False, 0.09) == ""
    with pytest.raises(bench.Refused, match=r"0\.40 cores busy.*\n.*--busy"):
        bench.refuse_when_busy(False, 0.4)
    assert "0.40 cores" in bench.refuse_when_busy(True, 0.4)


def test_names_that_begin_alike_are_chosen_together():
    known = ["sft", "sft-packing", "dpo-3", "dpo-long"]
    assert bench.chosen("", known) == known
    assert bench.chosen("dpo-long,sft-packing", known) == ["sft-packing", "dpo-long"]
    assert bench.chosen("dpo", known) == ["dpo-3", "dpo-long"]
    with pytest.raises(bench.Refused, match="no such name; known: sft"):
        bench.chosen("grpo", known)


def test_the_command_that_is_written_down_names_no_path():
    given = ["--only", "dpo", "--trl-python", "/somewhere/python", "--busy"]
    assert bench.command(given) == 'make bench ARGS="--only dpo --busy"'
    assert bench.command(["--trl-python=/somewhere/python", "--vllm-python", "/else/python"]) == "make bench"


# -- pairs -------------------------------------------------------------------------------------------------------------

FAKE = """
import json, os, sys
name, diary, seconds, grad = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
for line in sys.stdin:
    command = json.loads(line)
    with open(diary, "a") as file:
        print(name, command["do"], command.get("rest", ""), os.environ.get("OMP_NUM_THREADS"), file=file)
    if command["do"] == "open":
        answer = {"facts": {"trunk": 100, "head": 50, "attention": 0}}
    elif command["do"] == "agree":
        answer = {"loss": 1.0, "gradient": {"w": [1.0, grad, grad]}, "peak": 10**9}
    else:
        answer = {"seconds": seconds, "peak": 10**9, "flops": 1e9, "bandwidth": 1e9}
    print(json.dumps(answer), flush=True)
    if seconds < 0:
        sys.exit("no memory left")
"""


def fake_start(folder: Path, seconds: float = 6.0, grad: float = 1.0) -> Callable[[str], Process]:
    script = folder / "fake.py"
    script.write_text(FAKE)
    told = {"tether_arm": (2.0, 1.0), "ceiling_arm": (1.0, 1.0)}

    def start(arm: str) -> Process:
        mine, my_grad = told.get(arm, (seconds, grad))
        words = [arm, str(folder / "diary"), str(mine), str(my_grad)]
        return Process(arm, [sys.executable, "-S", str(script), *words], machine.settings(3))

    return start


def fake_bench(folder: Path, memory: int = 10**12, **options: float) -> Bench:
    return Bench(start=fake_start(folder, **options), model="", threads=3, say=lambda line: None, memory=memory)


def diary(folder: Path, do: str) -> list[str]:
    lines = (folder / "diary").read_text().splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == do]


WORK = Work(name="sft", title="", kind="sft", rival=BEST, spec={"rows": demonstrations([5])})


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_arms_alternate(tmp_path: Path, kind: str):
    row = compare(fake_bench(tmp_path), replace(WORK, kind=kind), BEST, 3)
    assert row["pairs"] == [(2.0, 6.0)] * 3 and not row["void"]
    ours, theirs, ceiling = "tether_arm", "trl_arm", "ceiling_arm"
    pairs = [ours, theirs, ceiling, theirs, ours, ceiling, ours, theirs, ceiling]
    assert diary(tmp_path, "step") == pairs
    assert len(row["load"]) == len(row["ceilings"]) == 3
    assert row["peak"] == {"ours": 10**9, "theirs": 10**9}
    # Every arm has the same environment.
    assert {line.split()[-1] for line in (tmp_path / "diary").read_text().splitlines()} == {"3"}
    assert kind != "sft" or row["operations"] == {"training": 6 * (5 * 100 + 4 * 50), "drawing": 0}


def test_arms_that_fill_the_memory_give_it_back_between_steps(tmp_path: Path):
    assert compare(fake_bench(tmp_path, memory=2 * 10**9), WORK, BEST, 1)["gave_memory_back"]
    assert (tmp_path / "diary").read_text().count("step True") == 2
    assert not compare(fake_bench(tmp_path, memory=3 * 10**9), WORK, BEST, 1)["gave_memory_back"]


def test_sides_that_disagree_are_not_timed(tmp_path: Path):
    row = compare(fake_bench(tmp_path, grad=1.5), WORK, BEST, 3)
    assert "gradient differs" in row["void"] and "pairs" not in row
    assert diary(tmp_path, "step") == []


def test_an_arm_that_ends_says_why(tmp_path: Path):
    with pytest.raises(ArmFailed, match="trl_arm: ended: no memory left"):
        compare(fake_bench(tmp_path, seconds=-1.0), WORK, BEST, 1)


def test_sides_that_draw_less_than_asked_are_void(tmp_path: Path):
    start = fake_start(tmp_path)
    script = tmp_path / "fake.py"
    # The fakes' completions have 63 tokens on one side.
    script.write_text(FAKE.replace('"peak": 10**9, "fl', '"drawn": 63 + (name == "tether_arm"), "peak": 10**9, "fl'))
    short = Bench(start=start, model="", threads=3, say=lambda line: None, memory=10**12)
    row = compare(short, works()["grpo-64"], BEST, 1)
    assert row["void"] == "a completion has 63 tokens instead of 64"
    assert diary(tmp_path, "step") == ["tether_arm", "trl_arm", "ceiling_arm"]


def test_agreement_alone_is_asked_for_with_no_pairs(tmp_path: Path):
    row = compare(fake_bench(tmp_path), WORK, BEST, 0)
    assert "--pairs 0" in row["void"] and row["agreement"]["numbers"]["loss"] == 0
    assert diary(tmp_path, "step") == []


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``bench.main`` on fake arms, writing into a folder of the test's own."""
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "RAW", tmp_path / "results.json")
    monkeypatch.setattr(bench, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(bench, "starter", lambda options, folder: fake_start(tmp_path))
    monkeypatch.setattr(bench, "model_folder", lambda name, folder: name)
    monkeypatch.setattr(bench, "versions", lambda options: {"TRL": {"trl": "1.16.0"}})
    monkeypatch.setattr(machine, "quiet", lambda: 0.0)
    return tmp_path


def test_a_part_of_the_table_updates_its_own_rows(quiet_bench: Path):
    assert bench.main(["--only", "reward,dpo-3", "--pairs", "3"]) == 0
    first = json.loads((quiet_bench / "results.json").read_text())["rows"]
    assert list(first) == ["reward", "dpo-3"]
    assert bench.main(["--only", "reward", "--pairs", "1", "--default-pairs", "0"]) == 0
    second = json.loads((quiet_bench / "results.json").read_text())["rows"]
    assert second["dpo-3"] == first["dpo-3"] and "default" in second["dpo-3"]
    assert len(second["reward"]["best"]["pairs"]) == 1 and "default" not in second["reward"]
    page = (quiet_bench / "RESULTS.md").read_text()
    assert "| DPO, 3 pairs" in page and "**3.00** (3.00–3.00)" in page and "3.00 (one pair)" in page
    assert "--only reward,dpo-3 --pairs 3" in page and "OMP_NUM_THREADS" in page


def test_rows_against_vllm_say_that_it_is_missing_and_the_table_goes_on(
    quiet_bench: Path, monkeypatch: pytest.MonkeyPatch
):
    def starter(options: Any, folder: str) -> Callable[[str], Process]:
        start = fake_start(quiet_bench)
        return lambda arm: start(arm) if arm != "vllm_arm" else start(bench.interpreter(arm, options))

    monkeypatch.setattr(bench, "starter", starter)
    missing = ["--vllm-python", str(quiet_bench / "nowhere")]
    # TRL's row comes first in the table; vLLM's are done before it here.
    monkeypatch.setattr(bench, "works", lambda: {name: works()[name] for name in ("vllm-16x64", "reward")})
    assert bench.main(["--pairs", "1", *missing]) == 0
    rows = json.loads((quiet_bench / "results.json").read_text())["rows"]
    said = rows["vllm-16x64"]["best"]["void"]
    assert said.startswith("failed: vllm_arm: vLLM is not installed") and "make bench" in said and "\n" not in said
    assert str(quiet_bench) not in said and rows["reward"]["best"]["pairs"] == [[2.0, 6.0]]
    there = quiet_bench / "python"
    there.touch()
    assert bench.interpreter("vllm_arm", bench.arguments(["--vllm-python", str(there)])) == str(there)
    assert bench.interpreter("plain_arm", bench.arguments(missing)) == sys.executable


def test_a_busy_machine_writes_nothing(quiet_bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(machine, "quiet", lambda: 1.5)
    assert bench.main(["--only", "reward"]) == 2
    assert "1.50 cores busy" in capsys.readouterr().err
    assert not (quiet_bench / "results.json").exists()
    assert bench.main(["--only", "reward", "--pairs", "1", "--busy"]) == 0
    assert "Not a quiet machine: other processes keep 1.50 cores" in (quiet_bench / "RESULTS.md").read_text()


def test_growth_fits_the_count_of_operations_beside_the_clock(quiet_bench: Path):
    assert bench.main(["growth", "--only", "batch"]) == 0
    curve = json.loads((quiet_bench / "results.json").read_text())["growth"]["batch"]
    # The fake arm takes two seconds whatever it is asked; operations are in proportion to the batch.
    assert curve["slope"] == pytest.approx(0) and curve["expected"] == pytest.approx(1)
    assert "grows hardly at all" in (quiet_bench / "RESULTS.md").read_text()


def test_shares_of_the_ceiling_and_marks():
    best = {
        "rival": "TRL fp32", "void": "", "pairs": [(2.0, 4.0)], "load": [0.0], "gave_memory_back": True,
        "ceilings": [(100.0, 10.0)], "operations": {"training": 150.0, "drawing": 0.0}, "weight_bytes": 4,
        "peak": {"ours": 2**30, "theirs": 2**31}, "tokens": {"useful": 10, "decoded": 6, "steps": 3}, "drawing": [],
    }  # fmt: skip
    row = {"title": "training", "kind": "sft", "model": "smollm2-135m", "target": None, "best": best}
    assert report.shares(row, 2.0) == "75%"
    # Three steps that read four bytes at ten a second: 1.2 s; all rows computed would be 1.5 s.
    drawing = {**best, "operations": {"training": 0.0, "drawing": 150.0}}
    assert report.decode_floor(drawing, 100.0, 10.0) == 1.5 and report.decode_floor(drawing, 1000.0, 10.0) == 1.2
    assert report.shares({**row, "kind": "sampling", "best": drawing}, 2.0) == "75%"
    # A step that does both: four seconds of six trained 150 operations, in two they were drawn at a floor of 1.5.
    both = {**best, "operations": {"training": 150.0, "drawing": 150.0}, "drawing": [1.0, 2.0, 3.0]}
    assert report.shares({**row, "kind": "grpo", "best": both}, 6.0) == "38% / 75%"
    line = report.table({"x": row}, ["x"])[-1]
    assert "training ‡" in line and "5 / 2" in line and "1.0 / 2.0 GiB (0.50)" in line
    assert "training †" in report.table({"x": {**row, "best": {**best, "load": [0.2]}}}, ["x"])[-1]


# -- arms --------------------------------------------------------------------------------------------------------------


def test_what_a_library_prints_does_not_reach_the_conversation(tmp_path: Path):
    script = tmp_path / "arm.py"
    script.write_text(
        "from benchmarks.arms.common import serve\n"
        "class Arm:\n"
        "    facts = {}\n"
        "    def __init__(self, work): print('noise', work['kind'])\n"
        "    def agree(self, given): return {'loss': given['x']}\n"
        "    def steps(self, conversation):\n"
        "        held = bytearray(50 * 2**20)\n"
        "        conversation.begin_step(); print('more noise'); conversation.end_step()\n"
        "        conversation.begin_step(); raise KeyError('a part')\n"
        "serve(Arm)\n"
    )
    with Process("arm", [sys.executable, str(script)], {"PYTHONPATH": str(ROOT)}) as arm:
        assert arm.ask("open", work={"kind": "x"}, threads=1) == {"facts": {}}
        assert arm.ask("agree", x=2.5)["loss"] == 2.5
        done = arm.ask("step", rest=True)
        assert done["seconds"] < 1 and done["peak"] > 50 * 2**20
        with pytest.raises(ArmFailed, match="arm: KeyError: 'a part'"):
            arm.ask("step")
