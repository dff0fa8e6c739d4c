"""``tether constitutional``: answer, criticise, revise, prefer (Bai 2022): a demonstration set and a preference set.

Every text is kept in the folder's answers.sqlite the moment it is written, so a command that was killed, or whose
endpoint went down, goes on with ``--resume`` and asks only the rest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tether.config.build import build
from tether.config.load import resolve_yaml
from tether.config.schema import ConstitutionalConfig
from tether.config.sections import ModelConfig
from tether.config.yaml import read as read_yaml
from tether.core.errors import RewardFailure, UserError
from tether.core.text import Message, Prompt
from tether.data.readers import read
from tether.evals.winrate import PairwiseJudge, both_orders, position_sentence
from tether.methods import parts
from tether.methods.judge_counts import record
from tether.methods.judge_local import LocalSource
from tether.methods.judge_models import PairJudge, build_pair_judge, open_endpoint
from tether.rewards.judges.ask import Asker, Conversation
from tether.rewards.judges.cache import AnswerCache
from tether.rewards.judges.constitution import (
    Principle,
    ask_critique,
    ask_revision,
    draw,
    lines_of,
    read_principles,
)
from tether.rewards.judges.endpoint import Endpoint
from tether.runs.folder import RunFolder, new_path
from tether.runs.storage import write_text


@dataclass(kw_only=True, eq=False)
class Thread:
    """One prompt on its way: its first answer, and each round's principle, critique and revision."""

    id: str
    question: Conversation
    answer: str = ""
    cut: bool = False
    rounds: list[dict[str, str]] = field(default_factory=list)
    revision: str = ""


def run(config: ConstitutionalConfig, *, resume: bool = False, dry_run: bool = False, quiet: bool = False) -> Path:
    """Write sft.jsonl (prompt, last revision) and preferences.jsonl (what the feedback model prefers of revision and
    first answer), each row with its provenance; returns the folder."""
    say = parts.speaker(quiet)
    principles = open_constitution(config)
    judge = build_pair_judge(config.feedback, "feedback")
    if judge.criterion:
        raise UserError("feedback.criterion would be ignored: a principle of the constitution says what is better")
    endpoint = _endpoint(config)
    rows = read(config.data.train, "prompts", limit=config.data.limit, max_bad_rows=config.data.max_bad_rows)
    threads = [
        Thread(id=p.id, question=p.messages or (Message(role="user", content=p.question),)) for p in rows.records
    ]
    say(f"{config.data.train}: {len(threads)} prompts; {len(principles)} principles, {config.revisions} × revised")
    for cause, count in rows.counts.items():
        say(f"  {count} × {cause}")
    if dry_run:
        print(resolve_yaml(config))
        for principle in principles:
            print(parts.printable(f"- {principle.text}"))
        return Path(config.run.folder or ".")
    path = Path(config.run.folder) if config.run.folder else new_path("constitutional")
    with RunFolder.create(path, config_yaml=resolve_yaml(config), method="constitutional", resume=resume) as folder:
        for note in folder.notes:
            say(note)
        cache = AnswerCache(path=folder.file("answers.sqlite"))
        writer = _writer(config, endpoint, cache)
        left = _write_texts(threads, writer, principles, config, say)
        say(f"writer: {writer.tally.sentence()}")
        revised = [t for t in threads if t.revision]
        if not revised:
            raise RewardFailure(f"no prompt got a revision: {_causes(left)}")
        if judge.verdict == "text" and judge.cache is None:
            judge = replace(judge, cache=str(cache.path))
        provenance = _provenance(config, writer)
        demonstrations = [_demonstration(t, provenance) for t in revised]
        preferences = _prefer(revised, judge, principles, config.run.seed, provenance, left, say)
        _write(folder.path / "sft.jsonl", demonstrations)
        _write(folder.path / "preferences.jsonl", preferences)
        record(folder, {**writer.tally.counts("writer"), **judge.counts()})
        say(f"{len(demonstrations)} demonstrations, {len(preferences)} preferences; left out: {_causes(left)}")
        _show(revised, say)
    return path


