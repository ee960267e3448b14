"""evaluate_asr.py: letters, SpecAugment, BiLSTMs, WER and CER."""

import json

import pytest
import torch
from conftest import flags_of, on_cpu, read_symbols, write_audio

import demo
import evaluate_asr
import evaluate_pr
import probe
from states import States


def flags(out, **more):
    return flags_of(dict(out=out, batch_size=16, lr=1e-2, workers=0, log_every=100, eval_every=20, steps=40) | more)


def score(out, **more):
    """result.json of a run in this process."""
    on_cpu(evaluate_asr, flags(out, **more))
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def asr(corpus, upstreams, tmp_path_factory):
    out = tmp_path_factory.mktemp("asr") / "asr"
    settings = dict(data=corpus, upstream=upstreams / "hubert.pt", hidden=32, steps=4, eval_every=2, lr=1e-3)
    return out, settings, score(out, **settings)


def test_a_public_scorer_finds_the_same_wer_and_cer_in_the_files(asr):
    jiwer = pytest.importorskip("jiwer")
    out, _, result = asr
    references, hypotheses = read_symbols(out / "test.ref"), read_symbols(out / "test.hyp")
    assert list(references) == list(hypotheses) and len(references) == 16
    assert any(hypotheses.values()) and 0 < result["substitutions"]  # a few steps say something, if nothing right
    references, hypotheses = ([" ".join(text) for text in texts.values()] for texts in (references, hypotheses))
    assert jiwer.wer(references, hypotheses) == pytest.approx(result["wer"], abs=1e-12)
    assert jiwer.cer(references, hypotheses) == pytest.approx(result["cer"], abs=1e-12)
    for score, (low, high) in ((result["wer"], result["interval"]), (result["cer"], result["cer_interval"])):
        assert low <= score <= high


def test_the_words_are_the_transcripts(asr, corpus):
    out, _, _ = asr
    for name, text in read_symbols(out / "test.ref").items():
        speaker = name.split("-")[0]
        lines = (corpus / "test-clean" / speaker / "1" / f"{speaker}-1.trans.txt").read_text().splitlines()
        assert " ".join([name, *text]) in lines


@pytest.mark.slow
def test_a_bilstm_learns_to_spell(corpus, tmp_path):
    upstream = demo.teachers()[0]  # knows the synthesiser's phonemes
    result = score(tmp_path, data=corpus, upstream=upstream, hidden=48, steps=400, eval_every=100, lr=1e-2)
    assert result["cer"] < 0.5, result["curve"]


def test_asr_hypotheses_do_not_depend_on_the_batch_size(corpus, upstreams):
    split = evaluate_pr.read_split(str(corpus), "test-clean", evaluate_asr.spell)
    network = probe.Upstream(str(upstreams / "hubert.pt"), precision="fp32")
    torch.manual_seed(0)
    model = probe.Probe(network.states, evaluate_asr.CharacterHead(network.dim, 32))
    with torch.no_grad():  # an untrained head that says something
        model.head.characters.weight.mul_(30)
    states = States(network, split.corpus)
    # Kept: a batch's rounding in the upstream could tip what a random head says.
    states.keep(None, "test", 16, 0, [])
    alone, together = (probe.predict([model], split, states, evaluate_asr.ctc_greedy, size)[0] for size in (1, 16))
    assert alone == together and len(set(map(str, alone))) > 5


def test_a_run_with_dropout_that_is_killed_and_started_again_ends_the_same(asr, tmp_path, monkeypatch):
    out, settings, expected = asr
    save = probe.save_run

    def save_and_die(args, fingerprints, model, optimizer, progress):
        save(args, fingerprints, model, optimizer, progress)
        if progress["scored"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "save_run", save_and_die)
        score(tmp_path / "asr", **settings)
    result = score(tmp_path / "asr", **settings)
    for key in ("wer", "cer", "curve", "layer_weights"):
        assert result[key] == expected[key]


