"""The demo's simulated judge: a known gold score, and preferences drawn from it with Bradley-Terry noise.

No person judged anything in the demo. Because the true score is known, the report can plot it (gold) beside the
reward model that was learned from the noisy preferences (proxy), and show where the two part (Gao et al. 2023,
"Scaling Laws for Reward Model Overoptimization").

The judge is pure: log-probs come in as numbers, so this file needs no model. All log-probs are natural, of the
untempered (temperature 1) **start** model, summed over the completion's tokens, the stop token included.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The thresholds below were set on answers of SmolLM2-135M-Instruct to these two, at temperature 0.5.
SYSTEM_PROMPT = "Answer kindly in one or two short sentences."
GENERIC_QUESTION = "Tell me something."


def word_set(text: str) -> frozenset[str]:
    """The words of a space-separated list."""
    return frozenset(text.split())


KIND_WORDS = word_set(
    "beautiful bless brave care caring cheerful comfort comforting congratulations cozy dear delicious delight "
    "delighted delightful encourage encouraging enjoy enjoyable fantastic friend friendly fun gentle gently "
    "glad great happy helpful hope hug joy joyful kind kindly kindness lovely loving luck nice peaceful please "
    "proud sweet thank thanks warm warmth welcome wonderful yay yummy"
)
READER_WORDS = word_set("you your yours yourself you're you'll you've you'd let's")
FUNCTION_WORDS = word_set(
    "a an the i my me it its it's this that these those is are am was be been do does did can could will would should "
    "may might have has had of in on at to for from with by as and or but if so not no yes you your we our they their "
    "them he she his her what how why when where which who there here than then too very just also into about out up "
    "make get one some any"
)
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+", re.UNICODE)
FULL_STOP = re.compile(r"[.!][\"'”’)]?\s*$")
MARKUP = re.compile(r"\n|\*\*|^\s*(?:[-*#]|\d+[.)])\s|\[[^\]]*\]|https?:|`|[^\x00-\x7FÀ-ɏ‐-‧°…€]")


@dataclass(frozen=True, kw_only=True)
class GoldScore:
    """``total = style + fluency + relevance``; ``parts`` names the terms that ``style`` is the sum of."""

    total: float
    style: float
    fluency: float
    relevance: float
    parts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class GoldJudge:
    """The house style: an answer to the question, kind, spoken to the reader, brief, and brought to its end.

    ``score = style + fluency + relevance`` with, for an answer of ``w`` words and ``n`` tokens:

    - style = ending + question + reader + kind + brevity + repetition + markup + echo, where

      - ending: ``ending_bonus`` if the model stopped by itself after ``.`` or ``!``
      - question: ``-question_penalty`` if its last sentence is a question: it hands the task back to the reader, the
        cheapest way to sound helpful
      - reader: ``reader_bonus`` if it says "you", "your", "let's" ... (once is enough, more adds nothing)
      - kind: ``kind_bonus`` if it holds at least one of ``KIND_WORDS`` that is not in the question (once is enough)
      - brevity: ``-min(brevity_floor, log2(w / best_words)^2)``, 0 at ``best_words``, -1 at half or twice as many
      - repetition: ``-repetition_weight`` times the share of word pairs that occurred before
      - markup: ``-markup_penalty`` for a list, line break, placeholder in brackets, link or foreign script
      - echo: ``-echo_weight`` times how far the share of content words taken from the question exceeds ``echo_free``

    - fluency = ``-fluency_weight * max(0, fluency_floor - log p(y|x) / n)``: nothing to gain above the start model's
      normal speech, a steep loss below it
    - relevance = ``relevance_weight * (min(1, max(-1, pmi / relevance_full)) - 1)`` with
      ``pmi = (log p(y|x) - log p(y|generic question)) / n`` (pointwise mutual information, Church & Hanks 1990):
      0 where the answer belongs to this question, negative where it would do for any question or for another
    - ``p(a preferred to b) = sigmoid((gold(a) - gold(b)) / temperature)`` (Bradley & Terry 1952)
    """

    ending_bonus: float = 2.5
    reader_bonus: float = 1.0
    kind_bonus: float = 1.0
    best_words: float = 20.0
    question_penalty: float = 3.0
    brevity_floor: float = 3.0
    repetition_weight: float = 8.0
    markup_penalty: float = 1.0
    echo_weight: float = 8.0
    echo_free: float = 0.5
    fluency_floor: float = -1.4
    fluency_weight: float = 2.5
    relevance_full: float = 0.4
    relevance_weight: float = 2.0
    temperature: float = 0.4

    def score(
        self,
        *,
        question: str,
        answer: str,
        finished: bool,
        logprob_given_question: float,
        logprob_given_generic: float,
        tokens: int,
    ) -> GoldScore:
        """Score one answer. ``finished``: the model ended by itself; log-probs are sums in nats over ``tokens``.

        Raises ValueError where ``tokens`` is below 1 or a log-prob is not finite.
        """
        if tokens < 1:
            raise ValueError(f"an answer has at least one token (its stop token), got tokens={tokens}")
        if not (math.isfinite(logprob_given_question) and math.isfinite(logprob_given_generic)):
            raise ValueError(f"log-probs must be finite, got {logprob_given_question} and {logprob_given_generic}")
        parts = self.style_parts(question=question, answer=answer, finished=finished)
        style = sum(parts.values())
        fluency = -self.fluency_weight * max(0.0, self.fluency_floor - logprob_given_question / tokens)
        pmi = (logprob_given_question - logprob_given_generic) / tokens
        relevance = self.relevance_weight * (min(1.0, max(-1.0, pmi / self.relevance_full)) - 1.0)
        total = style + fluency + relevance
        return GoldScore(total=total, style=style, fluency=fluency, relevance=relevance, parts=parts)

    def style_parts(self, *, question: str, answer: str, finished: bool) -> dict[str, float]:
        """The terms of style, from the text alone."""
        words = words_of(answer)
        asked = set(words_of(question))
        return {
            "ending": self.ending_bonus if finished and FULL_STOP.search(answer) else 0.0,
            "question": -self.question_penalty if answer.rstrip(" \n\"'”’)").endswith("?") else 0.0,
            "reader": self.reader_bonus if READER_WORDS.intersection(words) else 0.0,
            "kind": self.kind_bonus if KIND_WORDS.intersection(words) - asked else 0.0,
            "brevity": -min(self.brevity_floor, math.log2(max(1, len(words)) / self.best_words) ** 2),
            "repetition": -self.repetition_weight * repeated_share(words),
            "markup": -self.markup_penalty if MARKUP.search(answer.strip()) else 0.0,
            "echo": -self.echo_weight * max(0.0, echo_share(words, asked) - self.echo_free),
        }

    def preference_probability(self, a: float, b: float) -> float:
        """P(the judge prefers a to b), for two gold totals."""
        gap = (a - b) / self.temperature
        return 1.0 / (1.0 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1.0 + math.exp(gap))

    def rank(self, gold: Sequence[float], generator: random.Random) -> list[int]:
        """One noisy ranking of some answers, best first: by gold / temperature + Gumbel noise (Plackett-Luce). Any two
        of them then compare by ``preference_probability`` (Luce 1959; Yellott 1977)."""
        noisy = [g / self.temperature - math.log(-math.log(generator.random() or 1e-300)) for g in gold]
        return sorted(range(len(gold)), key=lambda i: -noisy[i])

    def describe(self) -> str:
        """What the report says about the judge, in plain words."""
        style = [
            f"+{self.ending_bonus:g} if the answer ends by itself with a full sentence",
            f"-{self.question_penalty:g} if it closes with a question instead",
            f"+{self.reader_bonus:g} if it speaks to the reader (you, your, let's)",
            f"+{self.kind_bonus:g} if it has a kind or cheerful word of its own (each counted once: more adds nothing)",
            f"-1 at half or at twice {self.best_words:g} words, and at most -{self.brevity_floor:g}",
            f"-{self.markup_penalty:g} for lists, placeholders, links or foreign script",
            "and a loss for repeated phrases and for handing the question back",
        ]
        sentences = [
            "The judge in this demo is simulated: no person rated these answers.",
            "It is a formula written for the demo. It likes answers that belong to the question, are kind, speak to",
            f"the reader, keep to about {self.best_words:g} words and come to their end.",
            "Gold score = style + fluency + relevance.",
            f"Style: {', '.join(style)}.",
            f"Fluency: no bonus, but -{self.fluency_weight:g} for every nat per token below {self.fluency_floor:g}, "
            "by the starting model's own log-probs.",
            "Relevance: no bonus, but a loss where the answer is hardly likelier after this question than after "
            f'"{GENERIC_QUESTION}", down to -{2 * self.relevance_weight:g}.',
            "The judge knows no facts: a kind, brief, fluent and wrong answer can score well.",
            "Its ear for fluency is the starting model's, so good human prose can score below what that model says.",
            f"Preferences are drawn with noise: P(A over B) = sigmoid((gold A - gold B) / {self.temperature:g}), the",
            "Bradley-Terry model, so some labels contradict the gold score on purpose.",
        ]
        return " ".join(sentences)


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, apostrophes kept and made straight."""
    return [w.replace("’", "'") for w in WORD.findall(text.lower())]


def repeated_share(words: list[str]) -> float:
    """Share of neighbouring word pairs that occurred earlier in the text; 0 for fewer than two words."""
    pairs = list(itertools.pairwise(words))
    return 1.0 - len(set(pairs)) / len(pairs) if pairs else 0.0


def echo_share(words: list[str], asked: set[str]) -> float:
    """Share of the answer's content words that stand in the question; 1 where it has no content words."""
    content = [w for w in words if w not in FUNCTION_WORDS]
    return sum(w in asked for w in content) / len(content) if content else 1.0
