"""Candidates: drawn from a model and scored, or read from a file; and as rows that say where they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO

import torch

from tether.backends.local.sampler import LocalSampler
from tether.config.schema import GivenConfig
from tether.config.sections import ModelConfig
from tether.core.errors import DataError, RewardFailure
from tether.core.protocols import Reward, SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.evals.winrate import both_orders
from tether.methods import parts
from tether.methods.choose_select import Candidate, Pool, rank
from tether.methods.judge_checks import ENDING, named
from tether.methods.judge_models import PairJudge
from tether.methods.judges import open_pair_judge, open_reward
from tether.models.load import fingerprint
from tether.models.roles import Policy
from tether.rewards.beside import sample_beside
from tether.rewards.meter import counted
from tether.runs.log import plain, read_lines
from tether.runs.storage import write_text

TOKENS_PER_MICRO_BATCH = 8192
# Completions that are drawn and scored before they are written: what a killed run may lose.
AT_ONCE = 256

RELATIVE = (
    "no reward curve or mean: a pair_judge's score is the share of the other answers to the prompt that an answer "
    "beats, so its mean is near one half whatever the answers are worth"
)


@dataclass(frozen=True, kw_only=True)
class WinShare:
    """A judge of two answers as a score of each: the share of the other answers to its prompt that it beats, a tie half
    (Borda's count). NaN where the judge gave no verdict on any of its pairs."""

    judge: PairJudge

    def counts(self) -> dict[str, float]:
        return self.judge.counts()

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        of: dict[int, list[int]] = {}
        for place, rollout in enumerate(rollouts):
            of.setdefault(rollout.group, []).append(place)
        games = [game for places in of.values() for game in combinations(places, 2)]
        asked = [(rollouts[a].prompt, rollouts[a].text, rollouts[b].text) for a, b in games]
        won: list[list[float]] = [[] for _ in rollouts]
        outcomes = both_orders(asked, self.judge.pairwise).outcomes.tolist() if asked else []
        for (a, b), outcome in zip(games, outcomes, strict=True):
            if not math.isnan(outcome):
                won[a].append(outcome)
                won[b].append(1 - outcome)
        return Scores(total=torch.tensor([sum(w) / len(w) if w else math.nan for w in won]))


class TextOnly:
    """Stands in for the tokenizer of completions that are text: a reward model then uses its own."""

    def get_vocab(self) -> dict[str, int]:
        return {}


def open_scorer(
    spec: Mapping[str, Any] | str, tokenizer: Any, model: ModelConfig, say: parts.Say
) -> tuple[Reward, dict[str, Any]]:
    """The reward or the pair judge that ``spec`` names, and what a row says of it."""
    judge = open_pair_judge(spec)
    if judge is not None:
        return WinShare(judge=judge), {"reward": plain(spec)}
    reward, scorer = open_reward(spec, tokenizer, model, TOKENS_PER_MICRO_BATCH, say)
    if scorer is None:
        return reward, {"reward": plain(spec)}
    trunk = Policy(backbone=scorer.backbone, adapter=scorer.adapter)
    return reward, {"reward": plain(spec), "reward_weights": fingerprint(trunk)}


def score(
    reward: Reward, rollouts: Sequence[Rollout], origin: Mapping[str, Any], n: int, number: int = 0
) -> list[Candidate]:
    """Rollouts, ``n`` of a prompt in a row, as candidates of the generator ``number``."""
    scores = reward(rollouts)
    if scores.total.shape != (len(rollouts),):
        raise RewardFailure(f"the reward gave {tuple(scores.total.shape)} scores for {len(rollouts)} completions")
    made = []
    for i, (rollout, total) in enumerate(zip(rollouts, scores.total.tolist(), strict=True)):
        made.append(
            Candidate(
                prompt=rollout.prompt,
                text=rollout.text,
                score=total,
                index=i % n,
                number=number,
                finish_reason=rollout.finish_reason,
                parts={name: float(values[i]) for name, values in scores.parts.items()},
                origin={**origin, "tokens": len(rollout.tokens), "logprob": round(float(rollout.logprobs.sum()), 4)},
            )
        )
    return made


# -- drawn -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model that answers, and what scores its answers. ``origin`` goes into every row; ``number``: which of several
    generators it is."""

    sampler: LocalSampler
    reward: Reward
    origin: Mapping[str, Any]
    number: int = 0

    @classmethod
    def open(
        cls,
        model: ModelConfig,
        sampler: LocalSampler,
        reward: Mapping[str, Any] | str,
        say: parts.Say,
        origin: Mapping[str, Any],
        number: int = 0,
    ) -> Generator:
        made, facts = open_scorer(reward, sampler.policy.backbone.tokenizer, model, say)
        who = {"generator": model.name, "weights": fingerprint(sampler.policy)}
        return cls(sampler=sampler, reward=made, origin={**origin, **who, **facts}, number=number)

    def draw(
        self, prompts: Sequence[Prompt], n: int, settings: SamplingSettings, seed: int
    ) -> tuple[list[Rollout], list[Candidate]]:
        """``n`` completions of each prompt, one prefill a prompt, and what they score."""
        rollouts = sample_beside(self.sampler, self.reward, prompts, n=n, settings=settings, seed=seed)
        return rollouts, score(self.reward, rollouts, self.origin, n, self.number)


def drawn(
    file: Path,
    prompts: Sequence[Prompt],
    n: int,
    settings: SamplingSettings,
    seed: int,
    open_generator: Callable[[], Generator],
    say: parts.Say,
) -> list[list[Candidate]]:
    """The candidates of each prompt. ``file`` grows with them, so that a run that was killed draws only the rest; the
    model is opened where something is left to draw."""
    known = _kept(file)
    for prompt, row in zip(prompts, known, strict=False):
        if row["id"] != prompt.id or row["prompt"] != asked(prompt):
            raise DataError(f"{file}: prompt {row['id']} has changed since this run began; name another folder")
    pools = [_read_pool(prompt, row) for prompt, row in zip(prompts, known, strict=False)]
    left = prompts[len(pools) :]
    if not left:
        return pools
    if pools:
        say(f"  {len(pools)} prompts were answered before; {len(left)} are left")
    generator = open_generator()
    at_once = max(1, AT_ONCE // n)
    with file.open("a", encoding="utf-8") as handle:
        for first in range(0, len(left), at_once):
            _, found = generator.draw(left[first : first + at_once], n, settings, seed)
            for place in range(0, len(found), n):
                pool = found[place : place + n]
                pools.append(pool)
                _write_pool(handle, pool)
            handle.flush()
            say(f"  {len(pools)} of {len(prompts)} prompts answered and scored")
    return pools


def _kept(file: Path) -> list[dict[str, Any]]:
    """The whole rows of a file that may have been torn by a kill; the torn one is cut off."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as handle:
            handle.truncate(whole)
    return list(read_lines(file).rows)


def _write_pool(handle: TextIO, pool: Pool) -> None:
    rows = [{k: v for k, v in vars(c).items() if k != "prompt"} for c in pool]
    row = {"id": pool[0].prompt.id, "prompt": asked(pool[0].prompt), "candidates": plain(rows)}
    handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_pool(prompt: Prompt, row: Mapping[str, Any]) -> list[Candidate]:
    made = []
    for fields in row["candidates"]:
        total = math.nan if fields["score"] is None else fields["score"]
        made.append(Candidate(**{**fields, "prompt": prompt, "score": total}))
    return made


# -- given -------------------------------------------------------------------------------------------------------------


def given(
    prompts: Sequence[Prompt], config: GivenConfig, reward: Mapping[str, Any] | str | None, file: str, say: parts.Say
) -> tuple[list[list[Candidate]], dict[str, float]]:
    """Candidates that stand in the rows, scored by ``reward``, or with the scores that stand beside them; and what a
    judge among the reward was asked."""
    pools = [_given(prompt, config, file, scored=reward is None) for prompt in prompts]
    if reward is None:
        return pools, {}
    if any(name == ENDING for _, name in named(reward)):
        _check_endings(prompts, config)
    made, facts = open_scorer(reward, TextOnly(), ModelConfig(), say)
    none = torch.tensor([], dtype=torch.long)
    rollouts = [
        Rollout(
            prompt=c.prompt, group=group, prompt_tokens=none, tokens=none, sampled=none.bool(), logprobs=none.float(),
            text=c.text, finish_reason=c.finish_reason,
        )
        for group, pool in enumerate(pools)
        for c in pool
    ]  # fmt: skip
    scores = made(rollouts)
    totals = iter(scores.total.tolist())
    scored = [[replace(c, score=next(totals), origin={**c.origin, **facts}) for c in pool] for pool in pools]
    return scored, counted([made])


def _check_endings(prompts: Sequence[Prompt], config: GivenConfig) -> None:
    items = [item for prompt in prompts for item in _column(prompt, config.column)]
    silent = sum(not isinstance(item, Mapping) or "finish_reason" not in item for item in items)
    if silent:
        raise DataError(
            f"{ENDING}: {silent} of {len(items)} given candidates do not say how they ended; give each a finish_reason "
            "(stop or length), or take the penalty out"
        )


def _given(prompt: Prompt, config: GivenConfig, file: str, *, scored: bool) -> list[Candidate]:
    items = _column(prompt, config.column)
    flat = config.score or "scores"
    beside = _column(prompt, flat) if scored and items and isinstance(items[0], str) else None
    if beside is not None and len(beside) != len(items):
        raise DataError(
            f"{prompt.id}: {len(items)} in {config.column!r}, but {len(beside)} in {flat!r}; one score for each"
        )
    made = []
    for index, item in enumerate(items):
        fields = {"text": item} if isinstance(item, str) else item
        key = "text" if isinstance(item, str) else config.text
        if not isinstance(fields, Mapping) or not isinstance(fields.get(key), str):
            raise DataError(
                f"{prompt.id}: item {index} of {config.column!r} must be a text, or hold one under {config.text!r} "
                "(given.text names another key)"
            )
        total = math.nan
        if scored:
            total = _score(prompt, beside[index] if beside is not None else fields.get(config.score or "score"))
        who = {"generator": str(fields[config.generator])} if config.generator in fields else {}
        reason = str(fields.get("finish_reason", "stop"))
        made.append(
            Candidate(
                prompt=prompt,
                text=fields[key],
                score=total,
                index=index,
                finish_reason=reason,
                origin={
                    "prompts": file,
                    **who,
                    **({} if not scored else {"reward": f"column {config.score or 'score'}"}),
                },
            )
        )
    return made


def _column(prompt: Prompt, name: str) -> list[Any]:
    found = prompt.metadata.get(name)
    if not isinstance(found, list):
        raise DataError(
            f"{prompt.id}: the row has no list {name!r}; it has {sorted(prompt.metadata) or 'nothing else'}\n"
            "  given.column and given.score name the columns; give a reward to score the candidates anew"
        )
    return found


def _score(prompt: Prompt, value: Any) -> float:
    """A number or a truth value; null is unscored."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise DataError(f"{prompt.id}: a score must be a number, true, false or null, got {value!r} (given.score)")
    return float(value)


# -- out ---------------------------------------------------------------------------------------------------------------


def asked(prompt: Prompt) -> Any:
    """The prompt as it stands in a file."""
    if prompt.text is not None:
        return prompt.text
    return [{"role": m.role, "content": m.content} for m in prompt.messages]


def facts(candidate: Candidate, pool: Pool) -> dict[str, Any]:
    """Where a candidate comes from and how it stands among those of its prompt: ``n`` scored ones, rank 0 the best."""
    scored = [c for c in pool if math.isfinite(c.score)]
    return {
        **candidate.origin,
        "index": candidate.index,
        "score": candidate.score,
        **({"parts": dict(candidate.parts)} if candidate.parts else {}),
        "rank": rank(candidate, scored),
        "n": len(scored),
        "finish_reason": candidate.finish_reason,
    }


def demonstration(candidate: Candidate, pool: Pool, source: Mapping[str, Any]) -> dict[str, Any]:
    """A row for ``tether sft``."""
    return {
        "prompt": asked(candidate.prompt),
        "completion": candidate.text,
        "source": {**source, "prompt_id": candidate.prompt.id, **facts(candidate, pool)},
    }


def preference(chosen: Candidate, rejected: Candidate, pool: Pool, source: Mapping[str, Any]) -> dict[str, Any]:
    """A row for ``tether dpo`` and ``tether reward``."""
    sides = {"chosen": facts(chosen, pool), "rejected": facts(rejected, pool)}
    return {
        "prompt": asked(chosen.prompt),
        "chosen": chosen.text,
        "rejected": rejected.text,
        "source": {**source, "prompt_id": chosen.prompt.id, **sides},
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))
