"""Speaker identification, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, mean pooling, accuracy.

    python evaluate_sid.py --upstream runs/avg/student.pt --data data/VoxCeleb1
    python evaluate_sid.py --upstream runs/avg/student.pt --manifest speakers.csv
    python evaluate_sid.py --demo

Where this is not s3prl: MEASURED.md has the table. Running the same command again resumes the run.
"""

import processes

import csv
import os

import numpy as np
import torch
from torch import nn

import data
import demo
import probe
import report

SPLITS = {"1": "train", "2": "dev", "3": "test"}  # in VoxCeleb1's iden_split.txt


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n")[0])
    crop = processes.number(float, "from 0.1 to 3600", lambda seconds: 0.1 <= seconds <= 3600)
    parser.set_defaults(data="data/VoxCeleb1", steps=200_000, lr=1e-4, eval_every=4000)
    parser.add_argument(
        "--manifest", help="a .csv of path,label,split (train, dev, test) instead of VoxCeleb1; paths from its folder"
    )
    parser.add_argument(
        "--crop", type=crop, default=8.0, help="seconds of an utterance that a training step sees at most"
    )
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=demo.STUDENT, manifest=demo.SPEAKERS)
        parser.set_defaults(steps=1500, batch_size=16, lr=5e-3, log_every=500, eval_every=250)
    return probe.finish(parser.parse_args(arguments), "sid")


# ---------------------------------------------------------------- tables of files


def read_iden_split(folder):
    """(root, [(path, speaker, split, line)]) of VoxCeleb1, whose iden_split.txt lies in its folder.

    Raises FileNotFoundError and ValueError naming the line.
    """
    path = os.path.join(folder, "iden_split.txt")
    if not os.path.isfile(path):
        where = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
        raise FileNotFoundError(f"{path}: no such file; give --data the folder of VoxCeleb1 with {where} in it")
    # The two archives unpack to wav/, or to dev/wav/ and test/wav/.
    roots = [root for root in ("wav", "dev/wav", "test/wav") if os.path.isdir(os.path.join(folder, root))]
    rows = []
    for number, line in data.read_lines(path):
        split, _, audio = line.strip().partition(" ")
        if split not in SPLITS or not audio:
            raise ValueError(f"{path}, line {number}: not '1|2|3 SPEAKER/VIDEO/FILE.wav' but {line.strip()[:60]!r}")
        found = [os.path.join(root, audio) for root in roots if os.path.isfile(os.path.join(folder, root, audio))]
        rows.append(
            (found[0] if found else f"wav/{audio}", audio.split("/")[0], SPLITS[split], f"{path}, line {number}")
        )
    return folder, rows


def read_manifest(path):
    """(root, [(path, speaker, split, line)]) of a .csv of path,label,split. Raises FileNotFoundError and ValueError."""
    rows = []
    for row in read_table(path, ["path", "label", "split"]):
        line = f"{path}, line {row['line']}"
        if row["split"] not in SPLITS.values():
            raise ValueError(f"{line}: the split {row['split']!r} is none of train, dev, test")
        rows.append((row["path"], row["label"], row["split"], line))
    return os.path.dirname(path), rows


def read_splits(root, rows):
    """(speakers, the three probe.Splits) of rows (path, speaker, split, line); a label is the speaker's place among them."""
    speakers = sorted({speaker for _, speaker, split, _ in rows if split == "train"})
    corpus, places = labelled_corpus(root, [row[0] for row in rows], [row[3] for row in rows])
    splits = []
    for name in SPLITS.values():
        mine = [row for row in rows if row[2] == name]
        for _, speaker, _, line in mine:
            if speaker not in speakers:
                raise ValueError(f"{line}: the speaker {speaker} has no utterance to train on")
        usable = [row for row in mine if row[0] in places]
        if not usable:
            raise ValueError(f"no utterances of the split {name}")
        left_out = {path: reason for path, reason in corpus.left_out.items() if path in {row[0] for row in mine}}
        labels = [torch.tensor(speakers.index(row[1])) for row in usable]
        splits.append(
            probe.Split(name, corpus, [places[row[0]] for row in usable], [row[0] for row in usable], labels, left_out)
        )
    return speakers, splits


