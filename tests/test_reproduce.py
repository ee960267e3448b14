"""superb/reproduce.sh as a user runs it: every row, resumed, failures named."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment

ALL = {"STEPS": "2", "TASKS": "sid", "SID": "--steps 4", "OUT": "out", "CACHE": "cache"}
ALL |= {"TEACHERS": f"{ROOT}/demo/hubert.pt,{ROOT}/demo/wavlm.pt", "NAMES": "HuBERT,WavLM"}
ALL |= {"HEADS": "2,3,4", "TRAIN": "--splits train-clean-100 --batch-size 8 --workers 0"}


def start(folder, *flags, script=ROOT / "superb/reproduce.sh", **settings):
    """The script, started in `folder`."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", str(script), *flags],
        cwd=folder,
        env=environment(**{"PATH": path, "PROCESSES": "1"} | settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def reproduce(folder, *flags, **settings):
    """The finished script."""
    process = start(folder, *flags, **settings)
    printed, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def test_what_it_cannot_run_is_one_line(tmp_path):
    for flags, settings, words in (
        (["--demo"], {}, "--demo"),
        ([], {"NAMES": "A"}, "one name per"),
        ([], {"TASKS": "pr-noise", "NOISE": "nowhere"}, "NOISE=nowhere: no such folder"),
        ([], {"TASKS": "pr ks"}, "no task ks; there are pr, sid, er, asr"),
        ([], {"JOBS": "0"}, "JOBS=0: must be a whole number"),
        ([], {"ROWS": "fbank averge"}, "no row averge; there are fbank untrained"),
    ):
        done = reproduce(tmp_path, *flags, **settings)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def test_a_part_that_fails_is_named_with_its_log_and_does_not_stop_the_others(tmp_path):
    settings = {"ROWS": "fbank untrained", "TASKS": "sid", "OUT": "out", "VOXCELEB": "nowhere"}
    settings |= {"TEACHERS": f"{ROOT}/demo/hubert.pt", "NAMES": "HuBERT", "HEADS": "2"}
    run = f"run{tmp_path.resolve()}/out.0".replace("/", ".")
    cached = tmp_path / "cache/reproduce" / run / "fbank"
    cached.mkdir(parents=True)
    done = reproduce(tmp_path, DATA="nowhere", CACHE="cache", **settings)
    for part in ("fbank/seed-0/sid", "untrained/seed-0"):
        log = f"out/logs/{part.replace('/', '.')}.log"
        line = done.stderr.split(f"{part} failed")[1].splitlines()[0]
        assert "nowhere" in line and log in line and (tmp_path / log).exists()
    assert done.returncode == 1 and "untrained/seed-0/sid" not in done.stderr  # has no student
    assert cached.exists()  # for the next try
    settings |= {"ROWS": "untrained", "PROCESSES": "2", "TRAIN": "--batch-size 3"}
    done = reproduce(tmp_path, **settings)  # torchrun prints more after the reason
    reason = "train.py: --batch-size 3 is not a multiple of 2 processes"
    assert f"untrained/seed-0 failed: {reason}" in done.stderr


def test_a_task_in_noise_takes_the_probes_of_the_task(tmp_path):
    settings = {"ROWS": "fbank", "OUT": "out", "IEMOCAP": "nowhere", "NOISE": str(tmp_path)}
    settings |= {"TEACHERS": "hubert.pt, robust.pt", "NAMES": "A, B", "TASKS": "er-noise"}
    for fold in ("fold-1", "fold-2"):
        (tmp_path / "out/fbank/seed-0/er" / fold).mkdir(parents=True)
        (tmp_path / "out/fbank/seed-0/er" / fold / "last.pt").write_text(fold)
    reproduce(tmp_path, **settings)
    copies = sorted((tmp_path / "out/fbank/seed-0/er-noise").rglob("*"))
    assert [path.read_text() for path in copies if path.is_file()] == ["fold-1", "fold-2"]
    rows = (tmp_path / "out/rows.tsv").read_text().splitlines()
    assert rows[3] == "teacher-robust\tteachers\tteacher: B"


@pytest.mark.parametrize(
    "number, part",
    [
        (signal.SIGTERM, "avg/seed-0"),
        (signal.SIGHUP, "avg/seed-0"),
        (signal.SIGUSR1, "avg/seed-0"),
        (signal.SIGINT, "fbank/seed-0/pr"),
    ],
)
def test_a_signal_to_the_script_ends_the_running_part_after_it_is_saved(
    corpus, tmp_path, number, part
):
    settings = {"DATA": str(corpus), "TEACHERS": f"{ROOT}/demo/hubert.pt", "NAMES": "HuBERT"}
    settings |= {"LEXICON": f"{corpus}/lexicon.txt", "HEADS": "2", "STEPS": "100000", "OUT": "out"}
    settings |= {"ROWS": part.split("/")[0], "TASKS": "pr" if part.endswith("pr") else ""}
    flags = "--batch-size 2 --log-every 1 --workers 0"
    settings |= {"TRAIN": f"--splits train-clean-100 {flags}", "PR": f"--steps 100000 {flags}"}
    process = start(tmp_path, **settings)
    log = tmp_path / f"out/logs/{part.replace('/', '.')}.log"
    try:
        while process.poll() is None and not (log.exists() and "step 2/" in log.read_text()):
            time.sleep(0.1)
        if number in (signal.SIGINT, signal.SIGUSR1):  # as a terminal, or SLURM: to every process
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    steps = log.read_text().count("loss ")
    saved = torch.load(tmp_path / "out" / part / "last.pt", weights_only=True)
    assert process.returncode == 128 + number and errors == ""
    assert saved["step"] == steps >= 2  # it has ended: one line per step


def test_rows_run_at_once_in_the_order_given_and_a_signal_stops_all(corpus, tmp_path):
    settings = {"DATA": str(corpus), "TEACHERS": f"{ROOT}/demo/hubert.pt", "NAMES": "HuBERT"}
    settings |= {"HEADS": "2", "STEPS": "100000", "TASKS": "", "OUT": "out", "JOBS": "2"}
    settings |= {"TRAIN": "--splits train-clean-100 --batch-size 2 --log-every 1 --workers 0"}
    process = start(tmp_path, ROWS="none hubert avg", **settings)
    logs = [tmp_path / f"out/logs/{row}.seed-0.log" for row in ("none", "hubert")]
    try:
        while process.poll() is None and not all(
            log.exists() and "step 2/" in log.read_text() for log in logs
        ):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM and errors == ""
    assert "\nnone: step 2/" in printed and "\nhubert: step 2/" in printed
    assert printed.count(f"\nPYTHONPATH={ROOT} python {ROOT}/train.py --data ") == 2
    assert not (tmp_path / "out/avg").exists()
    for row, log in zip(("none", "hubert"), logs):
        saved = torch.load(tmp_path / "out" / row / "seed-0/last.pt", weights_only=True)
        assert saved["step"] == log.read_text().count("loss ") >= 2


def test_an_aggregation_that_a_user_adds_is_a_row(corpus, tmp_path):
    shutil.copytree(ROOT / "superb", tmp_path / "superb")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    with open(tmp_path / "aggregate.py", "a") as file:
        file.write('\nAGGREGATIONS["mine"] = average\n')
    settings = {"DATA": str(corpus), "ROWS": "mine", "TASKS": "", "STEPS": "2", "OUT": "out"}
    settings |= {"TEACHERS": f"{ROOT}/demo/hubert.pt,{ROOT}/demo/wavlm.pt", "HEADS": "2"}
    settings |= {"NAMES": "HuBERT,WavLM", "TRAIN": "--splits train-clean-100 --batch-size 8"}
    done = reproduce(tmp_path, script=tmp_path / "superb/reproduce.sh", **settings)
    assert done.returncode == 0 and "--agg mine" in done.stdout, done.stderr
    assert (tmp_path / "out/mine/seed-0/student.pt").exists()
    assert (
        "mine\tstudents of two teachers\tmine of two\n" in (tmp_path / "out/rows.tsv").read_text()
    )


def test_commands_and_their_output_are_printed_and_the_commands_can_be_copied(corpus, tmp_path):
    settings = {"DATA": str(corpus), "LEXICON": f"{corpus}/lexicon.txt"}
    settings |= {"ROWS": "fbank", "OUT": "an out", "RATES": "1e-2", "PR": "--steps 2 --workers 0"}
    settings |= {"TASKS": "pr pr-noise", "NOISE": f"{corpus}/dev-clean", "SNR": "0"}
    done = reproduce(tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "an out/logs/fbank.seed-0.pr.log").read_text()
    assert "step 2/2" in log and log in done.stdout
    assert done.stdout.count("| filter banks") == 1 and (tmp_path / "an out/results.md").exists()
    assert "| PR at 0 dB (PER, ↓)" in done.stdout
    noisy = (tmp_path / "an out/logs/fbank.seed-0.pr-noise.log").read_text()
    assert "from step 2 of 2" in noisy  # with the probes of pr
    (line,) = [line for line in log.splitlines() if "evaluate_pr.py" in line]
    assert "--lr 1e-2 --steps 2 --workers 0 --upstream fbank" in line
    shutil.rmtree(tmp_path / "an out")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=environment(PATH=path))
    assert (tmp_path / "an out/fbank/seed-0/pr/result.json").exists()


