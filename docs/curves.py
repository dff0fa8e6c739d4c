"""The measured curves of the documentation: every objective on one small task, three seeds each.

    OMP_NUM_THREADS=1 python docs/curves.py [KIND/NAME ...]    writes docs/curves.json (a name: that curve anew)

The task, and what the curves do not show: docs/methods/measured.md.
"""

from __future__ import annotations

import json
import math
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import tether
from tether.advantages import ADVANTAGES
from tether.algorithms import ALGORITHMS
from tether.backends.local.learner import evaluate
from tether.backends.local.sampler import LocalSampler
from tether.config.schema import RewardModelConfig, RLConfig
from tether.config.sections import OptimConfig
from tether.core.batches import Batch, Group
from tether.core.protocols import Loss, SamplingSettings
from tether.core.text import Prompt
from tether.data.chat import ChatTokenizer
from tether.kl_control import KL_CONTROL
from tether.losses import PREFERENCE, REWARD, SUPERVISED, UNPAIRED
from tether.methods import parts, rl
from tether.methods.preference import with_baseline, with_reference
from tether.methods.reference import OfflineReference
from tether.methods.reward import judgements, pairs, plan_for
from tether.models.load import load_backbone
from tether.models.roles import Policy, Scorer, new_head

OUT = Path(__file__).parent / "curves.json"
SEEDS = (0, 1, 2)
LETTERS = "abcdefghijklmnopqrstuvwxyz "
LENGTH = 8
SETTINGS = SamplingSettings(max_new_tokens=LENGTH)
WORDS = ("cat", "dog", "mat", "one", "this", "that", "what", "then")
REWARD_FILE = f"""
def vowels(prompts, completions):
    return [sum(c.count(v) for v in "aeiou") / {LENGTH} for c in completions]
"""
STEPS = 20  # of 32 completions each
EVERY = 2  # steps between two measurements where they are not free
RATE = {"rl": 1e-2, "policy": 3e-3, "scorer": 3e-3}
BUDGET = 4096


def build_model(folder: Path, seed: int) -> str:
    """A random two-layer Llama over the letters, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|begin|>", "<|end|>"]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*specials, *LETTERS])}, merges=[]))
    raw.add_special_tokens(specials)
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    )
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape, vocab_size=len(LETTERS) + 3, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def true_reward(text: str) -> float:
    return sum(text.count(vowel) for vowel in "aeiou") / LENGTH


def prompts(count: int, name: str) -> list[Prompt]:
    return [Prompt(id=f"{name}-{i}", text=WORDS[i % len(WORDS)]) for i in range(count)]


class World:
    """One seed: the untrained policy in a folder, and what it wrote."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir()
        self.model = build_model(folder / "model", seed)
        (folder / "reward.py").write_text(REWARD_FILE, encoding="utf-8")
        rows = "".join(json.dumps({"prompt": f"{word} {i}"}) + "\n" for i, word in enumerate(WORDS * 2))
        (folder / "prompts.jsonl").write_text(rows.translate(str.maketrans("0123456789", "abcdefghij")))
        text = "".join(json.dumps({"text": f"{word} and {word}"}) + "\n" for word in WORDS)
        (folder / "text.jsonl").write_text(text, encoding="utf-8")
        policy = self.policy()
        # Eight completions of every prompt: what losses on data learn from, and beside it what they are judged on.
        self.written = self.sampler(policy).sample(prompts(96, "data"), n=8, settings=SETTINGS, seed=seed)
        self.held_out = self.sampler(policy).sample(prompts(32, "held-out"), n=8, settings=SETTINGS, seed=seed)

    def policy(self) -> Policy:
        return Policy(backbone=load_backbone(self.model, say=lambda line: None))

    def sampler(self, policy: Policy) -> LocalSampler:
        return LocalSampler(policy=policy, chat=ChatTokenizer(policy.backbone.tokenizer))


# -- rows of the algorithm table, advantages and KL control: through the front door -----------------------------------


def online(world: World, name: str, overrides: dict, metric: str, group: int | None = None) -> tuple[list, list]:
    """What ``tether rl`` writes of ``metric`` at every step of 32 completions."""
    row = ALGORITHMS[name]
    group = group or row.group_size
    out = world.folder / f"run-{time.monotonic_ns()}"
    settings = {
        "model": {"name": world.model},
        "data": {"train": str(world.folder / "prompts.jsonl")},
        "algorithm": name,
        "overrides": overrides,
        "reward": f"{world.folder / 'reward.py'}:vowels",
        "optim": {"learning_rate": RATE["rl"]},
        "run": {"folder": str(out), "report": False, "seed": world.seed},
        "sampling": {"max_new_tokens": LENGTH},
        "steps": STEPS,
        "prompts_per_step": 32 // group,
        "completions_per_prompt": group,
    }
    if row.ptx_weight:
        settings["pretraining"] = {"data": str(world.folder / "text.jsonl")}
    rl.run(RLConfig.model_validate(settings), quiet=True)
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    found = [(line["step"], line["values"][metric]) for line in lines if line["split"] == "train"]
    # Step s is measured on completions that were drawn before its update.
    return [step - 1 for step, _ in found], [value for _, value in found]


