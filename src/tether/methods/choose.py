"""``tether choose``: best of n and rejection sampling. Candidates are drawn from one model or several, or read from a
file; scored; chosen; and written as a set that ``tether sft`` or ``tether dpo`` takes, beside a control by lot."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tether.config.load import resolve_yaml
from tether.config.schema import ChooseConfig
from tether.config.sections import ModelConfig, SamplingConfig
from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Reward
from tether.core.text import Prompt
from tether.data.readers import read
from tether.evals.best_of_n import CurvePoint, doubling, reached, reward_curve
from tether.methods import parts
from tether.methods.choose_candidates import (
    RELATIVE,
    Generator,
    asked,
    demonstration,
    drawn,
    facts,
    given,
    preference,
    write_rows,
)
from tether.methods.choose_select import (
    Candidate,
    Pair,
    at_random,
    causes,
    pair,
    pair_at_random,
    select,
    tied,
    usable,
)
from tether.methods.judge_checks import check_no_memory, check_no_tokens
from tether.methods.judge_counts import record
from tether.methods.judges import open_pair_judge, open_rule
from tether.methods.sample import open_sampler
from tether.rewards.judges.ask import sentence
from tether.rewards.meter import counted
from tether.runs.folder import RunFolder, new_path
from tether.runs.log import plain
from tether.runs.storage import write_text

Pools = Sequence[Sequence[Candidate]]


def run(config: ChooseConfig, *, resume: bool = False, dry_run: bool = False, quiet: bool = False) -> Path:
    """Write sft.jsonl or preferences.jsonl, control.jsonl (as many of each prompt, by lot), candidates.jsonl (all, with
    scores) and summary.json; returns the folder."""
    say = parts.speaker(quiet)
    check(config)
    rows = read(config.data.train, "prompts", limit=config.data.limit, max_bad_rows=config.data.max_bad_rows)
    prompts: list[Prompt] = list(rows.records)
    say(f"{config.data.train}: {len(prompts)} prompts")
    for cause, count in rows.counts.items():
        say(f"  {count} × {cause}")
    if dry_run:
        print(resolve_yaml(config))
        names = (config.model.name, *config.models)
        print(f"{len(prompts)} prompts" + ("" if config.given else f" × {config.n} completions by {', '.join(names)}"))
        return Path(config.run.folder or ".")
    path = Path(config.run.folder) if config.run.folder else new_path("choose")
    with RunFolder.create(path, config_yaml=resolve_yaml(config), method="choose", resume=resume) as folder:
        for note in folder.notes:
            say(note)
        by_generator, asked_for = _candidates(config, prompts, folder, say)
        _write(config, by_generator, record(folder, asked_for), folder.path, say)
    return path


def check(config: ChooseConfig) -> None:
    """Raises UserError where a key would be ignored or is missing, and where a reward is misspelt."""
    if config.given is not None:
        drawing: dict[str, tuple[Any, Any]] = {
            "model": (config.model, ModelConfig()),
            "models": (config.models, ()),
            "n": (config.n, type(config).model_fields["n"].default),
            "sampling": (config.sampling, SamplingConfig(max_new_tokens=256)),
        }
        for name, (value, default) in drawing.items():
            if value != default:
                raise UserError(f"{name} would be ignored: with `given` the candidates come from data.train; keep one")
        if config.reward is not None and config.given.score is not None:
            raise UserError("given.score would be ignored: the reward scores the candidates anew; keep one of the two")
    elif config.reward is None:
        raise UserError("nothing scores the candidates: give a reward, or `given` where data.train holds their scores")
    names = [config.model.name, *config.models]
    if len(set(names)) < len(names):
        raise UserError(f"a generator is named twice ({', '.join(names)}); it would draw the same completions again")
    if config.sampling.temperature == 0 and config.n > 1 and config.given is None:
        raise UserError(f"sampling.temperature=0 gives the same completion {config.n} times; use one above 0")
    if config.write == "sft" and config.against != "worst":
        raise UserError("against would be ignored: only write=preferences rejects anything; take it out")
    if config.reward is not None:
        if open_pair_judge(config.reward) is None:
            open_rule(config.reward)
            check_no_memory(config.reward, "choose")
            if config.given is not None:
                check_no_tokens(config.reward)
        elif config.models:
            raise UserError("a pair_judge ranks the answers of one generator only; use one generator, or type: judge")


def _candidates(
    config: ChooseConfig, prompts: list[Prompt], folder: RunFolder, say: parts.Say
) -> tuple[list[Pools], dict[str, float]]:
    """Per generator, the candidates of each prompt; and what a judge among the reward was asked."""
    if config.given is not None:
        pools, counts = given(prompts, config.given, config.reward, config.data.train, say)
        return [pools], counts
    settings, seed, reward = config.sampling.settings(), config.run.seed, config.reward
    assert reward is not None
    origin = {"prompts": config.data.train, "seed": seed, "sampling": plain(config.sampling.model_dump())}
    found: list[Pools] = []
    rewards: list[Reward] = []
    for number, name in enumerate((config.model.name, *config.models)):
        say(f"generator {name}: {config.n} completions of each prompt")
        own = {} if number == 0 else {"name": name, "revision": None}
        model = config.model.model_copy(update=own)

        def opened(model: ModelConfig = model, number: int = number) -> Generator:
            made = Generator.open(model, open_sampler(model, None, settings, say), reward, say, origin, number)
            rewards.append(made.reward)
            return made

        file = folder.file(f"drawn-{number}.jsonl")
        found.append(drawn(file, prompts, config.n, settings, seed, opened, say))
    return found, counted(rewards)


# -- choosing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What was taken of each prompt, candidates or pairs, from its ``usable`` ones; and what by lot."""

    usable: Pools
    chosen: Sequence[Sequence[Any]]
    control: Sequence[Sequence[Any]]
    left: Mapping[str, int]


