"""The commands that use and judge a model: sample, chat, evaluate, reward evaluate, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tether.core.errors import UserError

if TYPE_CHECKING:
    from tether.core.protocols import SamplingSettings

Model = Annotated[str, typer.Option("-m", "--model", help="Embedded name, folder (a run works), or hub id.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus; 1: off.")]
TopK = Annotated[int, typer.Option(min=0, help="Likeliest k; 0: off.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest completion.")]
Stop = Annotated[list[str] | None, typer.Option(help="End a completion at this text; repeatable.")]
System = Annotated[str | None, typer.Option(help="System message.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks for errors.")]

EMBEDDED = "smollm2-135m"


def add(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    for command in (sample, chat, evaluate, report, demo, control):
        app.command(command.__name__)(command)
    # Two words: `tether reward` alone trains one (see ``Front.resolve_command``).
    app.command("reward evaluate")(reward_evaluate)


def settings_of(
    temperature: float, top_p: float, top_k: int, max_new_tokens: int, stop: list[str] | None
) -> SamplingSettings:
    if top_p == 0:
        raise UserError("--top-p 0 leaves no token to draw; give a share above 0, or --temperature 0 for the likeliest")
    from tether.core.protocols import SamplingSettings

    return SamplingSettings(
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, stop=tuple(stop or ())
    )


def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to ask.")] = None,
    model: Model = EMBEDDED,
    prompts: Annotated[str | None, typer.Option(help="JSONL or Parquet file of prompts.")] = None,
    out: Annotated[str | None, typer.Option(help="Write JSONL here; empty: print.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Completions per prompt.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(min=1, help="Only the best of this many per prompt, by --reward.")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="As for evaluate --judge; with --best-of.")] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 256,
    stop: Stop = None,
    seed: Seed = 0,
    system: System = None,
    debug: Debug = False,
) -> None:
    """Completions for prompts given here or in a file; with --best-of the best of several."""
    if not prompt and prompts is None:
        raise UserError('nothing to ask: give a prompt (tether sample "Why is the sky blue?") or --prompts FILE')
    if (best_of is None) != (reward is None):
        raise UserError("--best-of N and --reward SPEC belong together: the reward says which of the N is best")
    if best_of is not None and n != 1:
        raise UserError("-n would be ignored: --best-of N draws N completions per prompt and keeps one; take -n out")
    settings = settings_of(temperature, top_p, top_k, max_new_tokens, stop)
    if best_of is not None and reward is not None:
        from tether.methods.choose_best import run as run_best

        return run_best(
            model=model, prompts=prompts, prompt=list(prompt or []), out=out, best_of=best_of, reward=reward,
            settings=settings, seed=seed, system=system,
        )  # fmt: skip
    from tether.methods.sample import run

    run(
        model=model, prompts=prompts, prompt=list(prompt or []), out=out, n=n, settings=settings, seed=seed,
        system=system,
    )  # fmt: skip


def chat(
    model: Model = EMBEDDED,
    system: System = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 512,
    stop: Stop = None,
    debug: Debug = False,
) -> None:
    """Talk to a model in the terminal."""
    settings = settings_of(temperature, top_p, top_k, max_new_tokens, stop)
    from tether.methods.chat import run

    run(model=model, system=system, settings=settings)


def evaluate(
    prompts: Annotated[str, typer.Option(help="JSONL or Parquet file of held-out prompts.")],
    judge: Annotated[
        str,
        typer.Option(help="Reward model folder, a rule, file.py:function, or '{type: judge, ...}' (or a YAML file)."),
    ],
    model: Model = EMBEDDED,
    baseline: Annotated[str | None, typer.Option(help="Compare with this model; empty: scores only.")] = None,
    pass_at: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="K", help="pass@K by a verifier (1: right, 0: wrong); repeatable."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers to each prompt, with --pass-at; empty: its largest K.")
    ] = None,
    n_prompts: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 256,
    stop: Stop = None,
    seed: Seed = 0,
    system: System = None,
    out: Annotated[str | None, typer.Option(help="Write the judged answers and the result here.")] = None,
    debug: Debug = False,
) -> None:
    """Win rate against a baseline with its interval, judged in both orders; or pass@k."""
    if samples is not None and not pass_at:
        raise UserError("--samples would be ignored: only --pass-at K draws several answers to a prompt; take it out")
    settings = settings_of(temperature, top_p, top_k, max_new_tokens, stop)
    if pass_at:
        from tether.methods.evaluate_pass import run as run_pass

        return run_pass(
            model=model, baseline=baseline, prompts=prompts, judge=judge, n_prompts=n_prompts, samples=samples,
            ks=pass_at, settings=settings, seed=seed, system=system, out=out,
        )  # fmt: skip
    from tether.methods.evaluate import run

    run(
        model=model, baseline=baseline, prompts=prompts, judge=judge, n_prompts=n_prompts, settings=settings,
        seed=seed, system=system, out=out,
    )  # fmt: skip


def reward_evaluate(
    model: Annotated[list[str], typer.Option("-m", "--model", help="Reward model folder (a run works); repeatable.")],
    data: Annotated[list[str], typer.Option(help="Pairs, rankings or judged answers it has not seen; repeatable.")],
    slices: Annotated[
        list[str] | None, typer.Option("--slice", metavar="COLUMN", help="Accuracy by this column too; repeatable.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Write the page here, and the numbers beside it (.json).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of each file.")] = None,
    max_bad_rows: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of unusable rows that is fine.")] = 0.01,
    debug: Debug = False,
) -> None:
    """Accuracy, calibration, and how much of it is length and format; several models: their agreement."""
    from tether.methods.reward_evaluate import run

    run(models=model, data=data, slices=slices or (), out=out, limit=limit, max_bad_rows=max_bad_rows)


def report(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; empty: FOLDER/report.html.")] = None,
    debug: Debug = False,
) -> None:
    """A run as one self-contained HTML page."""
    from tether.methods.report import run

    typer.echo(str(run(folder, out)))


def demo(
    out: Annotated[str | None, typer.Option(help="Folder to write; empty: runs/demo-<time>.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: fewer steps.")] = False,
    overoptimise: Annotated[
        bool, typer.Option("--overoptimise", help="Without the KL anchor, pressed hard: proxy up, gold down.")
    ] = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """The whole path on a small real model: reward model, PPO, DPO, evaluation, one report."""
    from tether.methods.demo import run

    typer.echo(str(run(out=out, quick=quick, overoptimise=overoptimise, seed=seed)))


def control(
    task: Annotated[str, typer.Argument(help="cartpole or grid.")] = "grid",
    algorithm: Annotated[str | None, typer.Option(help="A row of the algorithm table; empty: ppo.")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Preferences; empty: 400.")] = None,
    rationality: Annotated[
        float | None, typer.Option(min=0.0, help="Right with sigmoid(this x difference); empty: always.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Fits of the reward, each to more pairs.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training runs of each policy.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each policy.")] = None,
    seed: Seed = 0,
    out: Annotated[str | None, typer.Option(help="Folder to write; empty: runs/control-<task>-<time>.")] = None,
    debug: Debug = False,
) -> None:
    """CartPole or a grid world: a reward learned from preferences, a policy from the reward."""
    from tether.methods.control import run

    run(
        task, algorithm=algorithm, pairs=pairs, rationality=rationality, rounds=rounds, seeds=seeds, steps=steps,
        seed=seed, out=out,
    )  # fmt: skip
