"""probe.py: the frozen upstream, and the training of the probe."""

import copy

import numpy as np
import pytest
import torch
import torchaudio
from conftest import SMALL, noise

import probe
from student import Student, save_student, student_config

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
    model, progress = probe.Probe(2, torch.nn.Identity()), {"curve": [], "best": None}
    for step, score in ((10, 0.5), (20, 0.3), (30, 0.4), (40, 0.3)):
        with torch.no_grad():
            model.weights.fill_(step)
        probe.note_score(progress, step, score, model)
    assert progress["best"]["step"] == 20 and progress["best"]["probe"]["weights"].tolist() == [20, 20]
    probe.note_score(progress, 50, 0.45, model, higher_is_better=True)
    assert progress["best"]["step"] == 50 and progress["curve"].pop() == [50, 0.45]
    assert progress["curve"] == [[10, 0.5], [20, 0.3], [30, 0.4], [40, 0.3]]


def test_one_optimizer_of_several_rates_goes_on_as_an_optimizer_for_each():
    def adam(groups):
        return torch.optim.Adam([{"params": list(one.parameters()), "lr": lr} for one, lr in groups], fused=True)

    torch.manual_seed(0)
    together = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    apart = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    one, x = adam(zip(together, (0.1, 0.01))), torch.randn(4, 3)

    def step(networks, *optimizers):
        sum(network(x).square().mean() for network in networks).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step(together, one)
    for network, before in zip(apart, together):
        network.load_state_dict(before.state_dict())
    each = [adam([(network, 1.0)]) for network in apart]
    for optimizer, moments in zip(each, probe._apart(copy.deepcopy(one.state_dict())), strict=True):
        optimizer.load_state_dict(moments)
    step(together, one)
    step(apart, *each)
    for network, expected in zip(apart, together):
        assert torch.equal(network.weight, expected.weight) and torch.equal(network.bias, expected.bias)
