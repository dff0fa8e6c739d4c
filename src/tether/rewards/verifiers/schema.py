"""JSON schema: whether a completion is JSON of the shape that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Rollout
from tether.rewards.verifiers.base import column, inside, last_block, needs_package, score_each

# Brackets of JSON that no validator gets lost in: where it does, the fault is the schema's.
_SHALLOW = 40


@dataclass(frozen=True, kw_only=True)
class JsonSchema:
    """1 where the completion is JSON that its schema allows (JSON Schema 2020-12, or what ``$schema`` says), else 0.

    The JSON is the last fenced block, or the whole text where there is none. ``schema``: the same for every prompt;
    left out, each prompt carries its own under ``column``, as an object or as text. ``within``: judge only what the
    last tag of this name holds. References to other documents are not fetched. JSON too deep or with numbers too large
    for the validator is 0. Needs ``tether-rlhf[json]``.
    """

    beside: ClassVar[int] = 1
    column: str = "schema"
    schema: Mapping[str, Any] | None = None
    within: str = ""

    def __post_init__(self) -> None:
        needs_package("json_schema", "jsonschema", "json")
        if self.schema is not None:
            if self.column != "schema":
                raise UserError("reward.column would be ignored: reward.schema is the same for every prompt")
            try:
                _validator(self.schema)
            except RewardFailure as error:
                raise UserError(f"reward.schema: {error}") from error

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=score_each("json_schema", rollouts, self._valid))

    def _valid(self, rollout: Rollout) -> float:
        schema = self.schema if self.schema is not None else column(rollout, self.column)
        validator = _validator(json.loads(schema) if isinstance(schema, str) else schema)
        text = inside(rollout.text, self.within)
        block = last_block(text, ("json", "jsonc"))
        try:
            value = json.loads(text if block is None else block, parse_constant=_refuse)
        except (ValueError, RecursionError):  # NaN, Infinity and a thousand brackets are no JSON either
            return 0.0
        try:
            return float(validator.is_valid(value))
        except OverflowError:  # a number beyond a float's, under multipleOf
            return 0.0
        except RecursionError as error:
            if text.count("[") + text.count("{") <= _SHALLOW:
                raise RewardFailure("its schema refers to itself without end") from error
            return 0.0


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _validator(schema: Any) -> Any:
    """A validator that reaches for no other document; RewardFailure where ``schema`` is none."""
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise RewardFailure(f"not a JSON schema: {error.message}") from error
    return kind(schema, registry=Registry())
