"""Reference log-probs on disk: under which key they stand, what a second run finds, and that it changes no number."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model
from method_cases import WORDS, config, go, lines, preferences, same_weights, unclocked, write_rows
from tether.core.batches import Group
from tether.core.errors import UserError
from tether.methods import parts, preference, reference
from tether.methods.reference import OfflineReference, key_of
from tether.models.adapters import add_adapter
from tether.models.backbone import Backbone
from tether.models.digest import exact_digest
from tether.models.load import fingerprint
from tether.models.roles import Policy
from tether.runs import logprobs
from tether.runs.logprobs import LogprobStore


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def passes(monkeypatch) -> list[str | None]:
    """The adapter of every forward pass without gradient, which in a run on pairs is the reference's alone."""
    made: list[str | None] = []
    real = Backbone.hidden

    def hidden(self, batch, adapter):
        if not torch.is_grad_enabled():
            made.append(adapter)
        return real(self, batch, adapter)

    monkeypatch.setattr(Backbone, "hidden", hidden)
    return made


def dpo(model: Path, data: str, out: Path, /, **settings):
    settings = {"epochs": 2, "prompts_per_step": 4, "optim": {"learning_rate": 1e-3}, **settings}
    return config("preference", model, data, out, **settings)


def group(*parts_: list[int], id: str = "g") -> Group:
    prompt, *completions = (torch.tensor(p) for p in parts_)
    masks = tuple(torch.ones(len(c), dtype=torch.bool) for c in completions)
    return Group(id=id, prompt=prompt, completions=tuple(completions), loss_masks=masks)


def policy(model, tokenizer, **settings) -> Policy:
    return Policy(backbone=Backbone(hf=model, tokenizer=tokenizer, name="tiny"), **settings)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_group_is_known_by_its_tokens_alone():
    one = group([5, 6], [7], [8, 9])
    assert key_of(one) == key_of(group([5, 6], [7], [8, 9], id="another"))
    others = [
        group([5], [6, 7], [8, 9]),  # the same tokens in a row
        group([5, 6], [7, 8], [9]),
        group([5, 6], [8, 9], [7]),
        group([5, 6], [7]),
        group([5, 6], [7], [8, 9], []),
    ]
    assert len({key_of(g) for g in (one, *others)}) == 6


def test_a_model_is_known_by_every_value_and_setting(tiny_tokenizer):
    base = policy(build_model(), tiny_tokenizer)
    digest = exact_digest(base)
    assert exact_digest(policy(copy.deepcopy(base.backbone.hf), tiny_tokenizer)) == digest

    # One value that the sample of `fingerprint` passes over.
    moved = build_model()
    with torch.no_grad():
        flat = moved.model.embed_tokens.weight.view(-1)
        flat[flat.numel() // 4096 + 2] += 1e-3
    assert fingerprint(policy(moved, tiny_tokenizer)) == fingerprint(base)
    others = [policy(moved, tiny_tokenizer), policy(build_model(), tiny_tokenizer, temperature=0.7)]
    turned = build_model()
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 5e5}
    others.append(policy(turned, tiny_tokenizer))
    others.append(policy(build_model().to(torch.bfloat16), tiny_tokenizer))
    others.append(Policy(backbone=Backbone(hf=build_model(), tokenizer=tiny_tokenizer, name="tiny", mode="padded")))
    assert len({digest, *(exact_digest(other) for other in others)}) == 6


