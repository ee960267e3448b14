"""Phoneme recognition, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, a linear CTC probe, PER.

    python evaluate_pr.py --upstream runs/avg/student.pt --data data/LibriSpeech --lexicon data/librispeech-lexicon.txt
    python evaluate_pr.py --demo

Where this is not s3prl: MEASURED.md has the table.
Running the same command again resumes the run.
"""

import processes

import collections
import functools
import os
import re

import numpy as np
import torch
import torchaudio
from torch import nn

import data
import demo
import probe
import report

NOT_IN_LEXICON = "not in the lexicon:"


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n")[0], splits="train-clean-100,dev-clean,test-clean")
    parser.set_defaults(lr=1e-2)  # as s3prl's libriphone.yaml
    parser.add_argument(
        "--lexicon",
        type=processes.names,
        nargs="+",
        default="data/librispeech-lexicon.txt",
        help="files with lines WORD PHONE PHONE ...; a word's first line counts",
    )
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=demo.STUDENT, data=demo.DATA, lexicon=f"{demo.DATA}/lexicon.txt")
        parser.set_defaults(steps=1200, batch_size=16, lr=5e-3, log_every=300, eval_every=300)
    args = probe.finish(parser.parse_args(arguments), "pr")
    args.lexicon = [path for paths in args.lexicon for path in (paths if isinstance(paths, list) else [paths])]
    return args


# ---------------------------------------------------------------- transcripts and phones


def read_lexicon(paths):
    """{WORD: [phone, ...]}, the first pronunciation of each word, of the files in their order; `;;;` begins a comment.

    Kaldi's lexiconp.txt, with a probability after every word, is understood; there too the first line of a word counts.
    Raises FileNotFoundError and ValueError naming the file and line.
    """
    lexicon, probability = {}, re.compile(r"[01]?\.\d+|[01]\.?|\d\.?\d*e-\d+")
    for path in paths:
        try:
            lines = data.read_lines(path)
        except FileNotFoundError:
            where = "https://www.openslr.org/resources/11/librispeech-lexicon.txt"
            raise FileNotFoundError(f"{path}: no such lexicon; give --lexicon, LibriSpeech's is {where}") from None
        rows = [(number, *line.split()) for number, line in lines if not line.startswith(";;;")]
        kaldi = all(probability.fullmatch(row[2]) for row in rows if len(row) > 2)  # WORD 0.5 PHONE PHONE ...
        for number, word, *phones in rows:
            if not kaldi and any(probability.fullmatch(phone) and "." in phone for phone in phones):
                raise ValueError(f"{path}, line {number}: a probability here, but not on every line of the lexicon")
            phones = phones[1:] if kaldi else phones
            if not phones:
                raise ValueError(f"{path}, line {number}: not 'WORD PHONE PHONE ...' but {' '.join([word, *phones])!r}")
            lexicon.setdefault(word, phones)
    if not lexicon:
        raise ValueError(f"{path}: an empty lexicon")
    return lexicon


def pronounce(words, lexicon, numbers):
    """(the words' phones as numbers, "") or, where the lexicon lacks a word, ([], why they cannot be used)."""
    missing = [word for word in words if word not in lexicon]
    if missing:
        return [], f"{NOT_IN_LEXICON} {' '.join(missing)}"
    return [numbers[phone] for word in words for phone in lexicon[word]], ""


