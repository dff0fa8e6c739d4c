"""The parts every method is put together from: model, tokens, data, learner, run folder."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.backends.local.ceiling import bfloat16_gain, matmul_rate
from tether.backends.local.learner import AdamWSettings, LocalLearner, evaluate
from tether.config.load import resolve_yaml
from tether.config.sections import DataConfig, LoraConfig, MethodConfig, ModelConfig, OptimConfig
from tether.core.batches import Batch, Group, rollout_batch
from tether.core.errors import UserError
from tether.core.text import Rollout
from tether.data.chat import ChatTokenizer
from tether.data.groups import share_prompts, step_group, tokenise
from tether.data.readers import Kind, read
from tether.models.adapters import add_adapter
from tether.models.backbone import Backbone
from tether.models.checkpointing import checkpoint_activations
from tether.models.load import (
    clone_frozen,
    fingerprint,
    load_backbone,
    load_tokenizer,
    resolve,
    save_policy,
    save_scorer,
)
from tether.models.reading import LAST, Reading
from tether.models.roles import ActorCritic, Policy, Role, Scorer, new_head
from tether.models.shared import save_adapter
from tether.runs.folder import RunFolder, new_path
from tether.runs.storage import remove_folder, write_text
from tether.training.schedule import learning_rate

Say = Callable[[str], None]
# How much faster bfloat16 must be before its coarser numbers are worth it.
WORTH_ROUNDING = 1.1


def speaker(quiet: bool) -> Say:
    """Where a method's remarks go."""
    return (lambda text: None) if quiet else (lambda text: print(text, flush=True))


# -- models ------------------------------------------------------------------------------------------------------------


def open_backbone(model: ModelConfig, say: Say, *, scorer: bool = False) -> Backbone:
    return load_backbone(
        model.name,
        dtype=model.dtype,
        device=model.device,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attention_layout=model.attention,
        scorer=scorer,
        say=say,
    )


def adapt(backbone: Backbone, lora: LoraConfig | None, role: str) -> str | None:
    """Put an adapter named ``role`` on the backbone, and return its name; None where all weights are trained."""
    if lora is None:
        return None
    add_adapter(backbone.hf, role, **lora.model_dump())
    return role


def open_scorer(
    backbone: Backbone,
    lora: LoraConfig | None,
    role: str,
    *,
    zero: bool,
    reading: Reading = LAST,
    language: bool = False,
    heads: int = 1,
) -> Scorer:
    """A fresh scalar head on ``backbone``, or several, with an adapter of its own where LoRA is on."""
    head = new_head(backbone, zero=zero, bias=reading.has_bias, heads=heads)
    adapter = adapt(backbone, lora, role)
    return Scorer(backbone=backbone, head=head, adapter=adapter, reading=reading, language=language)


def frozen_reference(policy: Policy, name: str | None, model: ModelConfig, say: Say) -> Policy:
    """The policy as it is now, for good: the bare backbone where the policy is an adapter, else a copy; or a model of
    its own, ``name``. Which one it is, with a fingerprint of its weights, is said."""
    if name is not None:
        backbone = open_backbone(model.model_copy(update={"name": name}), say)
        backbone.autocast = policy.backbone.autocast
        if backbone.tokenizer.get_vocab() != policy.backbone.tokenizer.get_vocab():
            raise UserError(f"reference {name}: its vocabulary differs from that of {model.name}, so no KL is defined")
    elif policy.adapter is not None:
        backbone = policy.backbone
    else:
        backbone = clone_frozen(policy.backbone)
    reference = Policy(backbone=backbone, adapter=None, temperature=policy.temperature)
    say(f"reference: {name or f'{model.name} as it is now'}, weights {fingerprint(reference)}")
    return reference


def scores_of(role: Role, tokens_per_micro_batch: int) -> Callable[[Batch], Tensor]:
    """batch -> [B] scores of a reward model, without gradient."""

    def score(batch: Batch) -> Tensor:
        scores = evaluate(role, batch, tokens_per_micro_batch).scores
        assert scores is not None
        return scores

    return score


def head_scores_of(role: Role, tokens_per_micro_batch: int) -> Callable[[Batch], Tensor]:
    """batch -> [B, K] scores of a reward model's K heads, without gradient."""

    def score(batch: Batch) -> Tensor:
        scores = evaluate(role, batch, tokens_per_micro_batch).head_scores
        assert scores is not None
        return scores

    return score


def logprobs_of(policy: Policy, tokens_per_micro_batch: int) -> Callable[[Batch], Tensor]:
    """batch -> [B, T] log-probs, without gradient."""

    def logprobs(batch: Batch) -> Tensor:
        found = evaluate(policy, batch, tokens_per_micro_batch).logprobs
        assert found is not None
        return found

    return logprobs


