"""superb/sid.py: tables of files, mean pooling, accuracy."""

import json

import pytest
import torch
from conftest import flags_of, on_cpu, read_symbols, refused, write_audio

from superb import probe, sid


@pytest.fixture(scope="module")
def speakers(corpus):
    """A table of the six speakers of the synthetic corpus."""
    lines = ["path,label,split\n"]
    for number, path in enumerate(sorted(corpus.glob("train-clean-100/*/*/*.flac"))):
        split = ["test", "dev", "train", "train", "train"][number % 22 % 5]  # 22 per speaker
        lines.append(f"{path.relative_to(corpus)},{path.parts[-3]},{split}\n")
    (corpus / "speakers.csv").write_text("".join(lines))
    return corpus / "speakers.csv"


def score(out, **more):
    """result.json of a run in this process."""
    settings = {"out": out, "batch_size": 16, "lr": 1e-2, "workers": 0, "log_every": 100}
    on_cpu(sid, flags_of(settings | more))
    return json.loads((out / "result.json").read_text())


def read(path):
    return sid.read_table(str(path), ["path", "label", "split"])


def test_training_uses_a_random_crop_and_scoring_the_whole_utterance():
    head = sid.MeanHead(1, 1, crop=5)
    head.projection = head.output = torch.nn.Identity()
    states = torch.arange(20.0)[None, :, None].repeat(640, 1, 1)
    frames = torch.tensor([20, 4] * 320)
    torch.manual_seed(0)
    means = head.train()(states, frames)[:, 0]
    torch.testing.assert_close(means[1::2], torch.full((320,), 1.5))  # shorter than the crop
    starts = means[::2] - 2  # the mean of five frames from `start` on is start + 2
    torch.testing.assert_close(starts, starts.round())
    assert sorted(starts.round().unique().tolist()) == list(range(16))
    whole = head.eval()(states, frames)[::2, 0]
    torch.testing.assert_close(whole, torch.full((320,), 9.5))


def test_crop_is_in_seconds(speakers, tmp_path, monkeypatch, capsys):
    crops = []
    monkeypatch.setattr(probe, "evaluate", lambda args, task, *rest: crops.append(task.crop))
    settings = {"upstream": "fbank", "manifest": speakers, "out": tmp_path, "crop": 0.5}
    on_cpu(sid, flags_of(settings))
    assert crops == [48]  # frames of 10 ms
    assert "--crop 0.02 is less" in refused(capsys, sid, flags_of(settings | {"crop": 0.02}))
    assert "--crop: nan" in refused(capsys, sid, flags_of(settings | {"crop": "nan"}))


def test_speakers_are_identified_better_than_by_chance(speakers, upstreams, tmp_path):
    settings = {"manifest": speakers, "upstream": upstreams / "hubert.pt"}
    result = score(tmp_path, **settings, steps=150, eval_every=25)
    references = read_symbols(tmp_path / "test.ref")
    hypotheses = read_symbols(tmp_path / "test.hyp")
    correct = [references[name] == hypotheses[name] for name in references]
    assert result["accuracy"] == sum(correct) / len(correct) > 1.25 / 6 and len(correct) == 30
    assert all(name.split("/")[1] == speaker for name, (speaker,) in references.items())
    curve = dict(result["curves"]["0.01"])
    assert curve[result["best_step"]] == max(curve.values()) > min(curve.values())


def test_voxceleb1_is_read_as_it_unpacks(tmp_path):
    lines = []
    for speaker, root in (("id10001", "dev/wav"), ("id10002", "test/wav"), ("id10003", "wav")):
        write_audio(tmp_path / root / speaker / "video", [6000] * 3, suffix=".wav")
        lines += [f"{number + 1} {speaker}/video/{number:03d}.wav\n" for number in range(3)]
    (tmp_path / "iden_split.txt").write_text("".join(lines))
    speakers, splits = sid.read_splits(str(tmp_path), sid.read_voxceleb1(str(tmp_path)))
    assert speakers == ["id10001", "id10002", "id10003"]
    assert [split.name for split in splits] == ["train", "dev", "test"]
    for number, split in enumerate(splits):
        assert [int(label) for label in split.labels] == [0, 1, 2]
        assert all(path.endswith(f"{number:03d}.wav") for path in split.corpus.paths())


