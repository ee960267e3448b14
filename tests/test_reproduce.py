"""superb/reproduce.sh as a user runs it: every row, resumed, failures named."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment

DEMO = {"STEPS": "2", "TASKS": "sid", "SID": "--steps 4", "ROWS": "", "OUT": "out"}
DEMO |= {"TEACHERS": f"{ROOT}/demo/hubert.pt,{ROOT}/demo/wavlm.pt", "NAMES": "HuBERT,WavLM"}
DEMO |= {"CACHE": "cache"}


def reproduce(folder, *flags, **settings):
    """The finished script, started in `folder`."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(ROOT / "superb/reproduce.sh"), *flags],
        cwd=folder,
        env=environment(PATH=path, PROCESSES="1", **settings),
        capture_output=True,
        text=True,
    )


def test_what_it_cannot_run_is_one_line(tmp_path):
    for flags, settings, words in ((["--dmo"], {}, "--dmo"), ([], {"NAMES": "A"}, "one name per")):
        done = reproduce(tmp_path, *flags, **settings)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def test_a_part_that_fails_is_named_with_its_log_and_does_not_stop_the_others(tmp_path):
    settings = {"ROWS": "fbank untrained", "TASKS": "sid", "OUT": "out", "VOXCELEB": "nowhere"}
    done = reproduce(tmp_path, DATA="nowhere", **settings)
    for part in ("fbank/seed-0/sid", "untrained/seed-0"):
        log = f"out/logs/{part.replace('/', '.')}.log"
        line = done.stderr.split(f"{part} failed")[1].splitlines()[0]
        assert "nowhere" in line and log in line and (tmp_path / log).exists()
    assert done.returncode == 1 and "untrained/seed-0/sid" not in done.stderr  # has no student


@pytest.mark.slow
def test_all_rows_are_run_once_and_only_missing_parts_again(tmp_path):
    (tmp_path / "out/concat").mkdir(parents=True)
    (tmp_path / "out/concat/seed-0").write_text("in the way\n")
    first = reproduce(tmp_path, "--demo", **DEMO)
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
    again = reproduce(tmp_path, "--demo", **DEMO)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "concatenation of two" in (tmp_path / "out/results.md").read_text()

    other = reproduce(tmp_path, "--demo", **DEMO | {"ROWS": "hubert", "STEPS": "3"})
    assert "hubert/seed-0 failed: train.py: out/hubert/seed-0: holds another" in other.stderr
