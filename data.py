"""Audio files to batches of waveforms: utterances, batches, reading, finding files.

Works with torch, torchaudio, numpy and soundfile alone. All lengths are samples at 16 kHz.
"""

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
UNREADABLE = (soundfile.SoundFileError, OSError, ValueError, TypeError)  # reading audio or a target


# ------------------------------------------------------------------ utterances


class Corpus:
    """Utterances: audio files, or pieces of long files.

    root: folder that paths are relative to; paths: the file per utterance.
    starts, samples: (utterances,) int64, first sample in the file, and length.
    skipped: {path: reason} of the files that were found but cannot be used.
    pieces: the paths of files in several utterances; other files must have their listed length.
    """

    def __init__(self, root, paths, starts, samples, skipped=(), pieces=()):
        self.root, self.paths, self.skipped = root, list(paths), dict(skipped)
        self.starts = np.asarray(starts, np.int64)
        self.samples = np.asarray(samples, np.int64)
        self.files, self.pieces = set(self.paths), set(pieces)

    def __len__(self):
        return len(self.paths)

    def __str__(self):
        return f"{len(self.files):,} files in {len(self):,} utterances, {self.hours():.2f} hours"

    def hours(self):
        return self.samples.sum() / SAMPLE_RATE / 3600

    def part(self, indices):
        """The Corpus of some of the utterances."""
        paths = [self.paths[i] for i in indices]
        starts, samples = self.starts[indices], self.samples[indices]
        return Corpus(self.root, paths, starts, samples, pieces=self.pieces)

    def read(self, i, start=0, samples=None):
        """Samples of utterance i, (samples,) float32. Raises as read_audio does."""
        if samples is None:
            samples = int(self.samples[i]) - start
        file_samples = None if self.paths[i] in self.pieces else int(self.samples[i])
        path = os.path.join(self.root, self.paths[i])
        return read_audio(path, int(self.starts[i]) + start, samples, file_samples)


# ------------------------------------------------------------------ batches


class TrainBatches(torch.utils.data.Dataset):
    """One item per training step: this rank's share of a batch of crops of one length.

    Nothing is padded: a batch has utterances of similar length, cropped to the shortest of them.
    Utterances, order and crops depend on seed, epoch and batch size only, not on the number of
    ranks or workers, and any step can be computed without the steps before it.

    batch_size: utterances per step, over all ranks. noise: a Noise, for "noisy" waveforms too.
    Set `cache` to a cache.Cache of targets for their "values" and "scale" too.
    """

    cache = None

    def __init__(self, corpus, batch_size, seed=0, rank=0, world_size=1, noise=None):
        if batch_size > len(corpus):
            raise ValueError(f"a batch of {batch_size} is more than the {len(corpus)} utterances")
        self.corpus, self.batch_size, self.seed = corpus, batch_size, seed
        share = batch_size // world_size
        self.columns = range(rank * share, (rank + 1) * share)
        self.steps_per_epoch = len(corpus) // batch_size
        self.epoch, self.noise = None, noise

    def plan(self, epoch):
        """(utterances, crops, offsets) of an epoch.

        utterances: (steps, batch_size) indices; crops: (steps,) lengths in samples;
        offsets: (all utterances,) where each crop starts, from 0 (earliest) to 1 (latest).
        """
        rng = np.random.default_rng([self.seed, epoch])
        used = rng.permutation(len(self.corpus))[: self.steps_per_epoch * self.batch_size]
        # Sorted by length with 5% jitter: little is cropped, and batches differ between epochs.
        order = np.argsort(self.corpus.samples[used] * rng.uniform(0.95, 1.05, len(used)))
        utterances = rng.permutation(used[order].reshape(-1, self.batch_size))
        crops = self.corpus.samples[utterances].min(axis=1)
        rounded = crops // CROP_MULTIPLE * CROP_MULTIPLE
        crops = np.where(rounded > 0, rounded, crops)  # shorter crops stay as they are
        return utterances, crops, rng.random(len(self.corpus))

    def __getitem__(self, step):
        """This rank's share of the batch of a step, from 0.

        "waveforms": (share, samples), and what else crop() returns; "paths": [str];
        "skipped": {"audio": {path: reason}, "noise": {path: reason}} of unreadable files. An
        unreadable utterance is replaced by the next readable one of the batch; ValueError if there
        is none.
        """
        epoch, row = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.planned = epoch, self.plan(epoch)
        utterances, crops, offsets = self.planned
        examples, paths, skipped = [], [], {"audio": {}, "noise": {}}
        for column in self.columns:
            # The utterance of this column; if it is unreadable, the next one of the row.
            for i in np.roll(utterances[row], -column).tolist():
                try:
                    crop = self.crop(epoch, i, offsets[i], int(crops[row]))
                except UNREADABLE as error:
                    skipped["audio"][self.corpus.paths[i]] = str(error)
                    continue
                skipped["noise"] |= crop.pop("skipped_noise", {})
                examples.append(crop)
                paths.append(self.corpus.paths[i])
                break
            else:
                path, reason = next(iter(skipped["audio"].items()))
                raise ValueError(f"step {step + 1}: no utterance is readable: {path}: {reason}")
        batch = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        return batch | {"paths": paths, "skipped": skipped}

    def crop(self, epoch, i, offset, samples):
        """Tensors by name for one crop of utterance i; it starts where a frame starts."""
        start = int(offset * (self.corpus.samples[i] - samples + 1))
        start = start // FRAME_SAMPLES * FRAME_SAMPLES
        crop = {"waveforms": self.corpus.read(i, start, samples)}
        if self.noise:
            seeds = (self.seed, epoch, i)
            crop["noisy"], crop["skipped_noise"] = self.noise.mix(crop["waveforms"], *seeds)
        if self.cache:
            crop |= self.cache.crop(i, start, samples)
        return crop


