"""demo.py: what --demo makes, and what the programs do with it."""

import functools
import glob
import hashlib
import json
import os
import time

import numpy as np
import pytest
import torch
from conftest import metrics, noise, on_cpu, refused, run

import demo as demo_file
import evaluate_er
import train
from data import find_corpus
from student import load_student
from teachers import load_teacher


def test_the_demo_corpus_is_librispeech_in_small_and_the_same_for_the_same_seed(tmp_path):
    def digest(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()

    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        demo_file.write_corpus(str(tmp_path / name), seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")

    found = find_corpus(str(tmp_path / "a"), ["train-clean-100", "dev-clean", "test-clean"])
    assert 8 < found.hours() * 60 < 13 and not found.left_out
    lexicon = dict(line.split("\t") for line in (tmp_path / "a" / "lexicon.txt").read_text().splitlines())
    transcripts = {}
    for file in (tmp_path / "a").rglob("*.trans.txt"):
        for line in file.read_text().splitlines():
            name, *words = line.split()
            transcripts[name] = words
            assert set(words) <= set(lexicon)
    assert set(transcripts) == {os.path.splitext(os.path.basename(path))[0] for path in found.paths}
    speakers = [{path.split("/")[1] for path in found.paths if path.startswith(s)} for s in ("train", "dev", "test")]
    assert [len(s) for s in speakers] == [24, 8, 16] and len(set.union(*speakers)) == 48


def test_no_voice_and_no_room_is_in_two_splits_and_every_utterance_is_in_noise():
    voices, rooms = [], []
    for split, (_, speakers, halls) in demo_file.SPLITS.items():
        found = demo_file.cast(split, speakers, halls)
        voices += [tuple(voice.values()) for voice in found[0]]
        rooms += [room.tobytes() for room in found[1]]
    assert len(set(voices)) == len(voices) == 48 and len(set(rooms)) == len(rooms) == 15
    rng, speech = np.random.default_rng(0), np.sin(np.arange(16000) / 5)
    for decibels in (5, 20):
        heard = demo_file.record(speech, np.array([1.0]), decibels, rng)
        scale = heard @ speech / (speech @ speech)  # what of it is speech
        rest = heard - scale * speech
        ratio = 10 * np.log10((scale * speech) @ (scale * speech) / (rest @ rest))
        assert ratio == pytest.approx(decibels, abs=0.5)


def test_the_teachers_are_small_in_their_official_forms_and_know_the_phonemes():
    paths = demo_file.teachers()
    assert sum(os.path.getsize(path) for path in paths) < 1.5e6
    hubert, robust, wavlm = (torch.load(path, weights_only=True) for path in paths)
    assert {"cfg", "model"} <= hubert.keys() and "model" in hubert["cfg"]  # fairseq
    assert {"model_weight", "model_cfg", "task_cfg"} <= robust.keys()  # s3prl
    assert wavlm["cfg"]["relative_position_embedding"] and "encoder_layers" in wavlm["cfg"]  # Microsoft
    assert {weight.dtype for weight in wavlm["model"].values()} == {torch.float16}
    for path in paths:
        encoder = load_teacher(path)
        assert encoder.config.layers == 4 and bool(encoder.config.relative_buckets) == path.endswith("wavlm.pt")


def test_the_teachers_can_be_made_again_from_a_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        demo_file, "train_teachers", functools.partial(demo_file.train_teachers, steps=(3, 2, 2), utterances=30)
    )
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        on_cpu(demo_file, ["--teachers", str(tmp_path / name), "--seed", str(seed)])
    a, b, c = ([load_teacher(tmp_path / name / f"{t}.pt").state_dict() for t in demo_file.TEACHERS] for name in "abc")
    for one, same, other in zip(a, b, c):
        assert all(torch.equal(weight, same[name]) for name, weight in one.items())
        assert not torch.equal(one["layers.0.ffn_in.weight"], other["layers.0.ffn_in.weight"])
    assert not torch.equal(a[0]["layers.0.ffn_in.weight"], a[1]["layers.0.ffn_in.weight"])
    assert "masked frames right" in capsys.readouterr().out


def test_the_demos_emotions_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo_file.prepare()
    demo_file.emotions()
    classes, folds = evaluate_er.read_folds(*evaluate_er.read_manifest(demo_file.EMOTIONS), seed=0)
    assert classes == ["angry", "happy", "neutral", "sad"] and len(folds) == 5
    assert noise(1).isfinite().all() and all(len(splits[2].ids) == 20 for splits in folds.values())


def test_nothing_is_written_but_the_run_the_cache_and_the_demo(demo):
    folder, _, _ = demo
    assert demo_file.STUDENT == "runs/demo-avg/student.pt"
    assert {path.name for path in folder.iterdir()} == {"runs", "data"}
    assert {path.name for path in (folder / "runs").iterdir()} == {"demo-avg"}
    assert {path.name for path in (folder / "data").iterdir()} == {"demo", "demo.lock"}


# ---------------------------------------------------------------- the demo's programs


def test_the_demo_runs_under_torchrun_in_two_minutes_and_the_loss_falls_by_half(demo):
    folder, printed, seconds = demo
    assert seconds < 120 and printed.splitlines()[-1].startswith("python evaluate_pr.py --demo")
    lines = metrics(folder / "runs" / "demo-avg")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert load_student(folder / "runs" / "demo-avg" / "student.pt").head_names == ["layer2", "layer3", "layer4"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pr", "sid"])
def test_the_students_inheritance_is_seen_on_the_demo(demo, task):
    folder, _, _ = demo
    started = time.monotonic()
    done = run(f"evaluate_{task}.py", "--demo", cwd=folder, OMP_NUM_THREADS="2")
    assert done.returncode == 0 and time.monotonic() - started < 120, done.stderr
    table = done.stdout.splitlines()[-5:]
    found = {}
    for ending in ("-teacher", "", "-untrained", "-fbank"):
        path = folder / "runs" / "demo-avg" / f"{task}{ending}" / "result.json"
        found[ending] = json.loads(path.read_text())
    for line, result in zip(table[1:], found.values(), strict=True):
        low, high = result["interval"]
        assert f"{result[result['metric'].lower()]:.1%}" in line and f"{low:.1%} to {high:.1%}" in line
    if task == "pr":
        for other in (found["-untrained"], found["-fbank"]):
            assert found[""]["per"] < 0.5 * other["per"] and found[""]["interval"][1] < other["interval"][0]
        assert found["-teacher"]["per"] < 0.5 * found["-fbank"]["per"]
    else:
        assert found[""]["accuracy"] > max(found["-untrained"]["accuracy"], found["-fbank"]["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["asr", "er"])
def test_the_demo_student_is_scored_in_two_minutes(demo, task):
    folder, _, _ = demo
    done = run(f"evaluate_{task}.py", "--demo", cwd=folder, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "runs" / "demo-avg" / task / "result.json").read_text())
    assert sum(result["seconds"].values()) < 110 and result["metric"].lower() in result
    assert result["metric"] in done.stdout and "state  2" in done.stdout


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_teacher_of_the_demo_that_is_not_whole_is_said_to_be_made_again(tmp_path, monkeypatch, capsys, how):
    monkeypatch.chdir(tmp_path)
    paths = [*demo_file.teachers()[:2], str(tmp_path / "wavlm.pt")]
    if how == "damaged":
        with open(demo_file.teachers()[2], "rb") as file:
            (tmp_path / "wavlm.pt").write_bytes(file.read()[:100_000])
    monkeypatch.setattr(demo_file, "teachers", lambda: paths)
    line = refused(capsys, train, ["--demo"])
    assert "wavlm.pt" in line and "python demo.py --teachers" in line and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("missing", ["everything", "a file of speech"])
def test_a_demo_folder_that_is_not_whole_is_said_to_be_deleted(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.chdir(tmp_path)
    if missing == "everything":
        os.makedirs("data/demo")
    else:
        demo_file.prepare()
        os.remove(sorted(glob.glob("data/demo/dev-clean/*/*/*.flac"))[3])
    for program in (train, evaluate_er):
        line = refused(capsys, program, ["--demo"])
        assert "data/demo: not a whole demo" in line and "delete it" in line
