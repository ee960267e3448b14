"""train.py as a user runs it: as a program, alone, under torchrun, and on two agents."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import (
    LARGE,
    ROOT,
    environment,
    flags_of,
    metrics,
    noise,
    obey_permissions,
    on_cpu,
    random_encoder,
    refused,
    run,
    write_audio,
)

import data
import states
import train
from encoder import SpeechEncoder
from export import official_state_dict, save_official
from student import Student, load_student, save_student, student_config


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with audio and four small teachers in official forms."""
    folder = tmp_path_factory.mktemp("job")
    write_audio(folder / "audio", [6000 + 397 * i for i in range(25)])
    write_audio(folder / "audio" / "telephone", [5000 + 400 * i for i in range(5)], rate=8000, seed=1)
    save_official(random_encoder(0), folder / "hubert.pt", "fairseq")
    save_official(random_encoder(1), folder / "robust.pt", "s3prl")
    save_official(random_encoder(2, relative_buckets=320), folder / "wavlm.pt", "microsoft")
    save_official(random_encoder(3, dim=64, relative_buckets=320, **LARGE), folder / "wavlm_large.pt", "microsoft")
    return folder


def flags(job, out, **more):
    settings = dict(
        teachers=f"{job}/hubert.pt,{job}/robust.pt,{job}/wavlm.pt", heads="2,4", data=job / "audio", splits="."
    )
    settings |= dict(
        steps=20, batch_size=8, lr=1e-3, max_seconds=0.5, precision="fp32", dropout=0, workers=0, log_every=5
    )
    return flags_of(settings | dict(out=out) | more)