class Noise:
    """Noise to mix into speech, for students of noisy speech.

    corpus: the Corpus of the noise. snr: [lowest, highest] signal-to-noise ratio of a waveform in
        dB, drawn uniformly, or [one]. probability: that noise is added to a waveform.
    Source: the noisy training of DistilHuBERT in Huang et al. 2022, arXiv:2210.07978.
    """

    def __init__(self, corpus, snr, probability=1.0):
        if len(snr) > 2 or not -100 <= snr[0] <= snr[-1] <= 100:
            raise ValueError(f"a signal-to-noise ratio of {snr} dB: give -100 to 100, or low,high")
        self.corpus, self.snr, self.probability = corpus, (snr[0], snr[-1]), probability

    def mix(self, waveform, *seeds):
        """((samples,) with a random stretch of noise added, {path: reason} of unreadable noise).

        The seeds alone determine the stretch. In place of an unreadable file, the next one is used.
        Noise that is shorter than the waveform is repeated; a silent stretch adds nothing.
        Raises ValueError if no noise is readable.
        """
        rng = np.random.default_rng(seeds)
        if rng.random() >= self.probability:
            return waveform, {}
        first, skipped = int(rng.integers(len(self.corpus))), {}
        for number in range(len(self.corpus)):
            i = (first + number) % len(self.corpus)
            start = int(rng.integers(max(1, self.corpus.samples[i] - len(waveform) + 1)))
            length = min(len(waveform), int(self.corpus.samples[i]))
            try:
                noise = self.corpus.read(i, start, length)
                break
            except UNREADABLE as error:
                skipped[self.corpus.paths[i]] = str(error)
        else:
            path, reason = next(iter(skipped.items()))
            raise ValueError(f"no noise is readable: {path}: {reason}")
        if length < len(waveform):
            noise = noise.roll(int(rng.integers(length)))
            noise = noise.repeat(-(-len(waveform) // length))[: len(waveform)]
        snr = torch.tensor(rng.uniform(*self.snr))
        if not noise.square().sum():  # silent, or so faint that its energy is 0 in float32
            return waveform, skipped
        return torchaudio.functional.add_noise(waveform, noise, snr).to(waveform.dtype), skipped


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
                print("stopped while waiting for a batch; the same command resumes", flush=True)
                raise SystemExit(128 + stop.number) from None
            waited += settings["timeout"]
            if waited >= BATCH_TIMEOUT:
                causes = "a stuck disk, or little shared memory: docker --shm-size, or --workers 0"
                raise RuntimeError(f"no batch for {waited} s: {causes}") from None


def ignore_signals(worker):
    """For workers: signals reach them too, but the main process needs them to finish its step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # as program.SIGNALS
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def check_shared_memory(batch_bytes, workers):
    """Raises ValueError if /dev/shm is too small for the batches that workers prepare."""
    needed = 2 * workers * batch_bytes  # DataLoader's prefetch_factor is 2
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if needed > free:
        sizes = f"{needed / 1e6:.0f} MB in /dev/shm, {free / 1e6:.0f} MB are free"
        remedy = f"use fewer, or docker run --shm-size={needed / 1e6 + 64:.0f}m"
        raise ValueError(f"--workers {workers} need {sizes}; {remedy}")


# ------------------------------------------------------------------ reading


def resampled_length(samples, rate):
    """Length at 16 kHz of `samples` at `rate` Hz, rounded up.

    Raises ValueError for rates whose greatest common divisor with 16000 is below 25: the
    resampling filter of some, such as 11127 Hz, takes gigabytes.
    """
    if math.gcd(rate, SAMPLE_RATE) < 25:
        raise ValueError(f"a rate of {rate} Hz: resample it to 16000")
    return -(-samples * SAMPLE_RATE // rate)


def read_audio(path, start=0, samples=None, file_samples=None):
    """(samples,) float32, channels averaged, from sample `start` on; at 16 kHz.

    Of a file at another rate, only the samples and the resampling filter's margin are read.
    file_samples: expected length of the file, or None.
    Raises one of UNREADABLE if the file cannot be read, has changed its length, ends too early
    or has samples that are not finite.
    """
    with soundfile.SoundFile(os.fsencode(path)) as file:
        rate = file.samplerate
        length = resampled_length(file.frames, rate)
        if file_samples not in (None, length):
            raise ValueError(f"has {length} samples at 16 kHz, expected {file_samples}")
        if samples is None:
            samples = length - start
        divisor = math.gcd(rate, SAMPLE_RATE)
        # Every `down` samples of the file become `up`; the filter is shorter than ten such blocks.
        up, down = SAMPLE_RATE // divisor, rate // divisor
        first_block = max(0, start // up - 10)
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