def choose(config: ChooseConfig, pools: Pools) -> Choice:
    """The selection that ``config`` asks for, from all candidates of each prompt."""
    limits, seed = config.select, config.run.seed
    found = [usable(pool, keep_cut=limits.keep_cut) for pool in pools]
    left = sum((counts for _, counts in found), Counter[str]())
    kept = [pool for pool, _ in found]
    chosen = select(kept, per_prompt=limits.per_prompt, top=limits.top, threshold=limits.threshold, seed=seed)
    left["prompt: no usable candidate"] += sum(not pool for pool in kept)
    left["prompt: nothing chosen"] += sum(bool(pool) and not one for pool, one in zip(kept, chosen, strict=True))
    left["prompt: a tie broken by lot"] += sum(tied(pool, one) for pool, one in zip(kept, chosen, strict=True))
    if config.write == "sft":
        return Choice(usable=kept, chosen=chosen, control=at_random(kept, chosen, seed), left=left)
    pairs: list[list[Pair]] = []
    for pool, one in zip(kept, chosen, strict=True):
        made, without = pair(pool, one, config.against, seed)
        left["pair: none scores lower"] += without
        pairs.append(made)
    return Choice(usable=kept, chosen=pairs, control=pair_at_random(kept, pairs, seed), left=left)


def _rows(config: ChooseConfig, pools: Pools, taken: Sequence[Sequence[Any]], by: str) -> list[dict[str, Any]]:
    """The data set of what was taken ``by`` score or by lot; ranks are among all candidates of a prompt."""
    source: dict[str, Any] = {"method": "choose", "by": by, "select": config.select.model_dump()}
    found = [(one, pool) for pool, ones in zip(pools, taken, strict=True) for one in ones]
    if config.write == "sft":
        return [demonstration(one, pool, source) for one, pool in found]
    source["against"] = config.against
    return [preference(chosen, rejected, pool, source) for (chosen, rejected), pool in found]


def _write(
    config: ChooseConfig, by_generator: Sequence[Pools], judge: Mapping[str, float], folder: Path, say: parts.Say
) -> None:
    pools = [[c for pools in by_generator for c in pools[i]] for i in range(len(by_generator[0]))]
    choice = choose(config, pools)
    write_rows(folder / "candidates.jsonl", [_all(pool) for pool in pools if pool])
    relative = config.reward is not None and open_pair_judge(config.reward) is not None
    summary = {**_summary(by_generator, choice, relative=relative), "judge": judge}
    write_text(folder / "summary.json", json.dumps(plain(summary), indent=2, ensure_ascii=False))
    for line in told(summary):
        say(line)
    chosen = _rows(config, pools, choice.chosen, "score")
    if not chosen:
        raise RewardFailure(f"nothing was chosen from {summary['candidates']} candidates: {causes(choice.left)}")
    write_rows(folder / f"{config.write}.jsonl", chosen)
    write_rows(folder / "control.jsonl", _rows(config, pools, choice.control, "lot"))
    say(f"{len(chosen)} rows: {folder / f'{config.write}.jsonl'}; as many by lot: {folder / 'control.jsonl'}")


def _all(pool: Sequence[Candidate]) -> dict[str, Any]:
    """All candidates of a prompt as a row that ``given: {}`` reads back, the prompt's columns beside it."""
    found = [{"text": c.text, **facts(c, pool)} for c in pool]
    return {**pool[0].prompt.metadata, "prompt": asked(pool[0].prompt), "completions": found}


# -- told --------------------------------------------------------------------------------------------------------------