def test_blanks_and_a_byte_order_mark_in_a_table_are_ignored(tmp_path):
    text = '\ufeff path , label,  split\r\n\r\n a b.flac , anna , train \r\n"c,d.flac",eva,test\n'
    (tmp_path / "list.csv").write_text(text, newline="")
    rows = [row[:3] for row in read(tmp_path / "list.csv")]
    assert rows == [["a b.flac", "anna", "train"], ["c,d.flac", "eva", "test"]]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("list.csv", None, ["list.csv"]),
        ("list.csv", "path,label\na.flac,x\n", ["line 1", "the header lacks split"]),
        ("list.csv", "path,label,split\n000.flac,x,training\n", ["line 2", "'training'"]),
        ("list.csv", "path,label,split\n000.flac,,train\n", ["line 2", "missing"]),
        ("list.csv", "path,label,split\n000.flac,x\n", ["line 2", "missing"]),
        (
            "list.csv",
            'path,label,split,text\n000.flac,x,train,"of\n\ntwo lines"\n001.flac,,dev,of one\n',
            ["line 5", "missing"],
        ),
        ("list.csv", 'path,label,split\n"a.flac,x,train\n' + "b.flac,x,dev\n" * 19999, ["quote"]),
        ("list.csv", "path,label,split\n", ["no lines"]),
        ("list.csv", "path,label,split\n009.flac,x,train\n", ["line 2", "009.flac"]),
        ("list.csv", "path,label,split\n000.flac,x,train\n000.flac,x,dev\n", ["line 3", "second"]),
        (
            "list.csv",
            "path,label,split\n000.flac,x,train\n001.flac,x,dev\n./000.flac,x,test\n",
            ["000.flac: used twice"],
        ),
        ("list.csv", "path,label,split\n000.flac,x,train\n001.flac,y,test\n", ["line 3", "y"]),
        ("list.csv", "path,label,split\n000.flac,x,train\n", ["dev"]),
        ("iden_split.txt", None, ["iden_split.txt", "robots.ox.ac.uk", "--data"]),
        ("iden_split.txt", "4 id1/video/000.wav\n", ["iden_split.txt, line 1"]),
        ("iden_split.txt", "1 id1/video/009.wav\n", ["iden_split.txt, line 1", "009.wav"]),
    ],
)
def test_wrong_table_is_refused_by_file_and_line(tmp_path, capsys, name, text, words):
    write_audio(tmp_path, [6000] * 2)
    if text is not None:
        (tmp_path / name).write_text(text)
    settings = {"upstream": "fbank", "out": tmp_path / "out", "data": tmp_path}
    if name == "list.csv":
        settings["manifest"] = tmp_path / name
    line = refused(capsys, sid, flags_of(settings))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_utterance_without_a_frame_is_skipped_and_counted(tmp_path):
    write_audio(tmp_path, [6000] * 11 + [100] * 2)
    lines = ["path,label,split\n000.flac,a,dev\n001.flac,a,test\n"]
    lines += [f"{number:03d}.flac,a,train\n" for number in range(2, 12)]
    (tmp_path / "list.csv").write_text("".join(lines))
    _, (train, _, _) = sid.read_splits(str(tmp_path), read(tmp_path / "list.csv"))
    assert len(train.ids) == 9 and train.skipped == {"011.flac": "100 samples"}
    (tmp_path / "list.csv").write_text("".join([*lines, "012.flac,a,train\n"]))
    with pytest.raises(ValueError, match="train: 2 of 11 utterances cannot be used.*100 samples"):
        sid.read_splits(str(tmp_path), read(tmp_path / "list.csv"))
