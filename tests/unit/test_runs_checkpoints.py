"""Checkpoints: whole or not there, verified by hash, the newest whole one wins."""

import json

import pytest

from tether.core.errors import StorageError
from tether.runs.checkpoints import latest, listing, save, verify
from tether.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path / "run", config_yaml="a: 1\n", method="sft", resume=False) as made:
        yield made


def writer(text):
    def write(path):
        (path / "deep").mkdir()
        (path / "deep" / "model.bin").write_text(text)

    return write


def names(folder):
    return sorted(p.name for p in folder.checkpoints.iterdir())


def test_nothing_saved_is_none(folder):
    assert latest(folder) is None


def test_save_prune_and_load(folder):
    for step in (1, 2, 3):
        save(folder, step, writer(f"w{step}"), {"data": step}, keep=2)
    assert names(folder) == ["step-000002", "step-000003"]
    found = latest(folder)
    assert found is not None and found.step == 3 and found.state == {"data": 3}
    assert (found.path / "deep" / "model.bin").read_text() == "w3"
    assert all(faults == [] for _, faults in listing(folder.path))


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_flip, "SHA-256"),
        (lambda p: p.write_text(""), "bytes instead of"),
        (lambda p: p.unlink(), "missing"),
    ],
)
@pytest.mark.parametrize("name", ["deep/model.bin", "state.json", "manifest.json"])
def test_damage_is_found_and_the_one_before_is_used_loudly(folder, damage, word, name):
    save(folder, 1, writer("one"), {}, keep=3)
    save(folder, 2, writer("two"), {}, keep=3)
    damage(folder.checkpoints / "step-000002" / name)
    said = []
    found = latest(folder, said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and "step-000002 is damaged" in said[0]
    assert name == "manifest.json" or word in said[0]


def test_every_flipped_byte_of_the_manifest_is_harmless_or_found(folder):
    path = save(folder, 1, writer("one"), {"a": 1}, keep=1)
    manifest = path / "manifest.json"
    good = manifest.read_bytes()
    for at in range(len(good)):
        manifest.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            same = json.loads(manifest.read_bytes()) == json.loads(good)
        except ValueError:
            same = False
        assert same or verify(path), f"flipped byte {at} was not found"


def test_all_damaged_is_an_error_and_not_a_fresh_start(folder):
    save(folder, 1, writer("one"), {}, keep=1)
    (folder.checkpoints / "step-000001" / "state.json").unlink()
    with pytest.raises(StorageError, match="none of the 1 checkpoints"):
        latest(folder, lambda _: None)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rubbish(folder):
    save(folder, 1, writer("one"), {}, keep=1)

    def full(path):
        (path / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"not enough space .*needed.*free.*--resume"):
        save(folder, 2, full, {}, keep=1)
    assert names(folder) == ["step-000001"] and verify(folder.checkpoints / "step-000001") == []


def test_a_fault_of_the_writer_itself_is_not_called_a_disk_error(folder):
    def broken(path):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        save(folder, 1, broken, {}, keep=1)
    assert names(folder) == []


def test_saving_a_step_again_replaces_it_and_drops_the_future(folder):
    for step in (1, 2, 3):
        save(folder, step, writer("old"), {}, keep=9)
    save(folder, 2, writer("new"), {}, keep=9)
    assert names(folder) == ["step-000001", "step-000002"]
    assert (folder.checkpoints / "step-000002" / "deep" / "model.bin").read_text() == "new"


def test_a_state_that_is_not_json_fails_before_writing(folder):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(folder, 1, writer("x"), {"a": float("nan")}, keep=1)
    assert not folder.checkpoints.exists()