def algorithm(world: World, name: str) -> tuple[list, list]:
    changes = {"dapo": {"overlong_cache": 0.0}, "ppo_ptx": {"ptx_weight": 0.01}}
    return online(world, name, changes.get(name, {}), "reward/mean")


def advantage(world: World, name: str) -> tuple[list, list]:
    """The same plain policy gradient under every estimator, the KL in the loss, four completions a prompt."""
    base = "a2c" if "critic" in ADVANTAGES[name]().needs else "reinforce"
    overrides = {"advantage": {"type": name}, "kl_in_reward": 0.0, "loss": {"kl_weight": 0.05}}
    return online(world, base, overrides, "reward/mean", group=4)


def kl_control(world: World, name: str) -> tuple[list, list]:
    options = {"adaptive": {"target": 2.0, "horizon": 160.0}}
    overrides = {"kl_in_reward": 0.1, "kl_control": {"type": name, **options.get(name, {})}}
    return online(world, "rloo", overrides, "kl/reference")


# -- losses on data: the learner's verbs ------------------------------------------------------------------------------


def group_of(rollouts: Sequence, **more) -> Group:
    return Group(
        id=rollouts[0].prompt.id,
        prompt=rollouts[0].prompt_tokens,
        completions=tuple(r.tokens for r in rollouts),
        loss_masks=tuple(r.sampled for r in rollouts),
        **more,
    )


def prefer(rollouts: Sequence, seed: int) -> list[tuple]:
    """Neighbours of one prompt, the preferred one first, as σ(8·difference of true reward) draws it."""
    chance = random.Random(seed)
    out = []
    for a, b in zip(rollouts[::2], rollouts[1::2], strict=True):
        better = chance.random() < 1 / (1 + math.exp(-8 * (true_reward(a.text) - true_reward(b.text))))
        out.append((a, b) if better else (b, a))
    return out


def data_for(kind: str, world: World) -> list[Group]:
    """Groups of the kind that a loss reads, from what the untrained policy wrote."""
    written = world.written
    match kind:
        case "demonstrations":
            return [group_of([chosen]) for chosen, _ in prefer(written, world.seed)]
        case "preferences":
            return [group_of(pair) for pair in prefer(written, world.seed)]
        case "judgements":
            sides = [(r, side == 0) for pair in prefer(written, world.seed) for side, r in enumerate(pair)]
            return [group_of([r], desirable=desirable) for r, desirable in sides]
        case "rankings":
            fours = [written[i : i + 4] for i in range(0, len(written), 4)]
            return [group_of(four, ranks=ranks([true_reward(r.text) for r in four])) for four in fours]
    # Steps: every letter is one, right where it is a vowel.
    vowels = torch.tensor([3 + LETTERS.index(vowel) for vowel in "aeiou"])
    labels = [torch.isin(r.tokens, vowels) for r in written]
    return [group_of([r], labels=mask) for r, mask in zip(written, labels, strict=True)]


def ranks(rewards: Sequence[float]) -> tuple[int, ...]:
    ordered = sorted(set(rewards), reverse=True)
    return tuple(ordered.index(reward) for reward in rewards)


def learn(
    role: Policy | Scorer,
    loss: Loss,
    groups: Sequence[Group],
    lay_out: Callable[[Sequence[Group]], Batch],
    score: Callable[[], float],
    rate: float,
) -> tuple[list, list]:
    """``STEPS`` optimizer steps of 32 completions; ``score`` is asked before the first and after every second."""
    optim = OptimConfig(learning_rate=rate, warmup=0, schedule="constant")
    learner = parts.open_learner(role, optim, STEPS)
    size = 32 // len(groups[0].completions)
    x, y = [0], [score()]
    for step in range(STEPS):
        first = step * size % len(groups)
        learner.forward_backward(lay_out(groups[first : first + size]), loss)
        learner.optim_step()
        if (step + 1) % EVERY == 0:
            x.append(step + 1)
            y.append(score())
    return x, y


