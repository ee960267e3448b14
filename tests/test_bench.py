"""bench.py: it times the steps of train.py, and their parts add up."""

import dataclasses
import itertools
import re
import types

import pytest
from conftest import SMALL, on_cpu, refused

import bench


@pytest.fixture
def small(monkeypatch):
    """Makes the networks of bench.py small."""
    monkeypatch.setattr(bench, "EncoderConfig", lambda **more: dataclasses.replace(SMALL, **more))


def test_cached_steps_are_timed_in_turn_and_parts_add_up(small, capsys, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(bench, "time", clock)
    flags = ["--seconds", 0.9, 0.8, "--heads", "2,4", "--agg", "concat", "--steps", 2, "--cache"]
    on_cpu(bench, flags)
    printed = capsys.readouterr().out
    assert "1.6 s of audio per step" in printed and "heads: layer2, layer4" in printed
    rounds = ["teachers.*", "GB of targets", "teachers.*", "GB of targets"]
    assert re.search("(?s)" + ".*step 4/4.*".join(rounds), printed)
    for kind in ("step", "step with cached targets"):
        pattern = f"^{kind}: (.*) s, (.*) s of audio/s; median of 4:\n" + "  (\\S+) +(.*) s\n" * 5
        total, speed, *parts = re.search(pattern, printed, re.M).groups()
        assert parts[::2] == [*bench.PARTS, "rest"]
        seconds = list(map(float, parts[1::2]))
        assert min(seconds) > 0 and sum(seconds) == float(total)
        assert float(speed) == pytest.approx(1.6 / float(total), rel=0.01)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--heads", "4,13"], "13"),
        (["--steps", "0"], "--steps"),
        (["--seconds", "8,7"], "--seconds"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "0.01"], "no audio of at least 25 ms"),
        (["--student", "--precision", "bf16"], "--precision: --student takes no flags"),
    ],
)
def test_bad_settings_are_rejected_in_one_line(small, capsys, flags, word):
    assert word in refused(capsys, bench, flags)
