"""Audio to batches of waveforms: reading files, batches, noise.

Works with torch, torchaudio, numpy and soundfile alone. All lengths are samples at 16 kHz.
"""

import contextlib
import itertools
import math
import os
import shutil
import signal

import numpy as np
import soundfile
import torch
import torchaudio

SAMPLE_RATE = 16000
FRAME_SAMPLES = 320  # from one frame to the next
MIN_SAMPLES = 400  # the receptive field of one frame
CROP_MULTIPLE = 3200  # crop lengths are rounded down to a multiple of it, for few distinct shapes
BATCH_TIMEOUT = 600  # seconds
UNREADABLE = (OSError, ValueError, TypeError)  # reading audio or a target


# ------------------------------------------------------------------ batches


class TrainBatches(torch.utils.data.Dataset):
    """One item per training step: this rank's share of a batch of crops of one length.

    Nothing is padded: a batch has utterances of similar length, cropped to the shortest of them.
    Utterances, order and crops depend on seed, epoch and batch size only, not on the number of
    ranks or workers, and any step can be computed without the steps before it.

    corpus: a manifest.Corpus; batch_size: utterances per step, over all ranks.
    noise: a Noise, for "noisy" waveforms too; set `cache` to a cache.Cache for its targets too.
    """

    cache = None

    def __init__(self, corpus, batch_size, seed=0, rank=0, world_size=1, noise=None):
        if batch_size > len(corpus):
            problem = f"a batch of {batch_size} utterances, but the audio has {len(corpus)}"
            raise ValueError(f"{problem}; make it smaller")
        self.corpus, self.batch_size, self.seed = corpus, batch_size, seed
        share = batch_size // world_size
        self.columns = range(rank * share, (rank + 1) * share)
        self.steps_per_epoch = len(corpus) // batch_size
        self.epoch, self.noise = None, noise

    def plan(self, epoch):
        """(utterances, crops, offsets) of an epoch; that of the latest epoch is stored.

        utterances: (steps, batch_size) indices; crops: (steps,) lengths in samples;
        offsets: (all utterances,) where each crop starts, from 0 (earliest) to 1 (latest).
        """
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            used = rng.permutation(len(self.corpus))[: self.steps_per_epoch * self.batch_size]
            # Sorted by length with 5% jitter: little is cropped, and batches differ by epoch.
            order = np.argsort(self.corpus.samples[used] * rng.uniform(0.95, 1.05, len(used)))
            utterances = rng.permutation(used[order].reshape(-1, self.batch_size))
            crops = self.corpus.samples[utterances].min(axis=1)
            rounded = crops // CROP_MULTIPLE * CROP_MULTIPLE
            crops = np.where(rounded > 0, rounded, crops)  # shorter crops stay as they are
            self.epoch, self.planned = epoch, (utterances, crops, rng.random(len(self.corpus)))
        return self.planned

    def __getitem__(self, step):
        """This rank's share of the batch of a step, from 0.

        "waveforms": (share, samples); "noisy" ones if there is noise; what the cache returns;
        "paths": [str]; "skipped": {"audio": {path: reason}, "noise": {path: reason}} of
        unreadable files. An unreadable utterance is replaced by the next readable one of the
        batch; ValueError if there is none.
        """
        epoch, row = divmod(step, self.steps_per_epoch)
        utterances, crops, offsets = self.plan(epoch)
        batch, samples = utterances[row].tolist(), int(crops[row])
        examples, paths, skipped = [], [], {"audio": {}, "noise": {}}

        def read(i):
            return self.crop(i, offsets[i], samples)

        for column in self.columns:
            candidates = batch[column:] + batch[:column]  # the later ones are replacements
            i, example = first_readable(self.corpus, candidates, read, skipped["audio"])
            if self.noise:
                seeds = (self.seed, epoch, i)
                example["noisy"] = self.noise.mix(example["waveforms"], seeds, skipped["noise"])
            examples.append(example)
            paths.append(self.corpus.path(i))
        tensors = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        return tensors | {"paths": paths, "skipped": skipped}

    def crop(self, i, offset, samples):
        """Tensors by name for one crop of utterance i; it starts where a frame starts."""
        start = int(offset * (self.corpus.samples[i] - samples + 1))
        start = start // FRAME_SAMPLES * FRAME_SAMPLES
        crop = {"waveforms": self.corpus.read(i, start, samples)}
        if self.cache:
            crop |= self.cache.crop(i, start, samples)
        return crop


