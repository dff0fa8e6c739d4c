"""Judges as config rows: ``judge`` scores one answer and is a reward, ``pair_judge`` compares two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tether.config.build import build
from tether.config.sections import ModelConfig
from tether.core.errors import UserError
from tether.core.protocols import SamplingSettings, Scores
from tether.core.text import Prompt, Rollout
from tether.evals.winrate import PairwiseJudge
from tether.methods.judge_local import LocalSource
from tether.models.embedded import EMBEDDED, cache_folder
from tether.rewards.judges.ask import Asker, Tally
from tether.rewards.judges.cache import AnswerCache
from tether.rewards.judges.endpoint import Endpoint, EndpointSource
from tether.rewards.judges.questions import HIGHEST, LOWEST, Question, how_good, how_good_by, which_is_better
from tether.rewards.judges.verdicts import read_score, read_scores, read_verdict

MAX_NEW_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """Who is asked, at temperature 0: ``model`` on this machine, or an ``endpoint`` {url, model, api_key_env, ...}.

    ``verdict`` "text": the reply is written and read, strictly; "logprob" (local only): the log-probs of the possible
    replies are compared, which is exact, cheap, and needs no model that can follow a format. ``criterion``: a sentence
    that says what makes an answer good. ``cache``: file in which texts are kept; empty: one for all judges.
    """

    model: str | None = None
    endpoint: Mapping[str, Any] | None = None
    verdict: Literal["text", "logprob"] = "text"
    criterion: str = ""
    max_new_tokens: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.endpoint is not None:
            raise ValueError("model would be ignored: the endpoint is asked; keep one (endpoint.model names its model)")
        if self.endpoint is not None:
            self._endpoint()
        if self.verdict == "logprob":
            if self.endpoint is not None:
                raise ValueError("verdict=logprob needs a local model; with an endpoint use verdict=text")
            for name in ("max_new_tokens", "cache"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} would be ignored: verdict=logprob writes no text; take it out")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def name(self) -> str:
        return self._endpoint().model if self.endpoint is not None else self.model or next(iter(EMBEDDED))

    def _endpoint(self) -> Endpoint:
        return build({"endpoint": Endpoint}, {"type": "endpoint", **(self.endpoint or {})}, "endpoint")

    @cached_property
    def asker(self) -> Asker:
        """Opened when it is first needed."""
        limit = self.max_new_tokens or MAX_NEW_TOKENS
        cache = AnswerCache(path=Path(self.cache).expanduser() if self.cache else cache_folder() / "answers.sqlite")
        if self.endpoint is None:
            settings = SamplingSettings(temperature=0.0, max_new_tokens=limit)
            return Asker(source=LocalSource.open(ModelConfig(name=self.name), settings), cache=cache, tally=self.tally)
        return open_endpoint(self._endpoint(), {"temperature": 0, "max_tokens": limit}, cache, self.tally)

    @cached_property
    def tally(self) -> Tally:
        return Tally()

    def counts(self) -> dict[str, float]:
        """What this judge was asked, as metrics."""
        return self.tally.counts()

    def _read(self, questions: Sequence[Question], read: Callable[[str | None, str], list[float]]) -> Tensor:
        """What ``read`` finds in each reply with its question's code, [N, K] float64; texts without it are counted."""
        replies = self.asker.ask([q.messages for q in questions])
        rows = [read(reply.whole, question.code) for reply, question in zip(replies, questions, strict=True)]
        self.tally.unparsed += sum(
            r.text is not None and math.isnan(row[0]) for r, row in zip(replies, rows, strict=True)
        )
        return torch.tensor(rows, dtype=torch.float64)

    def _choose(self, questions: Sequence[Question], choices: Sequence[str], *, whole: bool) -> Tensor:
        """[N, K] float64 log-probs of the ``choices``; NaN where a question is too long for the model."""
        source = self.asker.source
        assert isinstance(source, LocalSource)
        found = source.choose([q.messages for q in questions], choices, whole=whole)
        self.tally.asked += len(questions)
        self.tally.refused += int(found[:, 0].isnan().sum())
        return found


def open_endpoint(
    endpoint: Endpoint, settings: Mapping[str, Any], cache: AnswerCache | None, tally: Tally | None = None
) -> Asker:
    source = EndpointSource(endpoint=endpoint, settings=settings)
    prices = {"price_in": endpoint.price_in, "price_out": endpoint.price_out}
    return Asker(source=source, cache=cache, tally=tally or Tally(), **prices)


