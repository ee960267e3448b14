"""superb/report.py: rows and their names, intervals and differences, the table, the pictures."""

import json
import sys

import numpy as np
import pytest
import torchaudio
from conftest import on_cpu, refused, run

from superb import probe, report

PR, SID, *_ = report.TASKS.values()
NAMES = "bank\tbaselines\tfilter banks\nall\tstudents of three teachers\taverage of three\n"
BANK = {"layer_weights": [1.0]}


def write_result(folder, pairs, task=0, **more):
    """A folder as an evaluation writes it. pairs: [(reference, hypothesis), ...], in words."""
    folder.mkdir(parents=True)
    metric = "accuracy" if task else "PER"
    errors = [torchaudio.functional.edit_distance(*pair) for pair in pairs]
    totals = [1 if task else len(reference) for reference, _ in pairs]
    errors = [int(count == 0) for count in errors] if task else errors
    result = {"task": list(report.TASKS)[task], "metric": metric, "test_set": len(pairs)}
    result |= {metric.lower(): sum(errors) / sum(totals), "per_utterance": [[errors, totals]]}
    result |= {"counts": {"test": {"utterances": len(pairs)}}}
    result |= {"layer_weights": [0.25, 0.75], "upstream": {"path": "a/b.pt", "layers": [0, 2]}}
    (folder / "result.json").write_text(json.dumps(result | more))
    return folder


@pytest.fixture
def results(tmp_path):
    """PR of two seeds, SID of one; in PR "average of three" has one more error per utterance."""
    folders = []
    (tmp_path / "rows.tsv").write_text(NAMES)
    for row, wrong, more in (("all", 3, {}), ("bank", 5, BANK)):
        for seed in (0, 1):
            correct = np.random.default_rng(seed).random((30, 10)) < 0.8 - 0.3 * seed
            texts = np.where(correct, list("abcdefghij"), "x").tolist()
            pairs = [("abcdefghij", text + ["extra"] * (row == "all")) for text in texts]
            folders.append(write_result(tmp_path / f"{row}/seed-{seed}/pr", pairs, **more))
        pairs = [(["ann"], ["bob" if n < wrong else "ann"]) for n in range(20)]
        folders.append(write_result(tmp_path / f"{row}/seed-0/sid", pairs, task=1, **more))
    return folders


def score(folders):
    rows = report.read_rows(folders)
    report.score_rows(rows)
    return rows


def test_rows_without_rows_tsv_are_named_by_their_folder(tmp_path):
    pairs = [(["a"], ["a"])] * 4
    names = ("avg/pr", "another", "c/seed-3/pr", "avg/sid")
    folders = [write_result(tmp_path / name, pairs, task=name == "avg/sid") for name in names]
    rows = report.read_rows(folders)
    assert [row.name for row in rows] == [f"{tmp_path}/{name}" for name in ("avg", "another", "c")]
    assert set(rows[0].results) == {PR, SID}


def test_several_seeds_have_their_mean_and_an_interval_over_both(results):
    row, _ = score(results)
    seeds = [result["per"] for result in row.results[PR].values()]
    mean, low, high = row.scores[PR]
    assert mean == pytest.approx(np.mean(seeds))
    assert low == 0 and high - mean > 6 * abs(seeds[1] - seeds[0])  # Student's t of two seeds
    probe.draws.cache_clear()
    assert score(results)[0].scores[PR].tolist() == [mean, low, high]
    assert 0.5 < row.scores[SID][1] < 0.75 < row.scores[SID][2] < 1


def test_differences_are_paired_by_utterance_and_seed(results):
    (row,) = report.score_rows(report.read_rows(results), "filter banks")
    # One more error in every utterance: no uncertainty, however uncertain both scores are.
    assert row.scores[PR] == pytest.approx([0.1, 0.1, 0.1], abs=1e-6)
    value, low, high = row.scores[SID]
    assert (value, low) == pytest.approx((0.1, 0.0)) and 0.15 < high < 0.3
    # Seeds that only one row has, here seed 0, are skipped.
    (row,) = report.score_rows(report.read_rows([results[1], *results[3:5]]), "filter banks")
    assert row.scores[PR][0] == pytest.approx(0.1)
    assert not report.score_rows(report.read_rows([results[0], results[4]]), "filter banks")