def read_split(folder, split, spell):
    """A probe.Split of LibriSpeech's transcripts: every line of a `.trans.txt` is `ID WORD WORD ...`, the audio beside it.

    spell(words): (numbers of symbols, "") or, for an utterance to leave out, (anything, the reason).
    Raises FileNotFoundError and ValueError, naming the line, for one without audio.
    """
    corpus = data.find_corpus(folder, [split])
    audio = {os.path.splitext(path)[0]: place for place, path in enumerate(corpus.paths)}
    unusable = {os.path.splitext(path)[0]: reason for path, reason in corpus.left_out.items()}
    spoken, usable, ids, labels, left_out, described = [], [], [], [], {}, set()
    for file in sorted(path for path in data.files_under(folder, split) if path.endswith(".trans.txt")):
        for number, line in data.read_lines(os.path.join(folder, file)):
            name, *words = line.split()
            stem = os.path.join(os.path.dirname(file), name)
            if (stem not in audio and stem not in unusable) or stem in described:
                what = "a second line of" if stem in described else "no audio beside it for"
                raise ValueError(f"{os.path.join(folder, file)}, line {number}: {what} {name}; mend it, or take it out")
            described.add(stem)
            if stem in unusable or not words:
                left_out[name] = unusable.get(stem, "no words")
                continue
            spoken.append(audio[stem])
            symbols, reason = spell(words)
            if reason:
                left_out[name] = reason
            else:
                usable.append(len(spoken) - 1)
                ids.append(name)
                labels.append(torch.tensor(symbols))
    left_out |= {os.path.basename(stem): "no transcript" for stem in (audio.keys() | unusable.keys()) - described}
    if not spoken:
        raise ValueError(f"{os.path.join(folder, split)}: no transcripts; each folder of audio needs its .trans.txt")
    if not usable:
        example = next(f"{reason} ({name})" for name, reason in left_out.items())
        raise ValueError(f"{os.path.join(folder, split)}: no transcript can be used: {example}")
    # All that is spoken, so that tasks which leave out others of the utterances share their kept states.
    return probe.Split(split, corpus.part(spoken), usable, ids, labels, left_out)


def read_splits(folder, names, spell):
    """A probe.Split of each name. Raises ValueError where two share a file: what is tested on was trained on."""
    splits, of = [read_split(folder, name, spell) for name in names], {}
    for split in splits:
        for path in split.corpus.paths:
            real = os.path.realpath(os.path.join(split.corpus.root, path))
            if of.setdefault(real, split) is not split:
                raise ValueError(f"{of[real].name} and {split.name} share files, such as {path}")
    return splits


# ---------------------------------------------------------------- the probe's head and CTC


class PhoneHead(nn.Module):
    """A projection and a linear layer, frame by frame: nothing can be learned here but what the states show.

    Source: SUPERB's phoneme recognition, s3prl's downstream/ctc/libriphone.yaml.
    """

    def __init__(self, dim, phones):
        super().__init__()
        self.projection = nn.Linear(dim, 256)
        self.phones = nn.Linear(256, phones + 1)  # 0 is CTC's blank

    def forward(self, x, frames):
        """x: (batch, frames, dim). Returns log probabilities, (batch, frames, phones + 1)."""
        # Nothing lies between the two, so their product, once for all frames: a quarter of the arithmetic.
        weight, bias = self.phones.weight @ self.projection.weight, self.phones(self.projection.bias)
        return nn.functional.linear(x, weight, bias).log_softmax(-1)


def ctc_loss(log_probabilities, frames, labels):
    """Mean over the utterances of CTC's loss for each label, blank 0; an utterance with too few frames weighs nothing.

    log_probabilities: (batch, frames, symbols + 1); frames: (batch,); labels: [(length,) int64 tensor], symbols from 1.
    """
    lengths = torch.tensor([len(label) for label in labels])
    targets = torch.cat(labels).to(log_probabilities.device)
    return nn.functional.ctc_loss(log_probabilities.transpose(0, 1), targets, frames.cpu(), lengths, zero_infinity=True)


def ctc_frames(label):
    """How many frames CTC needs for a label: one a symbol, and a blank between equal neighbours."""
    return len(label) + int((label[1:] == label[:-1]).sum())


def ctc_greedy(log_probabilities, frames):
    """Each utterance's most probable path, repeats merged and blanks taken out: [[symbol, ...]]."""
    best = log_probabilities.argmax(-1).cpu()
    paths = [path[:length].unique_consecutive().tolist() for path, length in zip(best, frames.tolist())]
    return [[symbol for symbol in path if symbol != 0] for path in paths]


# ---------------------------------------------------------------- PER


def edits(references, hypotheses):
    """(edit distances, lengths of the references), each (utterances,): their sums make PER, WER or CER."""
    distance = torchaudio.functional.edit_distance
    wrong = [distance(list(reference), list(hypothesis)) for reference, hypothesis in zip(references, hypotheses)]
    return np.array(wrong, float), np.array([len(reference) for reference in references], float)


