"""Opt-in: verifiers on real public data that is not part of the repository (make test-data DATA=folder).

The folder holds gsm8k, ifeval and human_eval as JSONL, in the layouts that docs/verifiers.md describes.
"""

import gzip
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tether.core.text import Rollout
from tether.data.readers import read
from tether.rewards.rules import ExactNumber
from tether.rewards.sandbox import SandboxName
from tether.rewards.verifiers.ifeval import IFEval
from tether.rewards.verifiers.ifeval_kinds import KINDS
from tether.rewards.verifiers.mathematics import Mathematics
from tether.rewards.verifiers.program import CodeTests
from verifier_cases import rollout, with_sandlock

pytestmark = pytest.mark.data
DATA = Path(os.environ["TETHER_DATA"])


def answered(file: str, text) -> list[Rollout]:
    """A completion ``text(metadata)`` of every prompt of ``file``."""
    prompts = read(str(DATA / file), "prompts").records
    return [replace(rollout(text(p.metadata)), prompt=p) for p in prompts]


@pytest.mark.parametrize(("file", "count"), [("gsm8k/test.jsonl", 1319), ("gsm8k/train.jsonl.gz", 7473)])
def test_every_gold_solution_of_gsm8k_is_right(file, count):
    rollouts = answered(file, lambda m: m["solution"])
    assert ExactNumber()(rollouts).total.tolist() == [1.0] * count


def test_mathematics_agrees_on_gsm8k():
    rollouts = answered("gsm8k/test.jsonl", lambda m: m["solution"].rpartition("####")[2])
    assert Mathematics()(rollouts).total.tolist() == [1.0] * 1319


@pytest.mark.parametrize("rule", [ExactNumber(), Mathematics()], ids=["exact_number", "mathematics"])
def test_the_published_accuracies_of_the_graded_solutions_come_out(rule):
    """Cobbe 2021: 6B and 175B, fine-tuned and with a verifier; every one of the 5,276 grades is reproduced."""
    with gzip.open(DATA / "gsm8k/model_solutions.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    graded = [(row["answer"], c) for row in rows for c in row["candidates"]]
    texts = [c["solution"].rpartition("A:")[2] if isinstance(rule, Mathematics) else c["solution"] for _, c in graded]
    found = rule([rollout(text, answer=answer) for text, (answer, _) in zip(texts, graded, strict=True)]).total
    wrong = [c["solution"][-60:] for (_, c), score in zip(graded, found, strict=True) if bool(score) != c["is_correct"]]
    assert not wrong
    right = Counter(c["method"] for (_, c), score in zip(graded, found, strict=True) if score)
    shares = {method: round(100 * count / len(rows), 2) for method, count in right.items()}
    assert shares == {
        "6b_finetuning": 21.68, "6b_verification": 39.04, "175b_finetuning": 34.72, "175b_verification": 56.25,
    }  # fmt: skip


def test_every_instruction_of_ifeval_is_known_and_its_options_fit():
    rollouts = answered("ifeval/prompts.jsonl", lambda m: "This is a sentence, and it follows little.")
    named = Counter(name for r in rollouts for name in r.prompt.metadata["instruction_id_list"])
    assert len(rollouts) == 541 and set(named) == set(KINDS) and sum(named.values()) == 834
    for variant in ("strict", "loose"):
        found = IFEval(variant=variant)(rollouts)  # type: ignore[arg-type]
        assert torch.isfinite(found.total).all() and 0.0 < found.total.mean() < 0.5


HUMAN_EVAL = dict(column="test", entry_column="entry_point", prepend_prompt=True, seconds=20.0)


@with_sandlock
@pytest.mark.parametrize(("sandbox", "passing"), [("monty", 162), ("sandlock", 164), ("monty_then_sandlock", 164)])
def test_human_evals_own_solutions_pass(sandbox: SandboxName, passing: int):
    """Monty's subset runs 162 of 164 (98.8 %): two import ``string``, which it does not have, and are unscored."""
    rule = CodeTests(sandbox=sandbox, **HUMAN_EVAL, **({} if sandbox == "sandlock" else {"undecided": "unscored"}))  # type: ignore[arg-type]
    total = rule(answered("human_eval/problems.jsonl", lambda m: m["canonical_solution"])).total
    assert total.nansum() == passing and int(total.isnan().sum()) == 164 - passing


def test_human_evals_solutions_of_other_problems_do_not_pass():
    rollouts = answered("human_eval/problems.jsonl", lambda m: "    return None\n")
    total = CodeTests(undecided="unscored", **HUMAN_EVAL)(rollouts).total  # type: ignore[arg-type]
    assert total.nansum() == 0