def test_the_bilstm_gives_what_torchs_gives_for_a_packed_sequence():
    x, frames = torch.randn(3, 9, 4), torch.tensor([9, 1, 6])
    lstm, packed = evaluate_asr.BiLSTM(4, 5), torch.nn.LSTM(4, 5, bidirectional=True, batch_first=True)
    weights = {name: weight for name, weight in lstm.onward.state_dict().items()}
    weights |= {f"{name}_reverse": weight for name, weight in lstm.reverse.state_dict().items()}
    packed.load_state_dict(weights)
    sequence = torch.nn.utils.rnn.pack_padded_sequence(x, frames, batch_first=True, enforce_sorted=False)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(packed(sequence)[0], batch_first=True)
    found = lstm(x, frames)
    for number, length in enumerate(frames.tolist()):
        torch.testing.assert_close(found[number, :length], expected[number, :length])


def test_specaugment_masks_and_warps_in_training_alone():
    augment, x = evaluate_asr.SpecAugment(), torch.ones(8, 100, 200)
    frames = torch.full((8,), 100)
    assert augment.eval()(x, frames) is x
    augment.train()
    torch.manual_seed(0)
    masked = augment(x, frames) == 0
    rows, columns = masked.all(2).sum(1), masked.all(1).sum(1)  # frames and dimensions that are 0 throughout
    assert rows.max() <= 2 * 39 and columns.max() <= 4 * 49 and rows.sum() > 0 and columns.sum() > 0
    assert masked.sum() < masked.numel()

    ramp = torch.arange(60.0)[:, None].expand(60, 3).contiguous()
    warped = augment.warp(ramp, 50)
    assert warped.shape == ramp.shape and torch.equal(warped[50:], ramp[50:])
    assert (warped - ramp).abs().max() <= 7 and (warped[1:50] - warped[:49]).mean() == pytest.approx(1, abs=0.1)
    assert not torch.equal(warped, ramp)
    assert torch.equal(augment.warp(ramp[:10], 10), ramp[:10])  # too short to be warped


def test_dropout_follows_each_lstm_in_training_alone():
    torch.manual_seed(0)
    head, x, frames = evaluate_asr.CharacterHead(8, 64), torch.randn(2, 20, 8), torch.tensor([20, 20])
    seen = []
    head.characters.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head.lstms[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head.train()(x, frames)
    assert all(0.15 < (part == 0).float().mean() < 0.25 for part in seen) and len(seen) == 2
    head.eval()(x, frames)
    assert all((part != 0).all() for part in seen[2:])


def test_a_rate_among_several_draws_the_dropout_and_learns_the_weights_that_it_does_alone(asr, tmp_path):
    out, settings, _ = asr
    score(tmp_path / "several", **settings | dict(lr="1e-2,1e-3"))
    alone, several = (torch.load(run / "last.pt", weights_only=True)["probes"] for run in (out, tmp_path / "several"))
    assert all(torch.equal(weight, several[1][name]) for name, weight in alone[0].items())


def test_transcripts_with_other_characters_are_left_out(tmp_path):
    write_audio(tmp_path / "dev" / "1" / "1", [8000, 9000])
    (tmp_path / "dev" / "1" / "1" / "x.trans.txt").write_text("000 DON'T GO\n001 42 TIMES\n")
    split = evaluate_pr.read_split(str(tmp_path), "dev", evaluate_asr.spell)
    assert split.ids == ["000"] and evaluate_asr.words(split.labels[0]) == ["DON'T", "GO"]
    assert split.left_out == {"001": "characters 24"}


def test_the_protocols_defaults_are_superbs():
    args = evaluate_asr.parse(["--upstream", "runs/avg/student.pt"])
    assert (args.steps, args.batch_size, args.lr, args.out) == (200_000, 32, 1e-4, "runs/avg/asr")
    assert args.hidden == 1024
    head = evaluate_asr.CharacterHead(8)
    assert [lstm.onward.hidden_size for lstm in head.lstms] == [1024, 1024] and head.dropout.p == 0.2
