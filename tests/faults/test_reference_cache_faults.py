"""Reference log-probs on disk when things go wrong: kills, broken files, writers at the same time, a disk that refuses.
Whatever the cache holds, a run that was killed and resumed is the run that was never disturbed."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from method_cases import Killed, config, go, kill_at, preferences, same_weights, unclocked
from tether.methods import preference
from tether.models.roles import Policy
from tether.runs import logprobs
from tether.runs.logprobs import LogprobStore

KEYS = [i.to_bytes(16, "big") for i in range(400)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def store(root: Path, said: list[str] | None = None) -> LogprobStore:
    return LogprobStore(root=root, model="m" * 32, say=[].append if said is None else said.append)


def files(cache: Path) -> list[Path]:
    return sorted(p for p in cache.rglob("*") if p.is_file())


def dpo(model: Path, data: str, out: Path, /, **settings):
    settings = {"epochs": 2, "prompts_per_step": 3, "optim": {"learning_rate": 1e-3}, **settings}
    return config("preference", model, data, out, **settings, run={"checkpoint_every": 2})


@pytest.fixture(scope="module")
def unsteady():
    """A model whose log-probs hang on what shares its packed row, as the last bits of a real one may: by more here, so
    that it shows. (A pass without gradient is the reference's in these runs.)"""
    real = Policy.__call__

    def call(self, batch, *, entropy=False):
        outputs = real(self, batch, entropy=entropy)
        if torch.is_grad_enabled():
            return outputs
        return replace(outputs, logprobs=outputs.logprobs + 1e-3 * (batch.tokens.sum() % 97))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "__call__", call)
        yield


