"""Faults injected into the real programs, and what must hold."""

import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, flags, metrics, obey_permissions, on_cpu, refused, run

import data
import train
from encoder import SpeechEncoder

SHORT = {"steps": 6, "log_every": 1, "save_every": 2, "dropout": 0.1}


def start(job, *arguments, processes=None, restarts=0, before=(), program=ROOT / "train.py"):
    """A program that runs, its output as pipes."""
    command = [*before, sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    command += [str(program), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=job, env=environment(), **pipes)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.stderr.read()}")


def children(pid):
    """Process numbers of the descendants of a process."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += map(int, file.read().split())
    return found + [descendant for child in found for descendant in children(child)]


def train_processes(pid):
    lines = {child: open(f"/proc/{child}/cmdline", "rb").read() for child in children(pid)}
    return [child for child, line in lines.items() if b".py" in line]


def state(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_run(a, b):
    """Student and optimizer are equal bit for bit."""
    assert a["step"] == b["step"]
    for name, tensor in a["student"].items():
        assert torch.equal(tensor, b["student"][name]), name
    for number, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(b["optimizer"]["state"][number][name], value)


@pytest.fixture(scope="module")
def whole(job):
    """The folder of an undisturbed run of 6 steps."""
    on_cpu(train, flags(job, job / "whole", **SHORT))
    return job / "whole"


# ------------------------------------------------------------------ interrupted and killed runs


@pytest.mark.parametrize(
    "number, processes",
    [
        (signal.SIGTERM, None),
        pytest.param(signal.SIGINT, None, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_saves_its_step_and_resumes_bit_for_bit(job, number, processes):
    settings = {"steps": 60, "dropout": 0.1, "workers": 1, "log_every": 1, "agg": "concat"}
    settings["save_every"] = 1000
    out, whole = job / f"stop{number}{processes}", job / f"whole{processes}"
    if not whole.exists():
        done = run("train.py", *flags(job, whole, **settings), cwd=job, processes=processes)
        assert done.returncode == 0, done.stderr
    process = start(job, *flags(job, out, **settings), processes=processes)
    wait_for(process, "step 5/60")
    process.send_signal(number)
    process.communicate(timeout=300)
    stopped = state(out)["step"]
    assert process.returncode == (1 if processes else 128 + number) and 5 <= stopped < 60
    assert [line["step"] for line in metrics(out)] == list(range(1, stopped + 1))
    with open(out / "metrics.jsonl", "a") as file:  # lines after the checkpoint, as after a kill
        file.write('{"step": 59, "loss": 0.1}\n{"step": 60')
    resumed = run("train.py", *flags(job, out, **settings), cwd=job, processes=processes)
    assert resumed.returncode == 0 and f"step {stopped} of 60" in resumed.stdout
    assert [line["step"] for line in metrics(out)] == list(range(1, 61))
    assert_same_run(state(out), state(whole))


@pytest.mark.parametrize(
    "kills, cached",
    [(2, True), *(pytest.param(20, cached, marks=pytest.mark.slow) for cached in (False, True))],
)
def test_a_killed_run_resumes_bit_for_bit(job, tmp_path, kills, cached):
    settings = {"steps": 20 * (kills + 1), "save_every": 2, "workers": 1, "log_every": 1}
    settings["dropout"] = 0.1
    if cached:
        settings["cache"] = tmp_path / "cache"
    rng, out = random.Random(kills), tmp_path / "killed"
    for number in range(kills):
        process = start(job, *flags(job, out, **settings))
        if cached and number % 2 == 0:
            wait_for(process, "of targets")
            time.sleep(rng.uniform(0, 0.3))
        elif number % 5 == 4:
            time.sleep(rng.uniform(0, 6))  # at the start
        else:
            wait_for(process, "step ")
            wait_for(process, "step ")
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
    for folder in (out, tmp_path / "undisturbed"):
        done = run("train.py", *flags(job, folder, **settings), cwd=job)
        assert done.returncode == 0, done.stderr
    assert_same_run(state(out), state(tmp_path / "undisturbed"))
    assert [line["step"] for line in metrics(out)] == list(range(1, settings["steps"] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_ends_the_job_or_restarts_it_bit_for_bit(job, restarts):
    settings, out = SHORT | {"steps": 40, "save_every": 3}, job / f"rank{restarts}"
    arguments = flags(job, out, **settings)
    process = start(job, *arguments, processes=2, restarts=restarts)
    wait_for(process, "step 8/40")
    os.kill(train_processes(process.pid)[-1], signal.SIGKILL)
    killed = time.monotonic()
    printed, errors = process.communicate(timeout=300)
    if restarts:
        assert process.returncode == 0, errors[-3000:]
        assert re.search("step ([69]|12) of 40", printed)
    else:
        assert process.returncode != 0 and time.monotonic() - killed < 60
        assert run("train.py", *arguments, cwd=job, processes=2).returncode == 0
    undisturbed = flags(job, job / "ranks", **settings)
    assert run("train.py", *undisturbed, cwd=job, processes=2).returncode == 0
    assert_same_run(state(out), state(job / "ranks"))


def test_ranks_whose_torchrun_is_killed_save_their_step_and_end(job, tmp_path):
    settings = {"steps": 100_000, "workers": 1, "save_every": 100_000, "log_every": 1}
    process = start(job, *flags(job, tmp_path / "out", **settings), processes=2)
    wait_for(process, "step 3/100000")
    process.kill()
    printed, _ = process.communicate(timeout=60)  # until no rank holds the pipes
    assert "is saved, the same command resumes" in printed
    assert state(tmp_path / "out")["step"] == metrics(tmp_path / "out")[-1]["step"] >= 3


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import program, train, aggregate, cache
average = aggregate.average
def slow(states):
    time.sleep(0.5)
    return average(states)
aggregate.AGGREGATIONS["avg"] = slow
cache.SIGNAL_EVERY = 2
program.run(train.main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_rank_or_torchruns_death_ends_the_filling_of_a_cache(job, tmp_path, number):
    program, settings = tmp_path / "program.py", {"cache": tmp_path / "cache"}
    program.write_text(SLOW.format(root=str(ROOT)))
    process = start(job, *flags(job, tmp_path / "out", **settings), processes=2, program=program)
    wait_for(process, "of targets")
    rank = train_processes(process.pid)[1]
    os.kill(process.pid if number == signal.SIGKILL else rank, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and 'program.py", line' not in errors
    assert len(list((tmp_path / "cache").rglob("*.pt"))) < 20  # of 30


@pytest.mark.slow
def test_a_killed_agent_that_is_started_again_by_hand_resumes_bit_for_bit(job):
    settings, out = {"steps": 40, "save_every": 3, "log_every": 1, "dropout": 0.1}, job / "killed"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--max-restarts=3", "--rdzv_backend=c10d", "--local_addr=127.0.0.1"]
    torchrun += [f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def start_agent(is_host):
        command = [*torchrun, f"--rdzv_conf=is_host={is_host}", str(ROOT / "train.py")]
        return subprocess.Popen([*command, *flags(job, out, **settings)], cwd=job, env=env)

    agents = [start_agent(1), start_agent(0)]
    try:
        while not (out / "last.pt").exists():
            assert agents[0].poll() is None
            time.sleep(0.1)
        agents[1].kill()
        time.sleep(2)
        agents[1] = start_agent(0)
        assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    undisturbed = flags(job, job / "no agents", **settings)
    assert run("train.py", *undisturbed, cwd=job, processes=2).returncode == 0
    assert_same_run(state(out), state(job / "no agents"))


BROKEN = """
import sys
sys.path.insert(0, {root!r})
import program, train, aggregate
average, calls = aggregate.average, []
def broken(states):
    calls.append(1)
    if program.RANK == {rank} and len(calls) == 3:
        raise RuntimeError("injected")
    return average(states)
