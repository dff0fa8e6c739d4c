"""The demo, stage by stage. Training goes through the same front doors that ``tether reward``, ``tether ppo`` and
``tether dpo`` use; what is the demo's own is the questions, the judge and the comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tether.backends.local.sampler import LocalSampler
from tether.config.sections import ModelConfig
from tether.core.batches import Group
from tether.core.errors import UserError
from tether.core.text import Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.methods import parts, preference, reward, rl
from tether.methods.demo import scale as scales
from tether.methods.demo.measure import Measured, measure
from tether.methods.demo.world import GoldReward, draw_pairs, questions
from tether.methods.judges import model_reward
from tether.models.backbone import Backbone
from tether.models.load import load_scorer
from tether.models.roles import Policy
from tether.reports.data import Stage
from tether.rewards.model import ScoreScale
from tether.runs.clock import Split
from tether.runs.folder import new_path

TOKENS = scales.TOKENS_PER_MICRO_BATCH
# Answers per held-out question: the start is what everybody is compared with, so it answers more often.
START_ANSWERS, ANSWERS = 2, 1


@dataclass(kw_only=True, eq=False)
class Demo:
    """What the stages share: the start model, the judge, the folder and the clock."""

    out: Path
    scale: scales.Scale
    seed: int
    backbone: Backbone
    chat: ChatTokenizer
    gold: GoldReward
    clock: Split = field(default_factory=Split)
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        self.clock.take()
        yield
        seconds = time.monotonic() - start
        self.stages.append(Stage(name=name, seconds=seconds, parts=self.clock.take()))
        print(f"   {seconds:.0f} s", flush=True)

    def sample(self, backbone: Backbone, prompts: Sequence[Prompt], n: int, seed: int) -> list[Rollout]:
        policy = Policy(backbone=backbone, temperature=scales.SAMPLING.temperature)
        sampler = LocalSampler(policy=policy, chat=self.chat)
        with self.clock("sample"):
            return sampler.sample(prompts, n=n, settings=scales.SAMPLING.settings(), seed=seed)


def open_demo(out: str | None, scale: scales.Scale, seed: int) -> Demo:
    path = Path(out) if out else new_path("demo")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path} exists already and is never overwritten; name another folder with --out")
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    backbone = parts.open_backbone(ModelConfig(name=scales.MODEL), print)
    chat = ChatTokenizer(backbone.tokenizer)
    untempered = parts.logprobs_of(Policy(backbone=backbone), TOKENS)
    gold = GoldReward.of(untempered, chat.prompt)
    return Demo(out=path, scale=scale, seed=seed, backbone=backbone, chat=chat, gold=gold)


def run(*, out: str | None, quick: bool, overoptimise: bool, seed: int) -> Path:
    """All of it; returns report.html."""
    demo = open_demo(out, scales.QUICK if quick else scales.FULL, seed)
    with demo.stage("compare: the model answers, the simulated judge prefers"):
        data = compare(demo)
    with demo.stage("reward model: learn what the judge prefers"):
        reward.run(scales.reward_config(demo.out, demo.scale, seed), data=data)
    runs = {}
    with demo.stage("PPO against the reward model" + (", without its anchor" if overoptimise else "")):
        runs["PPO"] = rl.run(scales.ppo_config(demo.out, demo.scale, seed, anchored=not overoptimise), watch=demo.gold)
    if not overoptimise:
        with demo.stage("DPO on the same pairs"):
            runs["DPO"] = preference.run(scales.dpo_config(demo.out, demo.scale, seed), data=data)
    with demo.stage("evaluate on questions nobody trained on"):
        held_out, measured = evaluate(demo, runs)
    from tether.methods.demo.page import write_page

    path = write_page(demo, held_out, measured, runs, overoptimise=overoptimise)
    print(NEXT.format(out=demo.out, report=path))
    return path


NEXT = """
report: {report}

on your own data (JSONL; `tether data inspect FILE` says what a file holds):
  tether reward --data pairs.jsonl --out runs/reward
  tether ppo --data prompts.jsonl --out runs/ppo reward=runs/reward
  tether dpo --data pairs.jsonl --out runs/dpo
talk to what was just trained:
  tether chat --model {out}/ppo/final --temperature 0.5 --system "Answer kindly in one or two short sentences."
"""


def compare(demo: Demo) -> parts.Data:
    """Sample answers to the training questions, score them, draw preferences; both files are kept for the reader."""
    asked = questions("train")
    prompts = asked[: demo.scale.questions]
    rollouts = demo.sample(demo.backbone, prompts, demo.scale.samples, demo.seed)
    with demo.clock("judge"):
        gold = demo.gold(rollouts).total
    pairs = draw_pairs(rollouts, gold.tolist(), demo.seed)
    print(f"   {len(pairs)} pairs from {len(prompts)} questions; {_ended(rollouts):.0%} of answers end by themselves")
    by_id = {p.id: p for p in prompts}
    with (demo.out / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(_pair_row(pair, by_id, demo.chat), ensure_ascii=False) + "\n")
    with (demo.out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for prompt in asked:
            file.write(json.dumps({"id": prompt.id, "prompt": _messages(prompt)}, ensure_ascii=False) + "\n")
    mark = parts.file_fingerprint(demo.out / "pairs.jsonl")
    return parts.Data(train=tuple(pairs), held_out=(), fingerprint=mark)


def _ended(rollouts: Sequence[Rollout]) -> float:
    return sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in prompt.messages]


def _pair_row(pair: Group, prompts: dict[str, Prompt], chat: ChatTokenizer) -> dict[str, object]:
    chosen, rejected = (chat.decode(tokens) for tokens in pair.completions)
    prompt = prompts[pair.id.rpartition(":")[0]]
    return {"prompt": _messages(prompt), "chosen": chosen, "rejected": rejected}


def evaluate(demo: Demo, runs: dict[str, Path]) -> tuple[list[Prompt], list[Measured]]:
    """The start and every trained policy on the held-out questions; the models are opened as a user would open them."""
    held_out = questions("heldout")[: demo.scale.held_out]
    scorer = load_scorer(str(demo.out / "reward" / "final"), say=print)
    scale = ScoreScale.load(demo.out / "reward" / "final")
    proxy = model_reward(scorer, demo.backbone.tokenizer, TOKENS, scale)
    tempered = Policy(backbone=demo.backbone, temperature=scales.SAMPLING.temperature)
    start_logprobs = parts.logprobs_of(tempered, TOKENS)

    def one(name: str, backbone: Backbone, n: int) -> Measured:
        rollouts = demo.sample(backbone, held_out, n, demo.seed + 1)
        with demo.clock("judge"):
            found = measure(
                name,
                rollouts,
                n,
                gold=demo.gold,
                proxy=proxy,
                start_logprobs=None if backbone is demo.backbone else start_logprobs,
            )
        print(f"   {name}: gold {found.gold.mean():.2f}, proxy {found.proxy.mean():.2f}, KL {found.kl.mean():.1f} nats")
        return found

    measured = [one("start", demo.backbone, START_ANSWERS)]
    for name, folder in runs.items():
        backbone = parts.open_backbone(ModelConfig(name=str(folder / "final")), print)
        measured.append(one(name, backbone, ANSWERS))
    return held_out, measured
