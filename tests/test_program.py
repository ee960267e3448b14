"""program.py: ranks, signals, streams, imports."""

import os
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, run

import program

LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}


def run_code(code, processes=None, shell="", **variables):
    """Python code in a new process, or in several of torchrun; shell: redirections."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport os, program\n{code}"
    command = [sys.executable, "-c", code]
    if processes:
        torchrun = "import sys, torch.distributed.run as r; r.main(sys.argv[1:])"
        command = [sys.executable, "-c", torchrun, "--standalone", "--no-python"]
        command += [f"--nproc_per_node={processes}", sys.executable, "-c", code]
    command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    pipes = {"capture_output": True, "text": True, "timeout": 100}
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), **pipes)


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize(
    "arguments", [["train.py", "--help"], ["evaluate_pr.py", "--upstream", "fbank"]]
)
def test_flags_are_read_before_other_ranks_are_waited_for(tmp_path, arguments):
    done = run(*arguments, cwd=tmp_path, **LEFT_OVER)
    assert "usage" in done.stdout or "one process" in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_waiting_for_other_ranks_ends_in_one_line_with_the_remedy(rank):
    code = "program.JOIN_LIMIT = 1\nprogram.run(program.join)"
    done = run_code(code, **LEFT_OVER | {"RANK": rank})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "localhost:29999" in done.stderr and "unset RANK and WORLD_SIZE" in done.stderr


@pytest.mark.slow
def test_after_30_seconds_a_line_says_what_is_waited_for():
    done = run_code("program.JOIN_LIMIT = 32\nprogram.run(program.join)", **LEFT_OVER)
    first, last = done.stderr.splitlines()
    assert first.startswith("rank 0 waits for 2 processes at localhost:29999; ")


SLOW_RANK = """
import time
def main():
    program.JOIN_LIMIT = 30
    program.join()
    time.sleep(33 * program.RANK)
    print(program.gather(program.RANK))
program.run(main)
"""


@pytest.mark.slow
def test_a_joined_rank_may_be_slower_than_the_limit_of_joining():
    done = run_code(SLOW_RANK, processes=2)
    assert done.returncode == 0 and done.stdout.count("[0, 1]") == 2, done.stderr


def test_a_restarted_rank_meets_the_living_ranks_alone(monkeypatch):
    monkeypatch.setattr(program, "WORLD_SIZE", 2)
    store = torch.distributed.HashStore()
    for key, value in {"nonce of 1": "dead1", "nonces": "dead0 dead1"}.items():
        store.set(key, value)
    store.set("dead0 0", "")
    store.set("dead0 1", "")
    found = []
    for rank in (0, 0, 1, 1, 0, 1):
        monkeypatch.setattr(program, "RANK", rank)
        found.append(program.agree(store, f"new{rank}"))
    assert found == [None, None, None, None, None, "new0"]


@pytest.mark.parametrize(
    "left_over",
    [{"RANK": "3", "LOCAL_RANK": "3"}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "8"}],
)
def test_a_process_without_others_is_rank_0(monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    found = runpy.run_path(str(ROOT / "program.py"))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert [found[name] for name in names] == [0, 0, 1, 1]


def test_numbers_alone_decide_the_seed():
    draws = []
    for numbers in [(0, 5, 1), (0, 5, 1), (0, 5, 2), (1, 5, 1)]:
        program.seed(*numbers)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1] and len(set(draws)) == 3


# ------------------------------------------------------------------ signals


def test_a_signal_between_two_runs_of_a_process_ends_the_second(monkeypatch):
    monkeypatch.setattr(program.StopSignal, "number", 0)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    program.StopSignal().record(signal.SIGTERM, None)
    assert program.StopSignal().received() == signal.SIGTERM


@pytest.fixture
def handlers():
    """Puts the handlers of the signals back."""
    before = {number: signal.getsignal(number) for number in program.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    program.StopSignal.number = 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_that_announces_the_end_is_recorded(handlers, name):
    signal.signal(signal.Signals[name], lambda *_: None)
    stop = program.StopSignal()
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.received() == signal.Signals[name]


def test_a_closed_terminal_is_ignored_under_nohup(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = program.StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received() == 0


# ------------------------------------------------------------------ streams


WRITES = """
def main():
    print("result")
    with open({path!r}, "w") as file:
        for number in (1, 2):
            os.write(number, b"written by a library")
        file.write(str([sys.stdin.fileno(), sys.stdout.fileno(), sys.stderr.fileno()]))
    raise SystemExit(3)
program.run(main)
"""


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_with_closed_streams_a_program_runs_and_its_files_get_no_output(tmp_path, closed):
    done = run_code(WRITES.format(path=str(tmp_path / "file")), shell=closed)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "[0, 1, 2]"


INTERACTIVE = """
import io, signal
class OutStream(io.TextIOBase):  # as Jupyter's: without reconfigure()
    def write(self, text):
        return os.write(1, text.encode())
sys.ps1, sys.stdout = "In [1]: ", OutStream()
def main():
    program.StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    raise ValueError("shown")
try:
    program.run(main)
except SystemExit as end:
    handler = int(signal.getsignal(signal.SIGTERM))
    print("goes on", end.code, handler, program.StopSignal.number)
"""


def test_a_value_may_begin_with_a_minus():
    parser = program.Parser("of a test")
    parser.add_argument("--snr", type=program.numbers)
    assert parser.parse_args(["--snr", "-5,5"]).snr == [-5, 5]
    with pytest.raises(ValueError, match="expected one argument"):
        parser.parse_args(["--snr", "--snr"])


def test_an_interactive_session_goes_on_with_its_signal_handlers():
    done = run_code(INTERACTIVE)
    assert done.stdout == "goes on 1 0 0\n" and "ValueError: shown" in done.stderr


# ------------------------------------------------------------------ imports

IMPORTS = """
import os, signal, warnings
import torch, torchaudio
def state():
    handlers = [signal.getsignal(number) for number in range(1, 32)]
    return os.environ.copy(), handlers, warnings.showwarning, torch.get_num_threads()
before = state()
for name in {names}:
    __import__(name)
    print(name, state() == before)
"""


def test_importing_a_file_changes_nothing():
    names = "encoder aggregate losses checkpoint student teachers data manifest cache run program"
    command = [sys.executable, "-c", IMPORTS.format(names=names.split())]
    env = {"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}  # nothing that conftest.py's imports set
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "".join(f"{name} True\n" for name in names.split()), done.stderr
