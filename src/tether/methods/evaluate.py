"""``tether evaluate``: a model's answers judged, against a baseline's where one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from tether.config.sections import ModelConfig
from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Reward, SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.evals.diversity import distinct_n, unique_share
from tether.evals.statistics import mean_interval
from tether.evals.winrate import WinRate, compare, position_sentence
from tether.methods import parts
from tether.methods.choose_candidates import TextOnly
from tether.methods.judge_checks import check_no_memory
from tether.methods.judge_models import PairJudge
from tether.methods.judges import given_judge, open_pair_judge, open_reward, open_rule
from tether.methods.sample import check_system, given_prompts, open_sampler
from tether.rewards.judges.ask import sentence
from tether.rewards.meter import counted
from tether.runs.log import plain

TOKENS_PER_MICRO_BATCH = 8192


def run(
    *,
    model: str,
    baseline: str | None,
    prompts: str,
    judge: str,
    n_prompts: int | None,
    settings: SamplingSettings,
    seed: int,
    system: str | None,
    out: str | None,
) -> None:
    """Sample one answer per prompt from each side, judge them, print the result; write everything to ``out``.

    A reward model or a rule scores one answer at a time, so there is no order to favour; its ties count half.
    """
    path = parts.new_file(out) if out is not None else None
    say = parts.speaker(False)
    spec = given_judge(judge)
    pair_judge = open_pair_judge(spec)
    if pair_judge is not None:
        if baseline is None:
            raise UserError("a pair_judge compares two answers: give --baseline MODEL, or use type: judge for scores")
        asked = given_prompts(prompts, [], n_prompts)
        check_system(system, asked, "--system")
        sides = [_answers(name, asked, settings, seed, system, say)[0] for name in (model, baseline)]
        return _compared(model, baseline, sides, pair_judge, seed, path)
    open_rule(spec, "judge")
    check_no_memory(spec, "evaluate", "judge")
    asked = given_prompts(prompts, [], n_prompts)
    check_system(system, asked, "--system")
    ours, tokenizer = _answers(model, asked, settings, seed, system, say)
    theirs, other = ([], tokenizer) if baseline is None else _answers(baseline, asked, settings, seed, system, say)
    # Tokens of two vocabularies can't be scored by one reward model: it then reads both sides as text.
    reads: Any = tokenizer if tokenizer.get_vocab() == other.get_vocab() else TextOnly()
    reward, _ = open_reward(spec, reads, ModelConfig(name=model), TOKENS_PER_MICRO_BATCH, say)
    scores = reward(ours).total
    texts = [r.text for r in ours]
    scored = scores[scores.isfinite()]
    if not len(scored):
        raise RewardFailure(f"the judge {judge} scored none of the {len(ours)} answers")
    mean = mean_interval(scored)
    unscored = f" ({len(ours) - len(scored)} left unscored)" if len(scored) < len(ours) else ""
    print(
        f"{model}: mean score {mean.estimate:.3f} [{mean.low:.3f}, {mean.high:.3f}] by {judge}, "
        f"over {len(scored)} prompts{unscored}; "
        f"{sum(len(r.tokens) for r in ours) / len(ours):.1f} tokens, "
        f"{100 * sum(r.finish_reason == 'length' for r in ours) / len(ours):.0f} % cut, "
        f"distinct-2 {distinct_n(texts):.2f}, unique {100 * unique_share(texts):.0f} %"
    )
    their_scores = torch.tensor([])
    result: WinRate | None = None
    if baseline is not None:
        their_scores = reward(theirs).total
        result = compare(ours, theirs, _known([*ours, *theirs], torch.cat([scores, their_scores])), seed=seed)
        _print_rate(model, baseline, result)
    if counts := counted([reward]):
        print(f"  judge: {sentence(counts)}")
    if path is not None:
        _write(path, ours, scores, theirs, their_scores, result)


def _print_rate(model: str, baseline: str, result: WinRate) -> None:
    print(f"{model} against {baseline}: {result.sentence()}")
    c = result.length_controlled
    print(
        f"  at equal length {100 * c.estimate:.1f} % [{100 * c.low:.1f}, {100 * c.high:.1f}]; mean tokens "
        f"{result.our_length:.1f} against {result.baseline_length:.1f}"
    )


def _compared(
    model: str, baseline: str, sides: list[list[Rollout]], judge: PairJudge, seed: int, path: Path | None
) -> None:
    """Both sides' answers before a judge who sees two at a time, in both orders."""
    ours, theirs = sides
    result = compare(ours, theirs, judge.pairwise, seed=seed)
    _print_rate(model, baseline, result)
    assert result.first_share is not None and result.disagreement is not None
    print(
        f"  judge {judge.name}: {position_sentence(result.first_share, result.disagreement)}, {result.unscored} pairs "
        f"without a verdict; {judge.tally.sentence()}"
    )
    if path is None:
        return
    with path.open("w", encoding="utf-8") as file:
        for a, b, outcome in zip(ours, theirs, plain(result.outcomes), strict=True):
            row = {"id": a.prompt.id, "question": a.prompt.question, "ours": a.text, "baseline": b.text}
            file.write(json.dumps({**row, "outcome": outcome}, ensure_ascii=False) + "\n")
        _write_summary(file, result)
    print(f"written: {path}")


def _answers(
    name: str,
    asked: list[Prompt],
    settings: SamplingSettings,
    seed: int,
    system: str | None,
    say: parts.Say,
) -> tuple[list[Rollout], Any]:
    """One answer to each prompt, and the tokenizer of the model that gave them."""
    sampler = open_sampler(name, system, settings, say)
    return sampler.sample(asked, n=1, settings=settings, seed=seed), sampler.policy.backbone.tokenizer


def _known(answers: list[Rollout], scores: Tensor) -> Reward:
    """The reward that gives these rollouts the scores that they have: who is asked once is counted once."""
    score_of = dict(zip(map(id, answers), scores.tolist(), strict=True))
    return lambda rollouts: Scores(total=torch.tensor([score_of[id(r)] for r in rollouts]))


def _write(
    path: Path, ours: list[Rollout], scores: Tensor, theirs: list[Rollout], other_scores: Tensor, result: WinRate | None
) -> None:
    """One line per prompt, both answers and their scores (null: unscored); the summary last."""
    our_scores = plain(scores.tolist())
    their_scores = plain(other_scores.tolist())
    with path.open("w", encoding="utf-8") as file:
        for i, rollout in enumerate(ours):
            row = {
                "id": rollout.prompt.id,
                "question": rollout.prompt.question,
                "ours": rollout.text,
                "our_score": our_scores[i],
            }
            if theirs:
                row |= {"baseline": theirs[i].text, "baseline_score": their_scores[i]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if result is not None:
            _write_summary(file, result)
    print(f"written: {path}")


def _write_summary(file: TextIO, result: WinRate) -> None:
    rate = result.rate
    summary = {"win_rate": rate.estimate, "low": rate.low, "high": rate.high, "n": rate.n}
    file.write(json.dumps({"summary": summary}) + "\n")
