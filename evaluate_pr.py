"""Phoneme recognition of SUPERB (arXiv:2105.01051): a frozen upstream, a linear CTC probe, PER.

    python evaluate_pr.py --upstream runs/avg/student.pt --lexicon data/librispeech-lexicon.txt

The same command resumes a run.
"""

import program
from superb import ctc, probe
from superb.upstream import Upstream


def make_parser():
    parser = probe.make_parser(__doc__, "pr", lr="1e-2")  # s3prl's libriphone.yaml
    add = parser.add_argument
    add("--splits", type=ctc.three_splits, default=ctc.SPLITS, help="train, dev and test")
    about = "files of lines WORD PHONE PHONE ...; the first line of a word counts"
    add("--lexicon", type=program.names, default="data/librispeech-lexicon.txt", help=about)
    return parser


class PhonemeRecognition:
    """What probe.evaluate needs of a task. A label is a (length,) tensor of numbers from 1.

    symbols: number n stands for symbols[n - 1].
    """

    name = "phoneme recognition"
    metric = "PER"  # sum / sum of the two arrays of count(references, hypotheses)
    higher_is_better = False
    loss = staticmethod(ctc.ctc_loss)
    predict = staticmethod(ctc.ctc_greedy)
    count = staticmethod(ctc.edit_distances)

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
        if not words:
            raise ValueError("no words")
        missing = [word for word in words if word.upper() not in self.lexicon]
        if missing:
            raise ValueError(f"not in the lexicon: {', '.join(map(repr, missing[:5]))}")
        return [self.numbers[phone] for word in words for phone in self.lexicon[word.upper()]]


def evaluate(args):
    with program.one_line_errors():
        task = PhonemeRecognition(ctc.read_lexicon(args.lexicon))
        splits = [ctc.read_split(args.data, name, task.encode) for name in args.splits]
        upstream = Upstream(args)
    return probe.evaluate(args, task, upstream, *splits)


def main(arguments=None):
    probe.main(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    program.run(main)