def trained_policy(world: World, loss: Loss, kind: str, lay_out: Callable) -> tuple[list, list]:
    """The true reward of what a policy writes that learns from data."""
    policy, before = world.policy(), world.policy()
    quiet = parts.speaker(True)
    if "reference" in loss.needs:
        reference = OfflineReference(frozen=before, store=None)
        lay_out = with_reference(lay_out, reference)
        if "kl_baseline" in loss.needs:
            lay_out = with_baseline(lay_out, parts.logprobs_of(policy, BUDGET), reference, quiet)
    asked = prompts(128, "asked")

    def score() -> float:
        found = world.sampler(policy).sample(asked, n=1, settings=SETTINGS, seed=world.seed)
        return sum(true_reward(r.text) for r in found) / len(found)

    return learn(policy, loss, data_for(kind, world), lay_out, score, RATE["policy"])


def supervised(world: World, name: str) -> tuple[list, list]:
    return trained_policy(world, SUPERVISED[name](), "demonstrations", Batch.from_groups)


def preference(world: World, name: str) -> tuple[list, list]:
    return trained_policy(world, PREFERENCE[name](), "preferences", pairs)


def unpaired(world: World, name: str) -> tuple[list, list]:
    return trained_policy(world, UNPAIRED[name](), "judgements", judgements)


def reward(world: World, name: str) -> tuple[list, list]:
    """Share of held-out pairs of different true reward that the scores order right; half for equal scores."""
    loss = REWARD[name]()
    settings = {"data": {"train": "made here"}, "loss": {"type": name}}
    if name == "process":
        settings["steps"] = {"aggregate": "product"}
    plan = plan_for(loss, RewardModelConfig.model_validate(settings))
    backbone = world.policy().backbone
    torch.manual_seed(world.seed)
    head = new_head(backbone, zero=plan.reading.has_bias, bias=plan.reading.has_bias)
    scorer = Scorer(backbone=backbone, head=head, reading=plan.reading)
    batch = Batch.from_groups([group_of([r]) for r in world.held_out])
    truth = torch.tensor([true_reward(r.text) for r in world.held_out])

    def score() -> float:
        scores = evaluate(scorer, batch, BUDGET).scores
        assert scores is not None
        return ordered_right(scores, truth)

    return learn(scorer, loss, data_for(plan.kind, world), plan.lay_out, score, RATE["scorer"])


def ordered_right(scores: Tensor, truth: Tensor) -> float:
    difference = (truth[:, None] - truth[None]).sign()
    agreed = (scores[:, None] - scores[None]).sign() * difference
    counted = difference != 0
    return float(((agreed[counted] > 0).float() + 0.5 * (agreed[counted] == 0).float()).mean())


MEASURES: dict[str, tuple[Sequence[str], Callable[[World, str], tuple[list, list]]]] = {
    "algorithm": (list(ALGORITHMS), algorithm),
    "advantage": (list(ADVANTAGES), advantage),
    "kl_control": (list(KL_CONTROL), kl_control),
    "supervised": (list(SUPERVISED), supervised),
    "preference": (list(PREFERENCE), preference),
    "unpaired": (list(UNPAIRED), unpaired),
    "reward": (list(REWARD), reward),
}


def main(wanted: Sequence[str]) -> None:
    torch.set_num_threads(1)
    from transformers.utils import logging

    known = [f"{kind}/{name}" for kind, (names, _) in MEASURES.items() for name in names]
    if strangers := [name for name in wanted if name not in known]:
        raise SystemExit(f"no such curve: {', '.join(strangers)}; there are {', '.join(known)}")
    curves = json.loads(OUT.read_text())["curves"] if wanted and OUT.exists() else {}
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        worlds = [World(Path(folder) / str(seed), seed) for seed in SEEDS]
        for key in wanted or known:
            kind, name = key.split("/")
            began = time.process_time()
            found = [MEASURES[kind][1](world, name) for world in worlds]
            x, ys = found[0][0], [[round(v, 4) for v in y] for _, y in found]
            curves[key] = {"x": x, "y": ys}
            ends = " ".join(f"{y[0]:.2f}->{y[-1]:.2f}" for y in ys)
            print(f"{key:28} {ends}  {time.process_time() - began:.1f} s", flush=True)
    versions = {"tether": tether.__version__, "torch": torch.__version__, "python": platform.python_version()}
    made = {"date": date.today().isoformat(), "seeds": list(SEEDS), "versions": versions}
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(curves[key])}" for key in known if key in curves)
    OUT.write_text(f'{{\n"made": {json.dumps(made)},\n"curves": {{\n{body}\n}}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
