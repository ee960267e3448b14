"""Phoneme recognition, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, a linear CTC probe, PER.

    python evaluate_pr.py --upstream runs/avg/student.pt --data data/LibriSpeech --lexicon data/librispeech-lexicon.txt
    python evaluate_pr.py --demo

Where this is not s3prl: a hypothesis is CTC's usual best path (repeats merged, then blanks taken out; s3prl takes blanks
out first and so loses doubled phones), and the symbols are those of the lexicon (no <eos>, <unk>, SIL and SPN).
Running the same command again resumes the run.
"""

import collections
import os
import signal
import sys

import torch
from torch import nn

import probe


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n")[0], splits="train-clean-100,dev-clean,test-clean")
    parser.add_argument(
        "--lexicon",
        type=probe.names,
        nargs="+",
        default="data/librispeech-lexicon.txt",
        help="files with lines WORD PHONE PHONE ...; a word's first line counts",
    )
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=probe.DEMO_STUDENT, data="data/demo", lexicon="data/demo/lexicon.txt")
        parser.set_defaults(steps=1200, batch_size=16, lr=5e-3, log_every=300, eval_every=300)
    args = probe.finish(parser.parse_args(arguments), "pr")
    args.lexicon = [path for paths in args.lexicon for path in (paths if isinstance(paths, list) else [paths])]
    return args


# ---------------------------------------------------------------- data


def read_lexicon(paths):
    """{WORD: [phone, ...]}, the first pronunciation of each word, of the files in their order; `;;;` begins a comment.

    Raises FileNotFoundError and ValueError naming the file and line.
    """
    lexicon = {}
    for path in paths:
        try:
            lines = probe.read_lines(path)
        except FileNotFoundError:
            where = "https://www.openslr.org/resources/11/librispeech-lexicon.txt"
            raise FileNotFoundError(f"{path}: no such lexicon; give --lexicon, LibriSpeech's is {where}") from None
        for number, line in lines:
            word, *phones = line.split()
            if word.startswith(";;;"):
                continue
            if not phones:
                raise ValueError(f"{path}, line {number}: not 'WORD PHONE PHONE ...' but {line.strip()[:60]!r}")
            lexicon.setdefault(word, phones)
    if not lexicon:
        raise ValueError(f"{path}: an empty lexicon")
    return lexicon


def read_split(folder, name, lexicon, numbers):
    """A probe.Split whose labels are numbers[phone] of its transcripts, and a Counter of words that the lexicon lacks.

    An utterance with such a word is left out.
    """
    corpus, ids, transcripts, left_out = probe.read_transcripts(folder, name)
    unknown, usable, labels = collections.Counter(), [], []
    for place, words in enumerate(transcripts):
        missing = [word for word in words if word not in lexicon]
        if missing:
            unknown.update(missing)
            left_out[ids[place]] = f"not in the lexicon: {' '.join(missing)}"
        else:
            usable.append(place)
            labels.append(torch.tensor([numbers[phone] for word in words for phone in lexicon[word]]))
    if not usable:
        words = " ".join(word for word, _ in unknown.most_common(3))
        raise ValueError(
            f"{os.path.join(folder, name)}: no transcript is in the lexicon, which lacks {words}; is it the right one?"
        )
    return probe.Split(name, corpus, usable, [ids[place] for place in usable], labels, left_out), unknown


# ---------------------------------------------------------------- the task


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
        return self.phones(self.projection(x)).log_softmax(-1)


def edits(labels, predictions):
    return probe.edits([label.tolist() for label in labels], predictions)


def main(arguments=None):
    args = parse(arguments)
    if args.demo:
        probe.prepare_demo()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with probe.refusing():
        lexicon = read_lexicon(args.lexicon)
        phones = sorted({phone for pronunciation in lexicon.values() for phone in pronunciation})
        numbers = {phone: number for number, phone in enumerate(phones, start=1)}
        splits, unknown = zip(*(read_split(args.data, name, lexicon, numbers) for name in args.splits))
        upstream = probe.Upstream(args.upstream, device, args.precision)
    too_short = probe.too_short(upstream, splits)
    for split, words in zip(splits, unknown):
        print(probe.describe(split, words, too_short[split.name]))
    print(f"upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    result, predictions = probe.evaluate(
        args,
        "PER",
        upstream,
        {split.corpus: probe.States(upstream, split.corpus) for split in splits},
        splits,
        make_head=lambda dim: PhoneHead(dim, len(phones)),
        loss=probe.ctc_loss,
        decode=probe.ctc_greedy,
        count=edits,
    )
    if predictions is not None:
        test = splits[2]
        references, hypotheses = (
            [[phones[int(number) - 1] for number in sequence] for sequence in sequences]
            for sequences in (test.labels, predictions)
        )
        result = {"task": "phoneme recognition", **result} | probe.kinds_of_errors(references, hypotheses)
        result["phones"] = phones
        result["words_not_in_the_lexicon"] = {split.name: dict(words) for split, words in zip(splits, unknown)}
        for name, count in too_short.items():
            result["counts"][name]["fewer_frames_than_needed"] = count
        probe.write_report(args, result, ref=dict(zip(test.ids, references)), hyp=dict(zip(test.ids, hypotheses)))
    probe.show(args, result, *args.splits[1:], probe.error_rows(result, "phones"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
