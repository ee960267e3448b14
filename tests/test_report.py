"""report.py: intervals, bars and the table."""

import csv
import json
import sys

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
    assert second.startswith("fbank") and second.split()[5] == "-"  # no ASR
    retrained = written(tmp_path / "new", "emotion recognition", "accuracy", 0.75, "a/student.pt", digest="0123456789")
    report.main([asr, same, retrained])  # another student under one path
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert "50.00%" in first and "25.00%" in first and "75.00%" in second and "(012345)" in second
    for folders, word in (([same, same], "second"), ([str(tmp_path)], "no such result")):
        with pytest.raises(SystemExit) as end:
            report.main(folders)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and word in line


# ---------------------------------------------------------------- rows of several seeds


def judged(folder, task, metric, utterances, seconds=1.0, **more):
    """A result as an evaluation writes it. utterances: [(reference, hypothesis), ...], each a list of symbols."""
    folder.mkdir(parents=True)
    pairs = [report.torchaudio.functional.edit_distance(*pair) for pair in utterances]
    wrong, total = np.array(pairs), np.array([len(reference) for reference, _ in utterances])
    score = float(np.mean(wrong == 0)) if metric == "accuracy" else float(wrong.sum() / total.sum())
    result = {
        "task": task,
        "metric": metric,
        metric.lower(): score,
        "interval": [0.0, 1.0],
        "layer_weights": [0.25, 0.75],
    }
    result |= {"upstream": {"path": "x", "digest": "d", "parameters": 1_500_000, "layers": [0, 1]}}
    result |= {"seconds": {"states": seconds, "training": seconds}} | more
    (folder / "result.json").write_text(json.dumps(result))
    for place, name in enumerate(("ref", "hyp")):
        lines = [" ".join([f"u{n}", *pair[place]]) for n, pair in enumerate(utterances)]
        (folder / f"test.{name}").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


@pytest.fixture
def seeds(tmp_path):
    """Rows "one" and "two", two seeds of PR and one of SID each; in PR "two" has one error more in every utterance."""
    rng, folders = np.random.default_rng(0), []
    for seed in (0, 1):
        references = [[str(symbol) for symbol in np.random.default_rng(n).integers(0, 9, 10)] for n in range(30)]
        one = [[symbol if rng.random() < 0.8 - 0.1 * seed else "x" for symbol in text] for text in references]
        for row, heard in (("one", one), ("two", [[*text, "extra"] for text in one])):
            pairs = list(zip(references, heard))
            folders.append(judged(tmp_path / row / f"seed-{seed}" / "pr", "phoneme recognition", "PER", pairs))
    for row, errors in (("one", 5), ("two", 3)):
        pairs = [(["anna b"], ["otto"] if n < errors else ["anna b"]) for n in range(20)]
        folder = tmp_path / row / "seed-0" / "sid"
        folders.append(judged(folder, "speaker identification", "accuracy", pairs))
        with open(folder.parent / "metrics.jsonl", "w") as file:
            file.write('{"step": 1, "seconds": 30.0}\n{"step": 2, "seconds": 12.0}\n')
    return folders


def test_a_row_of_several_seeds_has_their_mean_and_an_interval_that_holds_both(seeds):
    rows = report.read_rows(seeds)
    assert list(rows) == ["one", "two"]
    (mine,) = [one for task, one in report.summarise(rows)["one"].items() if task[0] == "PR"]
    scores = [run["result"]["per"] for run in rows["one"]["PR", "PER"].values()]
    assert mine["seeds"] == 2 and mine["score"] == pytest.approx(np.mean(scores))
    low, high = mine["interval"]
    assert low < min(scores) < max(scores) < high  # seeds are drawn too
    one_seed = report.summarise(report.read_rows(seeds[:1]))["one"]["PR", "PER"]
    assert one_seed["interval"] == [0.0, 1.0] and one_seed["seeds"] == 1  # as the evaluation wrote it


def test_differences_are_paired_utterance_by_utterance(seeds):
    two = report.summarise(report.read_rows(seeds), "one")["two"]
    # One error more in each: without chance in the pairs the interval is a point, however uncertain both scores are.
    assert two["PR", "PER"]["difference"] == pytest.approx(0.1)
    assert two["PR", "PER"]["difference_interval"] == pytest.approx([0.1, 0.1], abs=1e-6)
    assert two["SID", "accuracy"]["difference"] == pytest.approx(0.1)
    low, high = two["SID", "accuracy"]["difference_interval"]
    assert low == pytest.approx(0) and 0.15 < high < 0.3