@pytest.fixture(scope="module")
def straight(unsteady, tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    return go(dpo(tiny_model_folder, preferences(folder), folder / "r", reference={"cache": False}))


# How many rows another run left in the cache before, in batches of its own; and whether it is there at the resume.
@pytest.mark.parametrize("removed", [False, True], ids=["left", "removed"])
@pytest.mark.parametrize("before", [0, 5])
def test_killed_and_resumed_is_undisturbed_whatever_the_cache_holds(
    before, removed, straight, tiny_model_folder, tmp_path, cache, monkeypatch
):
    data = preferences(tmp_path)
    if before:
        other = {"data": {"limit": before}, "epochs": 1, "prompts_per_step": 2}
        go(dpo(tiny_model_folder, data, tmp_path / "other", **other))
    made = dpo(tiny_model_folder, data, tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        go(made)
    if removed:
        shutil.rmtree(cache)
    go(made, resume=True)
    assert same_weights(straight, tmp_path / "killed") and unclocked(straight) == unclocked(tmp_path / "killed")


@pytest.mark.parametrize("moment", ["in the file", "before the rename"])
def test_a_kill_while_writing_leaves_the_file_before(moment, cache, monkeypatch):
    mine = store(cache)
    mine.add({KEYS[0]: torch.ones(5)})

    def half(tensors, path):
        path.write_bytes(b"half of it")
        raise Killed

    def never(self, target):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        # A process that is gone tidies nothing up.
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        patch.setattr(*((logprobs, "save_file", half) if moment == "in the file" else (Path, "replace", never)))
        mine.add({KEYS[1]: torch.ones(5)})
    assert [p.suffix for p in files(cache)] == [".part", ".safetensors"]
    said: list[str] = []
    assert list(store(cache, said).read(dict.fromkeys(KEYS[:2], 5))) == [KEYS[0]] and said == []
    left = files(cache)[0]
    os.utime(left, (time.time() - 4000,) * 2)
    store(cache)
    assert not left.exists() and len(files(cache)) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def garbage(path: Path) -> None:
    path.write_bytes(b"no safetensors at all")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def others(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {"keys": torch.zeros(3, 4), "ends": torch.ones(2), "checks": torch.ones(2), "values": torch.ones(3)}, path
    )


@pytest.mark.parametrize("spoil", [cut, garbage, nothing, others])
def test_a_broken_file_is_removed_and_said(spoil, cache):
    store(cache).add({KEYS[0]: torch.ones(5)})
    store(cache).add({KEYS[1]: torch.ones(5)})
    first, second = files(cache)
    spoil(first)
    said: list[str] = []
    assert list(store(cache, said).read(dict.fromkeys(KEYS[:2], 5))) == [KEYS[1]]
    assert len(said) == 1 and f"{first} is broken, removed" in said[0]
    assert files(cache) == [second]


@pytest.mark.parametrize("what", ["value", "key", "end"])
def test_a_flipped_bit_is_found(what, cache):
    from safetensors.torch import load_file, save_file

    store(cache).add({KEYS[0]: torch.rand(5), KEYS[1]: torch.rand(5), KEYS[2]: torch.rand(5)})
    (path,) = files(cache)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if what == "value":
        tensors["values"].view(torch.int32)[7] ^= 1  # the last bit of one number
    elif what == "key":
        tensors["keys"][1] = torch.tensor(list(KEYS[9]), dtype=torch.uint8)
    else:
        tensors["ends"][1] += 1
    save_file(tensors, path)
    said: list[str] = []
    mine = store(cache, said)
    asked = dict.fromkeys([KEYS[0], KEYS[1], KEYS[2], KEYS[9]], 5)
    found = mine.read(asked)
    assert list(found) == ([KEYS[0]] if what == "end" else [KEYS[0], KEYS[2]])
    broken = 2 if what == "end" else 1
    assert said == [f"reference log-probs: {broken} broken entries of the cache dropped, to be computed anew"]
    mine.add({KEYS[1]: torch.ones(5), KEYS[2]: torch.ones(5)})
    assert store(cache, said).read(asked)[KEYS[1]].tolist() == [1.0] * 5 and len(said) == (1 if what != "key" else 2)


def test_a_wrong_length_or_what_is_not_finite_is_never_given(cache):
    said: list[str] = []
    mine = store(cache, said)
    mine.add({KEYS[0]: torch.tensor([-1.0, float("-inf")]), KEYS[1]: torch.tensor([float("nan")])})
    assert files(cache) == []
    mine.add({KEYS[2]: torch.ones(3)})
    assert store(cache, said).read({KEYS[2]: 2}) == {} and len(said) == 1
    # A file of somebody's own making, checksum and all.
    mine._mine[KEYS[3]] = torch.tensor([float("nan")])
    mine.add({KEYS[4]: torch.ones(1)})
    assert list(store(cache, said).read({KEYS[3]: 1, KEYS[4]: 1})) == [KEYS[4]] and len(said) == 2


def test_two_writers_at_once_lose_nothing(cache, monkeypatch):
    monkeypatch.setattr(logprobs, "FILE_BYTES", 600)
    stores = [store(cache), store(cache)]
    start = threading.Barrier(2)

    def write(mine: LogprobStore, keys: list[bytes]) -> None:
        start.wait()
        for key in keys:
            mine.add({key: torch.full((10,), float(int.from_bytes(key, "big")))})

    shares = [KEYS[:60], KEYS[30:90]]  # half of each is the other's too
    threads = [threading.Thread(target=write, args=(s, k)) for s, k in zip(stores, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said: list[str] = []
    found = store(cache, said).read(dict.fromkeys(KEYS, 10))
    assert {key: float(row[0]) for key, row in found.items()} == {key: float(i) for i, key in enumerate(KEYS[:90])}
    assert said == [] and all(p.suffix == ".safetensors" for p in files(cache))


def test_files_that_another_process_removes_are_no_fault(cache):
    store(cache).add({KEYS[0]: torch.ones(5)})
    mine = store(cache)
    shutil.rmtree(cache)
    assert list(mine.read({KEYS[0]: 5})) == [KEYS[0]]  # it was open
    mine.add({KEYS[1]: torch.ones(5)})
    assert list(store(cache).read(dict.fromkeys(KEYS[:2], 5))) == [KEYS[1]]


def test_a_disk_that_refuses_costs_the_cache_and_not_the_run(tiny_model_folder, tmp_path, cache, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    data = preferences(tmp_path)
    out = preference.run(dpo(tiny_model_folder, data, tmp_path / "r"))
    assert capsys.readouterr().out.count("note: reference log-probs can't be kept in") == 1
    without = go(dpo(tiny_model_folder, data, tmp_path / "without", reference={"cache": False}))
    assert same_weights(out, without)
