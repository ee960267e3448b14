"""The demo's speech, tables and noise, and its three teachers."""

import csv
import hashlib
import json
import os
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, flags_of, on_cpu, run

import checkpoint
import evaluate_pr
from data import Noise
from demo import speech, train_teachers
from manifest import find_corpus
from superb import sid
from teachers import load_teacher

ENERGIES = [4.7463e-4, 3.9494e-3, 6.7875e-3, 8.2988e-3, 2.0368e-3, 1.005e-2, 8.0547e-3, 2.0167e-3]
SMALL_SPLITS = {"train-clean-100": (6, 3, 2), "dev-clean": (2, 2, 1), "speakers": (40, 4, 1)}
TEACHERS = [f"{ROOT}/demo/{name}.pt" for name in train_teachers.TEACHERS]
write_corpus = speech.write_corpus


def write_small_corpus(folder, seed=0):
    write_corpus(folder, seed, SMALL_SPLITS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """data/demo, of few utterances."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(speech, "write_corpus", write_small_corpus)
        speech.prepare()
    return folder / speech.DATA


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = [str(path.relative_to(folder)).encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def read_table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        write_small_corpus(tmp_path / name, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_a_sentence_sounds_as_it_did_when_the_teachers_were_trained():
    voices, rooms, rng = speech.make_voices("dev-clean", 8, 3)
    audio, sounds = speech.synthesise(["SHE", "MOON"], voices[2], rng)
    audio = speech.add_room_and_noise(audio, rooms[1], 10, rng)
    # Of every 0.1 s. Bits may differ, since numpy's sine depends on the processor.
    energies = (audio[: len(audio) // 1600 * 1600].reshape(-1, 1600) ** 2).mean(1)
    np.testing.assert_allclose(energies, ENERGIES, rtol=1e-4)


def test_the_corpus_is_librispeech_in_small(small):
    found = find_corpus(str(small), list(SMALL_SPLITS))
    assert len(found) == 48 and not found.skipped
    lexicon = {line.split("\t")[0] for line in (small / "lexicon.txt").read_text().splitlines()}
    names = set()
    for file in small.rglob("*.trans.txt"):
        for line in file.read_text().splitlines():
            names.add(line.split()[0])
            assert set(line.split()[1:]) <= lexicon
    assert names == {os.path.basename(path)[:-5] for path in found.paths()}


def test_no_two_splits_share_a_speaker(small):
    speakers = [speaker for split in SMALL_SPLITS for speaker in os.listdir(small / split)]
    assert len(set(speakers)) == len(speakers) == 9


def test_no_two_splits_share_a_voice_or_a_room():
    voices, rooms = [], []
    for split, (_, *sizes) in speech.SPLITS.items():
        found = speech.make_voices(split, *sizes)
        voices += found[0]
        rooms += [room.tobytes() for room in found[1]]
    assert len(set(voices)) == len(voices) == 72
    assert len(set(rooms)) == len(rooms) == 21


@pytest.mark.parametrize("decibels", [5, 20])
def test_noise_is_as_far_below_the_speech_as_it_should_be(decibels):
    clean = np.sin(np.arange(16000) / 5)
    rng = np.random.default_rng(0)
    noisy = speech.add_room_and_noise(clean, np.array([1.0]), decibels, rng)
    signal = (noisy @ clean) / (clean @ clean) * clean
    rest = noisy - signal
    ratio = 10 * np.log10((signal @ signal) / (rest @ rest))
    assert ratio == pytest.approx(decibels, abs=0.5)


def test_noise_for_distillation_is_not_that_of_the_evaluations(small):
    contents = set()
    for name in ("noise", "noise-train"):
        noise = Noise(find_corpus(small / name, ["."]), [0])
        assert len(noise.corpus) == 16
        assert noise.corpus.samples.min() > find_corpus(str(small), ["dev-clean"]).samples.max()
        contents |= {(small / name / path).read_bytes() for path in noise.corpus.paths()}
    assert len(contents) == 32


def test_an_interrupted_corpus_is_written_again(tmp_path, monkeypatch):
    def interrupted(folder):
        write_small_corpus(folder)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speech, "write_corpus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speech.prepare()
    assert not os.path.exists(speech.DATA)
    monkeypatch.setattr(speech, "write_corpus", write_small_corpus)
    for _ in range(2):
        speech.prepare()
        found = {"lexicon.txt", "speakers.csv", "emotion", "noise", "noise-train", *SMALL_SPLITS}
        assert set(os.listdir(speech.DATA)) == found
        assert sorted(os.listdir("data")) == ["demo", "demo.lock"]


def test_every_speaker_is_in_training_dev_and_test(small):
    rows = read_table(small / "speakers.csv")
    assert len({row["label"] for row in rows}) == 4
    for speaker in {row["label"] for row in rows}:
        parts = [row["split"] for row in rows if row["label"] == speaker]
        assert [parts.count(part) for part in ("train", "dev", "test")] == [4, 1, 5]
    assert all(row["path"].split("/")[1] == row["label"] for row in rows)


def test_emotions_change_the_audio_and_folds_share_no_speaker(small):
    rows = read_table(small / "emotion" / "emotions.csv")
    assert {row["label"] for row in rows} == {"neutral", "happy", "sad", "angry"}
    assert len({(row["path"][:3], row["fold"]) for row in rows}) == 4
    before = find_corpus(str(small), ["speakers"])
    after = find_corpus(str(small / "emotion"), ["."])
    lengths = {row["label"]: [] for row in rows}
    for row, old, new in zip(rows, before.samples, after.samples):
        lengths[row["label"]].append(new / old)
    expected = {"neutral": 1, "happy": 1 / 1.25, "sad": 1 / 0.85, "angry": 1}
    for emotion, ratios in lengths.items():
        np.testing.assert_allclose(ratios, expected[emotion], rtol=1e-3)


def test_test_sets_are_large_enough_for_intervals_of_3_points(tmp_path, monkeypatch):
    """An accuracy p has an interval of 1.96 sqrt(p (1 - p) / utterances), the widest at 50%."""
    short = np.sin(np.arange(1600)), None  # for speed, in place of each sentence
    monkeypatch.setattr(speech, "synthesise", lambda words, voice, rng: short)
    write_corpus(tmp_path, splits={"speakers": speech.SPLITS["speakers"]})
    speech.write_tables(tmp_path)
    parts = [row["split"] for row in read_table(tmp_path / "speakers.csv")]
    assert [parts.count(part) for part in ("train", "dev", "test")] == [864, 216, 1080]
    folds = [row["fold"] for row in read_table(tmp_path / "emotion" / "emotions.csv")]
    assert [folds.count(fold) for fold in "01234"] == [224] * 5
    assert 1.96 * (0.25 / min(1080, len(folds))) ** 0.5 < 0.03


@pytest.mark.slow
def test_the_demo_is_written_in_half_a_minute_on_one_core(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = time.process_time()
    speech.prepare()
    assert time.process_time() - before < 30
    found = find_corpus(speech.DATA, ["train-clean-100"])
    assert 25 < found.hours() * 60 < 35 and found.samples.max() < 4 * 16000
    assert find_corpus(f"{speech.DATA}/emotion", ["."]).samples.min() > 4000


# ------------------------------------------------------------------ the teachers


def test_the_teachers_are_small_and_in_three_official_formats():
    assert sum(os.path.getsize(path) for path in TEACHERS) < 1.5e6
    hubert, robust, wavlm = map(checkpoint.load, TEACHERS)
    assert {"cfg", "model"} <= hubert.keys() and "model" in hubert["cfg"]  # fairseq
    assert {"model_weight", "model_cfg", "task_cfg"} <= robust.keys()  # s3prl
    assert wavlm["cfg"]["relative_position_embedding"]  # Microsoft
    assert {weight.dtype for weight in wavlm["model"].values()} == {torch.float16}
    for path in TEACHERS:
        config = load_teacher(path).config
        assert config.layers == 4 and bool(config.relative_buckets) == path.endswith("wavlm.pt")


def test_the_teachers_can_be_trained_again_from_a_seed(tmp_path, capsys):
    teachers = {}
    few = {name: {**train_teachers.TEACHERS[name], "steps": 2} for name in train_teachers.TEACHERS}
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        folder = tmp_path / name
        train_teachers.train_teachers(folder, seed, few, utterances=4)
        for file in os.listdir(folder):
            teachers[name, file] = load_teacher(str(folder / file)).state_dict()
    assert "masked accuracy" in capsys.readouterr().out
    for file in map(os.path.basename, TEACHERS):
        a, b, c = (teachers[name, file] for name in "abc")
        assert all(torch.equal(weight, b[name]) for name, weight in a.items())
        assert not torch.equal(a["layers.0.ffn_in.weight"], c["layers.0.ffn_in.weight"])
    hubert, robust = teachers["a", "hubert.pt"], teachers["a", "robust_hubert.pt"]
    assert not torch.equal(hubert["layers.0.ffn_in.weight"], robust["layers.0.ffn_in.weight"])


@pytest.mark.slow
def test_each_teacher_is_the_best_at_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    speech.prepare()
    phonemes = {"data": speech.DATA, "lexicon": f"{speech.DATA}/lexicon.txt"}
    noise = {"noise": f"{speech.DATA}/noise", "snr": 0}
    tasks = {
        "clean": (evaluate_pr, phonemes),
        "noise": (evaluate_pr, phonemes | noise),
        "speakers": (sid, {"manifest": f"{speech.DATA}/speakers.csv"}),
    }
    probes = {"steps": 600, "lr": "1e-2,3e-3", "lr_decay": True, "batch_size": 16}
    errors = {}
    for teacher in train_teachers.TEACHERS:
        for task, (module, settings) in tasks.items():
            out = tmp_path / teacher / task
            settings = settings | probes | {"upstream": f"{ROOT}/demo/{teacher}.pt", "out": out}
            on_cpu(module, flags_of(settings | {"eval_every": 200, "workers": 0}))
            result = json.loads((out / "result.json").read_text())
            errors[teacher, task] = result["per"] if "per" in result else 1 - result["accuracy"]
    margins = {"clean": 0.003, "noise": 0.3, "speakers": 0.2}
    for teacher, (task, margin) in zip(train_teachers.TEACHERS, margins.items()):
        others = [name for name in train_teachers.TEACHERS if name != teacher]
        assert all(errors[teacher, task] + margin < errors[name, task] for name in others)


# ------------------------------------------------------------------ python -m demo

SHORT = {"STEPS": "30", "SID": "--steps 20 --batch-size 16", "PROCESSES": "1"}
SHORT |= {"PR": "--steps 20 --batch-size 16"}


def test_the_demo_prints_its_commands_and_a_table_after_each_row(tmp_path, monkeypatch):
    splits = {"train-clean-100": (32, 4, 1), "dev-clean": (16, 2, 1), "test-clean": (8, 2, 1)}
    splits |= {"speakers": (20, 2, 1)}
    folder = tmp_path
    monkeypatch.chdir(folder)
    monkeypatch.setattr(speech, "write_corpus", lambda folder: write_corpus(folder, splits=splits))
    speech.prepare()
    done = run("-m", "demo", "--rows", "fbank,avg", "--tasks", "pr,pr-noise", cwd=folder, **SHORT)
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if "python " in line]
    (train,) = [line for line in commands if "train.py" in line]
    assert len(commands) == 5
    assert all(f"--{flag} " in train for flag in ("teachers", "heads", "valid", "cache"))
    assert done.stdout.count("PR at 0 dB (PER, ↓)") == 2
    assert "average of three" in done.stdout.split("PR at 0 dB (PER")[-1]
    assert "  valid " in done.stdout and (folder / "runs/demo/results.md").exists()
    assert {path.name for path in folder.iterdir()} == {"data", "runs"}
    again = run("-m", "demo", "--rows", "fbank,avg", "--tasks", "pr,pr-noise", cwd=folder, **SHORT)
    assert again.returncode == 0 and "step 1/30" not in again.stdout


@pytest.mark.slow
def test_the_demo_shows_what_an_ensemble_is_for(tmp_path):
    done = run("-m", "demo", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr

    def score(row, task):
        path = tmp_path / f"runs/demo/{row}/seed-0/{task}/result.json"
        result = json.loads(path.read_text())
        return 100 * result[result["metric"].lower()]

    assert score("avg", "pr") < min(score("wavlm", "pr"), score("fbank", "pr")) - 5
    assert score("avg", "sid") > max(score("hubert", "sid"), score("fbank", "sid")) + 10
    assert score("avg", "pr") < 0.2 * score("untrained", "pr")
