"""Speech recognition of SUPERB (arXiv:2105.01051): a frozen upstream, BiLSTMs with CTC, WER.

    python -m superb.asr --upstream runs/avg/student.pt --data data/LibriSpeech

The same command resumes a run.
"""

from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchaudio.transforms import SpecAugment

import program
from superb import ctc, probe
from superb.upstream import Upstream

CHARACTERS = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # the first is symbol 1; 0 is CTC's blank


def make_parser():
    parser = probe.make_parser(__doc__, "asr", steps=200_000, batch_size=16, eval_every=2000)
    # s3prl's file says 32, but its dataset.py halves batches of long utterances.
    add = parser.add_argument
    add("--splits", type=ctc.three_splits, default=ctc.SPLITS, help="train, dev and test")
    add("--hidden", type=program.count, default=1024, help="units per LSTM direction")
    return parser


class CharacterHead(nn.Module):
    """SpecAugment, a projection, two bidirectional LSTMs with dropout, and a linear layer.

    Source: s3prl's downstream/asr: config.yaml and model.py, RNNs; SpecAugment: arXiv:1904.08779.
    """

    def __init__(self, dim, hidden=1024):
        super().__init__()
        # Masks have up to 39 frames, and up to 49 dimensions.
        sizes = {"n_time_masks": 2, "time_mask_param": 40, "n_freq_masks": 4, "freq_mask_param": 50}
        self.augment = SpecAugment(**sizes, zero_masking=True)
        self.projection = nn.Linear(dim, hidden)
        self.lstm = nn.LSTM(hidden, hidden, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.dropout = nn.Dropout(0.2)
        self.characters = nn.Linear(2 * hidden, len(CHARACTERS) + 1)

    def forward(self, x, frames):
        """x: (batch, frames, dim). Returns logits, (batch, frames, characters + 1)."""
        if self.training:
            x = self.augment(x.transpose(1, 2)).transpose(1, 2)
        x = self.projection(x)
        packed = pack_padded_sequence(x, frames, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.characters(self.dropout(x))


class SpeechRecognition:
    """A task, as PhonemeRecognition. A label is a (length,) tensor of numbers of characters."""

    name = "speech recognition"
    metric = "WER"
    higher_is_better = False
    symbols = CHARACTERS
    loss = staticmethod(ctc.ctc_loss)
    predict = staticmethod(ctc.ctc_greedy)
    count = staticmethod(ctc.edit_distances)

    def __init__(self, hidden):
        self.hidden = hidden

    def head(self, dim):
        return CharacterHead(dim, self.hidden)

    def decode(self, numbers):
        return "".join(CHARACTERS[number - 1] for number in numbers).split()

    def encode(self, words):
        """Words to characters as numbers. Raises ValueError for other characters."""
        if not words:
            raise ValueError("no words")
        text = " ".join(words).upper()
        unknown = sorted(set(text) - set(CHARACTERS))
        if unknown:
            raise ValueError(f"characters {', '.join(map(repr, unknown))} are not English")
        return [CHARACTERS.index(character) + 1 for character in text]


def evaluate(args):
    task = SpeechRecognition(args.hidden)
    with program.one_line_errors():
        splits = [ctc.read_split(args.data, name, task.encode) for name in args.splits]
        upstream = Upstream(args)
    return probe.evaluate(args, task, upstream, *splits)


def main(arguments=None):
    probe.main(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    program.run(main)