# -- the parts ---------------------------------------------------------------------------------------------------------


def open_constitution(config: ConstitutionalConfig) -> tuple[Principle, ...]:
    """The principles, from the config itself or from a text or YAML file."""
    said = config.constitution
    if not isinstance(said, str):
        return read_principles(said, "constitution")
    path = Path(said).expanduser()
    if not path.is_file():
        raise UserError(f"constitution: no file {said}; give a text or YAML file, or the principles as a list")
    if path.suffix not in (".yaml", ".yml"):
        try:
            return read_principles(lines_of(path.read_text(encoding="utf-8-sig")), said)
        except UnicodeDecodeError:
            raise UserError(f"{said} is not UTF-8 text; save it as UTF-8") from None
    problems: list[str] = []
    found = read_yaml(path, problems).plain
    if problems:
        raise UserError("\n".join(problems))
    if set(found) != {"principles"}:
        raise UserError(
            f"{said}: a constitution file holds `principles:` and a list, got {', '.join(found) or 'nothing'}"
        )
    return read_principles(found["principles"], said)


def _endpoint(config: ConstitutionalConfig) -> Endpoint | None:
    if config.endpoint is None:
        return None
    if config.model != ModelConfig():
        raise UserError("model.* would be ignored: the endpoint writes; keep one (endpoint.model names its model)")
    if config.sampling.top_k:
        raise UserError("sampling.top_k would be ignored: an endpoint has no such setting; take it out")
    return build({"endpoint": Endpoint}, {"type": "endpoint", **config.endpoint}, "endpoint")


def _writer(config: ConstitutionalConfig, endpoint: Endpoint | None, cache: AnswerCache) -> Asker:
    sampling = config.sampling
    if endpoint is None:
        return Asker(source=LocalSource.open(config.model, sampling.settings(), config.run.seed), cache=cache)
    settings = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": config.run.seed,
        "stop": list(sampling.stop) or None,
    }
    return open_endpoint(endpoint, settings, cache)


def _write_texts(
    threads: Sequence[Thread],
    writer: Asker,
    principles: Sequence[Principle],
    config: ConstitutionalConfig,
    say: parts.Say,
) -> Counter[str]:
    """Answers, critiques and revisions into ``threads``; a thread that lacks one gets no revision. Returns why."""
    left: Counter[str] = Counter()
    going: list[Thread] = []
    say(f"answering {len(threads)} prompts")
    for thread, reply in zip(threads, writer.ask([t.question for t in threads]), strict=True):
        thread.answer, thread.cut = (reply.text or "").strip(), reply.cut
        left["no first answer"] += not thread.answer
        going += [thread] if thread.answer else []
    current = {t.id: t.answer for t in going}
    for turn in range(config.revisions):
        drawn = [draw(principles, config.run.seed, t.id, f"revision {turn}") for t in going]
        say(f"round {turn + 1}: criticising and revising {len(going)} answers")
        critiques = writer.ask([ask_critique(t.question, current[t.id], p) for t, p in zip(going, drawn, strict=True)])
        told = [(t, p, (c.text or "").strip()) for t, p, c in zip(going, drawn, critiques, strict=True)]
        left["no critique"] += sum(not critique for _, _, critique in told)
        told = [row for row in told if row[2]]
        replies = writer.ask([ask_revision(t.question, current[t.id], critique, p) for t, p, critique in told])
        going = []
        for (thread, principle, critique), reply in zip(told, replies, strict=True):
            text = (reply.text or "").strip()
            cause = "revision cut at sampling.max_new_tokens" if reply.cut else "" if text else "no revision"
            if cause:
                left[cause] += 1
                continue
            current[thread.id] = text
            thread.rounds.append(_round(principle, critique))
            going.append(thread)
    for thread in going:
        thread.revision = current[thread.id]
    return left