@dataclass(frozen=True, kw_only=True)
class Judge(JudgeModel):
    """A score from 1 to 10 for each answer; NaN where the judge gave no verdict (counted by the run, never a score).

    ``criteria``: a rubric, name -> weight, or name -> {weight, means}. Each is scored and is a part of the reward; the
    total is their weighted mean. With verdict=logprob a score is Σ s·p(s) over s = 1..10 (after Liu 2023, G-Eval).
    """

    criteria: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criteria and self.criterion:
            raise ValueError("criterion would be ignored: the criteria say what is judged; keep one of the two")
        self._weights()

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        if not self.criteria:
            return Scores(total=self._scores(rollouts, self.criterion).float())
        weights = self._weights()
        if self.verdict == "logprob":
            columns = [self._scores(rollouts, f"How good is it in this: {self._says(name)}?") for name in weights]
            table = torch.stack(columns, dim=1)
        else:
            meanings = {name: self._meaning(name) for name in weights}
            questions = [how_good_by(r.prompt, r.text, meanings) for r in rollouts]
            table = self._read(questions, lambda reply, code: read_scores(reply, code, list(weights)))
        share = torch.tensor(list(weights.values()), dtype=torch.float64)
        total = (table @ share) / share.sum()
        parts_ = {name: column.float() for name, column in zip(weights, table.unbind(dim=1), strict=True)}
        return Scores(total=total.float(), parts=parts_)

    def _scores(self, rollouts: Sequence[Rollout], criterion: str) -> Tensor:
        """[N] float64."""
        by_logprob = self.verdict == "logprob"
        questions = [how_good(r.prompt, r.text, criterion, number=by_logprob) for r in rollouts]
        if by_logprob:
            scale = range(LOWEST, HIGHEST + 1)
            found = self._choose(questions, [str(s) for s in scale], whole=True)
            return found.softmax(dim=1) @ torch.tensor(list(scale), dtype=torch.float64)
        return self._read(questions, lambda reply, code: [read_score(reply, code)])[:, 0]

    def _weights(self) -> dict[str, float]:
        made = {}
        for name, said in self.criteria.items():
            options = dict(said) if isinstance(said, Mapping) else {"weight": said}
            weight, means = options.pop("weight", 1.0), options.pop("means", "")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"criteria.{name}: a weight is a number above 0, got {weight!r}")
            if options or not isinstance(means, str):
                raise ValueError(f"criteria.{name} is a weight, or {{weight: 2, means: what it says}}, got {said!r}")
            if not name.replace("_", "").isalnum():
                raise ValueError(f"criteria: a name is one word of letters, digits and _, got {name!r}")
            made[name] = float(weight)
        return made

    def _meaning(self, name: str) -> str:
        said = self.criteria[name]
        return str(said.get("means", "")) if isinstance(said, Mapping) else ""

    def _says(self, name: str) -> str:
        return f"{name} ({means})" if (means := self._meaning(name)) else name


@dataclass(frozen=True, kw_only=True)
class PairJudge(JudgeModel):
    """Which of two answers is better, asked in both orders. ``orders`` "agree": two different verdicts are a tie;
    "average" (logprob only): the mean of P(A) over both orders decides, so that a liking for one place cancels."""

    orders: Literal["agree", "average"] = "agree"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orders == "average" and self.verdict != "logprob":
            raise ValueError("orders=average needs verdict=logprob: written verdicts have no probability to average")

    @property
    def pairwise(self) -> PairwiseJudge:
        return PairwiseJudge(ask=self.ask, orders=self.orders)

    def ask(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[float]:
        """P(the first answer is better) of each (prompt, first, second), asked in this order only; NaN: no verdict."""
        return self.ask_each(pairs, [self.criterion] * len(pairs))

    def ask_each(self, pairs: Sequence[tuple[Prompt, str, str]], criteria: Sequence[str]) -> list[float]:
        """The same, each pair by a criterion of its own."""
        letter = self.verdict == "logprob"
        questions = [which_is_better(*p, c, letter=letter) for p, c in zip(pairs, criteria, strict=True)]
        if letter:
            found = self._choose(questions, ["A", "B"], whole=False).softmax(dim=1)
        else:
            found = self._read(questions, lambda reply, code: [read_verdict(reply, code)])
        return found[:, 0].tolist()


JUDGES = {"judge": Judge, "pair_judge": PairJudge}


def build_pair_judge(spec: Mapping[str, Any], what: str) -> PairJudge:
    """The pair judge that a config names."""
    made = build({"pair_judge": PairJudge}, {"type": "pair_judge", **spec}, what)
    if not isinstance(made, PairJudge):
        raise UserError(f"{what}.type must be pair_judge, got {spec.get('type')}")
    return made