def test_the_table_has_groups_and_marks_the_best_and_clear_differences(results, tmp_path, capsys):
    on_cpu(report, [*results, "--against", "filter banks", "--to", tmp_path / "table.md"])
    text = (tmp_path / "table.md").read_text()
    assert text == capsys.readouterr().out
    table, note = text.split("\n\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    names = ["*baselines*", "filter banks", "*students of three teachers*", "average of three"]
    names += ["*difference from filter banks*", "average of three"]
    assert [line[0] for line in lines[2:]] == names
    assert lines[3][1].startswith("**") and not lines[5][1].startswith("**")  # PER: lower is better
    assert lines[5][2].startswith("**85.0** (") and lines[3][2].startswith("75.0 (")
    assert lines[7][1] == "**+10.0** (10.0 to 10.0)" and lines[7][2].startswith("+10.0 (0.0")
    assert "PR 30 utterances, 2 seeds; SID 20 utterances, 1 seed" in note
    for number in (1, 2):  # seeds of the row; the other row has one
        on_cpu(report, [*results[:number], results[3], "--against", "filter banks"])
        printed = capsys.readouterr().out
        assert "difference from" in printed and "**+" not in printed


def test_scores_in_noise_have_columns_of_their_own(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    babble = {"noise": {"folder": "babble", "snr": [0]}, "test_set": "babble at 0"}
    loud = {"noise": {"folder": "babble", "snr": [-5, 0]}, "test_set": "babble at -5 to 0"}
    pairs = [(["a", "b"], ["a", "c"])] * 20
    for row in ("all", "bank"):
        folder = tmp_path / row / "seed-0"
        results.append(write_result(folder / "pr-noise", pairs, **babble))
        results.append(write_result(folder / "pr-noise-loud", pairs, **loud))
    picture, layers = tmp_path / "scores.svg", tmp_path / "layers.svg"
    pictures = ["--picture", picture, "--layers", layers]
    on_cpu(report, [*results, "--against", "filter banks", *pictures])
    lines = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    names = ["PR (PER, ↓)", "PR at 0 dB (PER, ↓)", "PR at -5 to 0 dB (PER, ↓)", "SID (accuracy, ↑)"]
    assert columns == names
    assert lines[3].split("|")[3].strip() == "**50.0** (50.0 to 50.0)"
    assert lines[7].split("|")[3].strip() == "+0.0 (0.0 to 0.0)"
    assert "PR at 0 dB 20 utterances, 1 seed; " in lines[-1]
    assert ">PR at 0 dB (PER, ↓)<" in picture.read_text()
    assert " dB " not in layers.read_text()  # the weights are those of the clean column
    other = {"noise": {"folder": "cars", "snr": [0]}, "test_set": "cars at 0"}
    folder = write_result(tmp_path / "other/seed-0/pr-noise", pairs, **other)
    line = refused(capsys, report, [*results, folder])
    assert "PR at 0 dB" in line and "different utterances or noise" in line


def test_rows_can_be_named_by_a_flag(results, tmp_path, capsys):
    pairs = [(["ann"], ["ann"])] * 20
    results.append(write_result(tmp_path / "loose/sid", pairs, task=1))
    names = f"{tmp_path}/loose=Another,filter banks=Mel"
    on_cpu(report, [*results, "--names", names, "--against", "Mel"])
    printed = capsys.readouterr().out
    assert "| Another " in printed and "difference from Mel" in printed
    for names in ("nobody=Another", "filter banks"):
        assert "no such row; there are" in refused(capsys, report, [*results, "--names", names])


def test_rows_of_two_tables_share_their_groups(results, tmp_path):
    (tmp_path / "more/rows.tsv").parent.mkdir()
    (tmp_path / "more/rows.tsv").write_text("z\tteachers\tz\nx\tbaselines\tfilter y\n")
    pairs = [(["ann"], ["ann"])] * 20
    results.append(write_result(tmp_path / "more/x/seed-0/sid", pairs, task=1))
    names = [row.name for row in report.read_rows(results)]
    assert names == ["filter banks", "filter y", "average of three"]


def test_folders_without_a_result_are_named_in_one_line_and_the_others_used(results, capsys):
    on_cpu(report, [*results, "runs/*/er", "runs/x/asr"])
    printed = capsys.readouterr()
    assert printed.err == "warning: no result.json in runs/*/er, runs/x/asr\n"
    assert "average of three" in printed.out
    assert "no result.json in a, b, c ..." in refused(capsys, report, ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--against", "three"], "no such row; there are filter banks, average of three"),
        (["{0}"], "a second result of average of three, seed 0"),
        (["{tmp}/other/seed-0/pr"], "different utterances"),
        (["--curves", "c.svg"], "--curves FILE.svg RUN"),
        (["--curves", "c.svg", "nowhere"], "nowhere/metrics.jsonl"),
        (["--curves", "c.svg", "{tmp}"], "no complete line"),
        (["--steps", "s.svg", "{0}"], "no folder has a result of a student, such as"),
        (["--names", "filter banks=average of three"], "two rows of one name"),
    ],
)
def test_bad_input_is_one_line(results, tmp_path, capsys, flags, words):
    write_result(tmp_path / "other/seed-0/pr", [(["a", "b"], ["a"])] * 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    flags = [flag.format(*results, tmp=tmp_path) for flag in flags]
    assert words in refused(capsys, report, [*results, *flags])


def test_flags_of_the_table_need_folders_and_damaged_rows_are_named(results, tmp_path, capsys):
    for flags in (["--to", "t.md"], ["--names", "a=b"], ["--picture", "p.svg"]):
        line = refused(capsys, report, ["--curves", "c.svg", "run", *flags])
        assert "no folders of evaluations" in line
    (tmp_path / "rows.tsv").write_text("\n" + NAMES)
    assert [row.name for row in report.read_rows(results)] == ["filter banks", "average of three"]
    (tmp_path / "rows.tsv").write_text(NAMES + "all average\n")
    assert "rows.tsv, line 3: not FOLDER<tab>" in refused(capsys, report, results)


def test_pictures_say_rows_samples_and_seeds_on_a_white_ground(results, tmp_path):
    pytest.importorskip("matplotlib")
    scores, layers = tmp_path / "scores.svg", tmp_path / "layers.svg"
    on_cpu(report, [*results, "--picture", scores, "--layers", layers])
    for text in (scores.read_text(), layers.read_text()):
        words = ["students of three teachers", "average of three", "20 utterances", "1 seed"]
        assert all(f">{word}<" in text for word in words)
        assert '<svg role="img" aria-label="' in text and "prefers-color-scheme" not in text
    assert "Filled dot: the best." in scores.read_text()
    assert ">filter banks<" in scores.read_text() and ">filter banks<" not in layers.read_text()
    assert ">75<" in layers.read_text()  # percent, of state 2


def test_pictures_need_no_backend(results, tmp_path):
    pytest.importorskip("matplotlib")
    backend = "module://matplotlib_inline.backend_inline"
    arguments = ["-m", "superb.report", *results, "--picture", "p.svg"]
    done = run(*arguments, cwd=tmp_path, MPLBACKEND=backend)
    assert done.returncode == 0 and (tmp_path / "p.svg").exists(), done.stderr


def test_curves_have_a_panel_per_run_and_name_layers_and_teachers(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "rows.tsv").write_text(f"teacher-hubert\tteachers\tteacher: HuBERT\n{NAMES}")
    for row, heads in (("all", ["hubert.layer4", "wavlm.layer4"]), ("avg", ["layer8"])):
        losses = {f"{term}/{head}": 0.5 for term in ("l1", "cosine") for head in heads}
        held_out = {"valid": 5.5, "valid_l1": 0.5, "valid_cosine": 0.5} if row == "all" else {}
        lines = [json.dumps({"step": step} | losses | held_out) + "\n" for step in (1, 2)]
        (tmp_path / row / "seed-1").mkdir(parents=True)
        (tmp_path / row / "seed-1/metrics.jsonl").write_text("".join(lines))
    picture = tmp_path / "c.svg"
    on_cpu(report, ["--curves", picture, tmp_path / "all/seed-1", tmp_path / "avg/seed-1"])
    text = picture.read_text()
    words = ["average of three, seed 1", "HuBERT", "wavlm", "layer 4", "layer 8"]
    words.append("held out, mean")
    assert all(f">{word}<" in text for word in words)
    assert ">5<" not in text  # the held-out loss is L1 + cosine too, whatever --cosine-weight


def test_scores_over_steps_have_a_panel_per_task_and_a_line_per_student(tmp_path):
    pytest.importorskip("matplotlib")
    folders = []
    for steps in (500, 2000):
        out = tmp_path / f"of-{steps}"
        for row, task in (("all", "pr"), ("all", "sid"), ("bank", "pr")):
            pairs = [(["a"], ["b" if n * steps < 2000 else "a"]) for n in range(20)]
            folders.append(write_result(out / f"{row}/seed-0/{task}", pairs, task=task == "sid"))
            config = {"settings": {"steps": steps}}
            (out / f"{row}/seed-0/config.json").write_text(json.dumps(config))
        (out / "rows.tsv").write_text(NAMES)
    left_out = write_result(tmp_path / "of-500/without-steps/seed-0/pr", [(["a"], ["a"])])
    (tmp_path / "of-4000/all/seed-0").mkdir(parents=True)
    (tmp_path / "of-4000/all/seed-0/config.json").write_text('{"settings": {"steps": 4000}}')
    unfinished = tmp_path / "of-4000/all/seed-0/pr"
    on_cpu(report, ["--steps", tmp_path / "s.svg", *folders, left_out, unfinished])
    text = (tmp_path / "s.svg").read_text()
    words = [PR, SID, "500", "2,000", "average of three", "filter banks"]
    assert "4,000" not in text and "without-steps" not in text
    assert text.count('<g id="LineCollection_') == 3  # error bars, one set per line
    assert all(text.count(f">{word}<") in (1, 2) for word in words)


def test_without_matplotlib_the_table_is_there_and_one_line_names_it(results, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        on_cpu(report, [*results, "--picture", "p.svg"])
    printed = capsys.readouterr()
    assert printed.err == "report.py: pictures need matplotlib: pip install matplotlib\n"
    assert "average of three" in printed.out
