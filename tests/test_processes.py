"""processes.py: starting, agreeing and stopping together, and machines that lack something."""

import processes

import io
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, flags_of, run

WHOLE = dict(
    RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
)


def sitecustomize(folder, code):
    """PYTHONPATH with which every new Python runs `code` before its program."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}:{ROOT}"


@pytest.mark.parametrize("flag", [("--heads", "0"), pytest.param(("--batch-size", "7"), marks=pytest.mark.slow)])
def test_a_refused_flag_is_said_under_torchrun_though_rank_0_comes_last(tmp_path, flag):
    slow = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(4)\n"
    path = sitecustomize(tmp_path / "slow", slow)
    done = run("train.py", "--demo", *flag, cwd=tmp_path, processes=2, PYTHONPATH=path)
    assert done.returncode != 0 and done.stderr.count("train.py: ") == 1 and flag[0] in done.stderr, done.stderr[-2000:]
    assert f'{ROOT / "train.py"}", line' not in done.stderr  # torchrun's own traceback, none of ours


@pytest.mark.slow
def test_a_machine_without_locks_limits_and_affinity_runs_the_programs(tmp_path):
    # What Windows lacks, as far as it can be pretended here.
    lacking = "import os, sys\nsys.modules.update(fcntl=None, resource=None)\n"
    lacking += "for name in ('sched_getaffinity', 'posix_fallocate', 'sysconf'):\n    delattr(os, name)\n"
    path = sitecustomize(tmp_path / "lacking", lacking)
    done = run("train.py", "--demo", "--steps", 2, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    settings = dict(upstream="runs/demo-avg/student.pt", data="data/demo", lexicon="data/demo/lexicon.txt")
    settings |= dict(steps=2, batch_size=8, cache="cache", workers=0, eval_every=2)
    done = run("evaluate_pr.py", *flags_of(settings), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0 and "PER" in done.stdout, done.stderr
    done = run("bench.py", "--seconds", "0.5", "--steps", 1, "--heads", 4, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0 and "peak memory" in done.stdout, done.stderr


def test_an_evaluation_is_refused_under_torchrun_in_one_line_and_runs_as_its_only_process(tmp_path, corpus):
    flags = flags_of(dict(upstream="fbank", data=corpus, lexicon=corpus / "lexicon.txt", steps=1, workers=0, out="out"))
    done = run("evaluate_pr.py", *flags, cwd=tmp_path, processes=2)
    assert done.returncode != 0 and done.stderr.count("evaluate_pr.py: runs as one process") == 1
    done = run("evaluate_pr.py", *flags, cwd=tmp_path, processes=1)
    assert done.returncode == 0 and "PER" in done.stdout, done.stderr


def test_help_under_torchrun_ends_well(tmp_path):
    done = run("train.py", "--help", cwd=tmp_path, processes=2)
    assert done.returncode == 0 and "--agg" in done.stdout and "destroy_process_group" not in done.stderr


def test_reseeding_depends_on_every_number():
    drawn = []
    for numbers in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0)):
        processes.reseed(*numbers)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[4] and len(set(drawn)) == 4


@pytest.mark.parametrize("text, words", [("1,x", "such as 4,8,12"), ("0,1", "from 1"), ("2,2", "each once")])
def test_layers_that_are_none_are_refused_in_words(text, words):
    with pytest.raises(Exception, match=words):
        processes.layers(text)


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(WORLD_SIZE="4"), ["has WORLD_SIZE but not RANK"]),
        (dict(RANK="0"), ["has RANK but not"]),
        (dict(LOCAL_RANK=""), ["has LOCAL_RANK but not"]),
        (dict(WORLD_SIZE="x"), ["WORLD_SIZE"]),
        (dict(WHOLE, WORLD_SIZE="x"), ["WORLD_SIZE='x', not a number"]),
        (dict(WHOLE, LOCAL_RANK=""), ["LOCAL_RANK='', not a number"]),
        ({name: value for name, value in WHOLE.items() if name != "MASTER_PORT"}, ["but not MASTER_PORT"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("program", ["train.py", "evaluate_er.py"])
def test_half_of_torchruns_variables_is_refused_in_one_line(tmp_path, variables, words, program):
    if program == "evaluate_er.py" and len(variables) > 1:
        pytest.skip("the same code")
    done = run(program, "--demo", cwd=tmp_path, **variables)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"{program}: "), done.stderr
    assert all(word in done.stderr for word in words) and not list(tmp_path.iterdir())


def test_too_many_readers_are_cut_down_with_a_line(capsys, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    assert processes.readers(8) == 8 and capsys.readouterr().err == ""
    assert processes.readers(1_000_000) == 8
    line = capsys.readouterr().err
    assert "--workers 1000000: 8" in line and line.count("\n") == 1


def test_a_terminal_that_cannot_show_a_path_stops_nothing(tmp_path):
    done = run("train.py", "--demo", "--steps", 1, "--out", "läuft-ж", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and (tmp_path / "läuft-ж" / "student.pt").exists(), done.stderr
    assert r"l\xe4uft" in done.stdout


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            ["out of GPU memory", "a larger --accumulate"],
        ),
        (RuntimeError("Pin memory thread exited unexpectedly"), ["a process that reads audio died"]),
        (RuntimeError("DataLoader worker (pid 7) is killed"), ["a process that reads audio died"]),
    ],
    ids=["GPU memory", "pin memory thread", "loader"],
)
def test_what_ends_one_process_alone_is_one_line(monkeypatch, capsys, error, words):
    def main():
        raise error

    monkeypatch.setattr(processes.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stderr", errors := io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as end:
        processes.run(main, less_memory="a larger --accumulate")
    errors.flush()
    line = errors.buffer.getvalue().decode()
    assert end.value.code == 1 and line.count("\n") == 1 and all(word in line for word in words), line


@pytest.mark.parametrize("program", ["train.py", "evaluate_pr.py"])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path, program):
    slow = "import os, sys, time\nclass Slow:\n    def find_spec(self, name, *_):\n        if name == 'torch':\n"
    slow += "            print('importing', flush=True)\n            time.sleep(30)\nsys.meta_path.insert(0, Slow())\n"
    path = sitecustomize(tmp_path / "slow", slow)
    command = [sys.executable, str(ROOT / program), "--demo"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=path), **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and errors == ""


def test_processes_wait_for_one_that_scans_or_saves_for_hours(tmp_path):
    """torch's own patience is half an hour; a process that died is torchrun's to notice."""
    code = (
        "import torch.distributed as dist\n"
        "given = {}\n"
        "dist.init_process_group = lambda *_, **settings: given.update(settings)\n"
        "import processes\n"
        "processes.begin()\n"
        "print(given['timeout'].total_seconds())\n"
    )
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**job), capture_output=True, text=True
    )
    assert done.returncode == 0 and float(done.stdout) >= 12 * 3600, done.stderr