aggregate.AGGREGATIONS["avg"] = broken
program.run(train.main)
"""


@pytest.mark.parametrize("processes", [None, 2])
def test_an_exception_in_the_loop_ends_all_ranks_with_its_traceback(job, tmp_path, processes):
    program = tmp_path / "program.py"
    program.write_text(BROKEN.format(root=str(ROOT), rank=1 if processes else 0))
    arguments = flags(job, tmp_path / "out", steps=10_000, workers=2)
    process = start(job, *arguments, processes=processes, program=program)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "RuntimeError: injected" in errors


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_files(
    job, whole, tmp_path, monkeypatch
):
    forward, calls = SpeechEncoder.forward, []

    def infinite_once(self, *args, **keywords):
        states = forward(self, *args, **keywords)
        calls.append(1)
        if len(calls) == 3 * 4 + 4 + 1:  # the first teacher's of step 5
            return [state * float("inf") for state in states]
        return states

    monkeypatch.setattr(SpeechEncoder, "forward", infinite_once)
    with pytest.raises(RuntimeError, match="step 5: gradient not finite") as end:
        on_cpu(train, flags(job, tmp_path / "out", **SHORT))
    assert str(end.value).count(".flac") == 8
    monkeypatch.undo()
    assert state(tmp_path / "out")["step"] == 4
    on_cpu(train, flags(job, tmp_path / "out", **SHORT))
    assert_same_run(state(tmp_path / "out"), state(whole))


# ------------------------------------------------------------------ a machine with problems


def test_audio_that_is_all_gone_ends_the_run_after_saving_its_last_step(
    job, whole, tmp_path, monkeypatch
):
    crop, crops = data.TrainBatches.crop, []

    def crop_until_unmounted(self, *place):
        crops.append(place)
        if len(crops) > 8 * 4:
            raise OSError("Transport endpoint is not connected")
        return crop(self, *place)

    with monkeypatch.context() as patch:
        patch.setattr(data.TrainBatches, "crop", crop_until_unmounted)
        with pytest.raises(ValueError, match="no utterance is readable, such as .*endpoint"):
            on_cpu(train, flags(job, tmp_path / "out", **SHORT | {"save_every": 1000}))
    assert state(tmp_path / "out")["step"] == 4
    on_cpu(train, flags(job, tmp_path / "out", **SHORT))
    assert_same_run(state(tmp_path / "out"), state(whole))


def test_a_second_run_a_killed_worker_and_a_full_disk_leave_the_checkpoint_intact(job, capsys):
    out, settings = job / "busy", {"steps": 5000, "workers": 1, "save_every": 5, "log_every": 1}
    arguments = flags(job, out, **settings)
    process = start(job, *arguments)
    try:
        wait_for(process, "step 12/5000")
        assert "another run" in refused(capsys, train, arguments)
        os.kill(train_processes(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1 and "worker" in errors
    saved = state(out)["step"]
    assert saved >= 10
    process = start(job, *arguments)
    try:
        wait_for(process, f"step {saved} of 5000")
        wait_for(process, f"step {saved + 7}/5000")
        limit = (out / "last.pt.old").stat().st_size // 2  # which exists while last.pt is renamed
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1 and "not saved" in errors and "intact" in errors
    assert not list(out.glob("*.partial")) and state(out)["step"] >= saved + 5


def test_a_run_whose_tee_has_ended_saves_its_step_at_a_signal(job, tmp_path):
    settings = {"steps": 1000, "workers": 1, "save_every": 1000, "log_every": 1}
    process = start(job, *flags(job, tmp_path / "out", **settings))
    wait_for(process, "step 3/1000")
    process.stdout.close()
    process.stderr.close()
    while process.poll() is None and metrics(tmp_path / "out")[-1]["step"] < 6:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert state(tmp_path / "out")["step"] == metrics(tmp_path / "out")[-1]["step"] >= 6


def test_an_error_that_cannot_be_printed_ends_the_program_and_its_workers(tmp_path):
    code = """
