"""bench.py: its step is train.py's, its figures add up, and it runs as a program."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import SMALL, run

import aggregate
import bench
import data
import train
from export import save_official
from student import Student, initialise, load_student, student_config


def figures(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("agg", ["avg", "none"])
def test_the_step_that_is_timed_is_train_pys(tmp_path, monkeypatch, agg):
    monkeypatch.setattr(bench, "EncoderConfig", lambda **more: dataclasses.replace(SMALL, **more))
    settings = argparse.Namespace(seconds=[0.9, 0.8, 0.7], heads=[2, 4], agg=agg, workers=0, precision="fp32")
    (tmp_path / "audio").mkdir()
    corpus = bench.write_utterances(tmp_path / "audio", settings.seconds)
    ours = bench.Ours(settings, torch.device("cpu"), data.Batches(corpus, 3, 16000))
    for number, (teacher, form) in enumerate(zip(ours.teachers, ["fairseq", "fairseq", "microsoft"])):
        save_official(teacher, tmp_path / f"{number}.pt", form)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    teachers = ",".join(str(tmp_path / f"{number}.pt") for number in range(3))
    arguments = f"--teachers {teachers} --heads 2,4 --agg {agg} --data {tmp_path / 'audio'} --splits . --steps 1"
    train.main(
        [
            *arguments.split(),
            *f"--batch-size 3 --warmup 0 --workers 0 --precision fp32 --out {tmp_path / 'run'}".split(),
        ]
    )

    torch.manual_seed(0)
    names = [(str(number), SMALL.dim) for number in range(3)]
    student = Student(student_config(SMALL), aggregate.heads(agg, [[2, 4]] * 3, names))
    initialise(student, ours.teachers[0])
    for name, weight in student.encoder.state_dict().items():
        assert torch.equal(ours.student.encoder.state_dict()[name], weight), name
    ours.student.load_state_dict(student.state_dict())
    torch.manual_seed(int(np.random.SeedSequence((0, 1, 0)).generate_state(1, np.uint64)[0]))  # train.py's first step
    assert ours.step() == pytest.approx(3 * 0.6)  # cut to the shortest, in steps of 0.2 s
    (saved,) = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    (group,) = ours.optimizer.param_groups
    assert all(group[setting] == saved[setting] for setting in ("lr", "betas", "eps", "weight_decay"))
    trained, before = load_student(tmp_path / "run" / "student.pt").state_dict(), student.state_dict()
    for name, weight in ours.student.state_dict().items():
        update = trained[name] - before[name]
        assert update.norm() > 0 and (weight - trained[name]).norm() < 1e-3 * update.norm(), name


def flops_by_hand(c, layers, heads, seconds):
    """Of a step with two HuBERT and a WavLM of the shape `c`, a student of 2 layers and `heads` heads, an utterance."""
    samples, below, convolutions = int(seconds * 16000), 1, []
    for channels, kernel, stride in c.conv_layers:
        samples = (samples - kernel) // stride + 1
        convolutions.append(2 * samples * channels * below * kernel)
        below = channels
    frames = samples
    front = sum(convolutions) + 2 * frames * below * c.dim + 2 * (frames + 1) * c.dim**2 // c.pos_groups * c.pos_kernel
    layer = 2 * frames * c.dim * (4 * c.dim + 2 * c.ffn_dim) + 4 * frames**2 * c.dim
    gates = layers * 2 * frames * c.dim * 8  # WavLM's
    student = front + 2 * layer + heads * 2 * 2 * frames * c.dim**2
    # Backward is twice the student's forward, but for the waveforms, which need no gradient.
    return 3 * (front + layers * layer) + gates + 3 * student - convolutions[0]


def test_the_table_and_the_json_say_the_same_and_the_flops_are_those_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "EncoderConfig", lambda **more: dataclasses.replace(SMALL, **more))
    trace = str(tmp_path / "trace.json")
    bench.main(
        [
            "--seconds",
            "0.9,0.8",
            "--heads",
            "2,4",
            "--steps",
            "2",
            "--json",
            "--profile",
            trace,
            "--workers",
            "0",
            "--cache",
        ]
    )
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert found["audio_per_step"] == pytest.approx(1.6) and sum(found["shares"].values()) == pytest.approx(1)
    assert found["audio_per_second"] == pytest.approx(1.6 / found["seconds_per_step"])
    assert found["flops_per_second"] == pytest.approx(found["flops_per_step"] / found["seconds_per_step"])
    share = found["flops_per_second"] / found["limit_flops_per_second"]
    assert found["share_of_limit"] == pytest.approx(share) and 0 < share < 1.2
    assert f"{share:.1%}" in printed and f"{found['shares']['teachers']:.1%}" in printed
    assert found["kept_ratio"] == pytest.approx(found["seconds_per_step"] / found["kept_seconds_per_step"])
    assert f"{found['kept_ratio']:.2f} times as fast" in printed
    assert {"aten::addmm"} <= {event.get("name") for event in json.load(open(trace))["traceEvents"]}

    assert found["flops_per_step"] == 2 * flops_by_hand(SMALL, 4, 2, 0.8)


@pytest.mark.slow
def test_two_processes_and_the_peer_are_timed(tmp_path):
    found = figures(run("bench.py", "--seconds", "0.5,0.4", "--steps", 1, "--json", cwd=tmp_path, processes=2))
    assert found["audio_per_step"] == pytest.approx(4 * 0.4)
    found = figures(run("bench.py", "--seconds", "0.5,0.4", "--steps", 2, "--json", "--peer", cwd=tmp_path))
    assert found["flops_per_step"] == 2 * flops_by_hand(bench.EncoderConfig(), 12, 3, 0.4)
    assert found["ratio_to_peer"] == pytest.approx(found["audio_per_second"] / found["peer_audio_per_second"])


def test_the_loader_is_timed_alone(corpus, tmp_path):
    found = figures(run("bench.py", "--loader", "--data", corpus, "--batch-size", 8, "--json", cwd=tmp_path))
    assert found["utterances"] == 132 and found["workers"] == 1
    assert found["audio_per_second"] > found["utterances_per_second"] > 10  # utterances of over a second


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--loader", "--data", "nowhere"], "nowhere"),
        (["--seconds", "8,0.1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "0.3,inf"], "--seconds"),
        (["--profile", "nowhere/trace.json"], "nowhere/trace.json"),
        (["--heads", "4,13"], "--heads"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_bad_settings_are_refused_in_one_line(capsys, monkeypatch, flags, word):
    with pytest.raises(SystemExit) as end:
        bench.main(flags)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and word in line, line
