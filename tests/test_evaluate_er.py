"""evaluate_er.py: folds, accuracy and confusions."""

import json
import os
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import flags_of, on_cpu, read_symbols, refused, write_audio

import evaluate_er
import probe
import report


@pytest.fixture(scope="module")
def emotions(tmp_path_factory):
    """A manifest of two classes that differ in loudness of high frequencies, in three folds."""
    folder = tmp_path_factory.mktemp("emotions")
    rng, lines = np.random.default_rng(0), ["path,label,fold\n"]
    for number in range(36):
        hiss, name = rng.standard_normal(5000 + 100 * number), f"{number:02d}.flac"
        sound = hiss if number % 2 else np.convolve(hiss, np.hanning(32), "same")
        soundfile.write(folder / name, 0.1 * sound / np.abs(sound).max(), 16000)
        lines.append(f"{name},{'bright' if number % 2 else 'dull'},{number % 3}\n")
    (folder / "emotions.csv").write_text("".join(lines))
    return folder / "emotions.csv"


def flags(out, **more):
    return flags_of(dict(out=out, batch_size=16, lr=1e-2, workers=0, log_every=100, eval_every=20, steps=40) | more)


def score(out, **more):
    """result.json of a run in this process."""
    on_cpu(evaluate_er, flags(out, **more))
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def er(emotions, upstreams, tmp_path_factory):
    out = tmp_path_factory.mktemp("er") / "er"
    settings = dict(manifest=emotions, upstream=upstreams / "student.pt", batch_size=8, steps=120, eval_every=40)
    return out, settings, score(out, **settings)


def test_emotion_recognition_holds_out_a_fold_each_time(er):
    out, _, result = er
    assert list(result["folds"]) == ["0", "1", "2"] and result["accuracy"] == pytest.approx(
        np.mean(list(result["folds"].values()))
    )
    assert result["deviation"] == pytest.approx(np.std(list(result["folds"].values()), ddof=1))
    assert result["accuracy"] > 0.65
    references, hypotheses = read_symbols(out / "test.ref"), read_symbols(out / "test.hyp")
    assert len(references) == 36 and sum(sum(row.values()) for row in result["confusion"].values()) == 36
    for label, row in result["confusion"].items():
        for other, count in row.items():
            assert count == sum(references[n] == [label] and hypotheses[n] == [other] for n in references)
    folds = []
    for fold, accuracy in result["folds"].items():
        mine = [name for name in references if int(name[:2]) % 3 == int(fold)]
        same = np.array([references[name] == hypotheses[name] for name in mine], float)
        assert accuracy == pytest.approx(same.mean())
        folds.append((same, np.ones(len(same))))
    low, high = report.bootstrap(*folds)
    assert result["interval"] == pytest.approx([low, high], abs=1e-9) and low <= result["accuracy"] <= high <= 1


def test_folds_share_no_utterance_and_train_on_eighty_percent_of_the_others(emotions):
    classes, folds = evaluate_er.read_folds(*evaluate_er.read_manifest(str(emotions)), seed=0)
    assert classes == ["bright", "dull"]
    for train, dev, test in folds.values():
        assert (len(train.ids), len(dev.ids), len(test.ids)) == (19, 5, 12)
        assert len({*train.ids, *dev.ids, *test.ids}) == 36
        assert all((int(name[:2]) % 2 == 0) == bool(label) for name, label in zip(dev.ids, dev.labels))


def test_the_upstream_runs_once_for_all_folds(er, tmp_path, monkeypatch):
    _, settings, expected = er
    seen, call = [], probe.Upstream.__call__
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *a: seen.append(len(a[1])) or call(*a))
    assert score(tmp_path, **settings)["folds"] == expected["folds"]
    assert sum(seen) == 36


def test_finished_folds_are_not_run_again(er, capsys, monkeypatch):
    out, settings, expected = er
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *_: pytest.fail("the upstream ran"))
    result = score(out, **settings)
    assert {**result, "settings": 0} == {**expected, "settings": 0}
    assert capsys.readouterr().out.count("finished") == 3


