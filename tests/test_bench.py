"""bench.py: what it times is the step of train.py."""

import dataclasses
import re

import pytest
import torch
from conftest import SMALL, flags_of, on_cpu, refused

import bench
import train
from encoder import SpeechEncoder
from export import save_official
from student import Student, load_student


@pytest.fixture
def small(monkeypatch):
    """Makes the networks of bench.py small."""
    monkeypatch.setattr(bench, "EncoderConfig", lambda **more: dataclasses.replace(SMALL, **more))


@pytest.mark.parametrize("agg", ["avg", "none"])
def test_the_timed_steps_are_those_of_train(small, tmp_path, monkeypatch, agg):
    students, audio = [], tmp_path / "audio"

    def record(*arguments):
        students.append(Student(*arguments))
        return students[0]

    torch.manual_seed(0)
    teachers = []
    for number, form in enumerate(["fairseq", "s3prl", "microsoft"]):
        config = dataclasses.replace(SMALL, relative_buckets=320 if form == "microsoft" else 0)
        path = f"{tmp_path}/{number}.pt"
        save_official(SpeechEncoder(config), path, form)
        teachers.append(path)
    audio.mkdir()
    seconds = [0.9, 0.8, 0.7]
    bench.write_audio(audio, seconds)
    settings = {"teachers": ",".join(teachers), "heads": "2,4", "agg": agg, "data": audio}
    settings |= {"splits": ".", "steps": 3, "batch_size": 3, "precision": "fp32"}
    settings |= {"dropout": 0, "workers": 0, "out": tmp_path / "run"}
    monkeypatch.setattr(train, "learning_rate", lambda step, args: args.lr)
    on_cpu(train, flags_of(settings))
    trained = load_student(str(tmp_path / "run")).state_dict()
    settings |= {"steps": 0, "out": tmp_path / "start"}
    on_cpu(train, flags_of(settings))
    start = load_student(str(tmp_path / "start"))

    # bench.py draws other weights for the heads, and other dropout.
    def initialise(student, teacher):
        real_initialise(student, teacher)
        for name, weight in start.encoder.state_dict().items():
            torch.testing.assert_close(student.encoder.state_dict()[name], weight)
        student.load_state_dict(start.state_dict())

    real_initialise = bench.initialise
    monkeypatch.setattr(bench, "initialise", initialise)
    monkeypatch.setattr(bench, "Student", record)
    config_of = bench.student_config
    monkeypatch.setattr(bench, "student_config", lambda config: config_of(config, dropout=0.0))
    monkeypatch.setattr(bench, "WARMUP", 0)
    flags = ["--heads", "2,4", "--agg", agg, "--precision", "fp32", "--steps", 3]
    on_cpu(bench, [*flags, "--seconds", *seconds])
    before = start.state_dict()
    for name, weight in students[0].state_dict().items():
        update = trained[name] - before[name]
        assert update.norm() > 0 and (weight - trained[name]).norm() < 1e-3 * update.norm(), name


def test_cached_steps_are_timed_in_turn_and_parts_add_up(small, capsys):
    flags = ["--seconds", 0.9, 0.8, "--heads", "2,4", "--agg", "concat", "--steps", 2]
    on_cpu(bench, [*flags, "--cache"])
    printed = capsys.readouterr().out
    assert "1.6 s of audio per step; " in printed and "heads layer2, layer4" in printed
    for kind in ("step", "step with cached targets"):
        pattern = f"^{kind}: (.*) s, (.*) s of audio per second\n" + "  (\\S+) +(.*) s\n" * 5
        found = re.search(pattern, printed, re.M)
        total, speed, *parts = found.groups()
        assert parts[::2] == bench.PARTS
        assert sum(map(float, parts[1::2])) == pytest.approx(float(total), rel=0.2)
        assert float(speed) == pytest.approx(1.6 / float(total), rel=0.01)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--heads", "4,13"], "13"),
        (["--steps", "0"], "--steps"),
        (["--seconds", "8,7"], "--seconds"),
    ],
)
def test_bad_settings_are_rejected_in_one_line(small, capsys, flags, word):
    assert word in refused(capsys, bench, flags)
