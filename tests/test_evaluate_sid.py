"""evaluate_sid.py: tables of files, the mean-pooling head, accuracy."""

import json

import numpy as np
import pytest
import torch
from conftest import flags_of, on_cpu, read_symbols, refused, write_audio

import demo
import evaluate_sid
import probe
from states import States


@pytest.fixture(scope="module")
def speakers(corpus):
    """A manifest of the synthetic corpus's six speakers."""
    demo.speakers(str(corpus / "speakers.csv"))
    return corpus / "speakers.csv"


def flags(out, **more):
    return flags_of(dict(out=out, batch_size=16, lr=1e-2, workers=0, log_every=100, eval_every=20, steps=40) | more)


def score(out, **more):
    """result.json of a run in this process."""
    on_cpu(evaluate_sid, flags(out, **more))
    return json.loads((out / "result.json").read_text())


# ---------------------------------------------------------------- the head


def test_the_mean_is_over_an_utterances_own_frames_and_commutes_with_what_superb_does_before_it():
    head, x, frames = evaluate_sid.MeanHead(4, 3), torch.randn(2, 2, 10, 4), torch.tensor([10, 6])
    model = probe.Probe(2, head)
    with torch.no_grad():
        model.weights.copy_(torch.tensor([0.5, -0.5]))
    found = model(evaluate_sid.mean_over_frames(x, frames), frames)
    mixed = torch.tensordot(model.weights.softmax(0), x, dims=1)
    for place, length in enumerate(frames.tolist()):  # SUPERB's order
        by_hand = head.classes(head.projection(mixed[place, :length]).mean(0))
        torch.testing.assert_close(found[place], by_hand)


def test_training_sees_a_crop_and_scoring_all():
    x = torch.arange(20.0)[None, None, :, None].repeat(1, 640, 1, 1)
    frames = torch.tensor([20, 4] * 320)
    torch.manual_seed(0)
    seen = evaluate_sid.mean_over_frames(x, frames, 5)[0, :, 0]
    assert torch.allclose(seen[1::2], torch.tensor(1.5))  # 0..3: shorter than the crop
    starts = (seen[::2] - 2).round()  # the mean of five frames from `start` on is start + 2
    torch.testing.assert_close(seen[::2], starts + 2)
    assert sorted(starts.unique().tolist()) == list(range(16))
    torch.testing.assert_close(evaluate_sid.mean_over_frames(x, frames)[0, ::2, 0], torch.full((320,), 9.5))


# ---------------------------------------------------------------- the score


