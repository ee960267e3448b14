"""Speech recognition, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, a BiLSTM with CTC, WER.

    python evaluate_asr.py --upstream runs/avg/student.pt --data data/LibriSpeech
    python evaluate_asr.py --demo

Transcripts, CTC and edits are those of evaluate_pr.py. Running the same command again resumes the run.
"""

import processes

import torch
import torch.nn.functional as F
from torch import nn

import demo
import probe
import report
from evaluate_pr import ctc_greedy, ctc_loss, edits, error_rows, kinds_of_errors, read_splits, too_short

CHARACTERS = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a symbol is its place here, from 1; 0 is CTC's blank


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n")[0], splits="train-clean-100,dev-clean,test-clean")
    parser.set_defaults(steps=200_000, lr=1e-4, eval_every=2000)
    parser.add_argument("--hidden", type=processes.count, default=1024, help="units of the projection and of each LSTM")
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=demo.STUDENT, data=demo.DATA, hidden=64)
        parser.set_defaults(steps=300, batch_size=16, lr=5e-3, log_every=50, eval_every=100)
    return probe.finish(parser.parse_args(arguments), "asr")


# ---------------------------------------------------------------- transcripts and letters


def spell(words):
    """(the words' characters as numbers, in capitals, a space between words, "") or ([], why they cannot be used)."""
    text = " ".join(words).upper()
    foreign = sorted(set(text) - set(CHARACTERS))
    if foreign:
        return [], f"characters {''.join(foreign)}"
    return [CHARACTERS.index(character) + 1 for character in text], ""


def words(symbols):
    """Symbols, as CHARACTERS numbers them, to words."""
    return "".join(CHARACTERS[int(symbol) - 1] for symbol in symbols).split()


# ---------------------------------------------------------------- the probe's head


class SpecAugment(nn.Module):
    """Time warping and masks on the features, in training only.

    A point is moved by up to 5 frames, 2 times up to 39 frames and 4 times up to 49 dimensions become 0.
    Source: Park et al. 2019, arXiv:1904.08779; sizes of s3prl's downstream/asr/config.yaml.
    """

    def forward(self, x, frames):
        """x: (batch, frames, dim); frames: (batch,). Returns x, masked and warped."""
        if not self.training:
            return x
        x = torch.stack([self.warp(one, length) for one, length in zip(x, frames.tolist())])
        x = x.masked_fill(self.masks(x, x.shape[2], 4, 50)[:, None, :], 0)
        return x.masked_fill(self.masks(x, x.shape[1], 2, 40)[:, :, None], 0)

    def warp(self, x, frames, window=5):
        """One utterance's (longest frames, dim), its first `frames` stretched before and shrunk after a random point, or reverse."""
        if frames <= 2 * window:
            return x
        centre = int(torch.randint(window, frames - window, ()))
        moved = centre + int(torch.randint(1 - window, window + 1, ()))
        parts = [(x[:centre], moved), (x[centre:frames], frames - moved)]
        image = [F.interpolate(part[None, None], (size, x.shape[1]), mode="bicubic")[0, 0] for part, size in parts]
        return torch.cat([*image, x[frames:]])

    def masks(self, x, size, count, widest):
        """(batch, size), True in `count` random stretches of each row, each shorter than `widest`."""
        width = torch.randint(0, widest, (len(x), count, 1))
        start = (torch.rand(len(x), count, 1) * (size - width).clamp(min=1)).long()
        place = torch.arange(size)
        return ((place >= start) & (place < start + width)).any(1).to(x.device)


class BiLSTM(nn.Module):
    """A bidirectional LSTM to which padding does not exist: what nn.LSTM gives for a packed sequence.

    Two LSTMs, the second on each utterance turned round: the backward pass of nn.LSTM over a packed sequence takes time
    quadratic in the frames on a CPU (a minute for 8 seconds of speech, where this takes seconds).
    """

    def __init__(self, dim, hidden):
        super().__init__()
        self.onward = nn.LSTM(dim, hidden, batch_first=True)
        self.reverse = nn.LSTM(dim, hidden, batch_first=True)

    def forward(self, x, frames):
        """x: (batch, frames, dim); frames: (batch,). Returns (batch, frames, 2 * hidden), meaningless past an utterance's end."""
        time, frames = torch.arange(x.shape[1], device=x.device), frames.to(x.device, non_blocking=True)
        turned = torch.where(time < frames[:, None], frames[:, None] - 1 - time, time)[:, :, None]  # its own inverse
        backward, _ = self.reverse(x.gather(1, turned.expand_as(x)))
        return torch.cat([self.onward(x)[0], backward.gather(1, turned.expand_as(backward))], dim=2)


class CharacterHead(nn.Module):
    """A projection, SpecAugment before it, two bidirectional LSTMs, each with dropout after it, and a linear layer.

    Source: SUPERB's speech recognition, s3prl's downstream/asr: config.yaml and model.py, RNNs.
    """

    def __init__(self, dim, hidden=1024):
        super().__init__()
        self.augment = SpecAugment()
        self.projection = nn.Linear(dim, hidden)
        self.lstms = nn.ModuleList(BiLSTM(size, hidden) for size in (hidden, 2 * hidden))
        self.dropout = nn.Dropout(0.2)
        self.characters = nn.Linear(2 * hidden, len(CHARACTERS) + 1)

    def forward(self, x, frames):
        """x: (batch, frames, dim); frames: (batch,). Returns log probabilities, (batch, frames, characters + 1)."""
        x = self.projection(self.augment(x, frames))
        for lstm in self.lstms:
            x = self.dropout(lstm(x, frames))
        return self.characters(x).log_softmax(-1)


# ---------------------------------------------------------------- the run


def main(arguments=None):
    processes.begin()
    args = parse(arguments)
    device = processes.device()
    if args.demo:
        with processes.together():
            demo.student()
    with processes.together("--data, --splits"):
        splits = read_splits(args.data, args.splits, spell)
    with processes.together():
        upstream = probe.Upstream(args.upstream, device, args.precision, args.states)
    short = too_short(upstream, splits)
    for split in splits:
        print(report.describe(split, too_short=short[split.name]))
    print(f"upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    result, predictions = probe.evaluate(
        args,
        upstream,
        splits,
        symbols=CHARACTERS,
        metric="WER",
        make_head=lambda dim: CharacterHead(dim, args.hidden),
        loss=ctc_loss,
        decode=ctc_greedy,
        count=lambda labels, predictions: edits(
            [words(label) for label in labels], [words(said) for said in predictions]
        ),
    )
    if predictions is not None:
        test = splits[2]
        references, hypotheses = [words(label) for label in test.labels], [words(said) for said in predictions]
        result = {"task": "speech recognition", **result} | kinds_of_errors(references, hypotheses)
        wrong, total = edits([" ".join(text) for text in references], [" ".join(text) for text in hypotheses])
        result |= {"cer": float(wrong.sum() / total.sum()), "cer_interval": report.bootstrap((wrong, total))}
        for name, number in short.items():
            result["counts"][name]["fewer_frames_than_needed"] = number
        report.write_result(args, result, ref=dict(zip(test.ids, references)), hyp=dict(zip(test.ids, hypotheses)))
    rows = [report.score_row("CER", result["cer"], result["cer_interval"]), *error_rows(result, "words")]
    report.show(args, result, *args.splits[1:], rows)


if __name__ == "__main__":
    processes.run(main)
