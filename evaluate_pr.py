"""Phoneme recognition of SUPERB (arXiv:2105.01051): a frozen upstream, a linear CTC probe, PER.

    python evaluate_pr.py --upstream runs/avg/student.pt --lexicon data/librispeech-lexicon.txt

The same command resumes a run.
"""

import itertools
import os
import re

import manifest
import program
from superb import probe
from superb.ctc import (
    SPLITS,
    ctc_greedy,
    ctc_loss,
    edit_distances,
    normalize,
    read_splits,
    three_splits,
)
from superb.upstream import Upstream

LEXICON = "data/librispeech-lexicon.txt"
# 1 is the only integer, since X-SAMPA has phones such as 2 and 9.
PROBABILITY = re.compile(r"1|[0-9]*\.[0-9]+(e-?[0-9]+)?|[0-9]+(\.|e-?[0-9]+)")


def make_parser():
    parser = probe.make_parser(__doc__, "pr", lr="1e-2")  # s3prl's libriphone.yaml
    parser.add_argument("--splits", type=three_splits, default=SPLITS, help="train, dev and test")
    about = "files of lines WORD PHONE PHONE ...; the first line of a word counts"
    parser.add_argument("--lexicon", type=program.names, default=LEXICON, help=about)
    return parser


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


# ------------------------------------------------------------------ the task


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
        return probe.LinearHead(dim, len(self.symbols) + 1)  # 0 is CTC's blank

    def decode(self, numbers):
        """A label or prediction as symbols, the words of a line in test.ref or test.hyp."""
        return [self.symbols[number - 1] for number in numbers]

    def encode(self, words):
        """Words to phones as numbers. Raises ValueError for words that are not in the lexicon."""
        missing = [word for word in words if word.upper() not in self.lexicon]
        if missing or not words:
            quoted = ", ".join(map(repr, missing[:5]))
            raise ValueError(f"not in the lexicon: {quoted}" if words else "no words")
        return [self.numbers[phone] for word in words for phone in self.lexicon[word.upper()]]


def evaluate(args):
    with program.one_line_errors():
        task = PhonemeRecognition(read_lexicon(args.lexicon))
        splits = read_splits(args.data, args.splits, task.encode)
        upstream = Upstream(args)
    return probe.evaluate(args, task, upstream, *splits)


def main(arguments=None):
    probe.main(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    program.run(main)
