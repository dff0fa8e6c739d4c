"""``tether sample --best-of N``: the best of N completions of each prompt by a reward, and what a larger N buys."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tether.config.sections import ModelConfig
from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import SamplingSettings
from tether.evals.best_of_n import kl_bound
from tether.methods import parts
from tether.methods.choose import curve_of, table
from tether.methods.choose_candidates import RELATIVE, Generator, demonstration
from tether.methods.choose_select import EMPTY, UNSCORED, Candidate, best_first, causes, tied
from tether.methods.judge_checks import check_no_memory
from tether.methods.judges import given_judge, open_pair_judge, open_rule
from tether.methods.sample import given_prompts, open_sampler
from tether.rewards.judges.ask import sentence
from tether.rewards.meter import counted
from tether.runs.log import plain


def run(
    *,
    model: str,
    prompts: str | None,
    prompt: list[str],
    out: str | None,
    best_of: int,
    reward: str,
    settings: SamplingSettings,
    seed: int,
    system: str | None,
) -> None:
    """Draw ``best_of`` completions of each prompt, score them, print or write the best with all scores."""
    if settings.temperature == 0 and best_of > 1:
        raise UserError(f"--temperature 0 gives the same completion {best_of} times; use one above 0")
    path = parts.new_file(out) if out is not None else None
    say = parts.speaker(False)
    spec = given_judge(reward)
    relative = open_pair_judge(spec) is not None
    if not relative:
        open_rule(spec)
        check_no_memory(spec, "best of n")
    asked = given_prompts(prompts, prompt)
    sampler = open_sampler(model, system, settings, say)
    origin = {"seed": seed, "sampling": plain(vars(settings)), **({"system": system} if system else {})}
    generator = Generator.open(ModelConfig(name=model), sampler, spec, say, origin)
    rollouts, candidates = generator.draw(asked, best_of, settings, seed)
    pools = [candidates[i : i + best_of] for i in range(0, len(candidates), best_of)]
    scored = [[c for c in pool if math.isfinite(c.score)] for pool in pools]
    left = {
        UNSCORED: len(candidates) - sum(map(len, scored)),
        "prompt without any score, so without a best": sum(not pool for pool in scored),
        "prompt whose best was drawn by lot from equals": 0,
        f"{EMPTY} (scored like any other)": sum(not c.text.strip() for c in candidates),
        "cut at the length limit (scored like any other)": sum(r.finish_reason == "length" for r in rollouts),
    }
    if not any(scored):
        raise RewardFailure(f"the reward {reward} scored none of the {len(candidates)} completions")
    best = [best_first(pool, seed)[:1] for pool in scored]
    left["prompt whose best was drawn by lot from equals"] = sum(
        tied(pool, one) for pool, one in zip(scored, best, strict=True)
    )
    if path is None:
        for one in best:
            for c in one:
                print(parts.printable(f"\n> {c.prompt.question}\n{c.text}\n  [score {c.score:.4g}]"))
    else:
        _write(path, best, pools)
    print(f"best of {best_of} by {reward}: {sum(map(len, best))} of {len(asked)} prompts; of note: {causes(left)}")
    points, short = ([], 0) if relative else curve_of(pools)
    if short:
        print(f"  the curve leaves out {short} prompts with fewer scored completions than the others")
    binary = all(c.score in (0.0, 1.0) for pool in scored for c in pool)
    print(RELATIVE if relative else "\n".join(table(points, binary=binary)))
    if counts := counted([generator.reward]):
        print(f"judge: {sentence(counts)}")
    if path is not None:
        print(f"written: {path}")


def _write(path: Path, best: list[list[Candidate]], pools: list[list[Candidate]]) -> None:
    """A row of each prompt: the best and where it comes from, and the scores of all (null: unscored)."""
    with path.open("w", encoding="utf-8") as file:
        for one, pool in zip(best, pools, strict=True):
            for c in one:
                source = {"method": "best of n", "kl_bound": kl_bound(len(pool))}
                row = {
                    "id": c.prompt.id,
                    **demonstration(c, pool, source),
                    "score": c.score,
                    "scores": [other.score for other in pool],
                }
                file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")
