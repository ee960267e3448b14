"""Caches outputs of frozen networks, one file per utterance; training targets as int8."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import zipfile

import torch

import checkpoint
import data
import program

VERSION = 1  # raise it if encoder.py or quantize() changes the targets
SIGNAL_EVERY = 8  # utterances


def key(*parts):
    """A hash of the parts (JSON types), 16 hex digits: a name for a folder, or to compare them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def audio_hash(corpus, i):
    """A hash of the size of utterance i's file and 16 KiB from its middle. Raises OSError."""
    with open(os.path.join(corpus.root, corpus.path(i)), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        return hashlib.sha256(file.read(16384) + str(size).encode()).hexdigest()[:16]


class Cache:
    """One .pt file per utterance of a Corpus, in a folder per set of networks and settings.

    A file has the path and length of its audio as name, and the audio's hash in it.
    """

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus

    def path(self, i):
        """The file of utterance i, named by audio path, first sample and length."""
        corpus = self.corpus
        # Neither absolute nor with '..': the file stays inside the folder of the cache.
        parts = corpus.path(i).lstrip("/").split("/")
        *folders, name = ["__" if part == ".." else part for part in parts]
        if len(os.fsencode(name)) > 150:  # a name has at most 255 bytes
            name = key(name)
        file = f"{name}.{corpus.starts[i]}-{corpus.samples[i]}.pt"
        return os.path.join(self.folder, *folders, file)

    def load(self, i, part="tensors"):
        """The tensors of utterance i, or the "audio" hash that was saved with them.

        Raises OSError if the file cannot be read, and ValueError if it is damaged: then it is
        deleted, so that the next run computes it again.
        """
        path = self.path(i)
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())  # once, for the checksums and for torch
        try:
            with zipfile.ZipFile(content) as archive:
                if archive.testzip():
                    raise ValueError("a checksum differs")
            content.seek(0)
            return torch.load(content, map_location="cpu", weights_only=True)[part]
        except Exception as error:  # a damaged file can raise nearly anything
            if not checkpoint.is_damage(error):
                raise
            with contextlib.suppress(OSError):
                os.remove(path)
            raise ValueError(f"{path}: damaged, and deleted ({str(error)[:80]})") from error

    def crop(self, i, start, samples):
        """The quantized targets of a crop of utterance i, from sample `start`, a multiple of 320.

        The targets are of the whole utterance, so their context is larger than the crop. The
        convolutions have no padding: the crop that starts at sample 320 * n starts at frame n.
        """
        targets = self.load(i)
        frames = (samples - data.MIN_SAMPLES) // data.FRAME_SAMPLES + 1
        first = start // data.FRAME_SAMPLES
        values = targets["values"][first : first + frames]
        return {"values": values, "scale": targets["scale"], "zero": targets["zero"]}

    def find_missing(self):
        """This rank's utterances without a file: of those r, r + WORLD_SIZE, ...

        Raises ValueError if one of up to 100 existing files is of other audio.
        """
        share = range(program.RANK, len(self.corpus), program.WORLD_SIZE)
        progress = program.Progress("cached files", len(share))
        missing, cached = [], []
        for number, i in enumerate(share, start=1):
            size = 0  # as a power cut leaves files
            with contextlib.suppress(OSError):
                size = os.stat(self.path(i)).st_size
            (cached if size else missing).append(i)
            progress.show(number)
        for i in cached[:: len(cached) // 100 + 1]:
            try:
                is_same = self.load(i, "audio") == audio_hash(self.corpus, i)
            except ValueError:  # damaged, and deleted
                missing.append(i)
                continue
            except OSError:  # reported when training reads it
                continue
            if not is_same:
                problem = f"{self.path(i)} was computed from other audio than {self.corpus.path(i)}"
                raise ValueError(f"{problem}; delete it, or choose another folder")
        return missing

    def fill(self, compute, sizes, name, stop):
        """Computes the missing files; rank r those of utterances r, r + WORLD_SIZE, ...

        compute(i): tensors of utterance i, or None if it cannot be read; sizes[i]: their bytes.
        The total size is printed first; too little free disk space is an error before anything
        is computed. Exits on a signal; the same command resumes.
        """
        with program.one_line_errors():
            os.makedirs(self.folder, exist_ok=True)
            missing = self.find_missing()
        longest = max(program.gather(len(missing)))
        needed = sum(program.gather(sum(sizes[i] for i in missing))) / 1e9
        with program.one_line_errors():
            free = shutil.disk_usage(self.folder).free / 1e9
            message = f"{self.folder}: {sum(sizes) / 1e9:.3g} GB of {name}, {needed:.3g} to compute"
            if needed > free:
                raise OSError(f"{message}, {free:.3g} GB free; choose another folder")
            if program.RANK == 0:
                program.say(message)
        progress = program.Progress(name, len(missing))
        for number in range(longest + 1):  # the last turn is for a signal alone
            # All ranks check for a signal to any of them, after equally many utterances.
            check_now = number % SIGNAL_EVERY == 0 or number == longest
            signal = stop.received() if check_now else 0
            if signal:
                if program.RANK == 0:
                    program.say(f"{self.folder}: stopped; the same command resumes")
                raise SystemExit(128 + signal)
            if number >= len(missing):  # other ranks have more
                continue
            i = missing[number]
            tensors = compute(i)
            if tensors is not None:
                os.makedirs(os.path.dirname(self.path(i)), exist_ok=True)
                content = {"tensors": tensors, "audio": audio_hash(self.corpus, i)}
                checkpoint.save(self.path(i), content)
            progress.show(number + 1)


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