def curve_of(pools: Pools) -> tuple[list[CurvePoint], int]:
    """The reward over n up to what nine prompts of ten have scored candidates for, and how many prompts have fewer."""
    scores = [torch.tensor([c.score for c in pool if math.isfinite(c.score)], dtype=torch.float64) for pool in pools]
    top = reached([len(s) for s in scores])
    long_enough = [s for s in scores if top and len(s) >= top]
    return (reward_curve(long_enough, doubling(top)) if top else []), len(scores) - len(long_enough)


def _summary(by_generator: Sequence[Pools], choice: Choice, *, relative: bool = False) -> dict[str, Any]:
    """``relative``: scores are shares of the own pool (RELATIVE), so that nothing is said of them across pools."""
    everything = [c for pools in by_generator for pool in pools for c in pool]
    curves = {}
    for pools in () if relative else by_generator:
        name = next((str(c.origin.get("generator", "given")) for pool in pools for c in pool), "given")
        names = {str(c.origin.get("generator", "given")) for pool in pools for c in pool}
        points, short = curve_of(pools)
        curves[name if len(names) == 1 else "all"] = {"points": [vars(p) for p in points], "prompts_left_out": short}
    binary = all(c.score in (0.0, 1.0) for c in everything if math.isfinite(c.score))
    return {
        "prompts": len(choice.usable),
        "candidates": len(everything),
        "left_out": {k: v for k, v in choice.left.items() if v},
        "reward_is_0_or_1": binary and not relative,
        "reward_is_relative": relative,
        "curves": curves,
        "generators": {} if relative else _by_generator(everything),
        "chosen": _sides(choice.chosen),
        "control": _sides(choice.control),
        "all": _means([c for pool in choice.usable for c in pool]),
    }


def _by_generator(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Each generator's scored candidates and their mean score."""
    of: dict[str, list[float]] = {}
    for c in candidates:
        of.setdefault(str(c.origin.get("generator", "given")), []).extend([c.score] if math.isfinite(c.score) else [])
    return {name: {"scored": len(s), "score": sum(s) / len(s) if s else None} for name, s in of.items()}


def _sides(taken: Sequence[Sequence[Any]]) -> dict[str, Any]:
    flat = [one for ones in taken for one in ones]
    if flat and isinstance(flat[0], tuple):
        return {"chosen": _means([c for c, _ in flat]), "rejected": _means([r for _, r in flat])}
    return _means(flat)


def _means(candidates: Sequence[Candidate]) -> dict[str, Any]:
    count = max(len(candidates), 1)
    return {
        "count": len(candidates),
        "score": sum(c.score for c in candidates) / count,
        "characters": sum(len(c.text) for c in candidates) / count,
        "by": dict(Counter(str(c.origin.get("generator", "given")) for c in candidates)),
    }


def table(points: Sequence[CurvePoint], *, binary: bool) -> list[str]:
    """The curve, a line for each n."""
    lines = [f"  {'n':>5}  {'pass@n' if binary else 'reward':>9}  ± error   KL to the generator, upper bound (nats)"]
    for p in points:
        error = "      –" if math.isnan(p.error) else f"{p.error:7.4f}"
        lines.append(f"  {p.n:>5}  {p.reward:9.4f}  {error}   {p.kl_bound:.3f}")
    return lines


def told(summary: Mapping[str, Any]) -> list[str]:
    """The summary in words."""
    lines = [f"judge: {sentence(summary['judge'])}"] if summary.get("judge") else []
    lines += [RELATIVE] if summary["reward_is_relative"] else []
    for name, curve in summary["curves"].items():
        points = [CurvePoint(**p) for p in curve["points"]]
        if points:
            left = f" ({curve['prompts_left_out']} with fewer left out)" if curve["prompts_left_out"] else ""
            lines.append(f"best of n by {name}, unbiased from one pool, over {points[0].prompts} prompts{left}:")
            lines += table(points, binary=summary["reward_is_0_or_1"])
    means = {name: found for name, found in summary["generators"].items() if found["scored"]}
    lines += [f"{name}: mean score {m['score']:.4f} of {m['scored']} candidates" for name, m in means.items()]
    lines.append(f"{summary['candidates']} candidates; not usable, or worth knowing: {causes(summary['left_out'])}")
    for name in ("chosen", "control", "all"):
        found = summary[name]
        sides = found if "chosen" in found else {"": found}
        for side, means in sides.items():
            label = " ".join(filter(None, (name, side)))
            lines.append(
                f"  {label:<17} {means['count']:>6} with mean score {means['score']:.4f}, "
                f"{means['characters']:.0f} characters, by {', '.join(f'{k} {v}' for k, v in means['by'].items())}"
            )
    return lines
