"""The model that a run is held to. Of data that exists: its log-probs of each group, computed once and kept on disk.
Online: the policy of the start for good, or one that follows it at a distance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tether.config.schema import MovingReferenceConfig, ReferenceConfig
from tether.config.sections import LoraConfig, ModelConfig
from tether.core.batches import Batch, Group
from tether.core.errors import UserError
from tether.methods import parts
from tether.models.digest import exact_digest
from tether.models.embedded import cache_folder
from tether.models.load import clone_frozen, fingerprint
from tether.models.roles import Policy
from tether.runs.logprobs import KEY_BYTES, LogprobStore

FILE = "reference.safetensors"

# -- offline -----------------------------------------------------------------------------------------------------------


def key_of(group: Group) -> bytes:
    """Whose log-probs: a hash of the tokens of the prompt and of each completion, in their order."""
    digest = hashlib.sha256()
    for part in (group.prompt, *group.completions):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.to(torch.int64).cpu().numpy().data)
    return digest.digest()[:KEY_BYTES]


@dataclass(kw_only=True, eq=False)
class OfflineReference:
    """Log-probs of groups under a frozen model, each group computed once: in this run, or in one before it that left
    them in ``store``.

    The last bits of a log-prob may hang on what else is in its packed row. So a group always has a row to itself:
    its numbers are those of the model and its tokens alone, whichever run computed them, in whatever order, before a
    resume or after it.
    """

    frozen: Policy | None
    store: LogprobStore | None
    known: dict[bytes, Tensor] = field(default_factory=dict)

    def __call__(self, groups: Sequence[Group]) -> list[Tensor]:
        """[C_i] float32 of every completion, group after group."""
        keyed = {key_of(group): group for group in groups}
        self.recall(keyed)
        new = {key: self._compute(group) for key, group in keyed.items() if key not in self.known}
        self.known |= new
        if self.store is not None:
            self.store.add(new)
        return [row for g in groups for row in self.known[key_of(g)].split([len(c) for c in g.completions])]

    def recall(self, groups: Mapping[bytes, Group]) -> None:
        """Take what the store has of ``groups`` into memory."""
        if self.store is not None:
            unknown = {key: group for key, group in groups.items() if key not in self.known}
            self.known |= self.store.read({key: sum(map(len, g.completions)) for key, g in unknown.items()})

    @torch.no_grad()
    def _compute(self, group: Group) -> Tensor:
        assert self.frozen is not None, "a group that the data did not have"
        # With its own size as the budget a group is never cut, so optim.tokens_per_micro_batch changes no bit.
        rows = parts.logprobs_of(self.frozen, group.token_count)(Batch.from_groups([group]))
        return torch.cat([row[: len(c)] for row, c in zip(rows, group.completions, strict=True)])


def open_offline_reference(
    policy: Policy, config: ReferenceConfig, model: ModelConfig, data: Sequence[Group], say: parts.Say, *, only: bool
) -> OfflineReference:
    """The reference of an offline run; ``policy`` is as it is before the first step.

    What the cache has of ``data`` is said. ``only``: nothing else will be asked for; where all of it is known, the
    frozen model is given back.
    """
    frozen = parts.frozen_reference(policy, config.name, model, say)
    if not config.cache:
        return OfflineReference(frozen=frozen, store=None)
    store = LogprobStore(root=cache_folder() / "references", model=exact_digest(frozen), say=say)
    reference = OfflineReference(frozen=frozen, store=store)
    keyed = [(key_of(group), group) for group in data]
    reference.recall(dict(keyed))
    total = sum(len(group.completions) for _, group in keyed)
    found = sum(len(group.completions) for key, group in keyed if key in reference.known)
    say(f"reference log-probs: {found} of {total} completions from the cache")
    if only and found == total:
        reference.frozen = None
    return reference


# -- online ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class FixedReference:
    """Stands still: it is made anew from the model of the start, so a checkpoint holds nothing of it."""

    frozen: Policy
    tokens_per_micro_batch: int

    def __call__(self, batch: Batch) -> Tensor:
        return parts.logprobs_of(self.frozen, self.tokens_per_micro_batch)(batch)

    def follow(self, step: int) -> None:
        pass

    def save(self, folder: Path) -> None:
        pass

    def load(self, folder: Path) -> None:
        pass


@dataclass(kw_only=True, eq=False)
class MovingReference(FixedReference):
    """θ_ref ← θ_ref + rate·(θ − θ_ref) after every ``every`` steps; a rate of 1 copies the policy (the
    soft and the hard update of Gorbatovski 2024, TR-DPO).

    Where the policy is an adapter, so is the reference: its factors A and B follow each by itself, so with a rate below
    1 their product B·A is not the average of the products.
    """

    policy: Policy
    rate: float
    every: int
    say: parts.Say

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if step % self.every:
            return
        theirs = self._tensors()
        for name, parameter in _plain(self.policy).items():
            theirs[name].copy_(parameter) if self.rate == 1 else theirs[name].lerp_(parameter, self.rate)

    def save(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = load_file(folder / FILE)
        for name, tensor in self._tensors().items():
            tensor.copy_(saved[name])
        self.say(f"reference: as saved, weights {fingerprint(self.frozen)}")

    def _tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in _plain(self.frozen).items()}


def _plain(policy: Policy) -> dict[str, nn.Parameter]:
    """A policy's tensors, their names without that of its adapter."""
    return {name.replace(f".{policy.adapter}.", "."): p for name, p in policy.parameters().items()}


