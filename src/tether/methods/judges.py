"""What judges completions: a reward model, a rule, or the user's own function, named the same way everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tether.config.build import build, find
from tether.config.sections import ModelConfig
from tether.config.yaml import override, show
from tether.config.yaml import read as read_yaml
from tether.core.errors import UserError, nearest
from tether.core.protocols import Reward
from tether.methods import parts
from tether.methods.ensembles import MEMBER, find_members
from tether.methods.judge_models import JUDGES, Judge, PairJudge
from tether.methods.parts import Say
from tether.models.backbone import Backbone
from tether.models.load import load_scorer, resolve
from tether.models.roles import Scorer
from tether.models.shared import load_shared_scorer
from tether.rewards.beside import put_beside
from tether.rewards.compose import Gate, GateOptions, Part, PartOptions, Sum
from tether.rewards.ensemble import Ensemble, EnsembleOptions, Heads
from tether.rewards.function import FunctionOptions, FunctionReward, OwnReward
from tether.rewards.model import FILE, RewardModel, ScoreScale
from tether.rewards.penalties import PENALTIES
from tether.rewards.rules import RULES
from tether.runs import glossary

TABLE = {**RULES, **PENALTIES, "judge": Judge}
SUM, ENSEMBLE = "sum", "ensemble"
# Opens the reward model of a name as an adapter (or network) of a name, scaled or not; None: as the caller wants it.
OpenModel = Callable[[str, str, bool | None], Reward]


def open_reward(
    spec: Mapping[str, Any] | str,
    policy_tokenizer: Any,
    model: ModelConfig,
    tokens_per_micro_batch: int,
    say: Say,
    *,
    shared: Backbone | None = None,
    scaled: bool = False,
    skip: bool = False,
    what: str = "reward",
) -> tuple[Reward, Scorer | None]:
    """The reward that ``spec`` names, and the reward model behind it where it is one: a folder or hub id, a row of
    the rule table with its options, the user's own function or class, or a sum of such. ``shared``: a backbone that a
    reward model trained with LoRA is put on as an adapter, instead of being opened as a network of its own.
    ``scaled``: a reward model's scores in the scale that was saved with it, where there is one. ``skip``: a function's
    failure on one completion leaves that completion unscored, and is said."""
    scorers: list[Scorer] = []

    def open_model(name: str, role: str, own_scale: bool | None) -> Reward:
        folder = resolve(name, say=say)
        if shared is not None:
            scorer = load_shared_scorer(Path(folder), shared, role)
        else:
            scorer = load_scorer(folder, dtype=model.dtype, device=model.device, say=say)
        heads = f", {scorer.heads} heads" if scorer.heads > 1 else ""
        say(f"reward model: {name}{heads}" + (", an adapter of the policy's backbone" if shared else ""))
        wanted = scaled if own_scale is None else own_scale
        scale = ScoreScale.load(Path(folder)) if wanted else None
        if scale is not None:
            measured = f"as measured on {scale.completions} completions"
            score = "score" if not heads else "mean of the heads, or each likewise: score"
            say(f"  reward = ({score} - {scale.mean:.3g}) / {scale.std:.3g}, {measured}")
        elif wanted:
            say(f"  reward = score: no {FILE} in {name}, so kl_in_reward is in its units")
        scorers.append(scorer)
        return model_reward(scorer, policy_tokenizer, tokens_per_micro_batch, scale)

    open_rule(spec, what)  # all that can be wrong without opening a model is said before one is opened
    reward = _open(spec, what, open_model, skip, say)
    assert reward is not None
    return put_beside(reward), scorers[0] if isinstance(spec, str) and scorers else None


def given_judge(text: str) -> Mapping[str, Any] | str:
    """A judge as it is named on the command line: a name, or with options {type: judge, ...}, in place or in a YAML
    file."""
    problems: list[str] = []
    found: Any = text
    if text.startswith("{"):
        made = override(f"judge={text}", problems)
        found = made[1].plain if made else text
    elif text.endswith((".yaml", ".yml")):
        found = read_yaml(Path(text), problems).plain
    if problems:
        raise UserError("\n".join(problems))
    return found


def open_pair_judge(spec: Mapping[str, Any] | str) -> PairJudge | None:
    """The judge of two answers that ``spec`` names; None where it names what scores one."""
    made = {"type": spec} if isinstance(spec, str) else spec
    return build(JUDGES, made, "judge") if made.get("type") == "pair_judge" else None


def open_rule(spec: Mapping[str, Any] | str, what: str = "reward") -> Reward | None:
    """The reward that ``spec`` names, where no model is behind it, else None. Opens no model, so it is soon checked.
    ``what``: its path in the config, for messages."""
    return _open(spec, what, None, False, lambda text: None)


def _open(spec: Any, what: str, open_model: OpenModel | None, skip: bool, say: Say) -> Reward | None:
    """The reward at the config path ``what``; None where a model is behind it and none is to be opened."""
    if not isinstance(spec, str | Mapping):
        raise UserError(f"{what} must be a name or {{type: ...}}, got {show(spec)}")
    name = spec.get("type") if isinstance(spec, Mapping) else spec
    if name == "pair_judge":
        raise UserError(f"{what}: a pair_judge compares two answers and scores none; use type: judge")
    if name == SUM:
        return _open_sum(spec if isinstance(spec, Mapping) else {}, what, open_model, skip, say)
    if name == ENSEMBLE:
        return _open_ensemble(build({ENSEMBLE: EnsembleOptions}, spec, what), what, open_model, say)
    if isinstance(name, str) and name.endswith(".py"):
        raise UserError(f"{what}: name the function in {name} too: {name}:FUNCTION")
    if name not in TABLE and isinstance(name, str) and ":" in name:
        return _own(spec, name, what, skip, say)
    if isinstance(spec, Mapping) or spec in TABLE:
        return build(TABLE, spec, what)
    known = [*TABLE, SUM, ENSEMBLE]
    meant = nearest(spec, known)
    if meant and not Path(spec).exists():
        raise UserError(
            f'{what}: no folder and no rule "{spec}"{meant} (rules: {", ".join(known)}; or file.py:function)'
        )
    return open_model and open_model(spec, _role(what), None)


def _role(what: str) -> str:
    """A config path as the name of an adapter."""
    return what.replace(".", "_")


def _own(spec: Mapping[str, Any] | str, name: str, what: str, skip: bool, say: Say) -> Reward:
    """The user's own function or class."""
    found = find(TABLE, name, what)
    if isinstance(found, type):
        return OwnReward(reward=build(TABLE, spec, what), name=name)
    if not callable(found):
        raise UserError(f"{what}: {name} is no function, it is {type(found).__name__}")
    given = {**spec} if isinstance(spec, Mapping) else {}
    options = build({"function": FunctionOptions}, {**given, "type": "function"}, what)
    return FunctionReward(function=found, name=name, options=options, skip=skip, say=say)


