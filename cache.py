"""Caches outputs of frozen networks, one file per utterance; training targets as int8."""

import contextlib
import hashlib
import json
import os
import shutil

import torch

import checkpoint
import data
import program

# Of the targets: raise it if a change of encoder.py or of quantize() changes them.
VERSION = 1
SIGNAL_EVERY = 16  # utterances


def key(*parts):
    """A hash of the parts (JSON types), 16 hex digits: a name for a folder, or to compare them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def file_name(corpus, i):
    """Where utterance i is cached: audio path, first sample, length, a hash of the audio file.

    The hash is over the size of the file and 16 KiB from its middle. Raises OSError.
    """
    with open(os.path.join(corpus.root, corpus.paths[i]), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        content = hashlib.sha256(file.read(16384) + str(size).encode()).hexdigest()[:8]
    # Neither absolute nor with '..': the file stays inside the folder of the cache.
    folder, name = os.path.split(corpus.paths[i].lstrip("/").replace("..", "__"))
    if len(os.fsencode(name)) > 150:  # a name has at most 255 bytes
        name = key(name)
    return f"{os.path.join(folder, name)}.{corpus.starts[i]}-{corpus.samples[i]}.{content}.pt"


class Cache:
    """One .pt file per utterance of a Corpus, in a folder per set of networks and settings."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus

    def path(self, i):
        return os.path.join(self.folder, file_name(self.corpus, i))

    def load(self, i):
        """The tensors of utterance i. A damaged file is deleted: the next run computes it again."""
        try:
            return checkpoint.load(self.path(i))
        except ValueError as error:
            if not isinstance(error.__cause__, (OSError, MemoryError)):  # may be temporary
                with contextlib.suppress(OSError):
                    os.remove(self.path(i))
            raise

    def crop(self, i, start, samples):
        """The quantized targets of a crop of utterance i, from sample `start`, a multiple of 320.

        The targets are of the whole utterance, so their context is larger than the crop. The
        convolutions have no padding: the crop that starts at sample 320 * n starts at frame n.
        """
        targets = self.load(i)
        frames = (samples - data.MIN_SAMPLES) // data.FRAME_SAMPLES + 1
        values = targets["values"][start // data.FRAME_SAMPLES :][:frames]
        return {"values": values, "scale": targets["scale"], "zero": targets["zero"]}

    def is_missing(self, i):
        try:
            return not os.path.exists(self.path(i))
        except OSError:  # reported when the audio is read
            return True

    def fill(self, compute, sizes, name, stop):
        """Computes the missing files; rank r those of utterances r, r + WORLD_SIZE, ...

        compute(i): tensors of utterance i, or None if it cannot be read; sizes[i]: their bytes.
        The total size is printed first; too little free disk space is an error before anything
        is computed. Exits on a signal; the same command resumes.
        """
        with program.one_line_errors():
            os.makedirs(self.folder, exist_ok=True)
            missing = [
                i
                for i in range(program.RANK, len(self.corpus), program.WORLD_SIZE)
                if self.is_missing(i)
            ]
        longest = max(program.gather(len(missing)))
        needed = sum(program.gather(sum(sizes[i] for i in missing))) / 1e9
        with program.one_line_errors():
            free = shutil.disk_usage(self.folder).free / 1e9
            message = f"{self.folder}: {sum(sizes) / 1e9:.3g} GB of {name}, {needed:.3g} to compute"
            if needed > free:
                raise OSError(f"{message}, {free:.3g} GB free; choose another --cache")
            if program.RANK == 0:
                print(message, flush=True)
        progress = program.Progress(name, len(missing))
        for number in range(longest):
            # All ranks check for a signal to any of them, after equally many utterances.
            signal = stop.received() if number % SIGNAL_EVERY == 0 else 0
            if signal:
                raise SystemExit(128 + signal)
            if number < len(missing):
                self.save(missing[number], compute(missing[number]))
                progress.show(number + 1)
        signal = stop.received()
        if signal:
            raise SystemExit(128 + signal)

    def save(self, i, tensors):
        """Writes the tensors of utterance i, unless they are None."""
        if tensors is not None:
            path = self.path(i)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            checkpoint.save(path, tensors)


# ------------------------------------------------------------------ targets in 8 bits


def quantize(x):
    """(frames, dim) float to int8, with a float32 scale and zero point per dim.

    The range of a dim over time is divided into 254 steps.
    """
    low, high = x.float().aminmax(dim=0)
    scale = ((high - low) / 254).clamp(min=1e-12)
    zero = (high + low) / 2
    values = ((x - zero) / scale).round().to(torch.int8)
    return {"values": values.cpu(), "scale": scale.cpu(), "zero": zero.cpu()}


def dequantize(values, scale, zero):
    """(..., frames, dim) float32 of int8 values and their (..., dim) scales and zero points."""
    return values * scale[..., None, :] + zero[..., None, :]