def test_folds_count_the_same_each(tmp_path):
    right, wrong = (["a"], ["a"]), (["a"], ["b"])
    pairs, held_out = [right, wrong, *[right] * 8], {"1": ["u0", "u1"], "2": [f"u{n}" for n in range(2, 10)]}
    folder = judged(tmp_path / "er", "emotion recognition", "accuracy", pairs, held_out=held_out)
    folds = report.errors(folder, {"metric": "accuracy", "held_out": held_out})
    assert [(parts.sum(), totals.sum()) for parts, totals in folds] == [(1, 2), (8, 8)]


def test_the_table_is_written_as_markdown_and_csv_with_the_best_bold(seeds, tmp_path, capsys):
    report.main([*seeds, "--against", "one", "--to", f"{tmp_path}/t.md,{tmp_path}/t.csv"])
    printed, text = capsys.readouterr().out, (tmp_path / "t.md").read_text()
    assert "2 seeds" in printed and "1.50" in printed
    one, two = [line for line in text.splitlines() if line.startswith(("| one", "| two"))][:2]
    assert "**" in one.split("|")[2] and "**" not in two.split("|")[2]  # PER: less is better
    assert "**85.0**" in two and "**" not in one.split("|")[3]
    assert one.split("|")[4:7] == [" 1.50 ", " 42 ", " 4 "]  # weights, seconds to distil, to judge
    assert text.splitlines()[-1].startswith("| two | **10.0** (10.0 to 10.0)")
    lines = list(csv.DictReader(open(tmp_path / "t.csv", newline="")))
    assert [(line["row"], line["task"], line["seeds"]) for line in lines] == [
        ("one", "PR", "2"), ("one", "SID", "1"), ("two", "PR", "2"), ("two", "SID", "1")
    ]  # fmt: skip
    assert float(lines[2]["difference"]) == pytest.approx(0.1) and lines[0]["difference"] == ""


def test_rows_that_share_the_best_score_are_both_bold(tmp_path):
    for name in ("x", "y"):
        upstream = {"path": name, "digest": name, "layers": [0, 1]}
        judged(tmp_path / name / "pr", "phoneme recognition", "PER", [(["a"], ["a"])] * 4, upstream=upstream)
    report.main([f"{tmp_path}/x/pr", f"{tmp_path}/y/pr", "--to", f"{tmp_path}/t.md"])
    lines = [line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith(("| x", "| y"))]
    assert len(lines) == 2 and all("**0.0**" in line for line in lines)


def test_pictures_hold_every_row_and_turn_dark_on_a_dark_page(seeds, tmp_path):
    pytest.importorskip("matplotlib")
    for flag in ("--picture", "--layers"):
        report.main([*seeds, flag, str(tmp_path / "p.svg")])
        text = (tmp_path / "p.svg").read_text()
        assert all(f">{word}<" in text for word in ("one", "two")) and "prefers-color-scheme: dark" in text
        assert "SID" in text
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"step": n, "l1/layer4": 1 / n, "cosine/layer4": 0.5, "l1/layer8": 2 / n, "cosine/layer8": 0.6} for n in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.main([str(run), "--curves", str(tmp_path / "c.svg")])
    assert all(f">{head}<" in (tmp_path / "c.svg").read_text() for head in ("layer4", "layer8"))


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--against", "three"], "no such row; there are one, two"),
        (["--picture", "p.txt"], "must end in"),
        (["--to", "table.doc"], "must end in"),
        (["--curves", "c.svg"], "no such file; --curves takes"),
    ],
)
def test_what_a_report_cannot_do_is_one_line(seeds, capsys, flags, word):
    with pytest.raises(SystemExit) as end:
        report.main([*seeds, *flags])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and word in line


def test_without_matplotlib_a_line_names_it(seeds, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        report.main([*seeds, "--picture", str(tmp_path / "p.svg")])
    assert "--picture needs a package that is not there: pip install matplotlib" in capsys.readouterr().err


def test_rows_tested_on_other_utterances_are_not_compared(seeds, tmp_path, capsys):
    other = judged(tmp_path / "other" / "seed-0" / "pr", "phoneme recognition", "PER", [(["a", "b"], ["a"])] * 3)
    with pytest.raises(SystemExit):
        report.main([*seeds, other, "--against", "one"])
    assert "tested on other utterances" in capsys.readouterr().err
