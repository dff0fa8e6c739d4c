"""The works: what is timed, on which rows, against whom. Rows are made here, from a seed, and sent to both arms."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WORDS = """
the of and to in a is that for it was on are as with they be at one have this from or had by word but what some we can
out other were all there when up use your how said each she which do their time if will way about many then them write
would like so these her long make thing see him two has look more day could go come did number sound no most people my
over know water than call first who may down side been now find any new work part take get place
""".split()  # noqa: SIM905 - a list of them would be a page long
# Tokens of the completions that GRPO's gradients are compared on.
AGREED = 32
# Token ids that are drawn for rows of tokens: ordinary words of every vocabulary that is larger than this.
FIRST_ID, LAST_ID = 300, 30_000


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Who does the same work. ``arm``: a module of ``benchmarks/arms``; ``options``: what it is told on top."""

    name: str
    arm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # It computes in bfloat16: Tether does too beside it, and rounding is no disagreement.
    rounded: bool = False


BEST = Rival(name="TRL fp32", arm="trl_arm", options={"setting": "best"})
DEFAULT = Rival(name="TRL default", arm="trl_arm", options={"setting": "default"}, rounded=True)
PACKED = Rival(name="TRL fp32, packing", arm="trl_arm", options={"setting": "best", "packing": True})
GENERATE = Rival(name="transformers generate", arm="plain_arm")
VLLM = Rival(name="vLLM for CPU", arm="vllm_arm")
LOOP = Rival(name="plain transformers", arm="plain_arm")


@dataclass(frozen=True, kw_only=True)
class Work:
    """``spec``: what both arms are told. ``trained`` passes forward and backward, ``scored`` passes forward over the
    work's useful tokens, for the count of operations; ``target``: the ratio that the project set itself."""

    name: str
    title: str
    kind: str
    rival: Rival
    spec: dict[str, Any]
    default: Rival | None = None
    trained: int = 1
    scored: int = 0
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Useful tokens of a step: every prompt once, and every completion. ``seen``: how many tokens each of them attends
    to, added up; ``decoded``: those that are drawn, in ``steps`` passes of all rows."""

    prompt: int
    completion: int
    seen: int = 0
    decoded: int = 0
    steps: int = 0

    @property
    def useful(self) -> int:
        return self.prompt + self.completion


def token_counts(work: Work, prompt_tokens: Sequence[int]) -> Tokens:
    """``prompt_tokens``: of each prompt that is text, as the arm has counted them."""
    spec = work.spec
    if "rows" in spec:
        groups = [(len(row["prompt"]), [len(c) for c in row["completions"]]) for row in spec["rows"]]
        completions = sum(sum(sizes) for _, sizes in groups)
        return Tokens(prompt=sum(p for p, _ in groups), completion=completions, seen=_seen(groups))
    each = [spec["new_tokens"]] * spec["group"]
    drawn = len(spec["prompts"]) * sum(each)
    seen = _seen([(p, each) for p in prompt_tokens])
    return Tokens(prompt=sum(prompt_tokens), completion=drawn, seen=seen, decoded=drawn, steps=spec["new_tokens"])


def _seen(groups: Sequence[tuple[int, Sequence[int]]]) -> int:
    """A token sees itself and what is before it; ``groups``: length of a prompt and those of its completions."""
    return sum(p * (p + 1) // 2 + sum(c * p + c * (c + 1) // 2 for c in sizes) for p, sizes in groups)


def operations(work: Work, tokens: Tokens, *, trunk: int, head: int, attention: int = 0) -> tuple[float, float]:
    """Floating-point operations that the useful tokens need, of training with its scoring and of drawing: 2 a parameter
    and token forward, 4 more backward; the head on completion tokens alone. ``attention``: operations forward for each
    token that a token sees, which double backward as well."""
    passes = 3 * work.trained + work.scored
    # Of PPO's networks, policy and reference have such a head, critic and reward model none.
    headless = {"reward": passes, "ppo": (passes + 1) // 2}.get(work.kind, 0)
    through_trunk = 2.0 * tokens.useful * trunk + tokens.seen * attention
    through_head = 2.0 * tokens.completion * head
    training = passes * through_trunk + (passes - headless) * through_head
    return training, through_trunk + through_head if tokens.decoded else 0.0


def ids(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


def text(generator: random.Random, words: int) -> str:
    """A prompt of about as many tokens as words."""
    return " ".join(generator.choice(WORDS) for _ in range(words))


def pairs(count: int, prompt: int, shortest: int, longest: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preference pairs: prompts of about ``prompt`` tokens, completions of ``shortest`` to ``longest``."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        size = prompt + generator.randint(-prompt // 20, prompt // 20)
        completions = [ids(generator, generator.randint(shortest, longest)) for _ in range(2)]
        rows.append({"prompt": ids(generator, size), "completions": completions})
    return rows


def demonstrations(lengths: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Whole texts: every token but the first is trained."""
    generator = random.Random(seed)
    return [{"prompt": ids(generator, 1), "completions": [ids(generator, n - 1)]} for n in lengths]


