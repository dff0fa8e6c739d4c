"""The run folder: made once, locked, never reused in silence; names that lead outside are refused."""

import json

import pytest

from tether.core.errors import StorageError, UserError
from tether.runs.folder import RunFolder, config_changes, new_path
from tether.runs.storage import check_space, inside, write_folder

CONFIG = "method: sft\noptim:\n  learning_rate: 1.0e-05\nrun:\n  folder: a\n"


def make(path, config=CONFIG, method="sft", resume=False):
    return RunFolder.create(path, config_yaml=config, method=method, resume=resume)


def test_a_new_folder_holds_the_config_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with make(tmp_path / "run") as folder:
        assert (folder.path / "config.yaml").read_text() == CONFIG
        text = (folder.path / "environment.json").read_text()
        facts = json.loads(text)
        assert not folder.resumed and folder.notes == ()
    assert facts["method"] == "sft" and facts["packages"]["torch"].startswith("2.") and facts["cores"] >= 1
    assert "hf_secret" not in text and str(tmp_path) not in text


def test_an_existing_folder_is_refused_with_both_ways_out(tmp_path):
    make(tmp_path / "run").close()
    with pytest.raises(UserError, match=r"exists already.*--resume.*run\.folder="):
        make(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "file")


def test_resume_keeps_the_config_and_names_every_difference(tmp_path):
    make(tmp_path / "run").close()
    with make(tmp_path / "run", resume=True) as folder:
        assert folder.resumed
    with make(tmp_path / "run", CONFIG.replace("folder: a", "folder: b"), resume=True) as folder:
        assert folder.resumed
    changed = CONFIG.replace("1.0e-05", "2.0e-05") + "  seed: 3\n"
    with pytest.raises(UserError, match=r"optim\.learning_rate: 1e-05 -> 2e-05\n  run\.seed: \(absent\) -> 3"):
        make(tmp_path / "run", changed, resume=True)
    with pytest.raises(UserError, match="holds a run of 'sft', not of 'rl'"):
        make(tmp_path / "run", method="rl", resume=True)
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["resumed"]) == 2


def test_resume_without_a_run_starts_and_says_so(tmp_path):
    with make(tmp_path / "run", resume=True) as folder:
        assert not folder.resumed and "starting from the beginning" in folder.notes[0]


def test_another_version_of_a_package_is_said(tmp_path):
    make(tmp_path / "run").close()
    file = tmp_path / "run" / "environment.json"
    facts = json.loads(file.read_text())
    facts["packages"]["torch"] = "1.0"
    file.write_text(json.dumps(facts))
    with make(tmp_path / "run", resume=True) as folder:
        assert any("torch was 1.0" in note and "not bit for bit" in note for note in folder.notes)


def test_list_values_and_shapes_are_compared_key_by_key():
    assert config_changes("a: [1, 2]\nb: {c: x}\n", "a: [1, 3]\nb: {}\n") == [
        "a.1: 2 -> 3",
        "b: (absent) -> {}",
        "b.c: x -> (absent)",
    ]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\0b"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads outside"):
        inside(tmp_path, name)


def test_a_link_that_leads_outside_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads outside"):
        inside(tmp_path / "root", "link/x")
    assert inside(tmp_path / "root", "a/b") == (tmp_path / "root" / "a" / "b").resolve()


def test_room_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(StorageError, match=r"needed.*free"):
        check_space(tmp_path, 2**60)
    called = []
    with pytest.raises(StorageError, match="not enough space"):
        write_folder(tmp_path / "x", called.append, need=2**60)
    assert not called and list(tmp_path.iterdir()) == []


def test_new_paths_carry_the_method():
    assert new_path("ppo").parts[0] == "runs" and new_path("ppo").name.startswith("ppo-2")
