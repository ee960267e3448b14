"""probe.py: the frozen upstream, its kept states, and the scores."""

import os
import types

import numpy as np
import pytest
import torch
import torchaudio
from conftest import SMALL, noise, random_encoder, write_audio

import data
import probe
from student import Student, save_student, student_config
from teachers import save_official


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory):
    """A student and a teacher in files, and on noise(2, 8000) the hidden states of each by hand."""
    folder = tmp_path_factory.mktemp("upstreams")
    student = Student(student_config(SMALL), [("layer2", 48)]).eval()
    teacher = random_encoder(0, relative_buckets=320)
    save_student(student, folder / "student.pt")
    save_official(teacher, folder / "wavlm.pt", "microsoft")
    with torch.no_grad():
        states = {"student.pt": student.hidden_states(noise(2, 8000)), "wavlm.pt": teacher(noise(2, 8000))}
    torch.save(states, folder / "states.pt")
    return folder


@pytest.fixture
def few(tmp_path):
    """A corpus of nine files of different lengths."""
    write_audio(tmp_path / "audio", [4000 + 1357 * i for i in range(9)])
    return data.find_corpus(tmp_path / "audio", ["."])


def interrupted_after(calls):
    """A check() that raises Interrupted the second time it is called, the third, ..."""
    count = iter(range(calls, -1, -1))

    def check():
        if not next(count):
            raise probe.Interrupted(15)

    return check


def all_states(states, plan):
    """{utterance: its (states, frames, dim)} as batches give them, cut to its frames; past them there must be zeros."""
    found = {}
    for utterances, x, frames in states.batches(plan):
        for place, (utterance, length) in enumerate(zip(utterances, frames.tolist())):
            found[utterance] = x[:, place, :length]
            assert not x[:, place, length:].any()
    return found


# ---------------------------------------------------------------- the upstream


def test_filter_banks_are_superbs():
    waveform = noise(16000)
    (states,) = probe.FilterBanks()(waveform[None], torch.tensor([16000]))
    # s3prl's extracter: log Mel filter banks, deltas of deltas, mean and deviation of each dimension.
    expected = torchaudio.compliance.kaldi.fbank(waveform[None], num_mel_bins=80, frame_length=25.0, frame_shift=10.0)
    deltas = torchaudio.transforms.ComputeDeltas(win_length=5)
    first = deltas(expected.t()[None])[0].t()
    expected = torch.cat([expected, first, deltas(first.t()[None])[0].t()], dim=-1)
    expected = (expected - expected.mean(0, keepdim=True)) / (1e-10 + expected.std(0, keepdim=True))
    assert states.shape == (1, 98, 240)
    torch.testing.assert_close(states[0], expected, rtol=1e-4, atol=1e-4)


def test_filter_banks_of_silence_and_of_a_single_frame_are_finite():
    banks = probe.FilterBanks()
    for waveform in (torch.zeros(1, 4000), noise(1, 400), torch.full((1, 8000), 0.25)):
        states = banks(waveform, torch.tensor([waveform.shape[1]]))[0]
        assert states.shape[1] == banks.frames(waveform.shape[1]) and states.abs().max() < 100


@pytest.mark.parametrize("name, states, dim", [("student.pt", 3, 48), ("wavlm.pt", 5, 48), ("fbank", 1, 240)])
def test_an_utterance_in_a_padded_batch_has_the_states_it_has_alone(upstreams, name, states, dim):
    upstream = probe.Upstream(name if name == "fbank" else str(upstreams / name), precision="fp32")
    assert (upstream.states, upstream.dim) == (states, dim)
    waveforms, lengths = noise(3, 12000), torch.tensor([12000, 7000, 9999])
    together = upstream(waveforms, lengths)
    assert together.dtype == torch.bfloat16 and together.shape[:2] == (states, 3)
    for place, length in enumerate(lengths.tolist()):
        alone = upstream(waveforms[place : place + 1, :length], lengths[place : place + 1])
        assert alone.shape[2] == upstream.frames(length)
        torch.testing.assert_close(together[:, place : place + 1, : alone.shape[2]], alone, rtol=0.01, atol=1e-3)
        assert not together[:, place, alone.shape[2] :].any()


