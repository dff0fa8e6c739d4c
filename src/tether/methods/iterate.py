"""Online preference optimisation: rounds of sample, score, pair and train, each from the result of the last one.

A round's data and its training run stay in ``rounds/N``: candidates.jsonl, pairs.jsonl, and ``run``, an ordinary run
folder of ``tether preference``. A run that was stopped goes on where it was: at a round, or inside its training.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tether.backends.local.sampler import LocalSampler
from tether.config.build import build
from tether.config.schema import IterateConfig, PreferenceConfig, ReferenceConfig
from tether.core.batches import Group
from tether.core.errors import RewardFailure, UserError
from tether.core.text import Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.losses import PREFERENCE, UnpairedLoss
from tether.methods import parts, preference
from tether.methods.choose_candidates import RELATIVE, Generator, asked, facts, write_rows
from tether.methods.choose_candidates import preference as preference_row
from tether.methods.choose_select import Candidate, causes, pair, select, usable
from tether.methods.judge_checks import check_no_memory
from tether.methods.judges import open_pair_judge, open_rule
from tether.methods.rl_parts import PromptOrder, both, open_prompts
from tether.models.load import resolve
from tether.models.roles import Policy
from tether.rewards.judges.ask import sentence
from tether.rewards.meter import Meter, added
from tether.runs.folder import RunFolder
from tether.runs.log import MetricsLog, SamplesLog, plain, read_lines
from tether.runs.storage import write_folder, write_text

SAMPLES = 16  # completions of a round that the report shows
SPLITS = ("eval", "train")


def run(config: IterateConfig, *, resume: bool = False, dry_run: bool = False, quiet: bool = False) -> Path:
    """Train the policy in rounds; returns the run folder, whose ``final`` is the last round's model."""
    say = parts.speaker(quiet)
    parts.begin(config)
    check(config)
    chat = parts.open_chat(config.model, config.data, say)
    prompts, mark = open_prompts(config, chat, say)
    held_out: list[Prompt] = []
    if config.data.eval is not None:
        theirs = config.data.model_copy(update={"train": config.data.eval, "limit": None})
        held_out, other = open_prompts(config.model_copy(update={"data": theirs}), chat, say)
        mark = both(mark, other)
    rounds = config.rounds
    if dry_run:
        lines = [
            f"{rounds.count} rounds: {rounds.prompts} of {len(prompts)} prompts a round, {rounds.completions} answers "
            f"each, so up to {rounds.prompts * rounds.pairs_per_prompt} pairs; {config.epochs:g} epochs, "
            f"{config.prompts_per_step} pairs an optimizer step"
        ]
        parts.describe_dry_run(config, lines, chat.prompt_text(prompts[0]))
        return Path(config.run.folder or ".")
    if open_pair_judge(config.reward) is not None:
        say(RELATIVE)
    with parts.open_run(config, "iterate", mark, resume=resume) as folder:
        for note in folder.notes:
            say(note)
        stream = PromptOrder(prompts, config.run.seed)
        for number in range(1, rounds.count + 1):
            _answered(config, folder, number, stream, held_out, chat, say)
            _trained(config, folder, number, quiet)
        _answered(config, folder, rounds.count + 1, stream, held_out, chat, say)
        last = _run_folder(folder, rounds.count) / "final"

        def copy(target: Path) -> None:
            shutil.copytree(last, target, dirs_exist_ok=True)

        write_folder(folder.final, copy)
        return parts.finish(folder, config, say)


