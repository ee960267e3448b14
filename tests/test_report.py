"""report.py: intervals, bars and the table."""

import json

import numpy as np
import pytest

import report


def test_the_bootstrap_interval_is_that_of_the_utterances():
    rng = np.random.default_rng(1)
    errors, totals = rng.binomial(20, 0.3, 400).astype(float), np.full(400, 20.0)
    low, high = report.bootstrap((errors, totals))
    score, deviation = errors.sum() / totals.sum(), (errors / 20).std() / 400**0.5  # normal, for that many
    assert low == pytest.approx(score - 1.96 * deviation, abs=0.0015)
    assert high == pytest.approx(score + 1.96 * deviation, abs=0.0015)
    assert report.bootstrap((errors, totals)) == [low, high]
    assert report.bootstrap((np.array([1.0, 2.0]), np.array([2.0, 4.0]))) == [0.5, 0.5]


def test_bars_are_as_long_as_the_weights():
    lines = report.bars([0.1, 0.4, 0.2])
    assert [line.count("#") for line in lines] == [10, 40, 20] and "state  1" in lines[1]


def written(folder, task, metric, score, upstream, digest=None):
    """A folder with a result.json as the evaluations write it."""
    folder.mkdir()
    result = {"task": task, "metric": metric, metric.lower(): score, "interval": [score - 0.05, score + 0.05]}
    (folder / "result.json").write_text(
        json.dumps(result | {"upstream": {"path": upstream, "digest": digest or upstream}})
    )
    return str(folder)


def test_the_table_has_upstreams_by_tasks(capsys, tmp_path):
    asr = written(tmp_path / "asr", "speech recognition", "WER", 0.25, "a/student.pt")
    same = written(tmp_path / "er", "emotion recognition", "accuracy", 0.5, "a/student.pt")
    other = written(tmp_path / "other", "emotion recognition", "accuracy", 0.375, "fbank")
    report.main([asr, same, other])
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.index("ER (accuracy, up)") < head.index("ASR (WER, down)")
    assert "50.00% (45.00% to 55.00%)" in first and "25.00%" in first
    assert second.startswith("fbank") and second.endswith("-")
    retrained = written(tmp_path / "new", "emotion recognition", "accuracy", 0.75, "a/student.pt", digest="0123456789")
    report.main([asr, same, retrained])  # another student under one path
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert "50.00%" in first and "25.00%" in first and "75.00%" in second and "(012345)" in second
    for folders, word in (([same, same], "second"), ([str(tmp_path)], "no such result")):
        with pytest.raises(SystemExit) as end:
            report.main(folders)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and word in line
