"""Phoneme recognition of SUPERB (arXiv:2105.01051): a frozen upstream, a linear CTC probe, PER.

    python evaluate_pr.py --upstream runs/avg/student.pt --lexicon data/librispeech-lexicon.txt
    python evaluate_pr.py --demo

The same command resumes a run.
"""

import os
import re

import numpy as np
import torch
import torchaudio
from torch import nn

import manifest
import program
from superb import probe
from superb.upstream import Split, Upstream

SPLITS = "train-clean-100,dev-clean,test-clean"
LEXICON = "data/librispeech-lexicon.txt"
# Of integers, 1 alone: X-SAMPA has phones such as 2 and 9.
PROBABILITY = re.compile(r"1|[0-9]*\.[0-9]+(e-?[0-9]+)?|[0-9]+(\.|e-?[0-9]+)")


def make_parser():
    parser = probe.make_parser(__doc__, "pr", lr="1e-2")  # s3prl's libriphone.yaml
    parser.add_argument("--splits", type=program.names, default=SPLITS, help="train, dev and test")
    about = "files of lines WORD PHONE PHONE ...; the first line of a word counts"
    parser.add_argument("--lexicon", type=program.names, default=LEXICON, help=about)
    return parser


def read_lexicon(paths):
    """{WORD: [phone, ...]}, the first pronunciation of each word, in capitals.

    Reads the forms of LibriSpeech, CMUdict (comments, variants such as WORD(2)), and Kaldi and the
    Montreal Forced Aligner (probabilities before the phones). Raises OSError and ValueError.
    """
    lexicon = {}
    for path in paths:
        if not os.path.isfile(path):
            source = "LibriSpeech's is at www.openslr.org/resources/11/librispeech-lexicon.txt"
            raise FileNotFoundError(f"{path}: no such --lexicon; {source}")
        for number, line in manifest.read_lines(path):
            text = re.split(r"\s#", line.strip())[0]
            if text.startswith((";;;", "# ")):
                continue
            word, *phones = text.split()
            while phones and PROBABILITY.fullmatch(phones[0]):
                del phones[0]
            misplaced = [x for x in phones if PROBABILITY.fullmatch(x) and "." in x]
            if misplaced or not phones:  # a probability after a phone
                raise ValueError(f"{path}, line {number}: not WORD PHONE PHONE ...: {text[:50]!r}")
            word = re.sub(r"\([0-9]+\)$", "", word)
            lexicon.setdefault(word.upper(), phones)
    if not lexicon:
        raise ValueError(f"{', '.join(paths)}: an empty lexicon")
    return lexicon


def read_split(folder, name, encode):
    """The Split of a folder in LibriSpeech's layout: audio, and .trans.txt with ID WORD ...

    encode(words): numbers of symbols; if it raises ValueError, the utterance is skipped.
    """
    corpus = manifest.find_corpus(folder, [name])
    audio = {os.path.splitext(path)[0]: i for i, path in enumerate(corpus.paths)}
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
                    labels[stem] = torch.tensor(encode(words))
                except ValueError as error:
                    skipped[stem] = str(error)
    skipped |= {stem: "no transcript" for stem in audio.keys() - labels.keys() - skipped.keys()}
    if not labels:
        stem, reason = next(iter(skipped.items()))
        raise ValueError(f"{os.path.join(folder, name)}: no utterance is usable: {stem}: {reason}")
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


# ------------------------------------------------------------------ the task


class LinearHead(nn.Module):
    """Two linear layers, for PR, SID and ER (emotion recognition).

    Source: s3prl's downstream/ctc/libriphone.yaml, and UtteranceLevel with MeanPooling.
    """

    def __init__(self, dim, outputs):
        super().__init__()
        self.projection = nn.Linear(dim, 256)
        self.output = nn.Linear(256, outputs)

    def forward(self, x, frames):
        """x: (..., dim); frames has no effect. Returns logits, (..., outputs)."""
        return self.output(self.projection(x))


class PhonemeRecognition:
    """What probe.evaluate needs of a task. A label is a (length,) tensor of numbers from 1.

    symbols: number n stands for symbols[n - 1].
    """

    name = "phoneme recognition"
    metric = "PER"  # sum / sum of the two arrays of count(references, hypotheses)
    higher_is_better = False
    loss = staticmethod(ctc_loss)
    predict = staticmethod(ctc_greedy)
    count = staticmethod(edit_distances)

    def __init__(self, lexicon):
        self.lexicon = lexicon
        self.symbols = sorted(set().union(*lexicon.values()))
        self.numbers = {phone: number for number, phone in enumerate(self.symbols, start=1)}

    def head(self, dim):
        return LinearHead(dim, len(self.symbols) + 1)  # 0 is CTC's blank

    def decode(self, numbers):
        """A label or prediction as symbols, the words of a line in test.ref or test.hyp."""
        return [self.symbols[number - 1] for number in numbers]

    def encode(self, words):
        """Words to phones as numbers. Raises ValueError for words that are not in the lexicon."""
        missing = [word for word in words if word.upper() not in self.lexicon]
        if missing or not words:
            raise ValueError(f"not in the lexicon: {' '.join(missing)}" if words else "no words")
        return [self.numbers[phone] for word in words for phone in self.lexicon[word.upper()]]


def evaluate(args):
    with program.one_line_errors():
        task = PhonemeRecognition(read_lexicon(args.lexicon))
    return evaluate_task(args, task)


def evaluate_task(args, task):
    """The result of args.upstream in a task whose labels come from transcripts."""
    with program.one_line_errors():
        if len(args.splits) != 3:
            raise ValueError(f"--splits {','.join(args.splits)}: give three: train, dev and test")
        splits = [read_split(args.data, name, task.encode) for name in args.splits]
        upstream = Upstream(args)
    return probe.evaluate(args, task, upstream, *splits)


def main(arguments=None):
    probe.main(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    program.run(main)