def check(config: IterateConfig) -> None:
    """Raises UserError where a key would be ignored, and where reward or loss are misspelt."""
    loss = build(PREFERENCE, config.loss, "loss")
    if isinstance(loss, UnpairedLoss):
        raise UserError("loss: rounds make pairs, and this loss reads single judgements; use a loss on pairs")
    if "reference" not in loss.needs and config.reference.of != "start":
        raise UserError("reference.of would be ignored: this loss has no reference; take it out")
    if open_pair_judge(config.reward) is None:
        open_rule(config.reward)
        check_no_memory(config.reward, "iterate")
    if config.sampling.temperature == 0:
        raise UserError("sampling.temperature=0 gives one answer several times; use one above 0")
    most = config.rounds.completions // 2
    if config.rounds.pairs_per_prompt > most:
        raise UserError(
            f"rounds.pairs_per_prompt={config.rounds.pairs_per_prompt} needs twice as many answers; with "
            f"rounds.completions={config.rounds.completions} it can be {most} at most"
        )
    if config.data.eval_fraction:
        raise UserError("data.eval_fraction would be ignored: name held-out prompts with data.eval")
    if config.run.eval_every:
        raise UserError("run.eval_every would be ignored: every round is measured once; take it out")


# -- sample, score, pair -----------------------------------------------------------------------------------------------


def _answered(
    config: IterateConfig,
    folder: RunFolder,
    number: int,
    stream: PromptOrder,
    held_out: Sequence[Prompt],
    chat: ChatTokenizer,
    say: parts.Say,
) -> None:
    """The pairs of round ``number`` and what they say of its policy; one after the last round is only measured."""
    place = folder.file(f"rounds/{number}" if number <= config.rounds.count else "rounds/end")
    summary = place / "summary.json"
    if not summary.exists():
        place.mkdir(parents=True, exist_ok=True)
        generator = _generator(config, folder, number, chat, say)
        meter = Meter([generator.reward])
        seed = config.run.seed * 1_000_003 + number
        settings, n = config.sampling.settings(), config.rounds.completions
        taken = stream((number - 1) * config.rounds.prompts, config.rounds.prompts)
        rollouts, candidates = generator.draw(taken, n, settings, seed)
        pools = [candidates[i : i + n] for i in range(0, len(candidates), n)]
        tokens = {id(c): r for c, r in zip(candidates, rollouts, strict=True)}
        relative = open_pair_judge(config.reward) is not None
        found: dict[str, Any] = {"train": measured(pools, relative=relative) | meter()}
        if number <= config.rounds.count:
            rows, found["left_out"] = pairs_of(pools, tokens, config.rounds.pairs_per_prompt, config.run.seed)
            found["train"] |= made(rows, found["left_out"])
            write_rows(place / "pairs.jsonl", rows)
        if held_out:
            judged = generator.draw(held_out, n, settings, seed)[1]
            found["eval"] = measured([judged[i : i + n] for i in range(0, len(judged), n)], relative=relative)
            found["eval"] |= meter()
        found["samples"] = [_sample(c) for c in candidates[:SAMPLES]]
        write_rows(place / "candidates.jsonl", [_scored(pool) for pool in pools])
        # Written last: a round without it is sampled anew.
        write_text(summary, json.dumps(plain(found), indent=2, ensure_ascii=False))
    found = json.loads(summary.read_text(encoding="utf-8"))
    _record(folder, number - 1, found)
    say(_sentence(config, number, found))


def _generator(config: IterateConfig, folder: RunFolder, number: int, chat: ChatTokenizer, say: parts.Say) -> Generator:
    """The policy that the rounds before ``number`` left, and the reward."""
    name = config.model.name if number == 1 else str(_run_folder(folder, number - 1))
    model = config.model if number == 1 else config.model.model_copy(update={"name": name, "revision": None})
    backbone = parts.open_backbone(model, say)
    backbone.tokenizer.chat_template = chat.tokenizer.chat_template
    policy = Policy(backbone=backbone, temperature=config.sampling.temperature)
    origin = {
        "method": "iterate",
        "round": number,
        "prompts": config.data.train,
        "seed": config.run.seed,
        "sampling": plain(config.sampling.model_dump()),
    }
    sampler = LocalSampler(policy=policy, chat=chat)
    return Generator.open(model, sampler, config.reward, say, origin)


