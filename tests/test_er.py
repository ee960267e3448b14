"""superb/er.py: folds and their mean accuracy."""

import json
import os

import numpy as np
import pytest
import soundfile
from conftest import flags_of, on_cpu, read_symbols, refused, write_audio

from superb import er, probe
from superb.sid import read_table
from superb.upstream import Upstream


@pytest.fixture(scope="module")
def emotions(tmp_path_factory):
    """A table of two classes that differ in loudness of high frequencies, in three folds."""
    folder = tmp_path_factory.mktemp("emotions")
    rng, lines = np.random.default_rng(0), ["path,label,fold\n"]
    for number in range(36):
        sound, label = rng.standard_normal(5000 + 100 * number), "bright"
        if number % 2 == 0:
            sound, label = np.convolve(sound, np.hanning(32), "same"), "dull"
        soundfile.write(folder / f"{number:02d}.flac", 0.1 * sound / np.abs(sound).max(), 16000)
        lines.append(f"{number:02d}.flac,{label},{number % 3}\n")
    (folder / "emotions.csv").write_text("".join(lines))
    return folder / "emotions.csv"


def score(out, **more):
    """result.json of a run in this process."""
    settings = {"out": out, "batch_size": 8, "lr": 1e-2, "workers": 0, "log_every": 100}
    on_cpu(er, flags_of(settings | more))
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(emotions, upstreams, tmp_path_factory):
    """A finished run: (its folder, its settings, its result, how often the upstream ran)."""
    out = tmp_path_factory.mktemp("er") / "er"
    settings = {"manifest": emotions, "upstream": upstreams / "student.pt"}
    settings |= {"steps": 40, "eval_every": 20, "lr": 3e-2}
    return out, settings, *count_calls(out, **settings)


def count_calls(out, **settings):
    """(result.json of a run, how often the upstream ran)."""
    computed, call = [], Upstream.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Upstream, "__call__", lambda *a: computed.append(1) or call(*a))
        return score(out, **settings), len(computed)


def test_score_is_the_mean_over_held_out_folds(finished):
    out, _, result, _ = finished
    assert list(result["folds"]) == ["0", "1", "2"] and result["accuracy"] > 0.65
    assert result["accuracy"] == pytest.approx(np.mean(list(result["folds"].values())))
    assert result["deviation"] == pytest.approx(np.std(list(result["folds"].values()), ddof=1))
    for fold, (errors, totals) in zip(result["folds"], result["per_utterance"]):
        texts = [read_symbols(out / f"fold-{fold}/test.{name}") for name in ("ref", "hyp")]
        assert all(int(name[:2]) % 3 == int(fold) for name in texts[0])
        correct = [int(a == b) for a, b in zip(*map(dict.values, texts), strict=True)]
        assert (errors, totals) == (correct, [1] * 12)
        assert result["folds"][fold] == pytest.approx(np.mean(correct))
    scores = probe.bootstrap(result["per_utterance"])
    assert result["interval"] == pytest.approx(np.percentile(scores, [2.5, 97.5]))
    assert result["counts"]["test"]["utterances"] == 36 and len(result["layer_weights"]) == 3


def test_folds_share_no_utterance_and_train_on_eighty_percent_of_the_others(emotions):
    rows = read_table(str(emotions), ["path", "label", "fold"])
    classes, folds = er.read_folds(str(emotions.parent), rows, seed=0)
    assert classes == ["bright", "dull"]
    for train, dev, test in folds.values():
        assert (len(train.ids), len(dev.ids), len(test.ids)) == (19, 5, 12)
        assert len({*train.ids, *dev.ids, *test.ids}) == 36
        for name, label in zip(dev.ids, dev.labels):
            assert classes[int(label)] == ("bright" if int(name[:2]) % 2 else "dull")


def test_upstream_runs_once_per_utterance_and_once_more_in_noise(finished, tmp_path):
    out, settings, clean, calls = finished
    assert calls == 36
    write_audio(tmp_path / "noise", [9000])
    noisy, calls = count_calls(tmp_path, noise=tmp_path / "noise", snr=-30, **settings)
    assert calls == 36 + 36 and noisy["noise"]["snr"] == [-30] and clean["noise"] is None
    assert noisy["accuracy"] < clean["accuracy"]
    for fold in clean["folds"]:
        paths = [folder / f"fold-{fold}/result.json" for folder in (out, tmp_path)]
        a, b = (json.loads(path.read_text())["curves"] for path in paths)
        assert a == b


def test_only_the_folds_that_are_missing_are_run_again(finished, monkeypatch):
    out, settings, expected, _ = finished
    monkeypatch.setattr(Upstream, "__call__", lambda *_: pytest.fail("upstream was run"))
    os.remove(out / "result.json")
    assert score(out, **settings) == expected


def test_iemocap_is_read_as_it_unpacks(tmp_path):
    for session in range(1, 6):
        folder, name = tmp_path / f"Session{session}", f"Ses0{session}F_impro01"
        tables = folder / "dialog/EmoEvaluation"
        (tables / "Categorical").mkdir(parents=True)
        (tables / "._hidden.txt").write_bytes(b"\x00\x05\x16\x07\xff")
        audio = write_audio(folder / "sentences/wav" / name, [6000] * 6, suffix=".wav")
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
        for path, label in zip(audio, ["neu", "exc", "hap", "ang", "fru", "xxx"]):
            turn = f"{name}_F{path.stem}"
            path.rename(path.with_name(f"{turn}.wav"))
            lines.append(f"[6.2901 - 8.2357]\t{turn}\t{label}\t[2.5000, 2.5000, 2.5000]\n")
            lines.append("C-E2:\tNeutral;\t()\n\n")
        (tables / f"{name}.txt").write_text("".join(lines))
    classes, folds = er.read_folds(str(tmp_path), er.read_iemocap(str(tmp_path)), seed=0)
    assert classes == ["angry", "happy", "neutral"] and list(folds) == ["1", "2", "3", "4", "5"]
    test = folds["2"][2]
    labels = [classes[int(label)] for label in test.labels]
    assert labels == ["neutral", "happy", "happy", "angry"]
    assert all(name.startswith("Session2/") for name in test.ids)
    with pytest.raises(FileNotFoundError, match="Session1.*--data"):
        er.read_iemocap(str(tmp_path / "Session1"))


def test_fold_without_a_usable_utterance_is_refused(tmp_path):
    write_audio(tmp_path, [6000] * 4 + [100])
    lines = [f"{number:03d}.flac,x,{number % 2}\n" for number in range(4)]
    (tmp_path / "list.csv").write_text("path,label,fold\n" + "".join(lines) + "004.flac,x,2\n")
    rows = read_table(str(tmp_path / "list.csv"), ["path", "label", "fold"])
    with pytest.raises(ValueError, match="1 of 1 utterances cannot be used.*004.flac: 100 samples"):
        er.read_folds(str(tmp_path), rows, seed=0)


@pytest.mark.parametrize(
    "text, words",
    [
        ("path, label, fold\na.flac, x, 1\n", ["line 2", "no file", "a.flac"]),
        ("path,label,fold\n000.flac,x,1\n001.flac,y,1\n", ["one fold"]),
    ],
)
def test_wrong_table_is_refused(tmp_path, capsys, text, words):
    write_audio(tmp_path, [6000] * 2)
    (tmp_path / "list.csv").write_text(text)
    settings = {"out": tmp_path / "out", "manifest": tmp_path / "list.csv", "upstream": "fbank"}
    line = refused(capsys, er, flags_of(settings))
    assert all(word in line for word in words), line
