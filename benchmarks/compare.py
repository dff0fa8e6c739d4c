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

    def open(
        self, stack: ExitStack, arm: str, work: Work, rival: Rival | None = None
    ) -> tuple[Process, dict[str, Any]]:
        """The process, which ``stack`` ends, and the facts that it tells of itself."""
        process = stack.enter_context(self.start(arm))
        spec = {"kind": work.kind, "model": self.model, **work.spec, **(rival.options if rival else {})}
        return process, process.ask("open", work=spec, threads=self.threads)["facts"]


def compare(bench: Bench, work: Work, rival: Rival, pairs: int) -> dict[str, Any]:
    """What is known of ``work`` afterwards, ready for JSON; ``void`` says why it was not timed, where it was not."""
    with ExitStack() as stack:
        ours, facts = bench.open(stack, "tether_arm", work)
        theirs, other = bench.open(stack, rival.arm, work, rival)
        mine = ours.ask("agree")
        found = agreement(mine, theirs.ask("agree", **_passed_on(mine)), rounded=rival.rounded)
        void = found.void or _different_prompts(facts, other)
        tokens = token_counts(work, facts.get("prompt_tokens", ()))
        row: dict[str, Any] = {
            "rival": rival.name,
            "agreement": {**asdict(found), "said": str(found)},
            "void": void,
            "tokens": {**asdict(tokens), "useful": tokens.useful},
            "operations": operations(work, tokens, trunk=facts["trunk"], head=facts["head"]),
            "weight_bytes": 4 * (facts["trunk"] + facts["head"]),
        }
        if void:
            bench.say(f"  void: {void}")
            return row
        bench.say(f"  agree: {found}")
        ceiling = stack.enter_context(bench.start("ceiling_arm"))
        ceiling.ask("open", work={}, threads=bench.threads)
        ceiling.ask("agree")
        return {**row, **_time(bench, work, ours, theirs, ceiling, pairs)}


def _passed_on(answer: dict[str, Any]) -> dict[str, Any]:
    """What the other side needs to be asked the same: tokens that were drawn."""
    return {"tokens": answer["tokens"]} if "tokens" in answer else {}


def _different_prompts(mine: dict[str, Any], other: dict[str, Any]) -> str:
    one, two = mine.get("prompt_tokens"), other.get("prompt_tokens", mine.get("prompt_tokens"))
    return "" if one == two else f"the prompts have {one} tokens on one side and {two} on the other"


def _time(bench: Bench, work: Work, ours: Process, theirs: Process, ceiling: Process, pairs: int) -> dict[str, Any]:
    """``pairs`` pairs; in every second one the rival goes first. The ceiling is measured between them."""
    rest = False
    if work.warm_up:
        peaks = [process.ask("step")["peak"] for process in (ours, theirs)]
        rest = sum(peaks) > CROWDED * bench.memory
    times, loads, ceilings = [], [], []
    peak = {"ours": 0, "theirs": 0}
    for number in range(pairs):
        before = machine.read_load((ours.pid, theirs.pid, ceiling.pid))
        order = [("ours", ours), ("theirs", theirs)]
        taken = {}
        for name, process in order if number % 2 == 0 else reversed(order):
            answer = process.ask("step", rest=rest)
            taken[name] = answer["seconds"]
            peak[name] = max(peak[name], answer["peak"])
        loads.append(machine.other_load(before, machine.read_load((ours.pid, theirs.pid, ceiling.pid))))
        rest = rest or sum(peak.values()) > CROWDED * bench.memory
        times.append((taken["ours"], taken["theirs"]))
        answer = ceiling.ask("step")
        ceilings.append((answer["flops"], answer["bandwidth"]))
        ratio = taken["theirs"] / taken["ours"]
        bench.say(f"  pair {number + 1} of {pairs}: {taken['ours']:.2f} s, {taken['theirs']:.2f} s, ratio {ratio:.2f}")
    return {"pairs": times, "peak": peak, "ceilings": ceilings, "load": loads, "gave_memory_back": rest}
