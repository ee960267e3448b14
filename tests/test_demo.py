"""demo.py: what --demo makes, and what the programs do with it."""

import hashlib
import json
import os

import pytest
from conftest import metrics, noise, refused, run

import demo as demo_file
import evaluate_er
import train
from data import find_corpus
from student import load_student


def test_the_demo_corpus_is_librispeech_in_small_and_the_same_for_the_same_seed(tmp_path):
    def digest(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()

    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        demo_file.write_corpus(str(tmp_path / name), seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")

    found = find_corpus(str(tmp_path / "a"), ["train-clean-100", "dev-clean", "test-clean"])
    assert 4 < found.hours() * 60 < 6 and not found.left_out
    lexicon = dict(line.split("\t") for line in (tmp_path / "a" / "lexicon.txt").read_text().splitlines())
    transcripts = {}
    for file in (tmp_path / "a").rglob("*.trans.txt"):
        for line in file.read_text().splitlines():
            name, *words = line.split()
            transcripts[name] = words
            assert set(words) <= set(lexicon)
    assert set(transcripts) == {os.path.splitext(os.path.basename(path))[0] for path in found.paths}
    speakers = [{path.split("/")[1] for path in found.paths if path.startswith(s)} for s in ("train", "dev", "test")]
    assert [len(s) for s in speakers] == [6, 2, 2] and len(set.union(*speakers)) == 10


def test_the_demos_voices_are_made(tmp_path, monkeypatch):
    demo_file.write_corpus(tmp_path / "data" / "demo")
    monkeypatch.chdir(tmp_path)
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


def test_the_demo_runs_under_torchrun_in_two_minutes_and_the_loss_falls_by_a_third(demo):
    folder, printed, seconds = demo
    assert seconds < 120 and "not the quality of the method" in printed
    lines = metrics(folder / "runs" / "demo-avg")
    assert lines[-1]["loss"] < 2 / 3 * lines[0]["loss"]
    load_student(folder / "runs" / "demo-avg" / "student.pt")
    assert {path.name for path in (folder / "data" / "demo" / "teachers").iterdir()} == {
        "hubert.pt",
        "robust_hubert.pt",
        "wavlm.pt",
    }


@pytest.mark.parametrize("task", ["pr", *(pytest.param(task, marks=pytest.mark.slow) for task in ("asr", "sid", "er"))])
def test_the_demo_student_is_scored_in_two_minutes(demo, task):
    folder, _, _ = demo
    done = run(f"evaluate_{task}.py", "--demo", cwd=folder, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "runs" / "demo-avg" / task / "result.json").read_text())
    assert sum(result["seconds"].values()) < (60 if task == "pr" else 110) and result.get("per", 0) < 1
    assert result["metric"] in done.stdout and "state  2" in done.stdout and "not the quality" in done.stdout


@pytest.mark.parametrize("missing", ["everything", "a teacher", "a file of speech"])
def test_a_demo_folder_that_is_not_whole_is_said_to_be_deleted(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.chdir(tmp_path)
    if missing == "everything":
        os.makedirs("data/demo")
    else:
        demo_file.prepare()
        os.remove(
            "data/demo/teachers/wavlm.pt" if missing == "a teacher" else "data/demo/dev-clean/107/1/107-1-0003.flac"
        )
    for program in (train, evaluate_er):
        line = refused(capsys, program, ["--demo"])
        assert "data/demo: not a whole demo" in line and "delete it" in line
