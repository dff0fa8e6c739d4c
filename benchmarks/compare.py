"""One work, two arms: whether they agree, and then pairs of steps in alternating order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import machine
from benchmarks.measures import agreement
from benchmarks.processes import Process
from benchmarks.works import Rival, Work, operations, token_counts

# Of the machine's memory: two arms that held more between them would drive each other out, so each gives back what it
# does not use after every step.
CROWDED = 0.8

Start = Callable[[str], Process]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all comparisons of a run share. ``start``: an arm's name -> its process."""

    start: Start
    model: str
    threads: int
    say: Say
    memory: int

    def begin(self, process: Process, work: Work, **options: Any) -> None:
        """Have an arm load its model; its answer holds the facts that it tells of itself."""
        spec = {"kind": work.kind, "model": self.model, **work.spec, **options}
        process.tell("open", work=spec, threads=self.threads)

    def open(self, process: Process, work: Work) -> dict[str, Any]:
        """``begin``, waited for: the facts."""
        self.begin(process, work)
        return process.answer()["facts"]


def compare(bench: Bench, work: Work, rival: Rival, pairs: int) -> dict[str, Any]:
    """What is known of ``work`` afterwards, ready for JSON; ``void`` says why it was not timed, where it was not."""
    with ExitStack() as stack:
        # All begin at once: reading libraries and a model takes each some seconds.
        ours, theirs, ceiling = (
            stack.enter_context(bench.start(arm)) for arm in ("tether_arm", rival.arm, "ceiling_arm")
        )
        bench.begin(ours, work, rounded=rival.rounded)
        bench.begin(theirs, work, **rival.options)
        facts, other = ours.answer()["facts"], theirs.answer()["facts"]
        mine = ours.ask("agree")
        other_side = theirs.ask("agree", **_passed_on(mine))
        found = agreement(mine, other_side, rounded=rival.rounded)
        void = found.void or _different_prompts(facts, other)
        tokens = token_counts(work, facts.get("prompt_tokens", ()))
        training, drawing = operations(work, tokens, **{k: facts[k] for k in ("trunk", "head", "attention")})
        row: dict[str, Any] = {
            "rival": rival.name,
            "agreement": {**asdict(found), "said": str(found)},
            "void": void,
            "tokens": {**asdict(tokens), "useful": tokens.useful},
            "operations": {"training": training, "drawing": drawing},
            "weight_bytes": 4 * (facts["trunk"] + facts["head"]),
        }
        if void:
            bench.say(f"  void: {void}")
            return row
        bench.say(f"  agree: {found}")
        if not pairs:
            return {**row, "void": "not timed (--pairs 0)"}
        ceiling.ask("open", work={}, threads=bench.threads)
        ceiling.ask("agree")
        # What a step needs, about; the two arms hold it at once.
        crowded = mine["peak"] + other_side["peak"] > CROWDED * bench.memory
        timed = _time(ours, theirs, ceiling, pairs, bench.say, rest=crowded)
        return {**row, **timed, "void": _different_lengths(work, timed["drawn"])}


def _passed_on(answer: dict[str, Any]) -> dict[str, Any]:
    """What the other side needs to be asked the same: tokens that were drawn."""
    return {"tokens": answer["tokens"]} if "tokens" in answer else {}


def _different_prompts(mine: dict[str, Any], other: dict[str, Any]) -> str:
    one, two = mine.get("prompt_tokens"), other.get("prompt_tokens", mine.get("prompt_tokens"))
    return "" if one == two else f"the prompts have {one} tokens on one side and {two} on the other"


def _different_lengths(work: Work, drawn: list[float]) -> str:
    """Both sides must have drawn all that they were asked for."""
    wanted = work.spec.get("new_tokens")
    wrong = [length for length in drawn if length != wanted]
    return f"a completion has {wrong[0]:g} tokens instead of {wanted}" if wrong else ""


def _time(ours: Process, theirs: Process, ceiling: Process, pairs: int, say: Say, *, rest: bool) -> dict[str, Any]:
    """``pairs`` pairs; in every second one the rival goes first. The ceiling is measured between them. ``rest``: an arm
    gives its free memory back after each step. ``drawing``: of our steps, the seconds that went into drawing."""
    arms = (ours.pid, theirs.pid, ceiling.pid)
    times, loads, ceilings, drawing = [], [], [], []
    peak, drawn = {"ours": 0, "theirs": 0}, []
    for number in range(pairs):
        before = machine.read_load(arms)
        order = [("ours", ours), ("theirs", theirs)]
        taken = {}
        for name, process in order if number % 2 == 0 else reversed(order):
            answer = process.ask("step", rest=rest)
            taken[name] = answer["seconds"]
            peak[name] = max(peak[name], answer["peak"])
            drawn += [answer["drawn"]] if "drawn" in answer else []
            drawing += [answer["drawing"]] if "drawing" in answer else []
        loads.append(machine.other_load(before, machine.read_load(arms)))
        times.append((taken["ours"], taken["theirs"]))
        answer = ceiling.ask("step")
        ceilings.append((answer["flops"], answer["bandwidth"]))
        ratio = taken["theirs"] / taken["ours"]
        say(f"  pair {number + 1} of {pairs}: {taken['ours']:.2f} s, {taken['theirs']:.2f} s, ratio {ratio:.2f}")
    return {
        "pairs": times,
        "peak": peak,
        "ceilings": ceilings,
        "load": loads,
        "drawn": drawn,
        "drawing": drawing,
        "gave_memory_back": rest,
    }