def _open_sum(spec: Mapping[str, Any], what: str, open_model: OpenModel | None, skip: bool, say: Say) -> Sum | None:
    """``{type: sum, gates: {NAME: {reward: ..., otherwise: -1}}, parts: {NAME: {reward: ..., weight: 2, ...}}}``; a
    part may be a reward as it stands, too."""
    if wrong := sorted(map(str, set(spec) - {"type", "gates", "parts"})):
        raise UserError(f"{what}: unknown key {wrong[0]} for sum{nearest(wrong[0], ['gates', 'parts'])} (gates, parts)")
    entries: dict[str, dict[str, Any]] = {"gates": {}, "parts": {}}
    for kind, made in entries.items():
        given = spec.get(kind, {})
        if not isinstance(given, Mapping):
            raise UserError(f"{what}.{kind} must be NAME: reward, ..., got {show(given)}")
        for name, said in given.items():
            path = f"{what}.{kind}.{name}"
            _check_name(name, path, {n for other in entries.values() for n in other})
            own = isinstance(said, Mapping) and "reward" in said
            options = {k: v for k, v in said.items() if k != "reward"} if own else {}
            place = build({"gate": GateOptions, "part": PartOptions}, {**options, "type": kind[:-1]}, path)
            reward = _open(said["reward"] if own else said, f"{path}.reward" if own else path, open_model, skip, say)
            entry = {"gates": Gate, "parts": Part}[kind]
            made[name] = None if reward is None else entry(reward=put_beside(reward), options=place)
    if not entries["parts"]:
        raise UserError(f"{what}: a sum needs parts: {{NAME: reward, ...}}")
    if None in entries["gates"].values() or None in entries["parts"].values():
        return None
    return Sum(gates=entries["gates"], parts=entries["parts"])


def _open_ensemble(
    options: EnsembleOptions, what: str, open_model: OpenModel | None, say: Say
) -> Ensemble | Heads | None:
    """``{type: ensemble, members: [FOLDER, ...], combine: minimum}``; its parts are member-0, member-1, ..., or head-0,
    head-1, ... of the one folder that has several."""
    rule = next((m for m in options.members if m in TABLE or m in (SUM, ENSEMBLE) or ":" in m), None)
    if rule is not None:
        raise UserError(f"{what}.members: a member is a reward model, {rule} is a rule or function; use type: sum")
    if open_model is None:
        return None
    folders = find_members(options, what, say)
    if len(folders) == 1:
        model = open_model(str(folders[0]), _role(what), options.scale)
        assert isinstance(model, Heads)
        return replace(model, options=options)
    members: dict[str, Reward] = {}
    for number, folder in enumerate(folders):
        members[f"{MEMBER}{number}"] = open_model(str(folder), f"{_role(what)}_{number}", options.scale)
    return Ensemble(options=options, members=members)


def _check_name(name: Any, path: str, taken: set[str]) -> None:
    """A part is a metric, reward/NAME, and must not be mistaken for another."""
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{path}: a name is letters, digits and _, got {show(name)}")
    if name in taken:
        raise UserError(f"{path}: a gate has this name already")
    if f"reward/{name}" in glossary.METRICS:
        raise UserError(f"{path}: reward/{name} is a metric of its own; choose another name")


def model_reward(
    scorer: Scorer, policy_tokenizer: Any, tokens_per_micro_batch: int, scale: ScoreScale | None = None
) -> RewardModel | Heads:
    """Raises UserError where the scale of a model of several heads is not of as many."""
    batch_of = parts.rollouts_for(scorer, policy_tokenizer)
    if scorer.heads == 1:
        return RewardModel(batch_of=batch_of, score=parts.scores_of(scorer, tokens_per_micro_batch), scale=scale)
    if scale is not None and len(scale.heads) != scorer.heads:
        raise UserError(
            f"{scorer.backbone.name}: {scorer.heads} heads, and {FILE} has a scale for {len(scale.heads)}\n"
            "  train it with tether reward, which measures one for each; or take its scores as they are"
        )
    return Heads(batch_of=batch_of, score=parts.head_scores_of(scorer, tokens_per_micro_batch), scale=scale)