def alignment(reference, hypothesis):
    """(substitutions, deletions, insertions) of the shortest edit; where several are, of the one with most symbols right."""
    # row[j]: (errors, substitutions, deletions, insertions) from the reference so far to hypothesis[:j].
    row = [(j, 0, 0, j) for j in range(len(hypothesis) + 1)]
    for i, symbol in enumerate(reference, start=1):
        diagonal, row[0] = row[0], (i, 0, i, 0)
        for j, other in enumerate(hypothesis, start=1):
            e, s, d, n = diagonal
            substituted = (e, s, d, n) if symbol == other else (e + 1, s + 1, d, n)
            e, s, d, n = row[j]
            deleted = (e + 1, s, d + 1, n)
            e, s, d, n = row[j - 1]
            inserted = (e + 1, s, d, n + 1)
            diagonal, row[j] = row[j], min(substituted, deleted, inserted)
    return row[-1][1:]


def kinds_of_errors(references, hypotheses):
    """{"substitutions", "deletions", "insertions"} over a set, and "reference_symbols", what they are out of."""
    counted = [alignment(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses)]
    kinds = dict(zip(("substitutions", "deletions", "insertions"), (sum(column) for column in zip(*counted))))
    return kinds | {"reference_symbols": sum(len(reference) for reference in references)}


def unknown_words(split):
    """How often its transcripts have each word that the lexicon lacks, a Counter."""
    reasons = (reason for reason in split.left_out.values() if reason.startswith(NOT_IN_LEXICON))
    return collections.Counter(word for reason in reasons for word in reason.removeprefix(NOT_IN_LEXICON).split())


def too_short(upstream, splits):
    """{name: how many utterances have fewer frames than CTC needs for their label}."""
    counts = {}
    for split in splits:
        frames = upstream.frames(torch.from_numpy(split.samples)).tolist()
        counts[split.name] = sum(ctc_frames(label) > length for label, length in zip(split.labels, frames))
    return counts


def error_rows(result, symbols):
    """Rows for `show` of the kinds of errors; symbols: what is counted, such as "phones"."""
    total = result["reference_symbols"]
    kinds = ("substitutions", "deletions", "insertions")
    return [(k, f"{result[k] / total:.2%}", f"{result[k]:,}") for k in kinds] + [("out of", f"{total:,}", symbols)]


# ---------------------------------------------------------------- the run


def judge(args):
    """The result of a probe on the upstream that args name."""
    device = processes.device()
    with processes.together():
        lexicon = read_lexicon(args.lexicon)
        phones = sorted({phone for pronunciation in lexicon.values() for phone in pronunciation})
        numbers = {phone: number for number, phone in enumerate(phones, start=1)}
        spell = functools.partial(pronounce, lexicon=lexicon, numbers=numbers)
    with processes.together("--data, --splits"):
        splits = read_splits(args.data, args.splits, spell)
    with processes.together():
        upstream = probe.Upstream(args.upstream, device, args.precision, args.states)
    unknown, short = [unknown_words(split) for split in splits], too_short(upstream, splits)
    for split, words in zip(splits, unknown):
        print(report.describe(split, words, short[split.name]))
    print(f"upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    result, predictions = probe.evaluate(
        args,
        upstream,
        splits,
        symbols=phones,
        metric="PER",
        make_head=lambda dim: PhoneHead(dim, len(phones)),
        loss=ctc_loss,
        decode=ctc_greedy,
        count=lambda labels, predictions: edits([label.tolist() for label in labels], predictions),
    )
    if predictions is not None:
        test = splits[2]
        references = [[phones[number - 1] for number in label.tolist()] for label in test.labels]
        hypotheses = [[phones[number - 1] for number in prediction] for prediction in predictions]
        result = {"task": "phoneme recognition", **result} | kinds_of_errors(references, hypotheses)
        result["phones"] = phones
        result["words_not_in_the_lexicon"] = {split.name: dict(words) for split, words in zip(splits, unknown)}
        for name, number in short.items():
            result["counts"][name]["fewer_frames_than_needed"] = number
        report.write_result(args, result, ref=dict(zip(test.ids, references)), hyp=dict(zip(test.ids, hypotheses)))
    return result


def show(args, result):
    """The result as a person reads it."""
    report.show(args, result, *args.splits[1:], error_rows(result, "phones"))


def main(arguments=None):
    processes.begin()
    args = parse(arguments)
    if args.demo:
        with processes.together():
            demo.student()
        demo.compare(judge, args, show)
    else:
        show(args, judge(args))


if __name__ == "__main__":
    processes.run(main)