def test_a_batch_too_large_for_one_go_has_the_states_of_one_that_is_not(upstreams, monkeypatch):
    waveforms, lengths = noise(5, 9000), torch.tensor([9000, 7000, 8000, 500, 600])
    for name in ("fbank", str(upstreams / "wavlm.pt")):
        upstream = probe.Upstream(name, precision="fp32")
        expected = upstream(waveforms, lengths)
        with monkeypatch.context() as patch:
            patch.setattr(probe, "AT_ONCE", 2 * 9000)
            torch.testing.assert_close(upstream(waveforms, lengths), expected, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("name", ["student.pt", "wavlm.pt"])
def test_the_upstreams_states_are_those_of_the_network_in_the_file(upstreams, name):
    upstream = probe.Upstream(str(upstreams / name), precision="fp32")
    states = upstream(noise(2, 8000), torch.tensor([8000, 8000]))
    for state, by_hand in zip(states, torch.load(upstreams / "states.pt")[name], strict=True):
        torch.testing.assert_close(state.float(), by_hand, rtol=0.01, atol=1e-3)
    assert not any(weight.requires_grad for weight in upstream.encoder.parameters()) and not upstream.encoder.training


def test_a_digest_tells_upstreams_apart(upstreams, tmp_path):
    save_student(Student(student_config(SMALL), [("layer2", 48)]), tmp_path / "other.pt")  # of other weights only
    paths = [upstreams / "student.pt", upstreams / "wavlm.pt", tmp_path / "other.pt", upstreams / "student.pt"]
    digests = [probe.Upstream(str(path)).digest for path in paths]
    assert digests[0] == digests[3] and len(set(digests)) == 3


def test_the_probe_sees_the_weighted_sum_of_the_states():
    states = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    seen = []
    model = probe.Probe(3, lambda x, frames: seen.append(x) or x)
    with torch.no_grad():
        model.weights.copy_(torch.tensor([0.0, 1.0, -1.0]))
    model(states, torch.tensor([5, 3]))
    e = np.exp([0.0, 1.0, -1.0])
    expected = sum(float(weight) * state for weight, state in zip(e / e.sum(), states))
    torch.testing.assert_close(seen[0], expected)


# ---------------------------------------------------------------- states that are kept


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("name", ["wavlm.pt", "fbank"])
def test_kept_states_are_those_computed_and_the_upstream_runs_no_more(
    upstreams, few, tmp_path, where, name, monkeypatch
):
    upstream = probe.Upstream(name if name == "fbank" else str(upstreams / name), precision="fp32")
    states, plan = probe.States(upstream, few), [[3, 0, 8], [1, 2], [4, 5, 6, 7]]
    computed = all_states(states, plan)
    path = None if where == "memory" else str(tmp_path / "cache" / "few.states")
    states.keep(path, "few", 4, 0, lambda: None)
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *_: pytest.fail("the upstream ran"))
    kept = all_states(states, plan)
    if path:
        assert os.path.getsize(path) == states.bytes and not os.path.exists(path + ".done")
        again = probe.States(upstream, few)
        again.keep(path, "few", 4, 0, lambda: None)  # another run finds the file
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
    states = probe.States(probe.Upstream(str(upstreams / "student.pt")), few)
    states.keep(str(tmp_path / "few.states"), "few", 4, 0, lambda: None)
    plan = [[3, 0, 8], [1, 2], [4, 5, 6, 7]]
    for one, other in zip(states.batches(plan, workers=2), states.batches(plan), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_a_cache_that_was_interrupted_is_carried_on_and_not_begun_anew(upstreams, few, tmp_path, monkeypatch):
    upstream, path = probe.Upstream(str(upstreams / "student.pt")), str(tmp_path / "few.states")
    with pytest.raises(probe.Interrupted):
        probe.States(upstream, few).keep(path, "few", 2, 0, interrupted_after(1))
    assert not os.path.exists(path)
    seen, call = [], probe.Upstream.__call__
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *a: seen.append(len(a[1])) or call(*a))
    states = probe.States(upstream, few)
    states.keep(path, "few", 2, 0, lambda: None)
    assert sum(seen) == 9 - 4
    computed = all_states(probe.States(upstream, few), [[i] for i in range(9)])
    for number, one in all_states(states, [[i] for i in range(9)]).items():
        torch.testing.assert_close(one, computed[number], rtol=0.01, atol=1e-3)


