"""``tether judge``: pairs of answers, or prompts to answer twice, made into a preference file by a judge or a rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tether.core.errors import DataError, UserError
from tether.core.protocols import SamplingSettings
from tether.core.text import Message, Preference, Prompt
from tether.data.files import open_rows
from tether.data.readers import read
from tether.evals.statistics import wilson
from tether.evals.winrate import Verdicts, both_orders, position_sentence
from tether.methods import parts
from tether.methods.judge_checks import check_no_memory
from tether.methods.judge_models import PairJudge
from tether.methods.judges import given_judge, open_pair_judge, open_rule
from tether.methods.sample import open_sampler

Pair = tuple[Prompt, str, str]
SHOWN = 60


def pairs(*, path: str, judge: str, out: str | None, limit: int | None) -> None:
    """Judge pairs of answers that exist: a preference file (then agreement with its choices is said), or what
    ``tether sample -n 2`` wrote."""
    file = parts.new_file(out) if out is not None else None
    made = _pair_judge(judge)
    found, labelled = _given_pairs(path, limit)
    verdicts = both_orders(found, made.pairwise)
    _report(found, verdicts, made)
    if labelled:
        print(agreement(verdicts))
    if file is not None:
        source = {"file": path} if not labelled else {"file": path, "first_was": "chosen there"}
        _write(file, found, verdicts, made, source)


def prompts(
    *, path: str, model: str, judge: str, out: str, n_prompts: int | None, settings: SamplingSettings, seed: int
) -> None:
    """Two answers of ``model`` to each prompt, judged; the better one is chosen."""
    if settings.temperature == 0:
        raise UserError("--temperature 0 gives the same answer twice; use one above 0")
    file = parts.new_file(out)
    made = _pair_judge(judge)
    asked = [_as_chat(p) for p in read(path, "prompts", limit=n_prompts).records]
    drawn = open_sampler(model, None, settings, parts.speaker(False)).sample(asked, n=2, settings=settings, seed=seed)
    found = [(a.prompt, a.text, b.text) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    different = [p for p in found if p[1].strip() != p[2].strip() and p[1].strip() and p[2].strip()]
    if len(different) < len(found):
        print(f"{len(found) - len(different)} × two equal answers, or an empty one: left out")
    if not different:
        raise DataError(f"{path}: no prompt got two different answers")
    verdicts = both_orders(different, made.pairwise)
    _report(different, verdicts, made)
    _write(file, different, verdicts, made, _sampled(path, model, settings, seed))


def constraint(
    *,
    path: str,
    model: str,
    text: str,
    check: str | None,
    without_it: bool,
    out: str,
    n_prompts: int | None,
    settings: SamplingSettings,
    seed: int,
) -> None:
    """Structured preferences: each prompt answered with and without a constraint; the answer with it is chosen.

    ``check``: a rule that must score the chosen answer above the other, else the pair is left out. ``without_it``: the
    rows ask without the constraint (RLCD, Yang 2023), so that it becomes a habit; else they ask with it.
    """
    if not text.strip():
        raise UserError("--constraint is empty; say what the answer must keep to")
    file = parts.new_file(out)
    rule = None if check is None else open_rule(given_judge(check), "--check")
    if check is not None and rule is None:
        raise UserError(f"--check {check} names no rule; give one of the rules, or file.py:function")
    if check is not None:
        check_no_memory(given_judge(check), "tether judge", "--check")
    asked = [_as_chat(p) for p in read(path, "prompts", limit=n_prompts).records]
    told = [_with(p, text) for p in asked]
    drawn = open_sampler(model, None, settings, parts.speaker(False)).sample(
        [*told, *asked], n=1, settings=settings, seed=seed
    )
    held, free = drawn[: len(asked)], drawn[len(asked) :]
    kept = torch.ones(len(asked), dtype=torch.bool)
    if rule is not None:
        # A rule may read the prompt's columns; both answers are judged as answers to the prompt with the constraint.
        both = rule(held).total, rule([replace(r, prompt=p) for r, p in zip(free, told, strict=True)]).total
        kept = both[0] > both[1]
    source = {**_sampled(path, model, settings, seed), "constraint": text, "check": check}
    rows, equal = [], 0
    for row, keep, with_it, without in zip(told if not without_it else asked, kept.tolist(), held, free, strict=True):
        same = with_it.text.strip() == without.text.strip() or not with_it.text.strip() or not without.text.strip()
        equal += same
        if keep and not same:
            rows.append(_row(row, with_it.text, without.text, "constraint", source))
    _write_rows(file, rows)
    left = f"; left out: {equal} with equal or empty answers" + (
        f", {len(asked) - int(kept.sum())} not above the other by the check" if rule is not None else ""
    )
    print(f"{len(rows)} of {len(asked)} prompts gave a pair{left}: {file}")


# -- in ----------------------------------------------------------------------------------------------------------------


def _pair_judge(text: str) -> PairJudge:
    spec = given_judge(text)
    made = open_pair_judge(spec)
    if made is None:
        raise UserError(f"--judge {text}: pairs are judged by a pair_judge, e.g. '{{type: pair_judge, model: NAME}}'")
    return made


def _given_pairs(path: str, limit: int | None) -> tuple[list[Pair], bool]:
    """(prompt, first, second) of each pair, and whether somebody already chose the first."""
    first = next(iter(open_rows(path)), None)
    if first is None or not isinstance(first.value, Mapping) or "completion" not in first.value:
        records: Sequence[Preference] = read(path, "preferences", limit=limit).records
        return [(r.prompt, r.chosen, r.rejected) for r in records], True
    rows = read(path, "prompts").records
    found: list[Pair] = []
    for _, group in groupby(rows, key=lambda p: (p.metadata.get("id"), p.messages, p.text)):
        answers = list(group)
        for a, b in zip(answers[::2], answers[1::2], strict=False):
            found.append((a, str(a.metadata["completion"]), str(b.metadata["completion"])))
    if not found:
        raise DataError(f"{path}: no prompt has two completions; draw them with tether sample -n 2")
    return found[:limit], False


def _as_chat(prompt: Prompt) -> Prompt:
    """A plain text as a user's turn: instruction-tuned models answer those."""
    return prompt if prompt.text is None else replace(prompt, text=None, messages=(_user(prompt.text),))


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _with(prompt: Prompt, constraint: str) -> Prompt:
    """The prompt with the constraint at the end of its last turn; an id of its own draws anew."""
    last = prompt.messages[-1]
    turn = replace(last, content=f"{last.content}\n\n{constraint}")
    return replace(prompt, id=f"{prompt.id}+constraint", messages=(*prompt.messages[:-1], turn))