def check_reference(config: MovingReferenceConfig, model: ModelConfig) -> None:
    """Raises UserError where a key of the section would be ignored, or is missing."""
    owner = {"rate": "ema", "every": "resync"}
    for key, update in owner.items():
        given = getattr(config, key) is not None
        if given and config.update != update:
            raise UserError(f"reference.{key} would be ignored: it belongs to reference.update={update}; take it out")
        if not given and config.update == update:
            raise UserError(f"reference.update={update} needs reference.{key}")
    if config.update != "fixed" and config.name is not None:
        raise UserError(
            f"reference.update={config.update} begins with the policy as it is at the start: take reference.name out, "
            "or use reference.update=fixed"
        )
    if config.update == "ema" and model.dtype != "float32" and model.lora is None:
        raise UserError(
            f"reference.update=ema in model.dtype={model.dtype}: its small steps would be lost in the rounding; use "
            "model.dtype=float32, model.lora, or reference.update=resync"
        )


def open_reference(
    policy: Policy, config: MovingReferenceConfig, model: ModelConfig, tokens_per_micro_batch: int, say: parts.Say
) -> FixedReference:
    """The reference of a run, named and fingerprinted; ``policy`` is as it is before the first step."""
    if config.update == "fixed":
        frozen = parts.frozen_reference(policy, config.name, model, say)
        return FixedReference(frozen=frozen, tokens_per_micro_batch=tokens_per_micro_batch)
    reference = MovingReference(
        frozen=_copy(policy, model.lora),
        tokens_per_micro_batch=tokens_per_micro_batch,
        policy=policy,
        rate=config.rate or 1.0,
        every=config.every or 1,
        say=say,
    )
    how = f"ema, rate {config.rate:g} a step" if config.update == "ema" else f"resync every {config.every} steps"
    say(f"reference: {model.name} as it is now, weights {fingerprint(reference.frozen)}; follows the policy: {how}")
    return reference


@torch.no_grad()
def _copy(policy: Policy, lora: LoraConfig | None) -> Policy:
    """The policy with tensors of its own, frozen: a second network, or a second adapter on the same one."""
    if policy.adapter is None:
        return Policy(backbone=clone_frozen(policy.backbone), temperature=policy.temperature)
    twin = Policy(
        backbone=policy.backbone,
        adapter=parts.adapt(policy.backbone, lora, "reference"),
        temperature=policy.temperature,
    )
    source = _plain(policy)
    for name, parameter in _plain(twin).items():
        parameter.requires_grad_(False).copy_(source[name])
    return twin