def test_a_cache_of_the_wrong_length_is_refused_by_name(upstreams, few, tmp_path):
    (tmp_path / "few.states").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"few\.states.*delete it"):
        upstream = probe.Upstream(str(upstreams / "student.pt"))
        probe.States(upstream, few).keep(str(tmp_path / "few.states"), "few", 2, 0, lambda: None)


def keeping(upstream, corpus, capsys, **settings):
    """keep_states on three splits of the same files: (States of each, what it said)."""
    corpora = [corpus.part(range(len(corpus))) for _ in range(3)]
    places = range(len(corpus))
    splits = [probe.Split(str(n), c, places, c.paths, [torch.zeros(1)] * len(c), {}) for n, c in enumerate(corpora)]
    args = dict(cache=None, cache_memory=0.5, steps=100, batch_size=4, workers=0) | settings
    states = {split.corpus: probe.States(upstream, split.corpus) for split in splits}
    probe.keep_states(types.SimpleNamespace(**args), upstream, states, splits, True, lambda: None)
    return list(states.values()), capsys.readouterr().out


def test_states_are_kept_in_memory_where_they_fit_and_a_line_says_which(upstreams, few, tmp_path, capsys, monkeypatch):
    upstream = probe.Upstream(str(upstreams / "student.pt"))
    states, line = keeping(upstream, few, capsys)
    assert [one.row is not None for one in states] == [True, True, False] and "kept in memory" in line
    assert "50% of the free memory" in line
    states, line = keeping(upstream, few, capsys, cache_memory=0)
    assert all(one.row is None for one in states) and "for every batch again" in line and "--cache" in line
    monkeypatch.setattr(probe, "free_memory", lambda: 4 * states[0].bytes - 1)  # two of them in half of it
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
        probe.States(upstream, few).keep(str(tmp_path / "few.states"), "few", 2, 0, lambda: None)
    assert not list(tmp_path.glob("few.states.partial"))


# ---------------------------------------------------------------- the order of training


def test_training_batches_depend_on_seed_and_step_alone_and_hold_every_utterance_once_an_epoch(few):
    def shuffled(seed, places=range(9)):
        return probe.Shuffled(probe.Split("few", few, places, list(places), list(places), {}), 3, seed)

    plan, later = shuffled(1), shuffled(1)
    steps = [sorted(plan[step].tolist()) for step in range(9)]
    assert sorted(later[7].tolist()) == steps[7] and sorted(later[1].tolist()) == steps[1]
    for epoch in range(3):
        assert sorted(sum(steps[3 * epoch : 3 * epoch + 3], [])) == list(range(9))
    assert any(sorted(shuffled(2)[step].tolist()) != steps[step] for step in range(9))
    assert sorted(sum((shuffled(1, [1, 3, 5, 7, 8, 2])[step].tolist() for step in range(2)), [])) == [1, 2, 3, 5, 7, 8]


def test_the_probe_that_is_kept_is_that_of_the_lowest_score():
    model, progress = probe.Probe(2, torch.nn.Identity()), {"scored": 0, "curve": [], "best": None}
    for step, score in ((10, 0.5), (20, 0.3), (30, 0.4), (40, 0.3)):
        with torch.no_grad():
            model.weights.fill_(step)
        probe.note_score(progress, step, score, model)
    assert progress["best"]["step"] == 20 and progress["best"]["probe"]["weights"].tolist() == [20, 20]
    probe.note_score(progress, 50, 0.45, model, higher_is_better=True)
    assert progress["best"]["step"] == 50 and progress["curve"].pop() == [50, 0.45]
    assert progress["scored"] == 50 and progress["curve"] == [[10, 0.5], [20, 0.3], [30, 0.4], [40, 0.3]]