# -- out ---------------------------------------------------------------------------------------------------------------


def agreement(verdicts: Verdicts) -> str:
    """How often the judge and the file choose the same side: of the pairs that it decided, and with ties as half."""
    outcomes = verdicts.outcomes[~verdicts.outcomes.isnan()]
    decided = outcomes[outcomes != 0.5]
    if not len(outcomes):
        return "agreement with the file's choices: none can be given, there is no verdict"
    whole = wilson(float(outcomes.sum()), len(outcomes))
    said = f"agreement with the file's choices: {_percent(whole)} with ties as half"
    if len(decided):
        said += f"; {_percent(wilson(float(decided.sum()), len(decided)))} of the {len(decided)} that were decided"
    return said


def _percent(interval: Any) -> str:
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _report(found: Sequence[Pair], verdicts: Verdicts, judge: PairJudge) -> None:
    outcomes = verdicts.outcomes
    decided, ties = int(((outcomes == 0) | (outcomes == 1)).sum()), int((outcomes == 0.5).sum())
    print(
        f"{len(found)} pairs by {judge.name}: {decided} decided, {ties} ties, {verdicts.unscored} without a verdict\n"
        f"  {position_sentence(verdicts.first_share, verdicts.disagreement)}\n  {judge.tally.sentence()}"
    )
    for (prompt, first, second), outcome in list(zip(found, outcomes.tolist(), strict=True))[:3]:
        mark = {1.0: ">", 0.0: "<", 0.5: "="}.get(outcome, "?")
        said = f"{_short(prompt.question)}: {_short(first)} {mark} {_short(second)}"
        print(parts.printable(f"  {said}"))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _sampled(path: str, model: str, settings: SamplingSettings, seed: int) -> dict[str, Any]:
    return {"file": path, "model": model, "seed": seed, "temperature": settings.temperature}


def _write(file: Path, found: Sequence[Pair], verdicts: Verdicts, judge: PairJudge, source: Mapping[str, Any]) -> None:
    """The decided pairs; a tie or a missing verdict chooses nothing and is left out."""
    by = {"judge": judge.name, "verdict": judge.verdict, "orders": judge.orders, "criterion": judge.criterion}
    rows = []
    for (prompt, first, second), outcome in zip(found, verdicts.outcomes.tolist(), strict=True):
        if outcome in (0.0, 1.0):
            chosen, rejected = (first, second) if outcome == 1.0 else (second, first)
            rows.append(_row(prompt, chosen, rejected, judge.name, {**source, **by}))
    _write_rows(file, rows)
    print(f"{len(rows)} preferences: {file}")


def _row(prompt: Prompt, chosen: str, rejected: str, annotator: str, source: Mapping[str, Any]) -> dict[str, Any]:
    asked = (
        prompt.text if prompt.text is not None else [{"role": m.role, "content": m.content} for m in prompt.messages]
    )
    return {
        "prompt": asked,
        "chosen": chosen,
        "rejected": rejected,
        "annotator": annotator,
        "source": {"prompt_id": prompt.id.removesuffix("+constraint"), **source},
    }


def _write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