def rollouts_for(scorer: Scorer, policy_tokenizer: Any) -> Callable[[Sequence[Rollout]], Batch]:
    """How a reward model sees rollouts: token for token where it shares the policy's vocabulary, else as text in its
    own template; a process reward model as text in steps."""
    separator = scorer.reading.separator
    if separator is None and scorer.backbone.tokenizer.get_vocab() == policy_tokenizer.get_vocab():
        return rollout_batch
    chat = ChatTokenizer(scorer.backbone.tokenizer)

    def group(r: Rollout) -> Group:
        if separator is not None:
            return step_group(chat, r.prompt, r.text, separator)
        return chat.group(r.prompt, [r.text], id=r.prompt.id)

    return lambda rollouts: share_prompts([group(r) for r in rollouts])


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """Groups to train on, groups held out, and what identifies the source."""

    train: tuple[Group, ...]
    held_out: tuple[Group, ...]
    fingerprint: str


def open_chat(model: ModelConfig, data: DataConfig, say: Say) -> ChatTokenizer:
    """The chat tokenizer of a run; its preflight findings are said."""
    resolve(model.name, revision=model.revision, say=say)
    tokenizer = load_tokenizer(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code, say=say)
    chat = ChatTokenizer(tokenizer, template=data.template, system=data.system)
    for message in chat.preflight():
        say(f"note: {message}")
    return chat


def open_data(
    config: DataConfig,
    kind: Kind,
    chat: ChatTokenizer,
    say: Say,
    *,
    last_turn_only: bool = False,
    step_separator: str = "\n\n",
) -> Data:
    """Read, tokenise and split; everything left out is said with its cause."""

    def groups(path: str, limit: int | None) -> tuple[tuple[Group, ...], str]:
        rows = read(path, kind, limit=limit, max_bad_rows=config.max_bad_rows)
        tokens = tokenise(
            rows.records,
            chat,
            max_prompt_tokens=config.max_prompt_tokens,
            max_completion_tokens=config.max_completion_tokens,
            overlong=config.overlong,
            last_turn_only=last_turn_only,
            step_separator=step_separator,
        )
        say(f"{path}: {len(tokens.groups)} {kind}")
        for note in (*rows.notes, *tokens.notes):
            say(f"  {note}")
        for cause, count in {**rows.counts, **tokens.counts}.items():
            say(f"  {count} × {cause}")
        return tokens.groups, rows.fingerprint

    train, mark = groups(config.train, config.limit)
    if config.eval is not None:
        held_out, theirs = groups(config.eval, None)
        mark = hashlib.sha256((mark + theirs).encode()).hexdigest()
    else:
        # By the hash of the prompt, so that one prompt never stands on both sides.
        share = round(config.eval_fraction * 1000)
        held_out = tuple(g for g in train if _bucket(g) < share)
        train = tuple(g for g in train if _bucket(g) >= share)
    if not train:
        raise UserError(f"{config.train}: no rows are left to train on")
    return Data(train=train, held_out=held_out, fingerprint=mark)


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, as ``read`` gives for the files it reads."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bucket(group: Group) -> int:
    return int.from_bytes(hashlib.sha256(group.prompt.numpy().tobytes()).digest()[:4], "little") % 1000


# -- learner and run ---------------------------------------------------------------------------------------------------


def open_learner(
    role: Role, optim: OptimConfig, total_steps: int, *, factors: dict[str, float] | None = None
) -> LocalLearner:
    """``total_steps``: optimizer steps of the whole run, for the schedule."""
    settings = AdamWSettings(
        learning_rate=learning_rate(optim.schedule, optim.learning_rate, optim.warmup, total_steps),
        weight_decay=optim.weight_decay,
        beta1=optim.beta1,
        beta2=optim.beta2,
        epsilon=optim.epsilon,
        clip_norm=optim.clip_norm,
        nonfinite_limit=optim.nonfinite_limit,
        factors=factors,
    )
    if optim.checkpoint_activations:
        for part in (role.policy, role.critic) if isinstance(role, ActorCritic) else (role,):
            checkpoint_activations(part.backbone.hf)
    return LocalLearner(role, settings, tokens_per_micro_batch=optim.tokens_per_micro_batch)