def preference(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    *,
    cached: bool = False,
    default: Rival | None = None,
    target: float | None = None,
) -> Work:
    return Work(
        name=name,
        title=title,
        kind="dpo",
        rival=BEST,
        default=default,
        spec={"rows": rows, "cached": cached},
        scored=0 if cached else 1,
        target=target,
    )


def grpo(
    name: str,
    prompts: int,
    group: int,
    prompt: int,
    new_tokens: int,
    *,
    default: Rival | None = None,
    target: float | None = None,
) -> Work:
    generator = random.Random(1)
    completions = [[ids(generator, AGREED) for _ in range(group)] for _ in range(prompts)]
    return Work(
        name=name,
        title=f"GRPO, {prompts} prompts × {group}, prompt ≈ {prompt}, {new_tokens} new tokens",
        kind="grpo",
        rival=BEST,
        default=default,
        spec={
            "prompts": [text(generator, prompt) for _ in range(prompts)],
            "group": group,
            "new_tokens": new_tokens,
            # For the agreement: completions that both are given, and advantages that do not add up to nothing.
            "completions": completions,
            "advantages": [(i % 5) - 1.5 for i in range(prompts * group)],
        },
        target=target,
    )


def ppo(name: str, lengths: Sequence[int], group: int, new_tokens: int, epochs: int, target: float | None) -> Work:
    generator = random.Random(2)
    return Work(
        name=name,
        title=f"PPO, {len(lengths)} prompts of {min(lengths)}–{max(lengths)} tokens × {group}, {new_tokens} new, "
        f"{epochs} epoch{'s' * (epochs > 1)}, four networks",
        kind="ppo",
        rival=LOOP,
        spec={
            "prompts": [text(generator, n) for n in lengths],
            "group": group,
            "new_tokens": new_tokens,
            "epochs": epochs,
            "completions": [[ids(generator, new_tokens) for _ in range(group)] for _ in lengths],
        },
        trained=2 * epochs,
        # Reward model, reference and critic. What the policy says before the update, the sampler has said.
        scored=3,
        target=target,
    )


def sampling(
    name: str,
    prompts: int,
    group: int,
    prompt: int,
    new_tokens: int,
    *,
    rival: Rival = GENERATE,
    default: Rival | None = None,
    target: float | None = None,
) -> Work:
    generator = random.Random(3)
    return Work(
        name=name,
        title=f"sampling, {prompts * group} rows ({prompts} prompts × {group}) × {new_tokens} tokens",
        kind="sampling",
        rival=rival,
        default=default,
        spec={
            "prompts": [text(generator, prompt) for _ in range(prompts)],
            "group": group,
            "new_tokens": new_tokens,
            "checked_tokens": min(16, new_tokens),
        },
        trained=0,
        target=target,
    )


SFT_LENGTHS = (20, 95, 210, 330, 450)


def works() -> dict[str, Work]:
    """The table, in its order."""
    rows = pairs(3, 230, 56, 120)
    texts = demonstrations(SFT_LENGTHS)
    sft = {"kind": "sft", "spec": {"rows": texts}}
    found = (
        Work(name="sft", title="SFT, 5 rows of 20–450 tokens", rival=BEST, target=2.0, **sft),
        Work(name="sft-packing", title="SFT, the same rows, TRL packing", rival=PACKED, target=1.3, **sft),
        Work(
            name="reward",
            title="reward model, 2 pairs",
            kind="reward",
            rival=BEST,
            spec={"rows": rows[:2]},
            target=1.7,
        ),
        preference("dpo-3", "DPO, 3 pairs, reference in the step", rows, default=DEFAULT, target=2.0),
        preference("dpo-cached", "DPO, 2 pairs, reference cached on both sides", rows[:2], cached=True, target=2.0),
        preference("dpo-long", "DPO, 2 pairs, completions dominate (prompt ≈ 30, 110–140)", pairs(2, 30, 110, 140)),
        grpo("grpo-64", 2, 8, 240, 64, default=DEFAULT, target=2.2),
        grpo("grpo-128", 2, 8, 240, 128, target=2.2),
        ppo("ppo", (60, 150, 240), 2, 64, 1, target=2.0),
        sampling("sampling-16x64", 2, 8, 60, 64, target=3.0),
        sampling("sampling-64x32", 8, 8, 60, 32, target=4.0),
        sampling("vllm-16x64", 2, 8, 60, 64, rival=VLLM, target=1.2),
    )
    return {work.name: work for work in found}
