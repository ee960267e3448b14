"""CTC, transcripts and lexicons, for phoneme recognition and speech recognition."""

import argparse
import itertools
import os
import re
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


def read_split(folder, name, encode):
    """The Split of a folder in LibriSpeech's layout: audio, and .trans.txt with ID WORD ...

    encode(words): numbers of symbols; if it raises ValueError, the utterance is skipped.
    """
    corpus = manifest.find_corpus(folder, [name])
    audio = {os.path.splitext(path)[0]: i for i, path in enumerate(corpus.paths())}
    skipped = {os.path.splitext(path)[0]: reason for path, reason in corpus.skipped.items()}
    labels, seen = {}, set()
    files = [file for file in manifest.files_under(folder, name) if file.endswith(".trans.txt")]
    for file in sorted(files):
        for number, line in manifest.read_lines(os.path.join(folder, file)):
            id, *words = line.split()
            stem = os.path.join(os.path.dirname(file), id)
            if stem in seen or not (stem in audio or stem in skipped):
                problem = "a second line of" if stem in seen else "no audio beside it for"
                raise ValueError(f"{os.path.join(folder, file)}, line {number}: {problem} {id}")
            seen.add(stem)
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


# ------------------------------------------------------------------ lexicons

# 1 is the only integer, since X-SAMPA has phones such as 2 and 9.
PROBABILITY = re.compile(r"1|[0-9]*\.[0-9]+(e-?[0-9]+)?|[0-9]+(\.|e-?[0-9]+)")


def read_lexicon(paths):
    """{WORD: [phone, ...]}, the first pronunciation of each word, in capitals.

    Reads the forms of LibriSpeech, CMUdict (comments, variants such as WORD(2)), HTK (a column
    [OUTPUT] before the phones), and Kaldi and the Montreal Forced Aligner (probabilities before the
    phones). Raises OSError, and ValueError for other forms.
    """
    lexicon = {}
    for path in paths:
        if not os.path.isfile(path):
            source = "LibriSpeech's is at www.openslr.org/resources/11/librispeech-lexicon.txt"
            raise FileNotFoundError(f"{path}: no such lexicon; {source}")
        entries = read_entries(path)
        single = [phones[0] for _, phones in entries if len(phones) == 1]
        if len(single) > len(entries) / 2:
            problem = f"most words have one symbol, such as {single[0]!r}"
            raise ValueError(f"{path}: {problem}; write spaces between the phones")
        for word, phones in entries:
            lexicon.setdefault(word, phones)
    if not lexicon:
        raise ValueError(f"{', '.join(paths)}: an empty lexicon")
    return lexicon


def read_entries(path):
    """[(WORD, [phone, ...])] of a lexicon; of several pronunciations on a line, the first.

    Columns are interpreted for the whole file at once. Raises ValueError.
    """
    lines = []  # (line number, WORD, text after it)
    for number, line in manifest.read_lines(path):
        line = normalize(line.strip())
        if not re.match(r";;;|#+(\s|$)", line):  # comments
            word, *text = re.sub(r"\s#", " #", line).split(None, 1)
            word = re.sub(r"\([0-9]+\)$", "", word).upper()
            lines.append((number, word, re.sub(r"^\[\S*\]\s+", "", "".join(text))))
    # A first number is a probability if every line has one, else a phone.
    columns = min((count_probabilities(text) for *_, text in lines if text), default=0)
    texts = [re.sub(rf"^(\S+\s*){{{columns}}}", "", text) for *_, text in lines]
    separator = r"\t|,\s|,$" if any(map(has_tabs_and_spaces, texts)) else r",\s|,$"
    firsts = [re.split(separator, text)[0].strip() for text in texts]
    firsts = [re.sub(r"^[/[](.*)[]/]$", r"\1", text) for text in firsts]  # as IPA is written
    parts = [f" {text}".split(" #", 1) for text in firsts]
    known = {phone for part in parts for phone in part[0].split()}
    entries = []
    for (number, word, text), (phones, *after) in zip(lines, parts):
        phones, place = phones.split(), f"{path}, line {number}"
        if after:
            phones += phones_after_hash(after[0], known, place)
        if not phones or any(p != "1" and PROBABILITY.fullmatch(p) for p in phones):
            problem = "a number, but not in every line" if phones else "no phones"
            raise ValueError(f"{place}: {problem}; write WORD PHONE ...: {f'{word} {text}'[:50]!r}")
        entries.append((word, phones))
    return entries


def count_probabilities(text):
    """Number of probabilities before the first other symbol."""
    return len(list(itertools.takewhile(PROBABILITY.fullmatch, text.split())))


def has_tabs_and_spaces(text):
    """Whether tabs separate pronunciations, since spaces separate phones."""
    fields = [field.split(" #")[0].strip() for field in text.split("\t")]
    return len(fields) > 1 and any(" " in field for field in fields)


def phones_after_hash(text, known, place):
    """The phones after a #: a boundary of syllables, if only `known` phones follow, or a comment.

    Raises ValueError if it may be both.
    """
    symbols = [symbol for symbol in text.split() if symbol != "#"]
    if text[:1].isdigit():  # Kaldi's #1
        return []
    if known.issuperset(symbols):
        return symbols
    if any(re.search(r"[^\W\d_]{3}", symbol) for symbol in set(symbols) - known):
        return []
    raise ValueError(f"{place}: {f'#{text}'[:50]!r} may be phones or a comment; remove the #")