def first_readable(corpus, utterances, read, skipped):
    """(i, read(i)) of the first readable one of the utterances; ValueError if there is none.

    skipped: {path: reason}, to which the unreadable ones before it are added.
    """
    for i in utterances:
        try:
            return i, read(i)
        except UNREADABLE as error:
            skipped[corpus.path(i)] = str(error)
    path, reason = next(iter(skipped.items()))
    raise ValueError(f"{corpus.root}: no utterance is readable, such as {path}: {reason}")


class Noise:
    """Noise to mix into speech, for students of noisy speech.

    corpus: the manifest.Corpus of the noise; probability: that noise is added to a waveform.
    snr: [lowest, highest] signal-to-noise ratio of a waveform in dB, drawn uniformly, or [one].
    Source: the noisy training of DistilHuBERT in Huang et al. 2022, arXiv:2210.07978.
    """

    def __init__(self, corpus, snr, probability=1.0):
        if len(snr) > 2 or not -100 <= snr[0] <= snr[-1] <= 100:
            raise ValueError(f"a signal-to-noise ratio of {snr} dB: give -100 to 100, or low,high")
        self.corpus, self.snr, self.probability = corpus, (snr[0], snr[-1]), probability

    def mix(self, waveform, seeds, skipped):
        """(samples,) with a random stretch of noise added, which the seeds alone determine.

        Noise that is shorter than the waveform is repeated; a silent stretch adds nothing. In place
        of an unreadable file the next one is used, and {path: reason} is added to `skipped`.
        Raises ValueError if no noise is readable.
        """
        rng = np.random.default_rng(seeds)
        if rng.random() >= self.probability:
            return waveform

        def read(i):
            length = min(len(waveform), int(self.corpus.samples[i]))
            start = int(rng.integers(self.corpus.samples[i] - length + 1))
            return self.corpus.read(i, start, length)

        first = int(rng.integers(len(self.corpus)))
        candidates = itertools.chain(range(first, len(self.corpus)), range(first))
        _, noise = first_readable(self.corpus, candidates, read, skipped)
        if len(noise) < len(waveform):
            noise = noise.roll(int(rng.integers(len(noise))))
            noise = noise.repeat(-(-len(waveform) // len(noise)))[: len(waveform)]
        snr = torch.tensor(rng.uniform(*self.snr))
        if not noise.square().sum():  # silent, or so faint that its energy is 0 in float32
            return waveform
        return torchaudio.functional.add_noise(waveform, noise, snr)


def load_batches(dataset, steps, workers=0, pin_memory=False, stop=None):
    """Yields the dataset's items of `steps`, prepared ahead by `workers` processes.

    stop: an object with the `number` of a signal, or 0; after a signal the program exits if no
        batch arrives.
    Raises RuntimeError if a worker dies, or if no batch arrives within ten minutes.
    """
    settings = {"timeout": 5, "worker_init_fn": ignore_signals} if workers else {}
    settings |= {"num_workers": workers, "pin_memory": pin_memory}
    batches = iter(torch.utils.data.DataLoader(dataset, None, sampler=steps, **settings))
    waited = 0
    while True:
        try:
            yield next(batches)
            waited = 0
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            if stop and stop.number:
                with contextlib.suppress(OSError):  # the terminal, or tee, may be gone
                    print("stopped while waiting for a batch; the same command resumes", flush=True)
                raise SystemExit(128 + stop.number) from None
            waited += settings["timeout"]
            if waited >= BATCH_TIMEOUT:
                causes = "a stuck disk, or too little shared memory for the workers"
                raise RuntimeError(f"no batch for {waited} s: {causes}") from None


def ignore_signals(worker):
    """For workers: signals reach them too, but the main process needs them to finish its step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # as program.SIGNALS
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def check_shared_memory(batch_bytes, workers):
    """Raises ValueError if /dev/shm is too small for the batches that workers prepare."""
    needed = 2 * workers * batch_bytes  # DataLoader's prefetch_factor is 2
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if needed > free:
        sizes = f"{needed / 1e6:.0f} MB in /dev/shm, {free / 1e6:.0f} MB are free"
        remedy = f"use fewer, or docker run --shm-size={needed / 1e6 + 64:.0f}m"
        raise ValueError(f"{workers} workers need {sizes}; {remedy}")


# ------------------------------------------------------------------ reading


def resampled_length(samples, rate):
    """Length at 16 kHz of `samples` at `rate` Hz, rounded up.

    Raises ValueError for rates whose greatest common divisor with 16000 is below 25: the
    resampling filter of some, such as 11127 Hz, takes gigabytes.
    """
    if math.gcd(rate, SAMPLE_RATE) < 25:
        raise ValueError(f"a rate of {rate} Hz: resample it to 16000")
    return -(-samples * SAMPLE_RATE // rate)


@contextlib.contextmanager
def open_audio(path):
    """The SoundFile of a path. Raises ValueError if it cannot be decoded, here or while reading."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # bytes: a path may not be UTF-8
            yield file
    except soundfile.SoundFileError as error:
        os.stat(path)  # OSError if there is no such file
        reason = getattr(error, "error_string", error)  # of damaged MP3: "File does not exist"
        raise ValueError(f"cannot be decoded (libsndfile: {reason})") from None


def read_audio(path, start=0, samples=None, file_samples=None):
    """(samples,) float32, channels averaged, from sample `start` on; at 16 kHz.

    Of a file at another rate, only the samples and the resampling filter's margin are read.
    file_samples: expected length of the file, or None.
    Raises one of UNREADABLE if the file cannot be read, has changed its length, ends too early
    or has samples that are not finite.
    """
    with open_audio(path) as file:
        rate = file.samplerate
        length = resampled_length(file.frames, rate)
        if file_samples not in (None, length):
            raise ValueError(f"has {length} samples at 16 kHz, expected {file_samples}")
        if samples is None:
            samples = length - start
        divisor = math.gcd(rate, SAMPLE_RATE)
        # Every `down` samples of the file become `up`; the filter is shorter than ten such blocks.
        up, down = SAMPLE_RATE // divisor, rate // divisor
        # A frame of an MP3 may need the nine before it, of 1152 samples each.
        margin = 10 + (12_000 // down if file.format == "MP3" else 0)
        first_block = max(0, start // up - margin)
        end_block = (start + samples) // up + 11
        offset = min(first_block * down, file.frames)
        if file.seekable():
            file.seek(offset)
        else:  # such as GSM 6.10, whose frames can only be read in order
            file.read(offset)
        audio = file.read((end_block - first_block) * down, dtype="float32", always_2d=True)
    audio = torch.from_numpy(audio.mean(axis=1))
    if rate != SAMPLE_RATE and len(audio):
        expected = resampled_length(len(audio), rate)
        # torchaudio rounds the length in float32: without padding, it may be too short.
        padded = torch.nn.functional.pad(audio, (0, 10 * down))
        audio = torchaudio.functional.resample(padded, rate, SAMPLE_RATE)[:expected]
    audio = audio[start - first_block * up :][:samples]
    if len(audio) < samples:
        raise ValueError(f"ends after {start + len(audio)} of {start + samples} samples")
    if not torch.isfinite(audio).all():
        raise ValueError("has samples that are not finite")
    return audio
