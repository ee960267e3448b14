"""safe_files.py: files whole or not at all, and locks."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, environment, write_audio

import data
import safe_files
from safe_files import claimed, locked, write_text, write_whole


def test_a_killed_run_leaves_no_claim_though_a_process_of_its_loader_lives_on(tmp_path):
    code = (
        "import os, safe_files, sys, time\n"
        "with safe_files.claimed(sys.argv[1]):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        orphan = int(holder.stdout.readline())
        try:
            with pytest.raises(ValueError, match="another run"), claimed(tmp_path):
                pass
            holder.kill()
            holder.wait()
            with claimed(tmp_path):
                os.kill(orphan, 0)  # it is there still
        finally:
            os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("missing", ["locks", "fcntl"])
def test_where_there_are_no_locks_nothing_is_stopped(tmp_path, monkeypatch, missing):
    if missing == "fcntl":  # Windows
        monkeypatch.setattr(safe_files, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(safe_files.fcntl, "lockf", refuse)
    with claimed(tmp_path), locked(tmp_path / "file.lock"):
        pass
    (tmp_path / "audio").mkdir()
    write_audio(tmp_path / "audio", [5000])
    assert len(data.find_corpus(str(tmp_path / "audio"), ["."])) == 1


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file.pt"
    write_text(path, "whole")

    def half(file):
        file.write(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="file.pt: not written .*No space.*what was saved before is whole"):
        write_whole(path, half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, lambda file: file.write(b"ha") and (_ for _ in ()).throw(KeyboardInterrupt()))
    assert os.listdir(tmp_path) == ["file.pt"] and path.read_text() == "whole"


def test_no_file_takes_another_ones_lock_in_the_programs_and_there_is_one_way_to_lock():
    callers = [path.name for path in ROOT.glob("*.py") if "fcntl" in path.read_text()]
    assert callers == ["safe_files.py"]