def test_iemocap_is_read_as_it_unpacks(tmp_path):
    for session in range(1, 6):
        folder, name = tmp_path / f"Session{session}", f"Ses0{session}F_impro01"
        (folder / "dialog" / "EmoEvaluation" / "Categorical").mkdir(parents=True)
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
        write_audio(folder / "sentences" / "wav" / name, [6000] * 6, suffix=".wav")
        for number, label in enumerate(["neu", "exc", "hap", "ang", "fru", "xxx"]):
            os.rename(
                folder / "sentences/wav" / name / f"{number:03d}.wav",
                folder / "sentences/wav" / name / f"{name}_F{number:03d}.wav",
            )
            lines.append(
                f"[6.2901 - 8.2357]\t{name}_F{number:03d}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
            )
        (folder / "dialog" / "EmoEvaluation" / f"{name}.txt").write_text("".join(lines))
    classes, folds = evaluate_er.read_folds(*evaluate_er.read_iemocap(str(tmp_path)), seed=0)
    assert classes == ["angry", "happy", "neutral"] and list(folds) == ["1", "2", "3", "4", "5"]
    assert [classes[int(label)] for label in folds["2"][2].labels] == ["neutral", "happy", "happy", "angry"]
    assert all(name.startswith("Session2/") for name in folds["2"][2].ids)
    with pytest.raises(FileNotFoundError, match="Session1.*--data"):
        evaluate_er.read_iemocap(str(tmp_path / "Session1"))


def test_a_plan_is_for_all_folds(emotions, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        on_cpu(evaluate_er, [*flags(tmp_path / "out", manifest=emotions, upstream="fbank"), "--plan"])
    assert end.value.code == 0 and not any(tmp_path.iterdir())
    assert re.match(r"about 0:\d\d:\d\d: states .*, 40 steps .*; 3 probes$", capsys.readouterr().out.splitlines()[-1])


def test_training_sees_whole_utterances_and_the_best_step_is_the_most_accurate(emotions, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def evaluate(*_, pool, higher_is_better, **__):
        x = torch.arange(9.0)[None, None, :, None]
        raise Asked(pool(x, torch.tensor([9]), True).item(), higher_is_better)

    monkeypatch.setattr(probe, "evaluate", evaluate)
    with pytest.raises(Asked) as asked:
        evaluate_er.main(flags(tmp_path, upstream="fbank", manifest=emotions))
    assert asked.value.args == (4.0, True)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"path,label,fold\na.flac,x,1\n", ["line 2", "no file", "a.flac"]),
        (b"path,label,fold\n\xff\xfe,x,1\n", ["UTF-8"]),
        (b"path,label,fold\n000.flac,x,1\n001.flac,y,1\n", ["one fold"]),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_file_and_line(tmp_path, capsys, text, words):
    write_audio(tmp_path, [6000] * 2)
    (tmp_path / "list.csv").write_bytes(text)
    line = refused(capsys, evaluate_er, flags(tmp_path / "out", manifest=tmp_path / "list.csv", upstream="fbank"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_an_utterance_without_a_frame_is_left_out_and_counted(tmp_path):
    write_audio(tmp_path, [6000] * 6 + [100])
    splits = ["train", "dev", "test"]
    lines = [f"{number:03d}.flac,{'ab'[number % 2]},{splits[number // 2 % 3]}\n" for number in range(7)]
    (tmp_path / "list.csv").write_text(f"path,label,fold\n{''.join(lines)}")
    _, folds = evaluate_er.read_folds(*evaluate_er.read_manifest(str(tmp_path / "list.csv")), seed=0)
    found = folds["train"][2]
    assert found.ids == ["000.flac", "001.flac"]
    assert found.left_out == {"006.flac": "100 samples, fewer than 400"}


def test_the_protocols_defaults_are_superbs():
    args = evaluate_er.parse(["--upstream", "runs/avg/student.pt"])
    assert (args.steps, args.batch_size, args.lr, args.out) == (30_000, 32, 1e-4, "runs/avg/er")
