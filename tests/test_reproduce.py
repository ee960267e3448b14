"""reproduce.sh as a user runs it: every row, carried on, failures named."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment


def command(*flags, **variables):
    """What Popen takes to start the script."""
    settings = {
        "PROCESSES": "1",
        "STEPS": "2",
        "SEEDS": "0 1",
        "TASKS": "sid",
        "PAIRS": "",
        "SID": "--steps 4",
        "HEADS": "2,4",
    }
    settings |= {"TEACHERS": f"{ROOT}/demo/hubert.pt,{ROOT}/demo/wavlm.pt", "OUT": "out", "RATES": "1e-2,1e-3"}
    env = environment() | settings | variables
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])  # `python`
    return {"args": ["bash", str(ROOT / "reproduce.sh"), *flags], "env": env, "text": True}


def reproduce(folder, *flags, **variables):
    """The finished script, started in `folder`."""
    return subprocess.run(**command(*flags, **variables), cwd=folder, capture_output=True, timeout=600)


def test_what_it_cannot_run_is_one_line(tmp_path):
    for flags, variables, word in ((["--dmo"], {}, "--dmo: unknown"), ([], {"DATA": "nowhere"}, "nowhere")):
        done = reproduce(tmp_path, *flags, **variables)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr, done.stderr
        assert not os.path.exists(tmp_path / "out" / "avg")


@pytest.mark.slow
def test_every_row_is_run_once_carried_on_and_a_failure_is_named(tmp_path):
    students = ["hubert", "wavlm", "avg", "concat", "none", "avg-one-head", "untrained"]
    rows = ["fbank", "teacher-hubert", "teacher-wavlm", *students]
    (tmp_path / "out" / "concat").mkdir(parents=True)
    (tmp_path / "out" / "concat" / "seed-1").write_text("in the way\n")
    first = reproduce(tmp_path, "--demo", CACHE="kept")
    assert first.returncode == 1 and "expected:\n  a student of all teachers 0:00" in first.stdout
    assert "  sid of a teacher 0:00" in first.stdout and "  in all about 0:0" in first.stdout
    assert "a row's targets and states" in first.stdout
    (failed,) = [line for line in first.stderr.splitlines() if line.startswith("failed")]
    assert failed.split(": ")[1].split(";")[0] == "concat/seed-1"
    assert not any((tmp_path / "kept" / "reproduce").iterdir())  # of each row only while it runs

    (tmp_path / "out" / "concat" / "seed-1").unlink()
    os.remove(tmp_path / "out" / "avg" / "seed-0" / "sid" / "result.json")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    again = reproduce(tmp_path, "--demo", CACHE="kept")
    assert again.returncode == 0, again.stderr
    done = sorted(line.split(":")[0] for line in again.stdout.splitlines() if " s; at most" in line)
    assert done == ["avg/seed-0/sid", "concat/seed-1", "concat/seed-1/sid"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2 : 2 + len(rows)]] == rows
    assert sum(line.startswith("| less avg") for line in lines) == 1
    for name in ("results.csv", "results.svg", "layers.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 500

    other = reproduce(tmp_path, "--demo", STEPS="3")
    assert other.returncode == 2 and "begun with other settings" in other.stderr and other.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_plan_names_a_task_that_cannot_be_run_and_has_the_hours_of_the_others(tmp_path):
    start = command("--demo", TASKS="er sid", ER="--manifest nowhere.csv")
    with subprocess.Popen(**start, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        lines = []
        while not lines or not lines[-1].startswith("  in all about"):
            lines.append(running.stdout.readline())
            assert lines[-1], lines
        running.terminate()
    assert not os.path.exists(tmp_path / "out" / "expected")  # the next start tries again
    assert any(line.startswith("er cannot be run: ") and "nowhere.csv" in line for line in lines), lines
    assert [line.split()[0] for line in lines if " of a teacher " in line] == ["sid"]
