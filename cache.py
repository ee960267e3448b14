"""Tensors of frozen networks, computed once: one file per utterance of a corpus."""

import runs
from runs import RANK, WORLD_SIZE

import hashlib
import json
import os
import shutil
import sys
import time

import soundfile
import torch

import data


def key(*parts):
    """16 hex digits for the name of a folder, which change with any of the parts (JSON types)."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Cache:
    """One .pt file per utterance of a Corpus; `folder` is named after what computes the tensors."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus

    def path(self, i):
        """The file of utterance i, named after audio file, first sample and length."""
        corpus = self.corpus
        audio = corpus.paths[i].lstrip("/").replace("..", "__")  # stays inside the folder
        return os.path.join(self.folder, f"{audio}.{corpus.starts[i]}-{corpus.samples[i]}.pt")

    def missing(self):
        """Utterances of this rank without a file, or with one that is older than the audio."""
        found, older = [], 0
        for i in range(RANK, len(self.corpus), WORLD_SIZE):
            try:
                cached = os.path.getmtime(self.path(i))
            except OSError:
                found.append(i)
                continue
            audio = os.path.join(self.corpus.root, self.corpus.paths[i])
            if os.path.exists(audio) and os.path.getmtime(audio) > cached:
                found.append(i)
                older += 1
        if older:
            remedy = "if the audio was copied, copy its times too (cp -a)"
            print(f"{self.folder}: {older} files are older than their audio; {remedy}")
        return found

    def fill(self, compute, size, name, stop):
        """Computes what is missing, in the main process; ranks share the work by index.

        compute(i): what to save of utterance i; size(i): its bytes. An utterance that cannot be
        read gets a warning and no file. Prints the size of the whole cache first. Exits on a
        signal; the same command continues. A disk that is too small is an error before that.
        """
        with runs.one_line_errors():
            os.makedirs(self.folder, exist_ok=True)
            missing = self.missing()
        total = sum(size(i) for i in range(len(self.corpus)))
        needed = sum(runs.gather(sum(size(i) for i in missing)))
        if RANK == 0:
            print(
                f"{name}: {total / 1e9:.3g} GB in {self.folder}, {needed / 1e9:.3g} GB to compute"
            )
        with runs.one_line_errors():
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                sizes = f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free"
                raise OSError(f"{self.folder}: {sizes}; choose another --cache")
        started = printed = time.monotonic()
        for number, i in enumerate(missing, start=1):
            if stop.number:
                break
            try:
                content = compute(i)
            except (soundfile.SoundFileError, OSError, ValueError) as problem:
                print(f"warning: {self.corpus.paths[i]}: {problem}", file=sys.stderr)
                continue
            os.makedirs(os.path.dirname(self.path(i)), exist_ok=True)
            runs.save(self.path(i), content)
            if RANK == 0 and time.monotonic() - printed > 20:
                printed = time.monotonic()
                left = (printed - started) / number * (len(missing) - number) / 60
                print(f"{name}: {number} of {len(missing)}, {left:.0f} min left", flush=True)
        signal = stop.received()
        if signal:
            raise SystemExit(128 + signal)


# ------------------------------------------------------------------ targets in 8 bits


def quantize(x):
    """(frames, dim) float to int8 with one float32 scale per dimension."""
    scale = x.float().abs().amax(0).clamp(min=1e-12) / 127
    return {"values": (x / scale).round().to(torch.int8), "scale": scale}


def dequantize(saved, first=0, frames=None):
    """Frames from `first` on, float32."""
    return saved["values"][first:][:frames] * saved["scale"]


class CachedTargets(data.TrainBatches):
    """TrainBatches with "targets", (share, frames, dim), read from a Cache of quantized targets.

    Convolutions without padding keep frames and samples aligned: the crop that starts at sample
    320 n has the frames from n on. Its targets saw the whole utterance, not the crop alone.
    """

    def __init__(self, cache, frames, *args):
        """frames(samples): how many frames the teachers give."""
        super().__init__(cache.corpus, *args)
        self.cache, self.frames, self.crop_start_multiple = cache, frames, 320

    def example(self, epoch, i, position, samples):
        first = self.crop_start(i, position, samples) // 320
        targets = dequantize(runs.load(self.cache.path(i)), first, self.frames(samples))
        return super().example(epoch, i, position, samples) | {"targets": targets}
