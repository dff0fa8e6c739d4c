"""Ensembles of reward models: trained in one command, and found again by the reward that combines them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tether.config.load import resolve_yaml
from tether.config.schema import RewardModelConfig
from tether.core.errors import UserError
from tether.methods import parts
from tether.models.load import heads_of, resolve
from tether.rewards.ensemble import EnsembleOptions
from tether.rewards.model import FILE, ScoreScale
from tether.runs.folder import RunFolder, new_path
from tether.runs.storage import remove_folder

MEMBER = "member-"


# -- found -------------------------------------------------------------------------------------------------------------


def find_members(options: EnsembleOptions, what: str, say: parts.Say) -> list[Path]:
    """The folders of the members, in their order; or one folder of several heads. Opens no model. ``what`` is the
    config path, for messages.

    Raises UserError: fewer than two, one of them twice, one not trained to its end, one without the scale it needs, one
    of several heads beside others.
    """
    names = [name for given in options.members for name in expand(given, what)]
    folders = [Path(resolve(name, say=say)).resolve() for name in names]
    many = next((f for f in folders if heads_of(f) > 1), None)
    if len(folders) < 2 and many is None:
        raise UserError(
            f"{what}.members: an ensemble has two members or more, {options.members[0]} is one; "
            "for one reward model: reward: FOLDER"
        )
    if len(folders) > 1 and many is not None:
        raise UserError(
            f"{what}.members: {many} has {heads_of(many)} heads, which are an ensemble by themselves; name it alone, "
            "or members of one head each"
        )
    twice = next((f for f in folders if folders.count(f) > 1), None)
    if twice is not None:
        raise UserError(f"{what}.members: {twice} is named twice, and would count twice; name it once")
    bare = [str(folder) for folder in folders if options.scale and ScoreScale.load(folder) is None]
    if bare:
        raise UserError(
            f"{what}.members: no {FILE} in {', '.join(bare)}, so its scores have no unit to share with the others'\n"
            "  train it with tether reward, which measures one; or combine all scores as they are with scale: false"
        )
    return folders


def expand(name: str, what: str) -> list[str]:
    """The members in the folder of an ensemble; any other name as it is. A member that is not finished is refused."""
    inside = list(Path(name).expanduser().glob(f"{MEMBER}*"))
    inside.sort(key=lambda p: (len(p.name), p.name))  # member-10 after member-9
    unfinished = [str(p) for p in inside if not (p / "final").is_dir()]
    if unfinished:
        raise UserError(f"{what}.members: {', '.join(unfinished)}: not trained to the end; tether reward --resume")
    return [str(p) for p in inside] or [name]


# -- trained -----------------------------------------------------------------------------------------------------------


def train(
    config: RewardModelConfig, one: Callable[[RewardModelConfig], Path], *, resume: bool, dry_run: bool, say: parts.Say
) -> Path:
    """``config.members`` reward models, one after the other, in RUN/member-0, RUN/member-1, ...: each a run of its own,
    with seed ``run.seed`` + its number. A resumed run leaves those that are finished as they are."""
    assert config.members is not None
    path = Path(config.run.folder) if config.run.folder else new_path("reward")
    configs = [_member(config, path, i) for i in range(config.members)]
    if dry_run:
        one(configs[0])
        say(f"this is {MEMBER}0; {config.members} members, run.seed {config.run.seed} to {configs[-1].run.seed}")
        return path
    made = not path.exists()
    with RunFolder.create(path, config_yaml=resolve_yaml(config), method="reward", resume=resume) as folder:
        for note in folder.notes:
            say(note)
        try:
            for number, member in enumerate(configs):
                place = path / f"{MEMBER}{number}"
                done = (place / "final").is_dir()
                say(f"{MEMBER}{number} of {config.members}: " + ("finished already" if done else str(place)))
                if not done:
                    one(member)
        except BaseException:
            # As with any run that failed before its first step: the mended command can be typed as before.
            if made and not any(path.glob(f"{MEMBER}*")):
                remove_folder(path)
            raise
    say(f"ensemble: reward: {{type: ensemble, members: [{path}]}}")
    return path


def _member(config: RewardModelConfig, path: Path, number: int) -> RewardModelConfig:
    run = config.run.model_copy(update={"folder": str(path / f"{MEMBER}{number}"), "seed": config.run.seed + number})
    return config.model_copy(update={"members": None, "run": run})


def bootstrap(data: parts.Data, seed: int) -> parts.Data:
    """As many groups as there are, drawn with replacement (Breiman 1996); what is held out stays as it is."""
    size = len(data.train)
    drawn = torch.randint(size, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    return replace(data, train=tuple(data.train[i] for i in drawn))


def bootstrap_heads(data: parts.Data, heads: int, seed: int) -> parts.Data:
    """For each head as many groups as there are, drawn with replacement: every group says how often each head has it
    (multinomial counts, fixed for the run: the bootstrapped heads of Osband 2016). What is held out stays as it is."""
    size = len(data.train)
    drawn = torch.randint(size, (heads, size), generator=torch.Generator().manual_seed(seed))
    counts = torch.stack([torch.bincount(row, minlength=size) for row in drawn], dim=1).tolist()
    return replace(data, train=tuple(replace(g, draws=tuple(n)) for g, n in zip(data.train, counts, strict=True)))