def pairs_of(
    pools: Sequence[Sequence[Candidate]], tokens: Mapping[int, Rollout], per_prompt: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of best against worst, their sampled tokens with them, and what gave no pair. A cut answer is paired as it
    was sampled: without a stop token, so nothing wrong is learned from it."""
    kept, left = [], {}
    for pool in pools:
        fit, counts = usable(pool, keep_cut=True)
        kept.append(fit)
        for cause, count in counts.items():
            left[cause] = left.get(cause, 0) + count
    left["prompt: fewer than two usable answers"] = sum(len(pool) < 2 for pool in kept)
    rows, tied = [], 0
    for pool, fit, chosen in zip(pools, kept, select(kept, per_prompt=per_prompt, seed=seed), strict=True):
        if len(fit) < 2:
            continue
        pairs, without = pair(fit, chosen[: len(fit) // 2], "worst", seed)
        tied += without
        for best, worst in pairs:
            sides = {side: tokens[id(c)].tokens.tolist() for side, c in (("chosen", best), ("rejected", worst))}
            row = preference_row(best, worst, pool, {})
            rows.append({**row, "tokens": {"prompt": tokens[id(best)].prompt_tokens.tolist(), **sides}})
    left["pair: a tie"] = tied
    return rows, left


def measured(pools: Sequence[Sequence[Candidate]], *, relative: bool = False) -> dict[str, float]:
    """What the answers say of the policy; scores over those that have one, best and worst over prompts. Scores that are
    ``relative`` to their own pool say nothing of it and are left out."""
    scored = [[c.score for c in pool if math.isfinite(c.score)] for pool in pools]
    flat = torch.tensor([s for one in scored for s in one], dtype=torch.float64)
    everything = [c for pool in pools for c in pool]
    if not len(flat):
        raise RewardFailure(f"the reward scored none of the {len(everything)} answers of the round")
    some = [one for one in scored if one]
    scores = {
        "reward/mean": float(flat.mean()),
        "reward/std": float(flat.std(correction=0)),
        "reward/best": sum(max(one) for one in some) / len(some),
        "reward/worst": sum(min(one) for one in some) / len(some),
    }
    return {
        **({} if relative else scores),
        "reward/dropped": float(len(everything) - len(flat)),
        "rollout/length": sum(c.origin["tokens"] for c in everything) / len(everything),
        "rollout/truncated": sum(c.finish_reason == "length" for c in everything) / len(everything),
    }


def made(rows: Sequence[Mapping[str, Any]], left: Mapping[str, int]) -> dict[str, float]:
    """The pairs of a round in numbers."""
    gaps = [row["source"]["chosen"]["score"] - row["source"]["rejected"]["score"] for row in rows]
    return {
        "pairs/made": float(len(rows)),
        "pairs/tied": float(left["pair: a tie"]),
        "pairs/gap": sum(gaps) / len(gaps) if gaps else math.nan,
    }


def _scored(pool: Sequence[Candidate]) -> dict[str, Any]:
    found = [{"text": c.text, **facts(c, pool)} for c in pool]
    return {"id": pool[0].prompt.id, "prompt": asked(pool[0].prompt), "completions": found}


def _sample(c: Candidate) -> dict[str, Any]:
    return {
        "prompt_id": c.prompt.id,
        "question": c.prompt.question,
        "completion": c.text,
        "reward": c.score,
        "finish_reason": c.finish_reason,
        "tokens": c.origin["tokens"],
    }


# -- train -------------------------------------------------------------------------------------------------------------


def _trained(config: IterateConfig, folder: RunFolder, number: int, quiet: bool) -> None:
    """The preference run of round ``number``: begun, gone on with, or done already."""
    target = _run_folder(folder, number)
    if (target / "final").is_dir():
        return
    pairs = folder.file(f"rounds/{number}") / "pairs.jsonl"
    rows = read_lines(pairs).rows
    if not rows:
        left = json.loads((pairs.parent / "summary.json").read_text(encoding="utf-8"))["left_out"]
        raise RewardFailure(
            f"round {number}: no prompt gave a pair ({causes(left)}), so there is nothing to train on\n"
            "  more rounds.completions, a higher sampling.temperature, or a reward that tells the answers apart"
        )
    data = parts.Data(
        train=tuple(_group(row, at) for at, row in enumerate(rows)),
        held_out=(),
        fingerprint=parts.file_fingerprint(pairs),
    )
    preference.run(_preference(config, folder, number, pairs), resume=target.exists(), quiet=quiet, data=data)


def _preference(config: IterateConfig, folder: RunFolder, number: int, pairs: Path) -> PreferenceConfig:
    """The config of a round's training, as the round's run folder keeps it."""
    model, reference = config.model, ReferenceConfig()
    if number > 1:
        needs = build(PREFERENCE, config.loss, "loss").needs
        if config.reference.of == "start" and "reference" in needs:
            start = model.name if model.revision is None else resolve(model.name, revision=model.revision)
            reference = ReferenceConfig(name=start)
        model = model.model_copy(update={"name": str(_run_folder(folder, number - 1)), "revision": None})
    own = {"folder": str(_run_folder(folder, number)), "seed": config.run.seed + number}
    return PreferenceConfig(
        model=model,
        optim=config.optim,
        run=config.run.model_copy(update=own),
        data=config.data.model_copy(update={"train": str(pairs), "eval": None, "limit": None}),
        epochs=config.epochs,
        prompts_per_step=config.prompts_per_step,
        loss=config.loss,
        reference=reference,
    )


def _group(row: Mapping[str, Any], at: int) -> Group:
    """A pair as the tokens that were sampled: never tokenised anew."""
    sides = [torch.tensor(row["tokens"][side]) for side in ("chosen", "rejected")]
    return Group(
        id=f"{row['source']['prompt_id']}/{at}",
        prompt=torch.tensor(row["tokens"]["prompt"]),
        completions=tuple(sides),
        loss_masks=tuple(torch.ones(len(side), dtype=torch.bool) for side in sides),
    )


def _run_folder(folder: RunFolder, number: int) -> Path:
    return folder.path / "rounds" / str(number) / "run"


# -- told --------------------------------------------------------------------------------------------------------------


def _record(folder: RunFolder, step: int, found: Mapping[str, Any]) -> None:
    """Metrics and samples of the policy after ``step`` rounds, once, however often the run was resumed."""
    known = {(row.get("step"), row.get("split")) for row in read_lines(folder.metrics).rows}
    if all(row.get("step") != step for row in read_lines(folder.samples).rows):
        samples = SamplesLog(folder.samples)
        for sample in found["samples"]:
            samples.append(step, "train", sample)
        samples.close()
    metrics = MetricsLog(folder.metrics)
    for split in SPLITS:
        if split in found and (step, split) not in known:
            metrics.append(step, split, found[split])
    metrics.close()


def _sentence(config: IterateConfig, number: int, found: Mapping[str, Any]) -> str:
    numbers = found["train"]
    when = f"round {number} of {config.rounds.count}" if number <= config.rounds.count else "after the last round"
    reward = ""
    if "reward/mean" in numbers:
        held_out = f", held out {found['eval']['reward/mean']:.4f}" if "eval" in found else ""
        reward = (
            f"reward {numbers['reward/mean']:.4f}{held_out} (best {numbers['reward/best']:.4f}, worst "
            f"{numbers['reward/worst']:.4f}), "
        )
    said = f"{when}: {reward}{numbers['rollout/length']:.0f} tokens, {100 * numbers['rollout/truncated']:.0f} % cut"
    if number <= config.rounds.count:
        said += f"; {numbers['pairs/made']:.0f} pairs; left out: {causes(found['left_out'])}"
    judged = [{n: v for n, v in found.get(split, {}).items() if n.startswith("judge/")} for split in SPLITS]
    return f"{said}; judge: {sentence(counts)}" if (counts := added(judged)) else said
