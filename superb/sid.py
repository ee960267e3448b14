"""Speaker identification of SUPERB (arXiv:2105.01051): a frozen upstream, mean pooling, accuracy.

    python -m superb.sid --upstream runs/avg/student.pt --data data/VoxCeleb1
    python -m superb.sid --upstream runs/avg/student.pt --manifest speakers.csv

The same command resumes a run.
"""

import csv
import math
import os

import numpy as np
import torch
from torch import nn

import data
import manifest
import program
from superb import probe
from superb.upstream import Split, Upstream

SPLIT_NAMES = {"1": "train", "2": "dev", "3": "test"}  # in VoxCeleb1's iden_split.txt


def make_parser():
    defaults = {"data": "data/VoxCeleb1", "steps": 200_000, "eval_every": 5000}
    parser = probe.make_parser(__doc__, "sid", **defaults)
    about = "a .csv of path,label,split (train, dev or test); paths are relative to its folder"
    parser.add_argument("--manifest", help=about)
    about = "seconds per utterance in training"
    parser.add_argument("--crop", type=program.at_least_0, default=8.0, help=about)
    return parser


def read_voxceleb1(folder):
    """[(path, speaker, split, place of the line)] of the iden_split.txt in VoxCeleb1's folder."""
    table = os.path.join(folder, "iden_split.txt")
    if not os.path.isfile(table):
        source = "www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
        raise FileNotFoundError(f"{table}: missing; put {source} into the folder of --data")
    rows = []
    for number, line in manifest.read_lines(table):
        place = f"{table}, line {number}"
        split, _, audio = line.strip().partition(" ")
        if split not in SPLIT_NAMES or not audio:
            raise ValueError(f"{place}: not 1|2|3 SPEAKER/VIDEO/FILE.wav: {line.strip()[:60]!r}")
        paths = [f"{root}/{audio}" for root in ("wav", "dev/wav", "test/wav")]  # as it unpacks
        existing = [path for path in paths if os.path.isfile(os.path.join(folder, path))]
        rows.append(((existing or paths)[0], audio.split("/")[0], SPLIT_NAMES[split], place))
    return rows


def read_table(path, columns):
    """[[value of each column, ..., place of the line]] of a .csv; values are stripped."""
    rows, lines = [], manifest.read_lines(path)
    table = csv.DictReader(line.replace("\0", "") for _, line in lines)
    table.fieldnames = [name.strip() for name in table.fieldnames or []]
    missing = [column for column in columns if column not in table.fieldnames]
    if missing:
        header = ",".join(columns)
        raise ValueError(f"{path}, line 1: the header lacks {missing[0]}; write {header}")
    try:
        for row in table:
            place = f"{path}, line {lines[table.line_num - 1][0]}"  # the last of a quoted value
            values = [(row.get(column) or "").strip() for column in columns]
            if not all(values):
                raise ValueError(f"{place}: a value of {','.join(columns)} is missing")
            rows.append([*values, place])
    except csv.Error as error:
        raise ValueError(f"{path}: {error}; look for a quote that is not closed") from None
    if not rows:
        raise ValueError(f"{path}: no lines below the header")
    return rows


def read_corpus(root, rows):
    """The Corpus of rows (path, ..., place of the line). Raises ValueError."""
    seen = set()
    for path, *_, place in rows:
        if path in seen or not os.path.isfile(os.path.join(root, path)):
            problem = "a second line of" if path in seen else "no file"
            raise ValueError(f"{place}: {problem} {os.path.join(root, path)}")
        seen.add(path)
    lengths, skipped = manifest.read_lengths(root, [row[0] for row in rows])
    manifest.check_skipped(skipped, len(rows))
    skipped |= {path: f"{n} samples" for path, n in lengths.items() if n < data.MIN_SAMPLES}
    lengths = {path: n for path, n in lengths.items() if path not in skipped}
    return manifest.Corpus(root, lengths.items(), skipped)


def make_split(name, corpus, rows, classes):
    """The Split of rows (path, class, ...) of a corpus, in the order of the corpus."""
    labels = {row[0]: torch.tensor(classes.index(row[1])) for row in rows}
    part = corpus.part([i for i, path in enumerate(corpus.paths()) if path in labels])
    if not rows:
        raise ValueError(f"{corpus.root or '.'}: no utterances for {name}")
    skipped = {path: reason for path, reason in corpus.skipped.items() if path in labels}
    return Split(name, part, list(part.paths()), [labels[path] for path in part.paths()], skipped)


def read_splits(root, rows):
    """(speakers, [train, dev, test]) of rows (path, speaker, split, place of the line)."""
    speakers = sorted({speaker for _, speaker, split, _ in rows if split == "train"})
    for _, speaker, split, place in rows:
        if split not in SPLIT_NAMES.values():
            raise ValueError(f"{place}: the split {split!r} is none of train, dev, test")
        if speaker not in speakers:
            raise ValueError(f"{place}: the speaker {speaker} has no utterance to train on")
    corpus = read_corpus(root, rows)
    parts = {name: [row for row in rows if row[2] == name] for name in SPLIT_NAMES.values()}
    return speakers, [make_split(name, corpus, parts[name], speakers) for name in parts]


class MeanHead(probe.LinearHead):
    """A linear head on the mean over frames; in training, over a random crop of `crop` frames.

    SUPERB projects first, then takes the mean: both are linear, so the results are equal.
    """

    def __init__(self, dim, classes, crop=math.inf):
        super().__init__(dim, classes)
        self.crop = crop

    def forward(self, x, frames):
        """x: (batch, frames, dim); frames: (batch,). Returns logits, (batch, classes)."""
        means = []
        for utterance, length in zip(x, frames.tolist()):
            size = min(self.crop, length) if self.training else length
            start = int(torch.randint(length - size + 1, ()))
            means.append(utterance[start : start + size].mean(0))
        return super().forward(torch.stack(means), frames)


class Classification:
    """A task, as PhonemeRecognition; a label is a () tensor, the number of a class.

    crop: the longest crop in training, in frames.
    """

    metric = "accuracy"
    higher_is_better = True

    def __init__(self, name, classes, crop=math.inf):
        self.name, self.symbols, self.crop = name, classes, crop

    def head(self, dim):
        return MeanHead(dim, len(self.symbols), self.crop)

    def loss(self, logits, frames, labels):
        return nn.functional.cross_entropy(logits, torch.stack(labels).to(logits.device))

    def predict(self, logits, frames):
        return logits.argmax(-1).tolist()

    def decode(self, number):
        return [self.symbols[number]]

    def count(self, references, hypotheses):
        """(1 if correct, else 0; always 1), two arrays of (utterances,)."""
        correct = [a == b for a, b in zip(references, hypotheses)]
        return np.array(correct, int), np.ones(len(correct), int)


def evaluate(args):
    with program.one_line_errors():
        if args.manifest:
            rows = read_table(args.manifest, ["path", "label", "split"])
            speakers, splits = read_splits(os.path.dirname(args.manifest), rows)
        else:
            speakers, splits = read_splits(args.data, read_voxceleb1(args.data))
        upstream = Upstream(args)
        crop = upstream.encoder.frames(int(min(args.crop, 1e9) * data.SAMPLE_RATE))
        if not crop:
            raise ValueError(f"--crop {args.crop} is less than a frame")
    task = Classification("speaker identification", speakers, crop)
    return probe.evaluate(args, task, upstream, *splits)


def main(arguments=None):
    probe.main(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    program.run(main)
