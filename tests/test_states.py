"""states.py: hidden states that are computed once and kept."""

import processes

import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, environment, noise, random_encoder, write_audio

import aggregate
import data
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
    monkeypatch.setattr(states_file, "BLOCK", 4)
    upstream = probe.Upstream(name if name == "fbank" else str(upstreams / name), precision="fp32")
    states, plan = states_file.States(upstream, few), [[3, 0, 8], [1, 2], [4, 5, 6, 7]]
    computed = all_states(states, plan)
    path = None if where == "memory" else str(tmp_path / "cache" / "few.states")
    states.keep(path, "few", 4)
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *_: pytest.fail("the upstream ran"))
    kept = all_states(states, plan)
    if path:
        sizes = [os.path.getsize(os.path.join(path, name)) for name in sorted(os.listdir(path)) if name.isdigit()]
        assert sum(sizes) == states.bytes + 4 * 9 and len(sizes) == 3  # and a checksum each
        again = states_file.States(upstream, few)
        again.keep(path, "few", 4)  # another run finds the file
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
    states.keep(str(tmp_path / "few.states"), "few", 4)
    plan = [[3, 0, 8], [1, 2], [4, 5, 6, 7]]
    for one, other in zip(states.batches(plan, workers=2), states.batches(plan), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_a_cache_that_was_interrupted_is_carried_on_and_not_begun_anew(upstreams, few, tmp_path, monkeypatch):
    monkeypatch.setattr(states_file, "BLOCK", 2)
    upstream, path = probe.Upstream(str(upstreams / "student.pt"), precision="fp32"), str(tmp_path / "few.states")
    with pytest.raises(processes.Interrupted):
        states_file.States(upstream, few).keep(path, "few", 2, After(2))
    assert [name for name in sorted(os.listdir(path)) if name.isdigit()] == ["00000", "00001"]
    seen, call = [], probe.Upstream.__call__
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *a: seen.append(len(a[1])) or call(*a))
    states = states_file.States(upstream, few)
    states.keep(path, "few", 2)
    assert sum(seen) == 9 - 4
    computed = all_states(states_file.States(upstream, few), [[i] for i in range(9)])
    for number, one in all_states(states, [[i] for i in range(9)]).items():
        torch.testing.assert_close(one, computed[number], rtol=0.01, atol=1e-3)


def test_a_file_of_the_wrong_length_is_made_anew_and_the_others_are_kept(upstreams, few, tmp_path, monkeypatch):
    monkeypatch.setattr(states_file, "BLOCK", 3)
    upstream, folder = probe.Upstream(str(upstreams / "student.pt")), tmp_path / "few.states"
    whole = states_file.States(upstream, few)
    whole.keep(str(folder), "few", 3)
    content = {name: (folder / name).read_bytes() for name in ("00000", "00001", "00002")}
    (folder / "00001").write_bytes(content["00001"][:-7])
    seen, call = [], probe.Upstream.__call__
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *a: seen.append(len(a[1])) or call(*a))
    states_file.States(upstream, few).keep(str(folder), "few", 3)
    assert sum(seen) == 3 and {name: (folder / name).read_bytes() for name in content} == content


def test_states_of_the_wrong_size_are_an_error_and_not_computed_for_ever(upstreams, few, tmp_path, monkeypatch):
    call = probe.Upstream.__call__
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *a: call(*a)[..., :-1])
    with pytest.raises(ValueError, match="bytes of states, not"):
        upstream = probe.Upstream(str(upstreams / "student.pt"))
        states_file.States(upstream, few).keep(str(tmp_path / "few.states"), "few", 3)
    assert not [name for name in os.listdir(tmp_path / "few.states") if name.isdigit()]


def test_a_folder_that_is_whole_need_not_be_writable_and_holds_no_lock(upstreams, few, tmp_path, monkeypatch):
    upstream, folder = probe.Upstream(str(upstreams / "student.pt")), tmp_path / "few.states"
    states_file.States(upstream, few).keep(str(folder), "few", 3)
    for name in ("write_whole", "locked_now"):
        monkeypatch.setattr(states_file, name, lambda *_: pytest.fail("something was written"))
    states_file.States(upstream, few).keep(str(folder), "few", 3)


