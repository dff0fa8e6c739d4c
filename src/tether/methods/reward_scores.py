"""Labelled answers and what reward models score them: what ``tether reward evaluate`` measures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from tether.config.sections import ModelConfig
from tether.core.batches import Group
from tether.core.errors import DataError, UserError
from tether.core.text import Judgement, Preference, Prompt, Ranking
from tether.data.audit import Comparison, detect
from tether.data.audit.comparisons import MOST_PER_PROMPT
from tether.data.audit.summary import prompt_key
from tether.data.chat import ChatTokenizer
from tether.data.files import open_rows
from tether.data.groups import share_prompts, step_group, tokenise
from tether.data.readers import read
from tether.methods import parts
from tether.models.load import load_scorer, resolve
from tether.models.roles import Scorer
from tether.rewards.ensemble import HEAD

# Columns by which accuracy is always shown, where rows have them.
SLICES = ("subset", "source")
GROUPS_AT_A_TIME = 128
UNLIMITED = 2**31


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Rankings (a pair is one of two answers) in the order of the files; ``tags[i]``: columns of the row, by name.

    ``counts``: rows left out, by cause.
    """

    rankings: tuple[Ranking, ...]
    tags: tuple[Mapping[str, str], ...]
    counts: Mapping[str, int]

    def of(self, rows: Sequence[int]) -> Labelled:
        return Labelled(
            rankings=tuple(self.rankings[i] for i in rows), tags=tuple(self.tags[i] for i in rows), counts=self.counts
        )