def test_the_crop_is_in_seconds_and_the_best_step_the_most_accurate(speakers, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def evaluate(*_, pool, higher_is_better, **__):
        x = torch.arange(100.0)[None, None, :, None].repeat(1, 8, 1, 1)
        means = [pool(x, torch.tensor([100] * 8), training)[0, :, 0] for training in (True, False)]
        raise Asked(means, higher_is_better)

    monkeypatch.setattr(probe, "evaluate", evaluate)
    with pytest.raises(Asked) as asked:
        evaluate_sid.main(flags(tmp_path, upstream="fbank", manifest=speakers, crop=0.5))
    (crops, wholes), higher_is_better = asked.value.args
    starts = crops - 23.5  # 48 frames of half a second, 10 ms apart
    torch.testing.assert_close(starts, starts.round(), atol=1e-3, rtol=0)
    assert len(set(starts.tolist())) > 1 and set(wholes.tolist()) == {49.5} and higher_is_better


def test_a_crop_without_frames_is_refused(tmp_path, capsys, speakers):
    for crop in (0.05, "inf", "nan"):
        arguments = flags(tmp_path / "out", manifest=speakers, upstream="fbank", crop=crop)
        assert "--crop" in refused(capsys, evaluate_sid, arguments)


def test_speakers_are_told_apart_better_than_by_chance(speakers, upstreams, tmp_path):
    result = score(tmp_path, manifest=speakers, upstream=upstreams / "hubert.pt", steps=300, eval_every=25)
    assert result["accuracy"] > 1.25 / 6 and result["speakers"] == 6
    references, hypotheses = read_symbols(tmp_path / "test.ref"), read_symbols(tmp_path / "test.hyp")
    same = [references[name] == hypotheses[name] for name in references]
    assert result["accuracy"] == sum(same) / len(same) and len(same) == result["counts"]["test"]["utterances"] == 30
    assert all(name.split("/")[1] == speaker for name, (speaker,) in references.items())
    curve = dict(result["curve"])
    assert curve[result["best_step"]] == max(curve.values()) > min(curve.values())


@pytest.mark.parametrize("name", ["hubert.pt", "student.pt"])
def test_classes_do_not_depend_on_the_batch_size(speakers, upstreams, name):
    _, splits = evaluate_sid.read_splits(*evaluate_sid.read_manifest(str(speakers)))
    network = probe.Upstream(str(upstreams / name), precision="fp32")
    torch.manual_seed(0)
    model = probe.Probe(network.states, evaluate_sid.MeanHead(network.dim, 50))
    states = States(network, splits[2].corpus)

    def pool(x, frames, training):
        return evaluate_sid.mean_over_frames(x, frames)

    alone, together = (
        probe.predict([model], splits[2], states, lambda x, frames: x.tolist(), size, pool=pool)[0] for size in (1, 16)
    )
    np.testing.assert_allclose(alone, together, atol=2e-3)  # bfloat16 states
    assert [np.argmax(one) for one in alone] == [np.argmax(one) for one in together]


def test_voxceleb1_is_read_as_it_unpacks(tmp_path):
    lines = []
    for speaker, root in (("id10001", "dev/wav"), ("id10002", "dev/wav"), ("id10003", "wav")):
        write_audio(tmp_path / root / speaker / "video", [6000] * 3, suffix=".wav")
        lines += [f"{number + 1} {speaker}/video/{number:03d}.wav\n" for number in range(3)]
    (tmp_path / "iden_split.txt").write_text("".join(lines))
    found, splits = evaluate_sid.read_splits(*evaluate_sid.read_iden_split(str(tmp_path)))
    assert found == ["id10001", "id10002", "id10003"] and [split.name for split in splits] == ["train", "dev", "test"]
    for number, split in enumerate(splits):
        assert [int(label) for label in split.labels] == [0, 1, 2]
        assert all(split.corpus.paths[place].endswith(f"{number:03d}.wav") for place in split.places)


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ["iden_split.txt", "--data", "robots.ox.ac.uk"]),
        ("4 id10001/video/000.wav\n", ["iden_split.txt, line 1"]),
        ("1 id10001/video/000.wav\n2 id10001/video/009.wav\n", ["iden_split.txt, line 2", "009.wav"]),
        ("1 id10001/video/000.wav\n", ["split dev"]),
        ("1 id10001/video/000.wav\n1 id10001/video/000.wav\n", ["line 1", "twice"]),
        ("1 id10001/video/000.wav\n2 id10002/video/000.wav\n", ["line 2", "id10002"]),
    ],
)
def test_a_voxceleb1_that_is_not_whole_is_refused_by_name(tmp_path, capsys, text, words):
    for speaker in ("id10001", "id10002"):
        write_audio(tmp_path / "wav" / speaker / "video", [6000], suffix=".wav")
    if text:
        (tmp_path / "iden_split.txt").write_text(text)
    line = refused(capsys, evaluate_sid, flags(tmp_path / "out", data=tmp_path, upstream="fbank"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ["list.csv", "path,label,split"]),
        ("path,label\na.flac,x\n", ["line 1", "no column split"]),
        ("path,label,split\na.flac,x,training\n", ["line 2", "'training'"]),
        ("path,label,split\na.flac,,train\n", ["line 2", "empty"]),
        ("path,label,split\n", ["no lines"]),
        ("path,label,split,label\n000.flac,x,train,y\n", ["line 1", "two columns label"]),
        ("path,label,split\n000.flac,x,train\n./000.flac,x,test\n", ["line 3", "named twice", "line 2"]),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_file_and_line(tmp_path, capsys, text, words):
    write_audio(tmp_path, [6000] * 2)
    if text is not None:
        (tmp_path / "list.csv").write_text(text)
    line = refused(capsys, evaluate_sid, flags(tmp_path / "out", manifest=tmp_path / "list.csv", upstream="fbank"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_an_utterance_without_a_frame_is_left_out_and_counted(tmp_path):
    write_audio(tmp_path, [6000] * 6 + [100])
    splits = ["train", "dev", "test"]
    lines = [f"{number:03d}.flac,{'ab'[number % 2]},{splits[number // 2 % 3]}\n" for number in range(7)]
    (tmp_path / "list.csv").write_text(f"path,label,split\n{''.join(lines)}")
    _, (found, _, _) = evaluate_sid.read_splits(*evaluate_sid.read_manifest(str(tmp_path / "list.csv")))
    assert found.ids == ["000.flac", "001.flac"]
    assert found.left_out == {"006.flac": "100 samples, fewer than 400"}


def test_the_protocols_defaults_are_superbs():
    args = evaluate_sid.parse(["--upstream", "runs/avg/student.pt"])
    assert (args.steps, args.batch_size, args.lr, args.out) == (200_000, 32, 1e-4, "runs/avg/sid")
    assert args.crop == 8.0