# ---------------------------------------------------------------- CTC and scores


def test_greedy_decoding_merges_repeats_keeps_doubles_and_stops_at_an_utterances_end():
    paths = torch.tensor([[0, 2, 2, 0, 2, 1, 1], [1, 1, 1, 0, 0, 3, 3]])
    outputs = torch.nn.functional.one_hot(paths, 4).float().log_softmax(-1)
    assert probe.ctc_greedy(outputs, torch.tensor([7, 4])) == [[2, 2, 1], [1]]


def test_an_utterance_with_fewer_frames_than_ctc_needs_is_known_and_does_not_spoil_the_loss():
    label = torch.tensor([1, 1, 2])
    assert probe.ctc_frames(label) == 4 and probe.ctc_frames(torch.tensor([1, 2, 1])) == 3
    outputs = torch.randn(2, 6, 4, requires_grad=True)
    loss = probe.ctc_loss(outputs.log_softmax(-1), torch.tensor([6, 3]), [label, label])
    alone = probe.ctc_loss(outputs[:1].log_softmax(-1), torch.tensor([6]), [label])
    assert torch.isfinite(loss) and loss.item() == pytest.approx(alone.item() / 2)
    loss.backward()
    assert torch.isfinite(outputs.grad).all() and not outputs.grad[1].any()
    enough = probe.ctc_loss(outputs[1:].log_softmax(-1), torch.tensor([4]), [label])
    assert enough > 0


def test_edits_are_counted_by_kind_and_add_up_to_the_edit_distance():
    assert probe.alignment("abcd", "abcd") == (0, 0, 0)
    assert probe.alignment("abcd", "axcd") == (1, 0, 0)
    assert probe.alignment("abcd", "acd") == (0, 1, 0)
    assert probe.alignment("abcd", "abxcd") == (0, 0, 1)
    assert probe.alignment("", "ab") == (0, 0, 2) and probe.alignment("ab", "") == (0, 2, 0)
    assert probe.alignment("ab", "ba") == (0, 1, 1)  # not two substitutions: one symbol is right
    rng = np.random.default_rng(0)
    for _ in range(100):
        one, other = (rng.integers(0, 4, rng.integers(0, 12)).tolist() for _ in range(2))
        counts = probe.alignment(one, other)
        assert sum(counts) == torchaudio.functional.edit_distance(one, other)
        assert counts[2] - counts[1] == len(other) - len(one)


def test_edits_of_a_set_are_distances_and_lengths_of_the_references():
    wrong, total = probe.edits([[1, 2, 3], [4]], [[1, 3], [4, 4, 4]])
    assert wrong.tolist() == [1, 2] and total.tolist() == [3, 1]


def test_the_bootstrap_interval_is_that_of_the_utterances():
    rng = np.random.default_rng(1)
    errors, totals = rng.binomial(20, 0.3, 400).astype(float), np.full(400, 20.0)
    low, high = probe.bootstrap((errors, totals))
    score, deviation = errors.sum() / totals.sum(), (errors / 20).std() / 400**0.5  # normal, for that many
    assert low == pytest.approx(score - 1.96 * deviation, abs=0.0015)
    assert high == pytest.approx(score + 1.96 * deviation, abs=0.0015)
    assert probe.bootstrap((errors, totals)) == [low, high]
    assert probe.bootstrap((np.array([1.0, 2.0]), np.array([2.0, 4.0]))) == [0.5, 0.5]


def test_bars_are_as_long_as_the_weights():
    lines = probe.bars([0.1, 0.4, 0.2])
    assert [line.count("#") for line in lines] == [10, 40, 20] and "state  1" in lines[1]