def read_table(path, columns):
    """Rows of a .csv, each a dict with its "line", that has all `columns`. Raises FileNotFoundError and ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; give --manifest a .csv with columns {','.join(columns)}")
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file)
            rows = [row | {"line": reader.line_num} for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a .csv in UTF-8 ({error})") from None
    head = reader.fieldnames or []
    twice = [column for column in columns if head.count(column) > 1]
    if twice:
        raise ValueError(f"{path}, line 1: two columns {twice[0]}; which one counts?")
    missing = [column for column in columns if column not in head]
    if missing:
        raise ValueError(f"{path}, line 1: no column {', '.join(missing)}; it needs {','.join(columns)}")
    for row in rows:
        if not all(row[column] for column in columns):
            raise ValueError(f"{path}, line {row['line']}: a field is empty; it needs {','.join(columns)}")
    if not rows:
        raise ValueError(f"{path}: no lines below the header")
    return rows


def labelled_corpus(root, paths, where):
    """A data.Corpus of files that a list names, and the place of each path in it.

    where: of each path, the line that names it. Raises ValueError with that line where there is no such file.
    """
    for path, line in zip(paths, where):
        if not os.path.isfile(os.path.join(root, path)):
            raise ValueError(f"{line}: no file {os.path.join(root, path)}")
    first = {}
    for path, line in zip(paths, where):
        earlier = first.setdefault(os.path.realpath(os.path.join(root, path)), line)
        if earlier is not line:
            raise ValueError(f"{line}: {path} is named twice, first in {earlier}")
    corpus = data.Corpus(root, paths, data.read_lengths(root, paths))
    return corpus, {path: place for place, path in enumerate(corpus.paths)}


# ---------------------------------------------------------------- the probe's head and accuracy


def mean_over_frames(states, frames, longest=None):
    """Each utterance's mean over its own frames, or over a random crop of `longest` of them where it has more.

    states: (..., batch, frames, dim); frames: (batch,). Returns (..., batch, dim). SUPERB takes it after the weighted sum
    and the projection; as both are linear, it is the same before them, and then a frame's price instead of all frames'.
    """
    start = torch.zeros_like(frames)
    if longest:
        room = (frames - longest).clamp(min=0)
        start = (torch.rand(len(frames), device=frames.device) * (room + 1)).long()
        frames = frames.clamp(max=longest)
    start, frames = start.to(states.device, non_blocking=True), frames.to(states.device, non_blocking=True)
    time = torch.arange(states.shape[-2], device=states.device)
    inside = (time >= start[:, None]) & (time < (start + frames)[:, None])
    share = inside.to(states.dtype) / frames[:, None]
    return torch.matmul(share[:, None], states)[..., 0, :]


class MeanHead(nn.Module):
    """A projection to 256 and a linear layer to the classes, of an utterance's mean.

    Source: SUPERB's speaker identification and emotion recognition, s3prl's UtteranceLevel with MeanPooling.
    """

    def __init__(self, dim, classes):
        super().__init__()
        self.projection = nn.Linear(dim, 256)
        self.classes = nn.Linear(256, classes)

    def forward(self, x, frames):
        """x: (batch, dim). Returns logits, (batch, classes)."""
        return self.classes(self.projection(x))


def class_loss(logits, frames, labels):
    """Cross-entropy of (batch, classes) logits for [() int64 tensor] labels."""
    return nn.functional.cross_entropy(logits, torch.stack(labels).to(logits.device))


def class_of(logits, frames):
    """The most probable class of each utterance."""
    return logits.argmax(-1).tolist()


def right(labels, predictions):
    """(1 where the class is right, 1), each (utterances,): their sums make the accuracy."""
    same = np.array([int(label) == prediction for label, prediction in zip(labels, predictions)], float)
    return same, np.ones(len(same))


# ---------------------------------------------------------------- the run


def judge(args):
    """The result of a probe on the upstream that args name."""
    device = processes.device()
    with processes.together():
        speakers, splits = read_splits(*(read_manifest(args.manifest) if args.manifest else read_iden_split(args.data)))
        upstream = probe.Upstream(args.upstream, device, args.precision, args.states)
    for split in splits:
        print(report.describe(split))
    print(f"{len(speakers):,} speakers; upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    crop = upstream.frames(int(args.crop * 16000))
    result, predictions = probe.evaluate(
        args,
        upstream,
        splits,
        symbols=speakers,
        metric="accuracy",
        pool=lambda states, frames, training: mean_over_frames(states, frames, crop if training else None),
        make_head=lambda dim: MeanHead(dim, len(speakers)),
        loss=class_loss,
        decode=class_of,
        count=right,
        higher_is_better=True,
    )
    if predictions is not None:
        test = splits[2]
        result = {"task": "speaker identification", **result, "speakers": len(speakers)}
        references = {name: [speakers[int(label)]] for name, label in zip(test.ids, test.labels)}
        hypotheses = {name: [speakers[prediction]] for name, prediction in zip(test.ids, predictions)}
        report.write_result(args, result, ref=references, hyp=hypotheses)
    return result


def show(args, result):
    """The result as a person reads it."""
    report.show(args, result, "dev", "test", [("out of", result["speakers"], "speakers")])


def main(arguments=None):
    processes.begin()
    args = parse(arguments)
    if args.demo:
        with processes.together():
            demo.student()
            demo.speakers()
        demo.compare(judge, args, show)
    else:
        show(args, judge(args))


if __name__ == "__main__":
    processes.run(main)