def test_processes_share_the_work_and_each_waits_for_what_another_has_begun(upstreams, tmp_path):
    write_audio(tmp_path / "audio", [4000 + 1357 * i for i in range(12)])
    code = (
        "import probe, states, sys, data\n"
        "states.BLOCK, states.RANK, states.WORLD_SIZE = 2, int(sys.argv[1]), 2\n"
        "upstream = probe.Upstream(sys.argv[2], precision='fp32')\n"
        "count, call = [], probe.Upstream.__call__\n"
        "probe.Upstream.__call__ = lambda *a: count.append(len(a[1])) or call(*a)\n"
        "corpus = data.find_corpus(sys.argv[3], ['.'])\n"
        "input()\n"
        "states.States(upstream, corpus).keep(sys.argv[4], 'few', 2)\n"
        "print(sum(count))\n"
    )
    places = [str(upstreams / "student.pt"), str(tmp_path / "audio"), str(tmp_path / "kept")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), *places], cwd=ROOT, env=environment(), **pipes)
        for rank in range(2)
    ]
    counts = [process.communicate("\n", timeout=120)[0].split()[-1] for process in started]
    assert sum(map(int, counts)) == 12  # nothing twice
    upstream = probe.Upstream(places[0], precision="fp32")
    kept = states_file.States(upstream, data.find_corpus(places[1], ["."]))
    kept.keep(places[2], "few", 2)
    computed = all_states(states_file.States(upstream, kept.corpus), [[i] for i in range(12)])
    for number, one in all_states(kept, [[i] for i in range(12)]).items():
        torch.testing.assert_close(one, computed[number], rtol=0.01, atol=1e-3)


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
    assert [one.kept is not None for one in states] == [True, True, False] and "kept in memory" in line
    assert "50% of the free memory" in line
    states, line = keeping(upstream, few, capsys, cache_memory=0)
    assert all(one.kept is None for one in states) and "for every batch again" in line and "--cache" in line
    monkeypatch.setattr(states_file, "free_memory", lambda: 4 * states[0].bytes - 1)  # two of them in half of it
    assert "over 50%" in keeping(upstream, few, capsys)[1]
    states, line = keeping(upstream, few, capsys, steps=2)
    assert all(one.kept is None for one in states) and "no utterance is trained on twice" in line
    states, line = keeping(upstream, few, capsys, cache=str(tmp_path / "cache"))
    assert len({one.kept.folder for one in states}) == 3


def test_a_cache_is_not_used_for_audio_that_has_changed(upstreams, few, tmp_path, capsys):
    upstream, cache = probe.Upstream(str(upstreams / "student.pt")), str(tmp_path / "cache")
    before = keeping(upstream, few, capsys, cache=cache)[0][0].kept.folder
    assert keeping(upstream, few, capsys, cache=cache)[0][0].kept.folder == before
    write_audio(tmp_path / "audio", [4000 + 1357 * i for i in range(9)], seed=1)  # other sound of the same lengths
    assert keeping(upstream, few, capsys, cache=cache)[0][0].kept.folder != before


def test_a_full_disk_is_said_before_anything_is_computed(upstreams, few, tmp_path, monkeypatch):
    monkeypatch.setattr(states_file.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *_: pytest.fail("the upstream ran"))
    with pytest.raises(OSError, match=r"no room for .* GB; give --cache"):
        upstream = probe.Upstream(str(upstreams / "student.pt"))
        states_file.States(upstream, few).keep(str(tmp_path / "few.states"), "few", 2)
    assert not os.listdir(tmp_path / "few.states")


# ---------------------------------------------------------------- targets of a distillation


class Convolutions:
    """A teacher whose receptive field is its convolutions alone."""

    def __init__(self, encoder):
        self.encoder, self.config, self.frames = encoder, encoder.config, encoder.frames

    def __call__(self, waveforms, lengths=None, layers=None):
        return [self.encoder.feature_projection(self.encoder.feature_extractor(waveforms, lengths))]


def test_kept_targets_of_a_crop_are_those_of_its_place_exactly(few):
    teacher = Convolutions(random_encoder(conv_norm="layer"))
    cpu = torch.device("cpu")
    ensemble = states_file.Ensemble([teacher], [[1]], aggregate.average, [48], cpu)
    assert (ensemble.field, ensemble.hop) == (400, 320)
    kept = states_file.States(ensemble, few, torch.float32)
    kept.keep(None, "few", 1)
    batches = data.Batches(few, 3, 6400, seed=1, grid=ensemble.hop)
    begins = set()
    for step in range(6):
        item = states_file.WithTargets(batches, kept.kept, ensemble.field)[step]
        with torch.no_grad():
            (computed,) = teacher(item["waveforms"])
        torch.testing.assert_close(item["targets"], computed, rtol=1e-4, atol=1e-5)
        begins |= set(batches.crops(step)[1])
    assert all(begin % 320 == 0 for begin in begins) and max(begins) > 0


def test_rounding_to_eight_bits_is_within_half_a_step_of_each_dimensions_scale():
    states = noise(2, 7, 6, seed=1) * torch.tensor([1e-3, 1.0, 100.0, 1.0, 1.0, 0.0])
    kept = states_file.rounded(states)
    assert kept.dtype == torch.int8 and kept.shape == (2, 4 + 7, 6)
    half = states.abs().amax(1, keepdim=True) / 127 / 2
    for first, frames in ((0, 7), (2, 3)):
        found = states_file.unrounded(kept, first, frames)
        assert ((found - states[:, first : first + frames]).abs() <= 1.0001 * half + 1e-9).all()
