"""The demo: its speech and teachers, what it writes, and what its programs show."""

import csv
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from conftest import metrics, run

import checkpoint
import train
from data import find_corpus
from demo import speech, train_teachers
from student import load_student
from teachers import load_teacher

ENERGIES = [4.7463e-4, 3.9494e-3, 6.7875e-3, 8.2988e-3, 2.0368e-3, 1.005e-2, 8.0547e-3, 2.0167e-3]
SMALL_SPLITS = {"train-clean-100": (6, 3, 2), "dev-clean": (2, 2, 1)}


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = [str(path.relative_to(folder)).encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        speech.write_corpus(tmp_path / name, seed, SMALL_SPLITS)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_a_damaged_student_is_one_line(tmp_path, capsys):
    (tmp_path / "student.pt").write_bytes(b"damaged")
    (tmp_path / "config.json").write_text('{"settings": {"steps": 1}}')
    with pytest.raises(SystemExit) as end:
        speech.train_student(tmp_path)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1 and "student.pt: damaged" in errors


def test_a_sentence_sounds_as_it_did_when_the_teachers_were_trained():
    voices, rooms, rng = speech.make_voices("dev-clean", 8, 3)
    audio, sounds = speech.synthesise(["SHE", "MOON"], voices[2], rng)
    audio = speech.add_room_and_noise(audio, rooms[1], 10, rng)
    # Of every 0.1 s. Bits may differ, since numpy's sine depends on the processor.
    energies = (audio[: len(audio) // 1600 * 1600].reshape(-1, 1600) ** 2).mean(1)
    np.testing.assert_allclose(energies, ENERGIES, rtol=1e-4)


def test_the_corpus_is_librispeech_in_small(demo):
    folder = demo[0] / "data" / "demo"
    found = find_corpus(str(folder), list(speech.SPLITS))
    assert 8 < found.hours() * 60 < 13 and not found.skipped
    lexicon = {line.split("\t")[0] for line in (folder / "lexicon.txt").read_text().splitlines()}
    names = set()
    for file in folder.rglob("*.trans.txt"):
        for line in file.read_text().splitlines():
            names.add(line.split()[0])
            assert set(line.split()[1:]) <= lexicon
    assert names == {os.path.basename(path)[:-5] for path in found.paths}


def test_no_two_splits_share_a_voice_a_room_or_a_speaker(demo):
    voices, rooms, speakers = [], [], []
    for split, (_, number, halls) in speech.SPLITS.items():
        found = speech.make_voices(split, number, halls)
        voices += found[0]
        rooms += [room.tobytes() for room in found[1]]
        speakers += os.listdir(demo[0] / "data" / "demo" / split)
    assert len(set(voices)) == len(set(speakers)) == len(voices) == 48
    assert len(set(rooms)) == len(rooms) == 15


@pytest.mark.parametrize("decibels", [5, 20])
def test_noise_is_as_far_below_the_speech_as_it_should_be(decibels):
    clean = np.sin(np.arange(16000) / 5)
    rng = np.random.default_rng(0)
    noisy = speech.add_room_and_noise(clean, np.array([1.0]), decibels, rng)
    signal = (noisy @ clean) / (clean @ clean) * clean
    rest = noisy - signal
    ratio = 10 * np.log10((signal @ signal) / (rest @ rest))
    assert ratio == pytest.approx(decibels, abs=0.5)


def test_an_interrupted_corpus_is_written_again(tmp_path, monkeypatch):
    write = speech.write_corpus

    def interrupted(folder):
        write(folder, splits=SMALL_SPLITS)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speech, "write_corpus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speech.prepare()
    assert not os.path.exists(speech.DATA)
    monkeypatch.setattr(speech, "write_corpus", lambda folder: write(folder, splits=SMALL_SPLITS))
    for _ in range(2):
        speech.prepare()
        found = {"dev-clean", "train-clean-100", "lexicon.txt", "speakers.csv", "emotion"}
        assert set(os.listdir(speech.DATA)) == found
        assert sorted(os.listdir("data")) == ["demo", "demo.lock"]


def test_the_tables_have_speakers_and_emotions(demo, monkeypatch):
    monkeypatch.chdir(demo[0])
    with open(f"{speech.DATA}/speakers.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 240 and len({row["label"] for row in rows}) == 24
    assert {row["split"] for row in rows if row["label"] == "101"} == {"train", "dev", "test"}
    assert all(os.path.exists(f"{speech.DATA}/{row['path']}") for row in rows)
    with open(f"{speech.DATA}/emotion/emotions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    assert {row["label"] for row in rows} == {"neutral", "happy", "sad", "angry"}
    assert len({(row["path"][:3], row["fold"]) for row in rows}) == 10
    assert find_corpus(f"{speech.DATA}/emotion", ["."]).samples.min() > 8000


# ------------------------------------------------------------------ the teachers


def test_the_teachers_are_small_and_in_three_official_formats():
    assert sum(os.path.getsize(path) for path in speech.TEACHERS) < 1.5e6
    hubert, robust, wavlm = map(checkpoint.load, speech.TEACHERS)
    assert {"cfg", "model"} <= hubert.keys() and "model" in hubert["cfg"]  # fairseq
    assert {"model_weight", "model_cfg", "task_cfg"} <= robust.keys()  # s3prl
    assert wavlm["cfg"]["relative_position_embedding"]  # Microsoft
    assert {weight.dtype for weight in wavlm["model"].values()} == {torch.float16}
    for path in speech.TEACHERS:
        config = load_teacher(path).config
        assert config.layers == 4 and bool(config.relative_buckets) == path.endswith("wavlm.pt")


def test_the_teachers_can_be_trained_again_from_a_seed(tmp_path, capsys):
    teachers = {}
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        folder = tmp_path / name
        train_teachers.train_teachers(folder, seed, steps=(2, 1, 1), utterances=4)
        for file in os.listdir(folder):
            teachers[name, file] = load_teacher(str(folder / file)).state_dict()
    assert "masked accuracy" in capsys.readouterr().out
    for file in map(os.path.basename, speech.TEACHERS):
        a, b, c = (teachers[name, file] for name in "abc")
        assert all(torch.equal(weight, b[name]) for name, weight in a.items())
        assert not torch.equal(a["layers.0.ffn_in.weight"], c["layers.0.ffn_in.weight"])
    hubert, robust = teachers["a", "hubert.pt"], teachers["a", "robust_hubert.pt"]
    assert not torch.equal(hubert["layers.0.ffn_in.weight"], robust["layers.0.ffn_in.weight"])


# ------------------------------------------------------------------ the programs


def test_the_demo_writes_in_its_two_folders_alone(demo):
    found = sorted(str(path.relative_to(demo[0])) for path in demo[0].glob("*/*"))
    assert found == ["data/demo", "data/demo.lock", "runs/demo-avg"]


def test_the_demo_learns_and_says_what_comes_next(demo):
    assert "python evaluate_pr.py --demo" in demo[1].splitlines()[-1]
    rows = metrics(demo[0] / speech.RUN)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    student = load_student(str(demo[0] / speech.RUN))
    assert student.head_names == ["layer2", "layer3", "layer4"]


def test_only_a_student_that_is_finished_is_scored(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "student.pt", {"step": 2})
    trained = []
    monkeypatch.setattr(train, "main", trained.append)
    for steps in (2, 3):
        checkpoint.save(tmp_path / "config.json", json.dumps({"settings": {"steps": steps}}))
        speech.train_student(tmp_path)
        assert len(trained) == steps - 2


@pytest.mark.slow
def test_the_demo_takes_two_minutes_on_two_cores(whole_demo):
    rows = metrics(whole_demo[0] / speech.RUN)
    assert whole_demo[1] < 2 * 120  # seconds
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [["evaluate_pr.py"], ["-m", "superb.sid"], ["-m", "superb.er"], ["-m", "superb.asr"]]
)
def test_the_student_of_the_demo_is_better_than_before_distillation(whole_demo, program):
    folder = whole_demo[0]
    done = run(*program, "--demo", cwd=folder, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    task = program[-1].removeprefix("superb.").removeprefix("evaluate_").removesuffix(".py")
    scores = {}
    for row in ("first-teacher", "student", "before-distillation", "filter-banks"):
        result = json.loads((folder / speech.RUN / row / task / "result.json").read_text())
        scores[row] = result[result["metric"].lower()]
        assert f"{100 * scores[row]:.1f}" in done.stdout
    if task == "pr":
        assert scores["student"] < 0.5 * scores["before-distillation"]
        assert scores["first-teacher"] < 0.5 * scores["filter-banks"]
    if task == "sid":
        assert scores["student"] > max(scores["before-distillation"], scores["filter-banks"])
