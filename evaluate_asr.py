"""Speech recognition, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, a BiLSTM with CTC, WER.

    python evaluate_asr.py --upstream runs/avg/student.pt --data data/LibriSpeech
    python evaluate_asr.py --demo

Running the same command again resumes the run.
"""

import os
import signal
import sys

import torch
import torch.nn.functional as F
from torch import nn

import probe

CHARACTERS = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a symbol is its place here, from 1; 0 is CTC's blank


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n")[0], splits="train-clean-100,dev-clean,test-clean")
    parser.set_defaults(steps=200_000, lr=1e-4, eval_every=2000)
    size = probe.number(int, "1 or more", lambda n: n >= 1)
    parser.add_argument("--hidden", type=size, default=1024, help="units of the projection and of each LSTM")
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=probe.DEMO_STUDENT, data="data/demo", hidden=64)
        parser.set_defaults(steps=300, batch_size=16, lr=5e-3, log_every=50, eval_every=100)
    return probe.finish(parser.parse_args(arguments), "asr")


# ---------------------------------------------------------------- data


def read_split(folder, name):
    """A probe.Split whose labels are the characters of its transcripts, in capitals, a space between words.

    An utterance with a character that is none of CHARACTERS is left out.
    """
    corpus, ids, transcripts, left_out = probe.read_transcripts(folder, name)
    usable, labels = [], []
    for place, words in enumerate(transcripts):
        text = " ".join(words).upper()
        foreign = sorted(set(text) - set(CHARACTERS))
        if foreign:
            left_out[ids[place]] = f"characters {''.join(foreign)}"
        else:
            usable.append(place)
            labels.append(torch.tensor([CHARACTERS.index(character) + 1 for character in text]))
    if not usable:
        raise ValueError(f"{os.path.join(folder, name)}: no transcript is of letters and apostrophes alone")
    return probe.Split(name, corpus, usable, [ids[place] for place in usable], labels, left_out)


def words(symbols):
    """Symbols, as CHARACTERS numbers them, to words."""
    return "".join(CHARACTERS[int(symbol) - 1] for symbol in symbols).split()


def word_edits(labels, predictions):
    return probe.edits([words(label) for label in labels], [words(prediction) for prediction in predictions])


# ---------------------------------------------------------------- the task


class SpecAugment(nn.Module):
    """Time warping and masks on the features, in training only.

    A point is moved by up to 5 frames, 2 times up to 39 frames and 4 times up to 49 dimensions become 0.
    Source: Park et al. 2019, arXiv:1904.08779; sizes of s3prl's downstream/asr/config.yaml.
    """

    def forward(self, x, frames):
        """x: (batch, frames, dim); frames: (batch,). Returns x, masked and warped."""
        if not self.training:
            return x
        x = torch.stack([self.warp(one, int(length)) for one, length in zip(x, frames)])
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
        time = torch.arange(x.shape[1], device=x.device)
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


def main(arguments=None):
    args = parse(arguments)
    if args.demo:
        probe.prepare_demo()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with probe.refusing():
        splits = [read_split(args.data, name) for name in args.splits]
        upstream = probe.Upstream(args.upstream, device, args.precision)
    too_short = probe.too_short(upstream, splits)
    for split in splits:
        print(probe.describe(split, too_short=too_short[split.name]))
    print(f"upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    result, predictions = probe.evaluate(
        args,
        "WER",
        upstream,
        {split.corpus: probe.States(upstream, split.corpus) for split in splits},
        splits,
        make_head=lambda dim: CharacterHead(dim, args.hidden),
        loss=probe.ctc_loss,
        decode=probe.ctc_greedy,
        count=word_edits,
    )
    if predictions is not None:
        test = splits[2]
        references = [words(label) for label in test.labels]
        hypotheses = [words(prediction) for prediction in predictions]
        result = {"task": "speech recognition", **result} | probe.kinds_of_errors(references, hypotheses)
        wrong, total = probe.edits([" ".join(r) for r in references], [" ".join(h) for h in hypotheses])
        result |= {"cer": float(wrong.sum() / total.sum()), "cer_interval": probe.bootstrap((wrong, total))}
        for name, count in too_short.items():
            result["counts"][name]["fewer_frames_than_needed"] = count
        ref, hyp = dict(zip(test.ids, references)), dict(zip(test.ids, hypotheses))
        probe.write_report(args, result, ref=ref, hyp=hyp)
    low, high = result["cer_interval"]
    rows = [("CER", f"{result['cer']:.2%}", f"95% interval {low:.2%} to {high:.2%}")]
    probe.show(args, result, *args.splits[1:], [*rows, *probe.error_rows(result, "words")])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