def settle_autocast(backbone: Backbone, optim: OptimConfig, folder: RunFolder, say: Say) -> None:
    """Decide what type the matrix products of training are computed in, once for the whole run: a resumed one keeps
    what its beginning chose, whatever the probe would say now."""
    chosen = optim.autocast
    if chosen == "auto":
        mark = folder.file("autocast.json")
        if folder.resumed and mark.exists():
            chosen = json.loads(mark.read_text(encoding="utf-8"))["autocast"]
            say(f"autocast: {chosen}, as when this run began")
        else:
            gain = bfloat16_gain(backbone.device, backbone.config.hidden_size)
            chosen = "bfloat16" if gain > WORTH_ROUNDING else "off"
            write_text(mark, json.dumps({"autocast": chosen, "gain": gain}))
            say(f"autocast: {chosen}; training in bfloat16 would be {gain:.2g} times as fast as in float32 here")
    backbone.autocast = torch.bfloat16 if chosen == "bfloat16" else None


def machine_ceiling(role: Role) -> float:
    """FLOP/s that this machine's matrix products reach now, at the role's width and in the type it computes in."""
    backbone = role.policy.backbone if isinstance(role, ActorCritic) else role.backbone
    return matmul_rate(backbone.device, backbone.autocast or backbone.dtype, backbone.config.hidden_size)


@contextmanager
def open_run(config: MethodConfig, method: str, data_fingerprint: str, *, resume: bool) -> Iterator[RunFolder]:
    """The run folder, made or reopened, locked until the block ends; a resumed run whose data has changed is refused.

    A new run that fails before its first step is recorded (a reward that raises, a model that can't be opened) takes
    its folder away again, so that the mended command can be typed as before.
    """
    path = Path(config.run.folder) if config.run.folder else new_path(method)
    if resume and (path / "final").is_dir():
        raise UserError(
            f"{path}: this run is finished; its model is in {path}/final\n  a new run needs a folder of its own"
        )
    made = not path.exists()
    with RunFolder.create(path, config_yaml=resolve_yaml(config), method=method, resume=resume) as folder:
        _check_data(folder, data_fingerprint)
        try:
            yield folder
        except BaseException:
            if made and not (folder.metrics.exists() and folder.metrics.stat().st_size):
                remove_folder(path)
            raise


def _check_data(folder: RunFolder, fingerprint_now: str) -> None:
    mark = folder.file("data.json")
    if not (folder.resumed and mark.exists()):
        write_text(mark, json.dumps({"sha256": fingerprint_now}))
        return
    before = json.loads(mark.read_text(encoding="utf-8"))["sha256"]
    if before != fingerprint_now:
        raise UserError(
            f"{folder.path}: the data has changed since this run began (sha256 {before[:12]} -> "
            f"{fingerprint_now[:12]})\n  put the old file back, or start another run with run.folder=NAME"
        )


def begin(config: MethodConfig) -> None:
    """Seeds and threads, before anything is drawn. Python's generator is for reward functions that use it."""
    torch.manual_seed(config.run.seed)
    random.seed(config.run.seed)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)


def saver(
    role: Policy | Scorer,
    method: str,
    model: str,
    config: MethodConfig,
    beside: Callable[[Path], None] | None = None,
) -> Callable[[Path], None]:
    """Writes the model as a normal Hugging Face folder with a model card, and what ``beside`` adds to it."""

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(role, Policy):
            save_policy(role, folder)
        else:
            save_scorer(role, folder)
            if role.adapter is not None:
                save_adapter(role, folder)
        if beside is not None:
            beside(folder)
        (folder / "README.md").write_text(model_card(role, method, model, config), encoding="utf-8")

    return save


def model_card(role: Policy | Scorer, method: str, model: str, config: MethodConfig) -> str:
    kind = "causal language model"
    if isinstance(role, Scorer):
        what = "token" if role.reading.per_token else "sequence"
        labels = "one label" if role.heads == 1 else f"{role.heads} labels: heads whose mean is the score"
        kind = f"reward model ({what} classification, {labels})"
    return (
        f"---\nbase_model: {model}\ntags: [tether, {method}]\n---\n\n# {method} of {model}\n\n"
        f"A {kind}, trained with Tether. It opens with transformers as it stands.\n\n"
        f"```yaml\n{resolve_yaml(config).strip()}\n```\n"
    )


def finish(folder: RunFolder, config: MethodConfig, say: Say) -> Path:
    """The report, and where everything is."""
    if config.run.report:
        from tether.methods import report

        say(f"report: {report.run(folder.path, None)}")
    say(f"model:  {folder.final}")
    return folder.path


def new_file(name: str) -> Path:
    """The path of a file that is to be written, refused before the work where it can't be."""
    path = Path(name)
    if path.exists():
        raise UserError(f"{path} exists already; name another file")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it first, or name another file")
    return path


def printable(text: str) -> str:
    """Without control characters: those of a model could steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def describe_dry_run(config: MethodConfig, lines: Sequence[str], example: str) -> None:
    """--dry-run: the resolved config, the schedule, and one tokenised example."""
    print(resolve_yaml(config))
    for line in lines:
        print(line)
    print(f"\none example:\n{example}")