def distil(job, out, processes=None, **more):
    """The weights of the student of a whole run: in this process where it is alone, which saves a start of Python."""
    out = job / out
    if processes is None:
        on_cpu(train, flags(job, out, **more))
        return load_student(out / "student.pt").state_dict()
    done = run("train.py", *flags(job, out, **more), cwd=job, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_student(out / "student.pt").state_dict()


def assert_same_student(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm(), name


@pytest.fixture(scope="module")
def reference(job):
    """The student of 20 steps on one process."""
    return distil(job, "one")


@pytest.mark.parametrize("processes, accumulate", [(2, 1), (None, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_processes_and_accumulation_give_the_student_of_one_process(job, reference, processes, accumulate):
    out = f"p{processes}a{accumulate}"
    assert_same_student(distil(job, out, processes, accumulate=accumulate), reference)
    for a, b in zip(metrics(job / out), metrics(job / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_two_agents_give_the_student_of_one(job, reference):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    command += [f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--local_addr=127.0.0.1", str(ROOT / "train.py")]
    logs = [open(job / f"agent{number}.log", "w+") for number in range(2)]
    agents = [subprocess.Popen(command + flags(job, "agents"), cwd=job, env=environment(), stderr=log) for log in logs]
    try:
        for agent in agents:
            agent.wait(timeout=120)
    finally:
        for agent in agents:
            agent.kill()
    errors = [log.seek(0) or log.read() for log in logs]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert_same_student(load_student(job / "agents" / "student.pt").state_dict(), reference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_losses_of_the_cpu(job, reference):
    done = run("train.py", *flags(job, "gpu"), cwd=job, processes=1, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0 and "1 x cuda" in done.stdout, done.stderr
    for a, b in zip(metrics(job / "gpu"), metrics(job / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def interrupt(job, out, number, after, **more):
    """Starts a run, sends it a signal once `after` stands on its screen, and returns (exit code, stderr)."""
    command = [sys.executable, str(ROOT / "train.py"), *flags(job, out, **more)]
    process = subprocess.Popen(
        command, cwd=job, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if after in line:
            process.send_signal(number)
            break
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_run_that_is_interrupted_and_started_again_ends_bit_for_bit_the_same(job, number):
    settings = dict(steps=60, dropout=0.1, workers=1, log_every=1, save_every=1000, agg="concat")
    whole = f"whole{int(number)}"
    if not (job / "whole").exists():
        assert run("train.py", *flags(job, "whole", **settings), cwd=job).returncode == 0
    code, errors = interrupt(job, whole, number, "step  5/60", **settings)
    assert code == 128 + number and errors.count("\n") == 1
    stopped = torch.load(job / whole / "last.pt", weights_only=True)["step"]
    assert f"step {stopped} of 60" in errors and 5 <= stopped < 60
    assert [line["step"] for line in metrics(job / whole)] == list(range(1, stopped + 1))

    with open(job / whole / "metrics.jsonl", "a") as file:  # as after a kill: lines of steps that no save holds
        file.write('{"step": 59, "loss": 0.1}\n{"step": 60')
    resumed = run("train.py", *flags(job, whole, **settings), cwd=job)
    assert resumed.returncode == 0 and f"resuming after step {stopped}" in resumed.stdout
    assert [line["step"] for line in metrics(job / whole)] == list(range(1, 61))
    expected, got = (torch.load(job / out / "last.pt", weights_only=True) for out in ("whole", whole))
    for name, tensor in expected["student"].items():
        assert torch.equal(got["student"][name], tensor), name
    for number, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(got["optimizer"]["state"][number][key], value) for key, value in state.items())


def test_a_finished_run_is_left_as_it_is(job, reference):
    before = (job / "one" / "last.pt").read_bytes()
    done = run("train.py", *flags(job, job / "one"), cwd=job)
    assert done.returncode == 0 and "finished" in done.stdout
    assert (job / "one" / "last.pt").read_bytes() == before


# ---------------------------------------------------------------- targets that are kept


@pytest.fixture(scope="module")
def whole_utterances(job):
    """Audio of which every crop is a whole utterance, and a run on it without kept targets."""
    write_audio(job / "whole audio", [6400] * 24, seed=3)
    return distil(job, "uncached", data=job / "whole audio", max_seconds=1)


@pytest.mark.parametrize("processes, where", [(None, "folder"), (None, "memory"), (2, "folder")])
def test_kept_targets_give_the_student_of_teachers_that_run_at_every_step(
    job, whole_utterances, tmp_path, monkeypatch, processes, where
):
    settings, out = dict(data=job / "whole audio", max_seconds=1), f"cached{processes}{where}"
    expected = whole_utterances if processes is None else distil(job, "uncached2", processes, **settings)
    settings |= dict(cache="memory" if where == "memory" else tmp_path / "cache")
    if processes is None:
        close = distil(job, out, **settings)
        assert_same_student(close, expected, 5e-2)
        assert not all(torch.equal(close[name], weight) for name, weight in expected.items())
        for a, b in zip(metrics(job / out), metrics(job / "uncached"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
    # Bit for bit where they are kept exactly as the teachers gave them.
    settings |= dict(cache="memory" if where == "memory" else tmp_path / "exact cache")
    if processes is None:
        monkeypatch.setattr(states, "TARGETS_AS", torch.float32)
        exact = distil(job, f"{out} exact", **settings)
    else:
        program = tmp_path / "exact.py"
        lines = "import processes, states, torch, train\nstates.TARGETS_AS = torch.float32\nprocesses.run(train.main)\n"
        program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{lines}")
        done = run(program, *flags(job, job / f"{out} exact", **settings), cwd=job, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        exact = load_student(job / f"{out} exact").state_dict()
    assert all(torch.equal(exact[name], weight) for name, weight in expected.items())


def test_a_later_run_finds_the_targets_and_another_ensembles_are_never_used(job, tmp_path, monkeypatch, capsys):
    cache, calls, forward = tmp_path / "cache", [], SpeechEncoder.forward
    monkeypatch.setattr(
        SpeechEncoder, "forward", lambda self, *a, **k: calls.append(self.training) or forward(self, *a, **k)
    )
    distil(job, tmp_path / "first", cache=cache, steps=2)
    assert f"kept {cache}" in capsys.readouterr().out.replace("kept in", "kept") and calls.count(False) > 0  # teachers
    calls.clear()
    distil(job, tmp_path / "second", cache=cache, steps=3, student_layers=1, seed=5)
    assert calls == [True] * 3
    for number, more in enumerate([dict(heads="1,4"), dict(agg="concat"), dict(teachers=job / "hubert.pt")], start=2):
        distil(job, tmp_path / f"other{number}", cache=cache, steps=1, **more)
        assert len(list(cache.glob("targets-*"))) == number


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_with_kept_targets_that_is_killed_is_carried_on_bit_for_bit(job, tmp_path, kills):
    settings = dict(steps=10 * kills, dropout=0.1, workers=1, log_every=1, save_every=4, agg="none")
    assert run("train.py", *flags(job, tmp_path / "whole", cache=tmp_path / "a", **settings), cwd=job).returncode == 0
    for number in range(kills):  # at a start, while targets are computed, among steps and saves
        after = ("audio: ", "targets: ", f"step {10 * number - 3:>{len(str(10 * kills))}}/")[number % 3]
        code, errors = interrupt(job, tmp_path / "killed", signal.SIGKILL, after, cache=tmp_path / "b", **settings)
        assert code == -signal.SIGKILL, errors
    done = run("train.py", *flags(job, tmp_path / "killed", cache=tmp_path / "b", **settings), cwd=job)
    assert done.returncode == 0, done.stderr
    expected, found = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    assert found["step"] == 10 * kills
    assert all(torch.equal(tensor, found["student"][name]) for name, tensor in expected["student"].items())


def test_a_disk_that_fills_up_while_targets_are_computed_costs_none_that_are_kept(job, tmp_path, capsys, monkeypatch):
    write, written = states.write_whole, []

    def full(path, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(states, "BLOCK", 8)
    monkeypatch.setattr(states, "write_whole", full)
    assert "No space left" in refusal(capsys, flags(job, tmp_path / "out", cache=tmp_path / "cache", steps=2))
    monkeypatch.setattr(states, "write_whole", lambda *a: written.append(a[0]) or write(*a))
    distil(job, tmp_path / "out", cache=tmp_path / "cache", steps=2)
    assert len(written) == len(set(written)) == 4  # 30 utterances; the first two blocks were not made again


@pytest.mark.parametrize("damage", ["flipped", "foreign"])
def test_a_damaged_file_of_targets_is_noticed_and_its_utterances_weigh_nothing(
    job, tmp_path, capfd, monkeypatch, damage
):
    monkeypatch.setattr(states, "BLOCK", 15)
    monkeypatch.setattr(data, "check_left_out", lambda *_: None)  # one file is half of this corpus
    settings = dict(cache=tmp_path / "cache", steps=6)
    expected = distil(job, tmp_path / "whole", **settings)
    (folder,) = (tmp_path / "cache").glob("targets-*")
    content = bytearray((folder / "00001").read_bytes())
    content[100] ^= 1
    if damage == "foreign":
        content = np.random.default_rng(0).bytes(len(content))
    (folder / "00001").write_bytes(content)
    distil(job, tmp_path / "damaged", **settings)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "its targets" in line]
    assert 1 <= len(warnings) <= (1 if damage == "flipped" else 15)
    assert all(f"{folder / '00001'}: damaged; delete it" in line for line in warnings)
    assert metrics(tmp_path / "damaged")[-1]["left_out"] == len(warnings)
    (folder / "00001").unlink()
    again = distil(job, tmp_path / "again", **settings)
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_targets_of_eight_bits_take_half_the_room_and_are_as_good(job, tmp_path, where):
    for bits in (16, 8):
        cache = "memory" if where == "memory" else tmp_path / str(bits)
        distil(job, tmp_path / f"out{bits}", cache=cache, cache_bits=bits)
    for a, b in zip(metrics(tmp_path / "out8"), metrics(tmp_path / "out16"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3) and a["loss"] != b["loss"]
    if where == "folder":
        size = {bits: sum(f.stat().st_size for f in (tmp_path / str(bits)).rglob("00*")) for bits in (16, 8)}
        assert 0.5 < size[8] / size[16] < 0.65  # utterances here have 20 frames; the scales are 4 frames' worth


def test_a_run_that_finds_its_targets_loads_no_teacher(job, tmp_path, monkeypatch):
    for name in ("hubert", "robust", "wavlm"):
        shutil.copy(job / f"{name}.pt", tmp_path)
    teachers = ",".join(str(tmp_path / f"{name}.pt") for name in ("hubert", "robust", "wavlm"))
    settings = dict(teachers=teachers, cache=tmp_path / "cache", steps=4, init="none", save_every=2)
    expected = distil(job, tmp_path / "first", **settings)
    loads, load = [], states.load_teacher
    for module in (states, train):
        monkeypatch.setattr(module, "load_teacher", lambda *a: loads.append(a[0]) or load(*a))
    found = distil(job, tmp_path / "second", **settings)
    assert not loads and all(torch.equal(found[name], weight) for name, weight in expected.items())
    os.replace(tmp_path / "second" / "last.1.pt", tmp_path / "second" / "last.pt")
    found = distil(job, tmp_path / "second", **settings)  # resumed
    assert not loads and all(torch.equal(found[name], weight) for name, weight in expected.items())
    distil(job, tmp_path / "third", **settings | dict(init="first"))
    assert loads == [str(tmp_path / "hubert.pt")]  # whose weights the student begins with
    loads.clear()
    distil(job, tmp_path / "fourth", **settings | dict(heads="1,2"))
    assert len(loads) == 3  # other targets
    loads.clear()
    save_official(random_encoder(7), tmp_path / "hubert.pt", "fairseq")
    distil(job, tmp_path / "fifth", **settings)
    assert len(loads) == 3 and len(list((tmp_path / "cache").glob("targets-*"))) == 3


def test_two_runs_fill_and_use_one_cache_at_the_same_time(job, tmp_path):
    """Each is another student of the same targets."""
    many = dict(cache=tmp_path / "cache", steps=6, agg="none")
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags(job, tmp_path / f"shared{seed}", seed=seed, **many)],
            **dict(cwd=job, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
        )
        for seed in (0, 1)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for seed in (0, 1):
        alone = distil(job, tmp_path / f"alone{seed}", seed=seed, **many | dict(cache=tmp_path / f"cache{seed}"))
        assert_same_student(load_student(tmp_path / f"shared{seed}").state_dict(), alone, 1e-3)  # fewer threads there


def test_a_whole_cache_that_cannot_be_written_is_used(job, tmp_path):
    distil(job, tmp_path / "first", cache=tmp_path / "cache", steps=3)
    (tmp_path / "cache" / "teachers.json").unlink()  # it would be written again
    folders = [tmp_path / "cache", *(tmp_path / "cache").glob("targets-*")]
    for folder in folders:
        folder.chmod(0o555)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *flags(job, tmp_path / "second", cache=tmp_path / "cache", steps=3),
    ]
    started = dict(env=environment(), capture_output=True, text=True, timeout=120)
    done = subprocess.run(command, cwd=job, preexec_fn=obey_permissions, **started)
    for folder in folders:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert_same_student(*(load_student(tmp_path / name).state_dict() for name in ("second", "first")), 1e-3)


def test_targets_without_room_are_refused_before_the_teachers_run(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(SpeechEncoder, "forward", lambda *_: pytest.fail("a network ran"))
    assert "no room for" in refusal(capsys, flags(job, tmp_path / "out", cache=tmp_path / "cache"))
    monkeypatch.setattr(states, "free_memory", lambda: 1000)
    assert "--cache: " in refusal(capsys, flags(job, tmp_path / "out2", cache="memory"))


# ---------------------------------------------------------------- what a run writes


def test_metrics_hold_every_heads_terms_and_add_up(job, reference):
    lines = metrics(job / "one")
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20]
    for line in lines:
        assert {"step", "loss", "l1", "cosine", "lr", "audio_per_second", "l1/layer2", "cosine/layer4"} <= set(line)
        assert line["loss"] == pytest.approx(line["l1"] + line["cosine"], rel=1e-6)
        assert line["l1"] == pytest.approx((line["l1/layer2"] + line["l1/layer4"]) / 2, rel=1e-6)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


@pytest.mark.parametrize("agg", ["avg", "concat", "none"])
def test_each_aggregation_trains_its_heads_and_the_loss_falls(job, agg):
    teachers = [job / "hubert.pt", job / "wavlm.pt"] if agg == "avg" else [job / "hubert.pt", job / "wavlm_large.pt"]
    distil(job, agg, agg=agg, teachers=",".join(map(str, teachers)), steps=12)
    student, lines = load_student(job / agg / "student.pt"), metrics(job / agg)
    expected = {
        "avg": [("layer2", 48), ("layer4", 48)],
        "concat": [("layer2", 112), ("layer4", 112)],
        "none": [("hubert.layer2", 48), ("hubert.layer4", 48), ("wavlm_large.layer2", 64), ("wavlm_large.layer4", 64)],
    }[agg]
    assert [(name, p.shape[-1]) for name, p in zip(student.head_names, student(noise(1, 4000)))] == expected
    assert [tuple(state.shape) for state in student.hidden_states(noise(1, 4000))] == [(1, 12, 48)] * 3
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_teachers_of_different_depth_have_layers_of_their_own(job):
    distil(job, "depths", heads="2,4/2,3/1,4", steps=2)
    student = load_student(job / "depths" / "student.pt")
    assert student.head_names == ["layer2-2-1", "layer4-3-4"]
    settings = json.loads((job / "depths" / "config.json").read_text())["settings"]
    assert settings["heads"] == [[2, 4], [2, 3], [1, 4]]
    distil(job, "depths", heads="2,4/2,3/1,4", steps=2)  # known again
    assert metrics(job / "depths")[0]["l1/layer4-3-4"] > 0


@pytest.mark.parametrize("change", [dict(processes=2), dict(accumulate=2)])
def test_with_dropout_processes_and_accumulation_change_the_student_no_more_than_another_seed(job, change):
    whole, seed, other = (
        distil(job, f"dropout{number}{list(change)[0]}", dropout=0.1, **more)
        for number, more in enumerate([{}, dict(seed=1), change])
    )

    def apart(a, b):
        return sum(float((a[name] - b[name]).norm()) for name in a)

    assert 0 < apart(whole, other) < apart(whole, seed)


def test_bf16_and_a_student_from_scratch_train_too(job):
    distil(job, "bf16", precision="bf16", init="none", steps=12, student_layers=3, dropout=0.1)
    lines = metrics(job / "bf16")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {tensor.dtype for tensor in load_student(job / "bf16" / "student.pt").state_dict().values()} == {
        torch.float32
    }


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_that_turns_out_unreadable_is_left_out_named_and_counted(job, tmp_path, processes):
    paths = write_audio(tmp_path / "audio", [6000] * 120)
    data.find_corpus(str(tmp_path / "audio"), ["."])  # the scan, while all is well
    paths[7].write_bytes(paths[7].read_bytes()[:200])
    settings = dict(data=tmp_path / "audio", steps=15)
    students = []
    for count in {None, processes}:
        out = tmp_path / f"left_out{count}"
        done = run("train.py", *flags(job, out, **settings), cwd=job, processes=count)
        assert done.returncode == 0, done.stderr
        assert len(re.findall("left out 007.flac", done.stderr)) == 1
        assert metrics(out)[-1]["left_out"] == 1
        students.append(load_student(out / "student.pt").state_dict())
    assert_same_student(students[0], students[-1])


def test_after_a_loss_that_is_not_finite_no_weight_changes_until_the_run_stops(job, tmp_path, capsys, monkeypatch):
    students, weights, losses = [], [], []
    rate, loss = train.learning_rate, train.distillation_loss

    def noted_rate(step, args):
        weights.append([weight.detach().clone() for weight in students[0].parameters()])
        return rate(step, args)

    def broken_loss(*a):
        total, l1, cosine = loss(*a)
        losses.append(total)
        return total * float("nan" if len(losses) == 3 else 1), l1, cosine

    monkeypatch.setattr(train, "Student", lambda *a: students.append(Student(*a)) or students[0])
    monkeypatch.setattr(train, "learning_rate", noted_rate)
    monkeypatch.setattr(train, "distillation_loss", broken_loss)
    line = refusal(capsys, flags(job, tmp_path / "out", steps=6, log_every=100))
    assert "step 3: the loss is not finite" in line and len(weights) == 6
    at_step_3, last = weights[2], list(students[0].parameters())
    assert not all(torch.equal(a, b) for a, b in zip(weights[1], at_step_3))
    assert all(torch.equal(a, b) for a, b in zip(at_step_3, last, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_files(job, tmp_path):
    broken = random_encoder(0)
    broken.layers[3].ffn_out.bias.data[0] = float("nan")
    save_official(broken, tmp_path / "teacher.pt", "fairseq")
    done = run("train.py", *flags(job, tmp_path / "out", teachers=tmp_path / "teacher.pt"), cwd=job)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "step 1:" in done.stderr and done.stderr.count(".flac") == 8 and "nothing was saved" in done.stderr


def test_a_teacher_that_was_exchanged_under_its_name_is_refused_at_a_resume(job, tmp_path, capsys):
    shutil.copy(job / "hubert.pt", tmp_path / "teacher.pt")
    settings = dict(teachers=tmp_path / "teacher.pt", steps=60, log_every=1)
    interrupt(job, tmp_path / "out", signal.SIGTERM, "step  3/60", **settings)
    saved = (tmp_path / "out" / "last.pt").read_bytes()
    save_official(random_encoder(7), tmp_path / "teacher.pt", "fairseq")
    line = refusal(capsys, flags(job, tmp_path / "out", **settings))
    assert "weights of teacher" in line and (tmp_path / "out" / "last.pt").read_bytes() == saved
    other = settings | dict(teachers=job / "robust.pt")
    assert "--teachers were teacher, are robust" in refusal(capsys, flags(job, tmp_path / "out", **other))


def test_a_run_goes_on_from_another_directory_and_with_paths_written_otherwise(job, reference, tmp_path):
    shutil.copytree(job / "one", tmp_path / "moved")
    names = ("hubert", "robust", "wavlm")
    here = dict(data="audio", teachers=",".join(f"./{name}.pt" for name in names))
    done = run("train.py", *flags(job, tmp_path / "moved", **here), cwd=job)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


def test_a_finished_run_writes_its_student_again_where_it_was_deleted(job, reference, tmp_path):
    shutil.copytree(job / "one", tmp_path / "out")
    os.remove(tmp_path / "out" / "student.pt")
    on_cpu(train, flags(job, tmp_path / "out"))
    again = torch.load(tmp_path / "out" / "student.pt", weights_only=True)
    assert_same_student(again["weights"], reference, 0)
    assert again["step"] == 20 and again["teachers"] == ["hubert", "robust", "wavlm"]


def test_automatic_precision_is_kept_as_what_it_was(job, tmp_path, capsys, monkeypatch):
    able = dict.fromkeys(["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"], False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    settings = dict(steps=2, precision="auto")
    on_cpu(train, flags(job, tmp_path / "out", **settings))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able | {"avx512_bf16": True})
    assert "--precision was fp32, is bf16" in refusal(capsys, flags(job, tmp_path / "out", **settings))
    on_cpu(train, flags(job, tmp_path / "out", **settings | dict(precision="fp32")))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["settings"]["precision"] = "auto"  # as it was kept before
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    on_cpu(train, flags(job, tmp_path / "out", **settings))


@pytest.mark.parametrize("content", ['{"settings": 5}', "[1]", "{}", "no", '{"settings": ["a"]}'])
def test_a_config_that_is_no_runs_is_refused(job, tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert "config.json: not the settings of a run" in refusal(capsys, flags(job, tmp_path))


def test_the_learning_rate_rises_then_falls_to_zero():
    args = train.parse(["--steps", "1000", "--lr", "1e-3", "--warmup", "0.07"])
    rates = [train.learning_rate(step, args) for step in range(1, 1002)]
    assert rates[0] == pytest.approx(1e-3 / 70) and max(rates) == rates[69] == 1e-3
    assert rates[-1] == 0 and rates[999] > 0
    assert all(a < b for a, b in zip(rates[:69], rates[1:70])) and all(a > b for a, b in zip(rates[69:], rates[70:]))


def test_the_recipes_defaults_are_the_papers():
    args = vars(train.parse([]))
    expected = dict(
        agg="avg", heads=[4, 8, 12], student_layers=2, init="first", dropout=0.1, steps=200_000, batch_size=24
    )
    expected |= dict(lr=2e-4, warmup=0.07, clip=5.0, cosine_weight=1.0, out="runs/avg", data="data/LibriSpeech")
    expected |= dict(teachers=["hubert", "robust_hubert", "wavlm_plus"], splits=list(data.LIBRISPEECH_960))
    assert {key: args[key] for key in expected} == expected
    assert args["max_seconds"] * 16000 == 250_000


def refusal(capsys, arguments):
    return refused(capsys, train, arguments)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(data="nowhere"), ["nowhere", "--data"]),
        (dict(splits="train-clean-100"), ["train-clean-100", "--splits"]),
        (dict(data="{job}/empty"), ["no audio", "empty"]),
        (dict(teachers="nowhere.pt"), ["nowhere.pt", "hubert"]),
        (dict(teachers="{job}/short.pt"), ["short.pt", "cut short"]),
        (dict(teachers="{job}/page.pt"), ["page.pt", "web page"]),
        (dict(teachers="{job}/code.pt"), ["code.pt", "refused", "system"]),
        (dict(teachers="{job}/other.pt"), ["other.pt", "not a HuBERT or WavLM"]),
        (dict(teachers="{job}/student.pt"), ["student.pt", "a student", "export.py"]),
        (dict(seed="9" * 23), ["--seed", "2^64"]),
        (dict(teachers="{job}/missing.pt"), ["missing.pt", "encoder.layers.1.fc1.weight"]),
        (dict(heads="2,5"), ["--heads: hubert has 4 layers, not 5"]),
        (dict(heads="2,4/2,4"), ["--heads", "2 lists for 3 teachers"]),
        (dict(heads="2,4/2,4/3"), ["--heads", "as many layers"]),
        (dict(heads="2,4/2,4/3,5"), ["--heads", "wavlm has 4 layers"]),
        (dict(heads="2,2"), ["--heads", "once"]),
        (dict(heads="two"), ["--heads", "two"]),
        (dict(heads="0,2"), ["--heads", "from 1"]),
        (dict(teachers="{job}/hubert.pt,{job}/wavlm_large.pt"), ["--agg avg", "hubert 48", "wavlm_large 64"]),
        (dict(agg="mean"), ["--agg", "mean"]),
        (dict(batch_size=9, accumulate=2), ["--batch-size 9", "--accumulate 2"]),
        (dict(batch_size=64), ["--batch-size 64", "30 utterances"]),
        (dict(student_layers=5), ["--student-layers", "--init none"]),
        (dict(steps=0), ["--steps", "1 or more"]),
        (dict(workers=-1), ["--workers", "0 or more"]),
        (dict(warmup=1.5), ["--warmup", "below 1"]),
        (dict(lr="fast"), ["--lr", "fast"]),
        (dict(out="{job}/strange"), ["strange", "--out"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(job, capsys, change, words, tmp_path):
    (job / "empty").mkdir(exist_ok=True)
    (job / "strange").mkdir(exist_ok=True)
    (job / "strange" / "last.pt").write_text("mine")
    whole = (job / "hubert.pt").read_bytes()
    (job / "short.pt").write_bytes(whole[: len(whole) // 3])
    (job / "page.pt").write_text("<html>Sign in</html>")
    torch.save({"model": {}, "cfg": os.system}, job / "code.pt")
    torch.save({"conv1.weight": torch.zeros(2)}, job / "other.pt")
    weights = official_state_dict(random_encoder(), "fairseq")
    del weights["encoder.layers.1.fc1.weight"]
    torch.save({"cfg": {"encoder_attention_heads": 4}, "model": weights}, job / "missing.pt")
    save_student(Student(student_config(random_encoder().config), [("layer2", 48)]), job / "student.pt")
    change = {key: str(value).format(job=job) for key, value in change.items()}
    line = refusal(capsys, flags(job, **{"out": tmp_path / "out", **change}))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists() and os.listdir(job / "strange") == ["last.pt"]


def test_the_folder_of_another_run_is_refused_and_the_settings_named(job, reference, capsys):
    line = refusal(capsys, flags(job, job / "one", heads="2,3", lr=2e-3))
    assert "--heads was 2,4, is 2,3" in line and "--lr was 0.001, is 0.002" in line and "--steps" not in line


def test_a_damaged_save_and_changed_audio_are_said_so(job, capsys, tmp_path):
    write_audio(tmp_path / "audio", [6000] * 10)
    settings = dict(data=tmp_path / "audio", steps=2)
    distil(job, tmp_path / "out", **settings)
    write_audio(tmp_path / "audio" / "more", [6000])
    assert "audio is not what it was" in refusal(capsys, flags(job, tmp_path / "out", **settings))
    (tmp_path / "out" / "last.pt").write_bytes(b"damaged")
    assert "last.pt" in refusal(capsys, flags(job, tmp_path / "out", **settings))


def test_tensorboard_is_asked_for_where_it_is_missing(job, capsys, tmp_path):
    try:
        import tensorboard  # noqa: F401

        pytest.skip("tensorboard is here")
    except ImportError:
        pass
    assert "pip install tensorboard" in refusal(capsys, [*flags(job, tmp_path / "out"), "--tensorboard"])


def test_under_torchrun_one_process_says_it_once(job, tmp_path):
    done = run("train.py", *flags(job, tmp_path / "out", heads="2,7"), cwd=job, processes=2)
    assert done.returncode != 0 and done.stderr.count("train.py: --heads: hubert has 4 layers, not 7") == 1
    assert f'{ROOT / "train.py"}", line' not in done.stderr  # torchrun's own traceback, none of ours
    uneven = run("train.py", *flags(job, tmp_path / "out", batch_size=9), cwd=job, processes=2)
    assert uneven.stderr.count("train.py: --batch-size 9 does not divide over 2 processes") == 1


def test_help_documents_every_setting_with_its_default():
    done = run("train.py", "--help", cwd=ROOT)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for flag, default in [
        ("--agg", "avg"),
        ("--steps", "200000"),
        ("--max-seconds", "15.625"),
        ("--clip", "5.0"),
        ("--out", "runs/"),
    ]:
        assert re.search(rf"{flag} .*?\(default: {default}", text), flag