import program, multiprocessing, time
def main():
    multiprocessing.Process(target=time.sleep, args=[3600], daemon=False).start()
    raise RuntimeError
program.run(main)
"""
    quiet = "import program; program.run(lambda: print('a result'))"
    with open("/dev/full", "w") as full:
        output = {"stdout": full, "stderr": full, "env": os.environ | {"PYTHONUNBUFFERED": ""}}
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, cwd=ROOT, timeout=300, **output).returncode == 1
        command = [sys.executable, "-c", quiet]
        assert subprocess.run(command, cwd=ROOT, timeout=300, **output).returncode == 1


STUCK = """
import sys, time
sys.path.insert(0, {root!r})
import program, train, manifest
read, calls = manifest.read_audio, []
def stuck(*args):
    calls.append(1)
    if len(calls) > 40:
        time.sleep(3600)
    return read(*args)
manifest.read_audio = stuck
program.run(train.main)
"""


def test_sigterm_ends_a_run_that_waits_for_a_stuck_disk(job, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(STUCK.format(root=str(ROOT)))
    settings = {"steps": 1000, "workers": 2, "save_every": 1, "log_every": 1}
    process = start(job, *flags(job, tmp_path / "out", **settings), program=program)
    wait_for(process, "step 10/1000")
    process.terminate()
    stopped = time.monotonic()
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and "waiting for a batch" in printed + errors
    assert time.monotonic() - stopped < 10
    assert state(tmp_path / "out")["step"] == 10


def test_too_little_shared_memory_is_one_line_at_the_start(job, tmp_path):
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec"
    before = ["unshare", "-m", "sh", "-c", f'{mount} "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*before, "true"]).returncode:
        pytest.skip("needs the right to mount")
    process = start(job, *flags(job, tmp_path / "out", workers=2), before=before)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert "2 workers" in errors and "--shm-size" in errors


@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True], ids=["new run", "resumed run"])
def test_a_folder_that_cannot_be_written_is_one_line(job, whole, tmp_path, started):
    out = tmp_path / "out"
    shutil.copytree(whole, out) if started else out.mkdir()
    for name in ("last.pt",) if started else ():
        shutil.move(out / "last.pt.old", out / name)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    out.chmod(0o555)
    command = [sys.executable, str(ROOT / "train.py"), *flags(job, out, **SHORT)]
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": 120}
    try:
        done = subprocess.run(command, cwd=job, preexec_fn=obey_permissions, **options)
    finally:
        out.chmod(0o755)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ermission" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_only_a_download_needs_a_home_that_can_be_written(job, whole):
    arguments = flags(job, job / "homeless", **SHORT)
    env = {"HOME": "/proc", "TORCH_HOME": "/proc/torch"}
    assert run("train.py", *arguments, cwd=job, **env).returncode == 0
    done = run("train.py", *flags(job, job / "x", teachers="hubert"), cwd=job, **env)
    assert done.returncode == 2 and "TORCH_HOME" in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------ damaged checkpoints


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "no optimizer", "other file", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(job, whole, tmp_path, capsys, damage):
    shutil.copytree(whole, tmp_path / "out")
    damage_file(tmp_path / "out" / "last.pt", damage, tmp_path / "out" / "student.pt")
    capsys.readouterr()
    on_cpu(train, flags(job, tmp_path / "out", **SHORT))
    captured = capsys.readouterr()
    assert "step 4 of 6" in captured.out
    if damage != "missing":
        assert captured.err.count("\n") == 1 and "last.pt: " in captured.err
    assert_same_run(state(tmp_path / "out"), state(whole))


def damage_file(path, damage, other):
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "zeroed":
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    elif damage == "no optimizer":
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["optimizer"]
        torch.save(checkpoint, path)
    elif damage == "other file":
        shutil.copy(other, path)
    else:
        path.unlink()


def test_without_an_undamaged_checkpoint_nothing_is_changed(job, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    for name in ("last.pt", "last.pt.old"):
        damage_file(tmp_path / "out" / name, "zeroed", None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit):
        on_cpu(train, flags(job, tmp_path / "out", **SHORT))
    *_, line = capsys.readouterr().err.splitlines()
    assert "no undamaged checkpoint; move" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.slow
def test_memory_does_not_grow_over_3000_steps(job):
    settings = {"steps": 3000, "save_every": 500, "workers": 1, "log_every": 50}
    process = start(job, *flags(job, job / "long", **settings))
    used = []
    for line in process.stdout:
        if line.startswith("step "):
            with open(f"/proc/{process.pid}/statm") as file:
                used.append(int(file.read().split()[1]))
    assert process.wait() == 0
    assert np.mean(used[-15:]) < 1.02 * np.mean(used[5:20])
