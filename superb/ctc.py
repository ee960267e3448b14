"""CTC and transcripts: what phoneme recognition and speech recognition share."""

import argparse
import os
import unicodedata

import numpy as np
import torch
import torchaudio
from torch import nn

import manifest
import program
from superb.upstream import Split

SPLITS = "train-clean-100,dev-clean,test-clean"


def three_splits(text):
    """Flag type: names of the train, dev and test split."""
    names = program.names(text)
    if len(names) != 3:
        raise argparse.ArgumentTypeError(f"{text}: give three: train, dev and test")
    return names


def normalize(text):
    """Text in Unicode's composed form (NFC), with ' for the apostrophe U+2019."""
    return unicodedata.normalize("NFC", text).replace("\u2019", "'")


def read_splits(folder, names, encode):
    """The Splits of a corpus in LibriSpeech's layout, see read_split."""
    return [read_split(folder, name, encode) for name in names]


def read_split(folder, name, encode):
    """The Split of a folder in LibriSpeech's layout: audio, and .trans.txt with ID WORD ...

    encode(words): numbers of symbols; if it raises ValueError, the utterance is skipped.
    """
    corpus = manifest.find_corpus(folder, [name])
    audio = {os.path.splitext(path)[0]: i for i, path in enumerate(corpus.paths())}
    skipped = {os.path.splitext(path)[0]: reason for path, reason in corpus.skipped.items()}
    labels = {}
    files = [file for file in manifest.files_under(folder, name) if file.endswith(".trans.txt")]
    for file in sorted(files):
        for number, line in manifest.read_lines(os.path.join(folder, file)):
            id, *words = line.split()
            stem = os.path.join(os.path.dirname(file), id)
            if stem in labels or not (stem in audio or stem in skipped):
                problem = "a second line of" if stem in labels else "no audio beside it for"
                raise ValueError(f"{os.path.join(folder, file)}, line {number}: {problem} {id}")
            if stem in audio:
                try:
                    labels[stem] = torch.tensor(encode([normalize(word) for word in words]))
                except ValueError as error:
                    skipped[stem] = str(error)
    for stem in sorted(audio.keys() - labels.keys() - skipped.keys()):
        line = f"{os.path.basename(stem)} WORD WORD"
        skipped[stem] = f"no transcript: no line {line!r} in a .trans.txt beside it"
    part = corpus.part([audio[stem] for stem in labels])
    ids = [os.path.basename(stem) for stem in labels]
    return Split(name, part, ids, list(labels.values()), skipped)


def ctc_loss(logits, frames, labels):
    """CTC loss, blank 0: per utterance divided by its label's length, then the mean.

    The loss of an utterance with too few frames for CTC is 0.

    logits: (batch, frames, symbols + 1); frames: (batch,); labels: [(length,) int64], from 1.
    """
    lengths = torch.tensor([len(label) for label in labels])
    targets = torch.cat(labels).to(logits.device)
    log_probs = logits.transpose(0, 1).log_softmax(-1)
    return nn.functional.ctc_loss(log_probs, targets, frames, lengths, zero_infinity=True)


def ctc_greedy(logits, frames):
    """The most probable path of each utterance, without repeats and blanks: [[symbol, ...]]."""
    best = logits.argmax(-1).cpu()
    paths = [path[:n].unique_consecutive() for path, n in zip(best, frames.tolist())]
    return [path[path != 0].tolist() for path in paths]


def edit_distances(references, hypotheses):
    """(edit distances, lengths of the references), two arrays, from lists of lists of symbols."""
    errors = map(torchaudio.functional.edit_distance, references, hypotheses)
    return np.array(list(errors)), np.array(list(map(len, references)))
