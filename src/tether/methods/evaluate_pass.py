"""``tether evaluate --pass-at``: how often a model is right, by a verifier, in one try and in several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.core.errors import UserError
from tether.core.intervals import mean_interval
from tether.core.pass_at import PassAt, pass_at
from tether.core.protocols import Reward, SamplingSettings
from tether.core.text import Prompt, Rollout
from tether.methods import parts
from tether.methods.judge_checks import check_no_memory
from tether.methods.judge_models import Judge
from tether.methods.judges import given_judge, open_rule
from tether.methods.sample import check_system, given_prompts, open_sampler
from tether.runs.log import plain


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One model's answers, several to each prompt, and what the verifier says of each."""

    model: str
    rollouts: Sequence[Rollout]
    scores: Tensor
    passes: Sequence[PassAt]


def run(
    *,
    model: str,
    baseline: str | None,
    prompts: str,
    judge: str,
    n_prompts: int | None,
    samples: int | None,
    ks: Sequence[int],
    settings: SamplingSettings,
    seed: int,
    system: str | None,
    out: str | None,
) -> None:
    """Draw ``samples`` answers to each prompt (by default as many as the largest of ``ks``), verify them, and print
    pass@k for each of ``ks``; with a ``baseline`` the difference to it too. Everything is written to ``out``."""
    path = parts.new_file(out) if out is not None else None
    ks, samples = check_counts(ks, samples, "--pass-at", "--samples")
    spec = given_judge(judge)
    verifier = open_verifier(spec, "judge")
    check_no_memory(spec, "evaluate", "judge")
    asked = given_prompts(prompts, [], n_prompts)
    check_system(system, asked, "--system")
    names = [model] if baseline is None else [model, baseline]
    found = [_answered(name, asked, verifier, samples, ks, settings, seed, system) for name in names]
    print(
        f"{samples} answers to each of {len(asked)} prompts at temperature {settings.temperature:g}, judged by {judge}"
    )
    for one in found:
        print(f"{one.model}: {describe(one.rollouts, one.scores, one.passes)}")
    if len(found) == 2:
        for ours, theirs in zip(found[0].passes, found[1].passes, strict=True):
            print(f"  {difference(ours, theirs)}")
    if path is not None:
        _write(path, found)


def open_verifier(spec: Mapping[str, Any] | str, what: str) -> Reward:
    """The reward that ``spec`` names; what can't say right or wrong is refused before anything is drawn."""
    named = spec.get("type") if isinstance(spec, Mapping) else spec
    if named != "pair_judge":
        rule = open_rule(spec, what)
        if rule is not None and not isinstance(rule, Judge):
            return rule
    raise UserError(
        f"{what}: pass@k counts right and wrong answers, and {named} gives other scores\n"
        "  name a verifier: exact_number, mathematics, multiple_choice, code_tests, ..., or file.py:function"
    )


def check_counts(ks: Sequence[int], samples: int | None, ks_name: str, samples_name: str) -> tuple[list[int], int]:
    """The k in rising order, and how many answers to a prompt there will be."""
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise UserError(f"{ks_name}: numbers of answers from 1, got {ks or 'none'}")
    if samples is not None and samples < ks[-1]:
        raise UserError(
            f"pass@{ks[-1]} needs {ks[-1]} answers to each prompt, and {samples_name} is {samples}; raise it"
        )
    return ks, samples or ks[-1]


def _answered(
    name: str,
    asked: list[Prompt],
    verifier: Reward,
    samples: int,
    ks: Sequence[int],
    settings: SamplingSettings,
    seed: int,
    system: str | None,
) -> Answered:
    sampler = open_sampler(name, system, settings, parts.speaker(False))
    rollouts = sampler.sample(asked, n=samples, settings=settings, seed=seed)
    scores = verifier(rollouts).total
    return Answered(
        model=name, rollouts=rollouts, scores=scores, passes=pass_at(scores, [r.group for r in rollouts], ks)
    )


def describe(rollouts: Sequence[Rollout], scores: Tensor, passes: Sequence[PassAt]) -> str:
    """One model's numbers in a line: the rates with their intervals over prompts, and what they leave open."""
    size = len(rollouts)
    unscored, cut = int((~scores.isfinite()).sum()), sum(r.finish_reason == "length" for r in rollouts)
    tokens = sum(len(r.tokens) for r in rollouts) / size
    return (
        f"{', '.join(map(str, passes))} over {passes[0].interval.n} prompts; {tokens:.1f} tokens, "
        f"{100 * cut / size:.0f} % cut at the length limit, {100 * unscored / size:.0f} % unscored"
    )


def difference(ours: PassAt, theirs: PassAt) -> str:
    """Prompt by prompt, so that what makes a prompt hard or easy cancels; Student's t over prompts."""
    common = [group for group in ours.rates if group in theirs.rates]
    gaps = torch.tensor([ours.rates[g] - theirs.rates[g] for g in common], dtype=torch.float64)
    if not len(gaps):
        return f"pass@{ours.k}: no prompt has {ours.k} scored answers of both"
    if not gaps.any():
        return f"pass@{ours.k}: the same as the baseline's on every one of {len(gaps)} prompts"
    change = mean_interval(gaps)
    clear = change.low > 0 or change.high < 0
    return (
        f"pass@{ours.k} against the baseline {100 * change.estimate:+.1f} points "
        f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}], prompt by prompt over {change.n}"
        + ("" if clear else ": no measurable difference")
    )


def _write(path: Path, found: Sequence[Answered]) -> None:
    """One line an answer, with its score (null: unscored); the summaries last."""
    with path.open("w", encoding="utf-8") as file:
        for one in found:
            for rollout, score in zip(one.rollouts, plain(one.scores.tolist()), strict=True):
                row = {
                    "model": one.model,
                    "id": rollout.prompt.id,
                    "question": rollout.prompt.question,
                    "completion": rollout.text,
                    "score": score,
                    "finish_reason": rollout.finish_reason,
                    "tokens": len(rollout.tokens),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for one in found:
            summary = {
                f"pass@{p.k}": {"estimate": p.interval.estimate, "low": p.interval.low, "high": p.interval.high}
                for p in one.passes
            }
            file.write(json.dumps({"model": one.model, "summary": plain(summary)}) + "\n")
    print(f"written: {path}")
