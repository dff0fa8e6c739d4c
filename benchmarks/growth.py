"""How Tether's cost grows, one size at a time, and what its losses cost beside their step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from benchmarks.compare import Bench
from benchmarks.measures import in_words, slope
from benchmarks.works import BEST, Work, ids, operations, sampling, token_counts

REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Curve:
    """``work(size)``: the step at a size; ``models``: where the model is what grows."""

    title: str
    size: str
    sizes: Sequence[int] = ()
    work: Callable[[int], Work]
    models: Sequence[str] = ()


def groups(count: int, prompt: int, size: int, completion: int) -> Work:
    """One optimizer step over ``count`` prompts with ``size`` completions each, the loss being cross-entropy."""
    generator = random.Random(4)
    rows = [
        {"prompt": ids(generator, prompt), "completions": [ids(generator, completion) for _ in range(size)]}
        for _ in range(count)
    ]
    return Work(name="growth", title="", kind="sft", rival=BEST, spec={"rows": rows})


CURVES = {
    "completion": Curve(
        title="training, completion length (1 prompt of 240 tokens × 8)",
        size="tokens a completion",
        sizes=(32, 64, 128, 256),
        work=lambda n: groups(1, 240, 8, n),
    ),
    "group": Curve(
        title="training, group size (1 prompt of 240 tokens, completions of 64)",
        size="completions a prompt",
        sizes=(2, 4, 8, 16),
        work=lambda n: groups(1, 240, n, 64),
    ),
    "prompt": Curve(
        title="training, prompt length (1 prompt × 8 completions of 64 tokens)",
        size="tokens a prompt",
        sizes=(60, 120, 240, 480),
        work=lambda n: groups(1, n, 8, 64),
    ),
    "batch": Curve(
        title="training, batch (prompts of 240 tokens × 2 completions of 64)",
        size="prompts a step",
        sizes=(1, 2, 4, 8),
        work=lambda n: groups(n, 240, 2, 64),
    ),
    "model": Curve(
        title="training, model (2 prompts of 240 tokens × 2 completions of 64; two random Llamas and SmolLM2)",
        size="parameters",
        work=lambda n: groups(2, 240, 2, 64),
        models=("llama:384x12", "smollm2-135m", "llama:1024x16"),
    ),
    "sampling-length": Curve(
        title="sampling, new tokens (2 prompts of 60 tokens × 8)",
        size="new tokens",
        sizes=(16, 32, 64),
        work=lambda n: sampling("growth", 2, 8, 60, n),
    ),
    "sampling-rows": Curve(
        title="sampling, rows at once (prompts of 60 tokens × 8, 32 new tokens)",
        size="rows",
        sizes=(8, 16, 32, 64),
        work=lambda n: sampling("growth", n // 8, 8, 60, 32),
    ),
}


def run(
    bench: Bench,
    names: Sequence[str],
    raw: dict[str, Any],
    about: Mapping[str, Any],
    model_folder: Callable[[str], str],
    keep: Callable[[], None],
) -> None:
    """Measure the named curves; each is kept as soon as it is known."""
    for name in names:
        curve = CURVES[name]
        if curve.models:
            opened = [(replace(bench, model=model_folder(model)), model, 0) for model in curve.models]
        else:
            opened = [(bench, str(size), size) for size in curve.sizes]
        points = [_point(at, label, size, curve.work(size)) for at, label, size in opened]
        sizes = [p["size"] for p in points]
        exponent = slope(sizes, [p["seconds"] for p in points])
        bench.say(f"{curve.title}: {in_words(exponent)}")
        raw[name] = {
            "title": curve.title,
            "size": curve.size,
            "points": points,
            "slope": exponent,
            "expected": slope(sizes, [p["operations"] for p in points]),
            "about": about,
        }
        keep()


def _point(bench: Bench, label: str, size: int, work: Work) -> dict[str, Any]:
    """Median seconds of a step at one size; where the model grows, the size is its parameters."""
    with bench.start("tether_arm") as process:
        facts = bench.open(process, work)
        process.ask("agree")
        process.ask("step")
        seconds = median(process.ask("step")["seconds"] for _ in range(REPEATS))
    tokens = token_counts(work, facts.get("prompt_tokens", ()))
    parameters = facts["trunk"] + facts["head"]
    bench.say(f"  {label}: {seconds:.2f} s")
    return {
        "label": label if size else f"{label}: {parameters / 1e6:.0f} M",
        "size": size or parameters,
        "seconds": seconds,
        "tokens": tokens.decoded or tokens.useful,
        "operations": sum(operations(work, tokens, **{k: facts[k] for k in ("trunk", "head", "attention")})),
    }


def losses(bench: Bench) -> dict[str, Any]:
    """Of every loss its share of the step that it belongs to."""
    with bench.start("losses_arm") as process:
        bench.open(process, groups(1, 1, 1, 1))
        found = process.ask("agree")
    for name, share in sorted(found["shares"].items(), key=lambda item: -item[1]):
        bench.say(f"  {name:18} {100 * share:6.3f} %")
    over = [name for name, share in found["shares"].items() if share > found["limit"]]
    if over:
        bench.say(f"over {found['limit']:.0%} of their step: {', '.join(over)}")
    return found


def scoring(bench: Bench) -> dict[str, Any]:
    """A reward model's time over that of the forward pass it needs."""
    with bench.start("scoring_arm") as process:
        bench.open(process, groups(1, 1, 1, 1))
        found = process.ask("agree")
    bench.say(f"  {median(found['ratios']):.3f} of the packed forward pass alone ({found['seconds']:.1f} s)")
    if median(found["ratios"]) > found["limit"]:
        bench.say(f"over {found['limit']:.2f} of it")
    return found