@dataclass(frozen=True, kw_only=True)
class Scored:
    """``scores[k][i]`` [K_i]: of ``labelled.rankings[i]`` by model k; ``lengths[i]`` [K_i]: in tokens of model 0."""

    labelled: Labelled
    names: tuple[str, ...]
    scores: tuple[tuple[Tensor, ...], ...]
    lengths: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Every two answers of different rank. ``ranking_of`` [N]: where each came from; ``margins[k]`` [N]: score of the
    better − of the worse by model k; ``length_gap`` [N] tokens likewise."""

    comparisons: tuple[Comparison, ...]
    ranking_of: tuple[int, ...]
    margins: tuple[Tensor, ...]
    length_gap: Tensor
    ties: int

    @property
    def clusters(self) -> list[Any]:
        return [c.cluster for c in self.comparisons]


def read_labelled(paths: Sequence[str], columns: Sequence[str], limit: int | None, max_bad_rows: float) -> Labelled:
    """Pairs, rankings and judged answers as rankings, with the ``columns`` of their rows as tags."""
    rankings: list[Ranking] = []
    tags: list[Mapping[str, str]] = []
    counts: Counter[str] = Counter()
    wanted = list(dict.fromkeys([*SLICES, *columns]))
    seen: set[str] = set()
    for path in paths:
        kind = detect(path).kind
        if kind not in ("preferences", "rankings", "judgements"):
            raise UserError(f"{path} holds {kind}: a reward model is judged on preferences, rankings or judged answers")
        rows = read(path, kind, limit=limit, max_bad_rows=max_bad_rows)
        counts.update(rows.counts)
        found, left_out = _as_rankings(rows.records)
        counts.update(left_out)
        columns_of = {f"{path}:{r.number}": r.value for r in open_rows(path) if isinstance(r.value, dict)}
        for ranking in found:
            row = columns_of.get(ranking.source, {})
            mine = {c: str(row[c]) for c in wanted if isinstance(row.get(c), str | int | bool)}
            seen.update(mine)
            tags.append(mine | ({"file": path} if len(paths) > 1 else {}))
        rankings += found
    missing = [c for c in columns if c not in seen]
    if missing:
        raise UserError(
            f"no row has a text or whole number in column {missing[0]!r}; --slice names a column of the data"
        )
    if not rankings:
        raise DataError(f"{', '.join(paths)}: no two answers of different rank to compare ({dict(counts)})")
    return Labelled(rankings=tuple(rankings), tags=tuple(tags), counts=dict(counts))


def _as_rankings(records: Sequence[Any]) -> tuple[list[Ranking], dict[str, int]]:
    made: list[Ranking] = []
    judged: dict[Any, list[Judgement]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for r in records:
        if isinstance(r, Preference):
            made.append(Ranking(prompt=r.prompt, completions=(r.chosen, r.rejected), ranks=(0, 1), source=r.source))
        elif isinstance(r, Judgement):
            judged[prompt_key(r)].append(r)
        elif len(set(r.ranks)) > 1:
            made.append(r)
        else:
            left_out["all answers tied"] += 1
    for many in judged.values():
        verdicts = {j.completion: j.desirable for j in many}
        if len(set(verdicts.values())) < 2:
            left_out["prompt without answers of both verdicts"] += 1
            continue
        ranks = tuple(int(not good) for good in verdicts.values())
        made.append(Ranking(prompt=many[0].prompt, completions=tuple(verdicts), ranks=ranks, source=many[0].source))
    return made, left_out


def score(labelled: Labelled, models: Sequence[str], config: ModelConfig, tokens: int, say: parts.Say) -> Scored:
    """Every answer by every model, and by every head of one that has several. A ranking that one model can't read (too
    long) is left out for all, and counted."""
    fits = set(range(len(labelled.rankings)))
    counts = Counter(labelled.counts)
    names: list[str] = []
    scores: list[dict[int, Tensor]] = []
    lengths: dict[int, Tensor] = {}
    for name in models:
        folder = resolve(name, say=say)
        scorer = load_scorer(folder, dtype=config.dtype, device=config.device, say=say)
        groups, causes = _groups(labelled.rankings, fits, scorer)  # each row left out is counted once
        counts.update(causes)
        fits = set(groups)
        say(f"{name}: {sum(len(g.completions) for g in groups.values())} answers")
        found = _score(scorer, labelled.rankings, {i: g for i, g in groups.items() if i in fits}, tokens)
        for head in range(scorer.heads):
            names.append(name if scorer.heads == 1 else f"{name} {HEAD}{head}")
            scores.append({i: s[:, head] for i, s in found.items()})
        lengths = lengths or {i: torch.tensor([float(len(c)) for c in g.completions]) for i, g in groups.items()}
    kept = sorted(fits)
    if not kept:
        raise DataError(f"no row is left to score: {dict(counts)}")
    counted = Labelled(rankings=labelled.rankings, tags=labelled.tags, counts=dict(counts))
    return Scored(
        labelled=counted.of(kept),
        names=tuple(names),
        scores=tuple(tuple(by[i] for i in kept) for by in scores),
        lengths=tuple(lengths[i] for i in kept),
    )


def _groups(
    rankings: Sequence[Ranking], rows: Collection[int], scorer: Scorer
) -> tuple[dict[int, Group], Counter[str]]:
    """Row -> tokens, of ``rows`` within the context of the model; the rest by cause."""
    chat = ChatTokenizer(scorer.backbone.tokenizer)
    asked = [rankings[i] for i in sorted(rows)]
    found = tokenise(asked, chat, max_prompt_tokens=UNLIMITED, max_completion_tokens=UNLIMITED)
    causes = Counter(found.counts)
    place = {id(r): i for i, r in enumerate(rankings)}
    context = getattr(scorer.backbone.config, "max_position_embeddings", None) or UNLIMITED
    groups: dict[int, Group] = {}
    for record, group in zip(found.records, found.groups, strict=True):
        if len(group.prompt) + max(len(c) for c in group.completions) > context:
            causes[f"over the {context} tokens of a model"] += 1
        else:
            groups[place[id(record)]] = group
    return groups, causes


def _score(scorer: Scorer, rankings: Sequence[Ranking], groups: Mapping[int, Group], tokens: int) -> dict[int, Tensor]:
    """Row -> [K_i, heads]."""
    measure = parts.head_scores_of(scorer, tokens) if scorer.heads > 1 else parts.scores_of(scorer, tokens)
    order = sorted(groups, key=lambda i: groups[i].token_count)
    made: dict[int, Tensor] = {}
    for start in range(0, len(order), GROUPS_AT_A_TIME):
        rows = order[start : start + GROUPS_AT_A_TIME]
        batch = share_prompts([g for i in rows for g in _read_as(scorer, rankings[i], groups[i])])
        sizes = [len(groups[i].completions) for i in rows]
        scores = measure(batch).to("cpu", torch.float64).reshape(batch.size, scorer.heads)
        made |= dict(zip(rows, scores.split(sizes), strict=True))
    bad = next((i for i, s in made.items() if not bool(s.isfinite().all())), None)
    if bad is not None:
        raise UserError(
            f"{rankings[bad].source}: the model's score is {made[bad].tolist()}; it can't be judged by such"
        )
    return made


def _read_as(scorer: Scorer, ranking: Ranking, group: Group) -> list[Group]:
    """A process reward model reads answers step by step."""
    separator = scorer.reading.separator
    if separator is None:
        return [group]
    chat = ChatTokenizer(scorer.backbone.tokenizer)
    return [step_group(chat, ranking.prompt, text, separator) for text in ranking.completions]


def pairs_of(scored: Scored) -> Pairs:
    """Every two answers of different rank, the better one first."""
    made: list[Comparison] = []
    of: list[int] = []
    picks: list[tuple[int, int, int]] = []
    ties = 0
    for i, ranking in enumerate(scored.labelled.rankings):
        every = list(combinations(sorted(range(len(ranking.ranks)), key=lambda k: ranking.ranks[k]), 2))
        unequal = [(a, b) for a, b in every if ranking.ranks[a] != ranking.ranks[b]]
        ties += len(every) - len(unequal)
        for a, b in unequal[:MOST_PER_PROMPT]:
            picks.append((i, a, b))
            of.append(i)
            made.append(_comparison(ranking.prompt, ranking.completions[a], ranking.completions[b]))

    def gaps(values: Sequence[Tensor]) -> Tensor:
        return torch.tensor([float(values[i][a] - values[i][b]) for i, a, b in picks], dtype=torch.float64)

    return Pairs(
        comparisons=tuple(made),
        ranking_of=tuple(of),
        margins=tuple(gaps(s) for s in scored.scores),
        length_gap=gaps(scored.lengths),
        ties=ties,
    )


def _comparison(prompt: Prompt, better: str, worse: str) -> Comparison:
    key = (prompt.text, prompt.messages)
    return Comparison(question=prompt.question, better=better, worse=worse, cluster=key)
