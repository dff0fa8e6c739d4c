"""Mode collapse made visible: how different a model's completions are from one another."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

# What counts as a word: letters and digits together, or one other mark.
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams / all n-grams over all texts (Li 2016). Falls as texts grow: compare at like sizes only.

    NaN where no text has n words.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(ngrams(words(text), n))
    return len(counts) / counts.total() if counts else math.nan


def unique_share(texts: Sequence[str]) -> float:
    """Share of texts that are different from all others up to case and space: different texts / texts."""
    return len({" ".join(text.lower().split()) for text in texts}) / len(texts) if texts else math.nan


def self_bleu(texts: Sequence[str], n: int = 4, limit: int = 100) -> float:
    """Mean BLEU-n of each text against all others (Zhu 2018): 1 is one text over and over, near 0 is variety.

    The first ``limit`` texts only: the cost grows with their square. NaN for fewer than two.
    """
    tokens = [words(text) for text in texts[:limit]]
    if len(tokens) < 2:
        return math.nan
    return sum(bleu(t, tokens[:i] + tokens[i + 1 :], n) for i, t in enumerate(tokens)) / len(tokens)


def bleu(candidate: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> float:
    """Sentence BLEU (Papineni 2002): brevity penalty × geometric mean of clipped n-gram precisions.

    Orders longer than the candidate are left out; an order without a match counts 0.1 matches (Chen 2014, method 1).
    """
    logs = []
    for order in range(1, min(n, len(candidate)) + 1):
        mine = ngrams(candidate, order)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= ngrams(reference, order)
        matched = (mine & most).total()
        logs.append(math.log((matched or 0.1) / mine.total()))
    if not logs:
        return float(any(not r for r in references))
    size = len(candidate)
    closest = min((abs(len(r) - size), len(r)) for r in references)[1]
    return min(1.0, math.exp(1 - closest / size)) * math.exp(sum(logs) / len(logs))
