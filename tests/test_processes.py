"""processes.py: starting, agreeing and stopping together, and machines that lack something."""

import pytest
import torch
from conftest import ROOT, flags_of, run

import processes


def sitecustomize(folder, code):
    """PYTHONPATH with which every new Python runs `code` before its program."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}:{ROOT}"


@pytest.mark.parametrize("flag", [("--heads", "0"), ("--batch-size", "7")])
def test_a_refused_flag_is_said_under_torchrun_though_rank_0_comes_last(tmp_path, flag):
    slow = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(4)\n"
    path = sitecustomize(tmp_path / "slow", slow)
    done = run("train.py", "--demo", *flag, cwd=tmp_path, processes=2, PYTHONPATH=path)
    assert done.returncode != 0 and done.stderr.count("train.py: ") == 1 and flag[0] in done.stderr, done.stderr[-2000:]
    assert f'{ROOT / "train.py"}", line' not in done.stderr  # torchrun's own traceback, none of ours


def test_a_machine_without_locks_limits_and_affinity_runs_the_programs(tmp_path):
    # What Windows lacks, as far as it can be pretended here.
    lacking = "import os, sys\nsys.modules.update(fcntl=None, resource=None)\n"
    lacking += "for name in ('sched_getaffinity', 'posix_fallocate', 'sysconf'):\n    delattr(os, name)\n"
    path = sitecustomize(tmp_path / "lacking", lacking)
    done = run("train.py", "--demo", "--steps", 2, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    settings = dict(upstream="runs/demo-avg/student.pt", data="data/demo", lexicon="data/demo/lexicon.txt")
    settings |= dict(steps=2, batch_size=8, cache="cache", workers=0, eval_every=2)
    done = run("evaluate_pr.py", *flags_of(settings), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0 and "PER" in done.stdout, done.stderr
    done = run("bench.py", "--seconds", "0.5", "--steps", 1, "--heads", 4, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0 and "peak memory" in done.stdout, done.stderr


def test_an_evaluation_is_refused_under_torchrun_in_one_line_and_runs_as_its_only_process(tmp_path, corpus):
    flags = flags_of(dict(upstream="fbank", data=corpus, lexicon=corpus / "lexicon.txt", steps=1, workers=0, out="out"))
    done = run("evaluate_pr.py", *flags, cwd=tmp_path, processes=2)
    assert done.returncode != 0 and done.stderr.count("evaluate_pr.py: runs as one process") == 1
    done = run("evaluate_pr.py", *flags, cwd=tmp_path, processes=1)
    assert done.returncode == 0 and "PER" in done.stdout, done.stderr


def test_help_under_torchrun_ends_well(tmp_path):
    done = run("train.py", "--help", cwd=tmp_path, processes=2)
    assert done.returncode == 0 and "--agg" in done.stdout and "destroy_process_group" not in done.stderr


def test_reseeding_depends_on_every_number():
    drawn = []
    for numbers in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0)):
        processes.reseed(*numbers)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[4] and len(set(drawn)) == 4


@pytest.mark.parametrize("text, words", [("1,x", "such as 4,8,12"), ("0,1", "from 1"), ("2,2", "each once")])
def test_layers_that_are_none_are_refused_in_words(text, words):
    with pytest.raises(Exception, match=words):
        processes.layers(text)