def _round(principle: Principle, critique: str) -> dict[str, str]:
    return {
        "principle": principle.text,
        "critique_request": principle.critique_request,
        "critique": critique,
        "revision_request": principle.revision_request,
    }


def _prefer(
    threads: Sequence[Thread],
    judge: PairJudge,
    principles: Sequence[Principle],
    seed: int,
    provenance: Mapping[str, Any],
    left: Counter[str],
    say: parts.Say,
) -> list[dict[str, Any]]:
    """Rows of (prompt, chosen, rejected): revision against first answer, as the feedback model sees them by a principle
    of its own draw."""
    pairs = [t for t in threads if not t.cut and t.revision != t.answer]
    left["pair: first answer cut"] += sum(t.cut for t in threads)
    left["pair: revision is the first answer"] += sum(not t.cut and t.revision == t.answer for t in threads)
    if not pairs:
        return []
    drawn = [draw(principles, seed, t.id, "prefer") for t in pairs]
    criteria = [p.criterion for p in drawn]
    asking = PairwiseJudge(ask=lambda asked: judge.ask_each(asked, [*criteria, *criteria]), orders=judge.orders)
    verdicts = both_orders([(_prompt(t), t.revision, t.answer) for t in pairs], asking)
    wins, losses = (int((verdicts.outcomes == side).sum()) for side in (1, 0))
    say(
        f"feedback by {judge.name}: revision preferred {wins}, first answer {losses}; "
        f"{position_sentence(verdicts.first_share, verdicts.disagreement)}; {judge.tally.sentence()}"
    )
    rows = []
    for thread, principle, outcome in zip(pairs, drawn, verdicts.outcomes.tolist(), strict=True):
        if outcome not in (0.0, 1.0):
            left["pair: tie" if outcome == 0.5 else "pair: no verdict"] += 1
            continue
        sides = (thread.revision, thread.answer) if outcome == 1.0 else (thread.answer, thread.revision)
        feedback = {
            "judge": judge.name,
            "verdict": judge.verdict,
            "orders": judge.orders,
            "principle": principle.text,
            "criterion": principle.criterion,
            "chosen_is": "revision" if outcome == 1.0 else "first answer",
        }
        rows.append(
            {
                "prompt": _plain(thread.question),
                "chosen": sides[0],
                "rejected": sides[1],
                "annotator": judge.name,
                "source": {**provenance, "prompt_id": thread.id, "rounds": thread.rounds, "feedback": feedback},
            }
        )
    return rows


# -- out ---------------------------------------------------------------------------------------------------------------


def _provenance(config: ConstitutionalConfig, writer: Asker) -> dict[str, Any]:
    """What made a row: the model (and its weights, or its address), how it was sampled, the seed, the prompts' file."""
    asked = {name: value for name, value in writer.source.identity.items() if name != "messages"}
    return {"method": "constitutional", "writer": asked, "seed": config.run.seed, "prompts": config.data.train}


def _demonstration(thread: Thread, provenance: Mapping[str, Any]) -> dict[str, Any]:
    source = {**provenance, "prompt_id": thread.id, "first_answer": thread.answer, "rounds": thread.rounds}
    answer = {"role": "assistant", "content": thread.revision}
    return {"messages": [*_plain(thread.question), answer], "source": source}


def _prompt(thread: Thread) -> Prompt:
    return Prompt(id=thread.id, messages=thread.question)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _causes(left: Counter[str]) -> str:
    return ", ".join(f"{count} × {cause}" for cause, count in left.items() if count) or "nothing"


def _show(threads: Sequence[Thread], say: parts.Say) -> None:
    thread = threads[0]
    for name, text in (
        ("prompt", thread.question[-1].content),
        ("first answer", thread.answer),
        ("principle", thread.rounds[-1]["principle"]),
        ("critique", thread.rounds[-1]["critique"]),
        ("revision", thread.revision),
    ):
        say(parts.printable(f"  {name}: {' '.join(text.split())[:200]}"))
