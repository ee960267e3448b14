"""checkpoint.py: complete files, locks, the newest checkpoint, comparison of settings."""

import errno
import fcntl
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, environment

import checkpoint


def test_a_file_gets_its_name_only_once_it_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="last.pt: not saved .*No space left.*intact"):
            checkpoint.save(path, {"step": 2}, keep_previous=True)
    assert os.listdir(tmp_path) == ["last.pt"] and checkpoint.load(path) == {"step": 1}
    checkpoint.save(path, {"step": 2}, keep_previous=True)
    assert checkpoint.load(path) == {"step": 2} and checkpoint.load(f"{path}.old") == {"step": 1}


@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker is killed"), KeyboardInterrupt()]
)
def test_an_exception_between_two_renames_leaves_the_last_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    for step in (1, 2):
        checkpoint.save(path, {"step": step}, keep_previous=True)

    def interrupted(source, target):  # signal handlers run between any two lines
        monkeypatch.undo()
        os.replace(source, target)
        raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises((OSError, KeyboardInterrupt)) as end:
        checkpoint.save(path, {"step": 3}, keep_previous=True)
    assert end.value is error or "not saved (DataLoader worker is killed); the" in str(end.value)
    assert os.listdir(tmp_path) == ["last.pt"] and checkpoint.load(path) == {"step": 2}


@pytest.mark.parametrize("damage", ["truncated", "one bit", "text", "code"])
def test_a_damaged_file_or_code_is_one_line_with_the_path(tmp_path, damage):
    path = tmp_path / "x.pt"
    torch.save(os.system if damage == "code" else {"x": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[len(content) // 2] ^= 1  # in the zeros: torch.load would not notice
        path.write_bytes(content)
        assert zipfile.is_zipfile(path) and torch.load(path, weights_only=True)["x"].any()
    elif damage == "text":
        path.write_text("a diary")
    with pytest.raises(ValueError, match="^[^\n]*x.pt: damaged[^\n]*$"):
        checkpoint.load(path)


def test_too_little_memory_for_a_checkpoint_is_not_damage(tmp_path, monkeypatch):
    for step in (4, 6):
        checkpoint.save(tmp_path / "last.pt", {"step": step}, keep_previous=True)
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoint.load_latest(tmp_path, ["step"])
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.old"]


def test_the_newest_undamaged_checkpoint_is_found(tmp_path):
    assert checkpoint.load_latest(tmp_path, ["step"]) is None
    checkpoint.save(tmp_path / "last.pt.old", {"step": 4})
    assert checkpoint.load_latest(tmp_path, ["step"])["step"] == 4  # killed between two renames
    for damaged in (b"", b"no checkpoint"):
        (tmp_path / "last.pt").write_bytes(damaged)
        with pytest.warns(match="last.pt: damaged"):
            assert checkpoint.load_latest(tmp_path, ["step"])["step"] == 4
    checkpoint.save(tmp_path / "last.pt", {"epoch": 5})
    with pytest.warns(match="not a checkpoint of this program, no step in it"):
        assert checkpoint.load_latest(tmp_path, ["step"])["step"] == 4
    (tmp_path / "last.pt.old").write_bytes(b"")
    with pytest.warns(), pytest.raises(ValueError, match="no undamaged checkpoint; move"):
        checkpoint.load_latest(tmp_path, ["step"])


def test_a_damaged_checkpoint_never_replaces_an_undamaged_one(tmp_path):
    path = tmp_path / "last.pt"
    for step in (4, 6):
        checkpoint.save(path, {"step": step}, keep_previous=True)
    path.write_bytes(b"")
    with pytest.warns(match="last.pt: damaged"):
        checkpoint.load_latest(tmp_path, ["step"])
    assert checkpoint.load(f"{path}.old") == {"step": 4}  # until the next is saved, too
    checkpoint.save(path, {"step": 5}, keep_previous=True)
    assert checkpoint.load(f"{path}.old") == {"step": 4}
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.old"]


def test_another_rank_may_have_renamed_a_damaged_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pt.old", {"step": 4})
    (tmp_path / "last.pt").write_bytes(b"")
    load = checkpoint.load

    def load_later(path):
        (tmp_path / "last.pt").unlink(missing_ok=True)
        return load(path)

    monkeypatch.setattr(checkpoint, "load", load_later)
    assert checkpoint.load_latest(tmp_path, ["step"])["step"] == 4


def test_a_folder_is_locked_until_the_process_ends_however_it_ends(tmp_path):
    (tmp_path / "last.pt.123.partial").write_text("of a killed process")
    code = f"import checkpoint; checkpoint.lock({str(tmp_path)!r}); print('locked', flush=True)"
    code += "; input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment(), cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        assert os.listdir(tmp_path) == ["lock"]
        with pytest.raises(ValueError, match="another run is using this folder"):
            checkpoint.lock(str(tmp_path))
        other.kill()
    checkpoint.lock(str(tmp_path))


def without_flock(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_on_a_file_system_without_locks_a_warning_is_all(tmp_path, monkeypatch, name):
    without_flock(monkeypatch, getattr(errno, name))
    for _ in range(2):
        with pytest.warns(match=f"{tmp_path}/lock: not locked"):
            checkpoint.lock(str(tmp_path))
        # A marker would outlive a killed run.
        assert [path.read_bytes() for path in tmp_path.iterdir()] in ([], [b""])
        del checkpoint.locks[str(tmp_path)]


def test_any_other_error_of_a_lock_names_its_file(tmp_path, monkeypatch):
    without_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/lock'"):
        checkpoint.lock(str(tmp_path))


def test_all_settings_that_differ_are_listed_and_hashes_are_not_shown():
    before = {"--lr": 1, "--seed": 0, "weights of hubert": "2f81", "noise": "77aa", "same": 5}
    now = {"--lr": 2, "--heads": [4], "weights of hubert": "90bc", "same": 5}
    with pytest.raises(ValueError) as end:
        checkpoint.check_same("runs/avg", before, now)
    changes = "--lr was 1, is 2; --seed was 0, is not given; weights of hubert changed; "
    changes += "noise changed; --heads was not given, is [4]"
    assert f"runs/avg: holds another run ({changes}); " in str(end.value)
    checkpoint.check_same("runs/avg", before, dict(before))


def test_two_containers_can_save_one_file_at_a_time(tmp_path, monkeypatch):
    path, save = str(tmp_path / "x.pt"), torch.save

    def save_twice(content, file):
        checkpoint.save(path, "of another process with the same number")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_twice)
    checkpoint.save(path, torch.tensor(5))
    assert int(checkpoint.load(path)) == 5 and os.listdir(tmp_path) == ["x.pt"]


def test_a_disk_that_fails_to_read_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    for step in (4, 5):
        checkpoint.save(tmp_path / "last.pt", {"step": step}, keep_previous=True)

    def failing(*args, **settings):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(torch, "load", failing)
        checkpoint.load_latest(tmp_path, ["step"])
    assert checkpoint.load_latest(tmp_path, ["step"])["step"] == 5
    torch.save(torch.zeros(2), tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="last.pt"):
        assert checkpoint.load_latest(tmp_path, ["step"])["step"] == 4
