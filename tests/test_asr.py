"""superb/asr.py: characters, SpecAugment, BiLSTMs, WER."""

import json

import pytest
import torch
from conftest import flags_of, on_cpu, read_symbols, write_audio

from superb import asr as program
from superb import ctc


def score(out, **more):
    """result.json of a run in this process."""
    settings = {"out": out, "batch_size": 16, "workers": 0, "log_every": 100, "steps": 4}
    on_cpu(program, flags_of(settings | {"eval_every": 2, "hidden": 32, "lr": 1e-3} | more))
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def asr(corpus, upstreams, tmp_path_factory):
    """A finished run: (its folder, its settings, its result)."""
    out = tmp_path_factory.mktemp("asr") / "asr"
    settings = {"data": corpus, "upstream": upstreams / "student.pt"}
    return out, settings, score(out, **settings)


def test_public_scorer_gives_the_same_wer(asr):
    jiwer = pytest.importorskip("jiwer")
    out, _, result = asr
    hypotheses, references = read_symbols(out / "test.hyp"), read_symbols(out / "test.ref")
    assert list(references) == list(hypotheses) and len(references) == 16
    assert any(hypotheses.values())
    texts = [[" ".join(line) for line in lines.values()] for lines in (references, hypotheses)]
    assert jiwer.wer(*texts) == pytest.approx(result["wer"], abs=1e-12)


def test_rate_in_a_sweep_draws_the_dropout_and_specaugment_that_it_draws_alone(asr, tmp_path):
    out, settings, result = asr
    several = score(tmp_path / "several", **settings | {"lr": "1e-2,1e-3"})
    assert several["curves"]["0.001"] == result["curves"]["0.001"]
    paths = (out / "last.pt", tmp_path / "several/last.pt")
    alone, several = (torch.load(path, weights_only=True)["probes"] for path in paths)
    assert all(torch.equal(weight, several[1][name]) for name, weight in alone[0].items())


def test_characters_are_letters_apostrophe_and_blank(tmp_path):
    write_audio(tmp_path / "dev/1/1", [8000])
    (tmp_path / "dev/1/1/x.trans.txt").write_text("000 Don\u2019t go\n")
    task = program.SpeechRecognition(8)
    split = ctc.read_split(str(tmp_path), "dev", task.encode)
    assert split.ids == ["000"] and task.decode(split.labels[0].tolist()) == ["DON'T", "GO"]
    with pytest.raises(ValueError, match="characters '2', '4' are not English"):
        task.encode(["42", "TIMES"])


def test_specaugment_masks_in_training_only():
    torch.manual_seed(0)
    head, x, frames = program.CharacterHead(200, 8), torch.ones(8, 100, 200), torch.full((8,), 100)
    inputs = []
    head.projection.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    head.train()(x, frames)
    head.eval()(x, frames)
    masked = inputs[0] == 0
    rows, columns = masked.all(2).sum(1), masked.all(1).sum(1)  # wholly masked frames, dimensions
    assert 0 < rows.max() <= 2 * 39 and 0 < columns.max() <= 4 * 49
    assert len(set(rows.tolist())) > 1 and masked.sum() < masked.numel()  # each its own masks
    assert torch.equal(inputs[1], x)
