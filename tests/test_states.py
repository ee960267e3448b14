"""states.py: hidden states that are computed once and kept."""

import processes

import os
import types

import pytest
import torch
from conftest import write_audio

import probe
import states as states_file


class After:
    """Signals of which the first comes when they have been looked at `calls` times."""

    def __init__(self, calls):
        self.calls = calls

    def __bool__(self):
        self.calls -= 1
        return self.calls < 0

    def __getitem__(self, _):
        return 15


def all_states(states, plan):
    """{utterance: its (states, frames, dim)} as batches give them, cut to its frames; past them there must be zeros."""
    found = {}
    for utterances, x, frames in states.batches(plan):
        for place, (utterance, length) in enumerate(zip(utterances, frames.tolist())):
            found[utterance] = x[:, place, :length]
            assert not x[:, place, length:].any()
    return found


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("name", ["wavlm.pt", "fbank"])
def test_kept_states_are_those_computed_and_the_upstream_runs_no_more(
    upstreams, few, tmp_path, where, name, monkeypatch
):
    upstream = probe.Upstream(name if name == "fbank" else str(upstreams / name), precision="fp32")
    states, plan = states_file.States(upstream, few), [[3, 0, 8], [1, 2], [4, 5, 6, 7]]
    computed = all_states(states, plan)
    path = None if where == "memory" else str(tmp_path / "cache" / "few.states")
    states.keep(path, "few", 4, 0, [])
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *_: pytest.fail("the upstream ran"))
    kept = all_states(states, plan)
    if path:
        assert os.path.getsize(path) == states.bytes and not os.path.exists(path + ".done")
        again = states_file.States(upstream, few)
        again.keep(path, "few", 4, 0, [])  # another run finds the file
        assert all(torch.equal(one, kept[number]) for number, one in all_states(again, plan).items())
    assert kept.keys() == computed.keys() == set(range(9))
    for number, one in computed.items():  # as bf16 has them, batches of other sizes round a little otherwise
        assert (
            kept[number].shape
            == one.shape
            == (upstream.states, upstream.frames(int(few.samples[number])), upstream.dim)
        )
        torch.testing.assert_close(kept[number], one, rtol=0.01, atol=1e-3)
    assert not torch.equal(kept[0], kept[1][:, : kept[0].shape[1]])


def test_states_reach_the_run_through_the_loaders_processes_too(upstreams, few, tmp_path):
    states = states_file.States(probe.Upstream(str(upstreams / "student.pt")), few)
    states.keep(str(tmp_path / "few.states"), "few", 4, 0, [])
    plan = [[3, 0, 8], [1, 2], [4, 5, 6, 7]]
    for one, other in zip(states.batches(plan, workers=2), states.batches(plan), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_a_cache_that_was_interrupted_is_carried_on_and_not_begun_anew(upstreams, few, tmp_path, monkeypatch):
    upstream, path = probe.Upstream(str(upstreams / "student.pt")), str(tmp_path / "few.states")
    with pytest.raises(processes.Interrupted):
        states_file.States(upstream, few).keep(path, "few", 2, 0, After(1))
    assert not os.path.exists(path)
    seen, call = [], probe.Upstream.__call__
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *a: seen.append(len(a[1])) or call(*a))
    states = states_file.States(upstream, few)
    states.keep(path, "few", 2, 0, [])
    assert sum(seen) == 9 - 4
    computed = all_states(states_file.States(upstream, few), [[i] for i in range(9)])
    for number, one in all_states(states, [[i] for i in range(9)]).items():
        torch.testing.assert_close(one, computed[number], rtol=0.01, atol=1e-3)


def test_a_cache_of_the_wrong_length_is_refused_by_name(upstreams, few, tmp_path):
    (tmp_path / "few.states").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"few\.states.*delete it"):
        upstream = probe.Upstream(str(upstreams / "student.pt"))
        states_file.States(upstream, few).keep(str(tmp_path / "few.states"), "few", 2, 0, [])


def keeping(upstream, corpus, capsys, **settings):
    """keep_states on three splits of the same files: (States of each, what it said)."""
    corpora = [corpus.part(range(len(corpus))) for _ in range(3)]
    places = range(len(corpus))
    splits = [probe.Split(str(n), c, places, c.paths, [torch.zeros(1)] * len(c), {}) for n, c in enumerate(corpora)]
    args = dict(cache=None, cache_memory=0.5, steps=100, batch_size=4, workers=0) | settings
    states = {split.corpus: states_file.States(upstream, split.corpus) for split in splits}
    states_file.keep_states(types.SimpleNamespace(**args), upstream, states, splits, True, [])
    return list(states.values()), capsys.readouterr().out


def test_states_are_kept_in_memory_where_they_fit_and_a_line_says_which(upstreams, few, tmp_path, capsys, monkeypatch):
    upstream = probe.Upstream(str(upstreams / "student.pt"))
    states, line = keeping(upstream, few, capsys)
    assert [one.row is not None for one in states] == [True, True, False] and "kept in memory" in line
    assert "50% of the free memory" in line
    states, line = keeping(upstream, few, capsys, cache_memory=0)
    assert all(one.row is None for one in states) and "for every batch again" in line and "--cache" in line
    monkeypatch.setattr(states_file, "free_memory", lambda: 4 * states[0].bytes - 1)  # two of them in half of it
    assert "over 50%" in keeping(upstream, few, capsys)[1]
    states, line = keeping(upstream, few, capsys, steps=2)
    assert all(one.row is None for one in states) and "no utterance is trained on twice" in line
    states, line = keeping(upstream, few, capsys, cache=str(tmp_path / "cache"))
    assert all(one.path for one in states) and len({one.path for one in states}) == 3


def test_a_cache_is_not_used_for_audio_that_has_changed(upstreams, few, tmp_path, capsys):
    upstream, cache = probe.Upstream(str(upstreams / "student.pt")), str(tmp_path / "cache")
    before = keeping(upstream, few, capsys, cache=cache)[0][0].path
    assert keeping(upstream, few, capsys, cache=cache)[0][0].path == before
    write_audio(tmp_path / "audio", [4000 + 1357 * i for i in range(9)], seed=1)  # other sound of the same lengths
    assert keeping(upstream, few, capsys, cache=cache)[0][0].path != before


def test_a_full_disk_is_said_before_anything_is_computed(upstreams, few, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"no room for .* GB .*--cache"):
        upstream = probe.Upstream(str(upstreams / "student.pt"))
        states_file.States(upstream, few).keep(str(tmp_path / "few.states"), "few", 2, 0, [])
    assert not list(tmp_path.glob("few.states.partial"))