@pytest.mark.slow
def test_all_rows_are_run_once_and_only_missing_parts_again(corpus, tmp_path):
    lines = ["path,label,split\n"]
    for number, path in enumerate(sorted(corpus.glob("train-clean-100/*/1/*.flac"))):
        lines.append(f"{path},{path.parts[-3]},{['train', 'dev', 'test'][number % 3]}\n")
    (tmp_path / "speakers.csv").write_text("".join(lines))
    settings = ALL | {"DATA": str(corpus), "VOXCELEB": "speakers.csv"}
    (tmp_path / "out/concat").mkdir(parents=True)
    (tmp_path / "out/concat/seed-0").write_text("in the way\n")
    first = reproduce(tmp_path, **settings)
    assert first.returncode == 1 and "failed: concat/seed-0; logs are in out/logs" in first.stderr
    lines = (tmp_path / "out/results.md").read_text().split("| *difference")[0].splitlines()[2:]
    assert ", ".join(line.split("|")[1].strip() for line in lines if line) == (
        "*baselines*, filter banks, before distillation, *teachers*, teacher: HuBERT, "
        "teacher: WavLM, *students of one teacher*, HuBERT's student, WavLM's student, "
        "*students of two teachers*, average of two, separate heads of two, average, one head"
    )
    assert not list((tmp_path / "cache/reproduce").glob("*/*"))  # of a row only while it runs

    (tmp_path / "out/concat/seed-0").unlink()
    results = list((tmp_path / "out").rglob("result.json"))
    before = {path: path.stat().st_mtime_ns for path in results}
    again = reproduce(tmp_path, **settings | {"ROWS": "fbank wavlm concat"})
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "concatenation of two" in (tmp_path / "out/results.md").read_text()

    other = reproduce(tmp_path, **settings | {"ROWS": "hubert", "STEPS": "3"})
    assert "hubert/seed-0 failed: train.py: out/hubert/seed-0: holds another" in other.stderr