def test_where_a_model_came_from_is_no_part_of_its_key(tiny_tokenizer, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    assert opened.config._name_or_path != build_model().config._name_or_path
    assert exact_digest(policy(opened, tiny_tokenizer)) == exact_digest(policy(build_model(), tiny_tokenizer))


def test_an_adapter_that_is_switched_off_has_the_key_of_the_bare_model(tiny_tokenizer):
    bare, adapted = build_model(), build_model()
    add_adapter(adapted, "policy", rank=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    assert exact_digest(policy(adapted, tiny_tokenizer)) == exact_digest(policy(bare, tiny_tokenizer))
    assert exact_digest(policy(adapted, tiny_tokenizer, adapter="policy")) != exact_digest(policy(bare, tiny_tokenizer))


# -- the store ---------------------------------------------------------------------------------------------------------


def store(root: Path, said: list[str] | None = None, **settings) -> LogprobStore:
    return LogprobStore(root=root, model="m" * 32, say=[].append if said is None else said.append, **settings)


def keys(count: int, first: int = 0) -> list[bytes]:
    return [i.to_bytes(16, "big") for i in range(first, first + count)]


def test_what_was_added_is_read_by_another_store_to_the_last_bit(cache):
    rows = dict(zip(keys(3), [torch.randn(7), torch.zeros(0), torch.tensor([-0.0, -1e-42, -88.0])], strict=True))
    mine = store(cache)
    for key, row in rows.items():
        mine.add({key: row})
    (file,) = cache.rglob("*.safetensors")
    found = store(cache).read({key: len(row) for key, row in [*rows.items(), (b"x" * 16, torch.zeros(2))]})
    assert found.keys() == rows.keys()
    assert all(found[key].view(torch.int32).equal(row.view(torch.int32)) for key, row in rows.items())
    assert load_file(file)["values"].dtype == torch.float32
    assert LogprobStore(root=cache, model="n" * 32, say=print).read({key: 7 for key in rows}) == {}


def test_a_long_run_writes_many_files_and_none_twice(cache, monkeypatch):
    monkeypatch.setattr(logprobs, "FILE_BYTES", 400)
    mine = store(cache)
    for key in keys(12):
        mine.add({key: torch.full((25,), float(key[-1]))})
    assert len(list(cache.rglob("*.safetensors"))) == 3
    found = store(cache).read(dict.fromkeys(keys(12), 25))
    assert [float(found[key][0]) for key in keys(12)] == list(range(12))


def test_over_its_size_the_files_that_were_used_least_recently_go(cache):
    said: list[str] = []
    for i, key in enumerate(keys(3)):
        store(cache).add({key: torch.zeros(500)})
        newest = max(cache.rglob("*.safetensors"), key=lambda p: p.name)
        os.utime(newest, (1000 + i, 1000 + i))
    store(cache).read({keys(1)[0]: 500})  # the oldest is used again
    size = sum(f.stat().st_size for f in cache.rglob("*.safetensors"))
    left = store(cache, said, cap=size - 1).read(dict.fromkeys(keys(3), 500))
    assert list(left) == [keys(3)[0], keys(3)[2]]
    assert said == [
        f"reference log-probs: the cache {cache} was over {(size - 1) / 2**30:.3g} GiB: its 1 oldest files were removed"
    ]


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_second_run_makes_no_reference_pass_and_gives_the_same_numbers(tiny_model_folder, tmp_path, passes, capsys):
    data = preferences(tmp_path)
    first = go(dpo(tiny_model_folder, data, tmp_path / "first"))
    assert len(passes) == len(WORDS)  # each pair by itself, once for both epochs
    passes.clear()
    second = preference.run(dpo(tiny_model_folder, data, tmp_path / "second"))
    assert passes == []
    assert unclocked(first) == unclocked(second) and same_weights(first, second)
    assert len(lines(first / "metrics.jsonl")) == 4
    assert "reference log-probs: 16 of 16 completions from the cache\n" in capsys.readouterr().out


def test_the_numbers_are_those_of_plain_transformers(tiny_model_folder, tmp_path, cache):
    """Log-softmax in float64 of one row at a time."""
    from transformers import AutoModelForCausalLM

    made = dpo(tiny_model_folder, preferences(tmp_path), tmp_path / "r")
    go(made)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    chat = parts.open_chat(made.model, made.data, lambda text: None)
    groups = parts.open_data(made.data, "preferences", chat, lambda text: None).train
    (folder,) = cache.iterdir()
    kept = LogprobStore(root=cache, model=folder.name.split("-")[1], say=print)
    found = kept.read({key_of(g): sum(map(len, g.completions)) for g in groups})
    assert len(found) == len(WORDS)
    for g in groups:
        expected = []
        for completion in g.completions:
            with torch.no_grad():
                logits = model(torch.cat([g.prompt, completion])[None]).logits.double()[0, len(g.prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
        torch.testing.assert_close(found[key_of(g)], torch.cat(expected).float(), rtol=1e-5, atol=1e-5)


def test_full_training_and_lora_from_one_base_share_their_entries(tiny_model_folder, tmp_path, passes):
    data = preferences(tmp_path)
    go(dpo(tiny_model_folder, data, tmp_path / "full"))
    passes.clear()
    lora = {"model": {"lora": {"rank": 2}}}
    go(dpo(tiny_model_folder, data, tmp_path / "lora", **lora))
    assert passes == []
    alone = go(dpo(tiny_model_folder, data, tmp_path / "alone", **lora, reference={"cache": False}))
    assert passes == [None] * len(WORDS)
    assert unclocked(tmp_path / "lora") == unclocked(alone)


def test_another_file_that_shares_rows_finds_them(tiny_model_folder, tmp_path, passes, capsys):
    go(dpo(tiny_model_folder, preferences(tmp_path), tmp_path / "first", data={"limit": 5}))
    rows = lines(tmp_path / "pairs.jsonl")
    passes.clear()
    other = write_rows(tmp_path / "other.jsonl", [*reversed(rows)])
    preference.run(dpo(tiny_model_folder, other, tmp_path / "second", prompts_per_step=3))
    assert "reference log-probs: 10 of 16 completions from the cache\n" in capsys.readouterr().out
    assert len(passes) == 3


def test_no_bit_hangs_on_the_cache_or_on_the_token_budget(tiny_model_folder, tmp_path, passes, cache):
    data = preferences(tmp_path)
    without = go(dpo(tiny_model_folder, data, tmp_path / "without", reference={"cache": False}))
    assert not cache.exists()
    passes.clear()
    settings = {"optim": {"tokens_per_micro_batch": 1, "learning_rate": 1e-3}}
    with_it = go(dpo(tiny_model_folder, data, tmp_path / "with", **settings))
    assert len(passes) == len(WORDS)  # a pair is never cut
    passes.clear()
    again = go(dpo(tiny_model_folder, data, tmp_path / "again"))
    assert passes == []
    assert unclocked(without) == unclocked(again) and same_weights(without, again)
    assert unclocked(with_it)[0][2]["loss"] == pytest.approx(unclocked(without)[0][2]["loss"])


def test_the_frozen_copy_is_given_back_where_all_is_known(tiny_model_folder, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    seen: list[int] = []
    real, save = reference.parts.frozen_reference, parts.save_policy

    def frozen(*args):
        made = real(*args)
        alive.append(weakref.ref(made.backbone.hf))
        return made

    def saved(*args):
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))
        save(*args)

    monkeypatch.setattr(parts, "frozen_reference", frozen)
    monkeypatch.setattr(parts, "save_policy", saved)
    for name in ("first", "second"):
        go(dpo(tiny_model_folder, preferences(tmp_path), tmp_path / name, data={"limit": 2}))
        alive.clear()
    assert seen == [1, 0]


def test_kto_finds_its_baselines_rows_too(tiny_model_folder, tmp_path, passes):
    """The policy is an adapter here: the passes with none are the reference's."""
    data = preferences(tmp_path)
    settings = {"loss": {"type": "kto"}, "model": {"lora": {"rank": 2}}}
    first = go(dpo(tiny_model_folder, data, tmp_path / "first", **settings))
    assert passes.count(None) > 2 * len(WORDS)
    passes.clear()
    second = go(dpo(tiny_model_folder, data, tmp_path / "second", **settings))
    assert passes.count(None) == 0 and passes.count("policy") > 0
    assert unclocked(first) == unclocked(second)


def test_rows_come_in_the_order_of_the_groups(tiny_model, tiny_tokenizer):
    groups = [group([5, 6], [7, 8, 9], [10]), group([5, 6, 7], [11, 12]), group([5, 6], [7, 8, 9], [10], id="again")]
    asked = OfflineReference(frozen=policy(tiny_model, tiny_tokenizer), store=None)
    rows = asked(groups)
    assert [len(row) for row in rows] == [3, 1, 2, 3, 1]
    assert rows[0].equal(rows[3]) and rows[1].equal(rows[4]) and len(asked.known) == 2


@pytest.mark.parametrize("name", ["simpo", "orpo"])
@pytest.mark.parametrize("key", ["cache", "name"])
def test_a_reference_that_the_loss_has_not_is_refused(name, key, tiny_model_folder, tmp_path):
    given = {"cache": False} if key == "cache" else {"name": str(tiny_model_folder)}
    made = dpo(tiny_model_folder, preferences(tmp_path), tmp_path / "r", loss={"type": name}, reference=given)
    with pytest.raises(UserError, match=rf"reference\.{key} would be ignored: {name} has no reference"):
        go(made)


def test_an_online_run_has_no_such_knob(tmp_path):
    with pytest.raises(ValueError, match=r"reference\.cache"):
        config("rl", "m", "d", tmp_path / "r", reward="target_length", reference={"cache": True})
