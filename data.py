"""Audio to batches of waveforms: scanning, reading, cutting, and a synthetic corpus to try things on.

Works alone, with torch, torchaudio, numpy and soundfile.
"""

import concurrent.futures
import contextlib
import hashlib
import math
import os
import sys
import time

import numpy as np
import soundfile
import torch
import torchaudio

SAMPLE_RATE = 16000
SHORTEST = 400  # samples: the receptive field of one frame
GRID = 3200  # samples: batches are cut to a multiple of this, so that only a few shapes occur
LIBRISPEECH_960 = ("train-clean-100", "train-clean-360", "train-other-500")
EXTENSIONS = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"} | {".aif", ".oga", ".opus"}


# ---------------------------------------------------------------- which files


class Corpus:
    """Utterances and their lengths: what a manifest says.

    root: folder that the paths are relative to; paths: list of str; samples: (utterances,) int64 at 16 kHz.
    left_out: {path: reason} of the files that cannot be used.
    """

    def __init__(self, root, paths, samples):
        self.root, samples = root, np.asarray(samples, np.int64)
        usable = samples >= SHORTEST
        self.paths = [path for path, good in zip(paths, usable) if good]
        self.samples = samples[usable]
        self.left_out = {
            paths[i]: "cannot be read" if samples[i] <= 0 else f"{samples[i]} samples, fewer than {SHORTEST}"
            for i in np.flatnonzero(~usable)
        }
        self.unreadable = int((samples <= 0).sum())
        check_left_out(self.unreadable, len(paths), root)
        if not self.paths:
            raise ValueError(f"{root}: no audio to train on")

    def __len__(self):
        return len(self.paths)

    def part(self, places):
        """The Corpus of some of the utterances, in the order of their places."""
        return Corpus(self.root, [self.paths[place] for place in places], self.samples[places])

    def hours(self):
        return self.samples.sum() / SAMPLE_RATE / 3600

    def fingerprint(self):
        """Changes with any utterance's path or length, so that a resume notices other data."""
        digest = hashlib.sha256("\n".join(self.paths).encode("utf-8", "surrogateescape"))
        digest.update(self.samples.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def check_left_out(unreadable, total, where):
    """Raises ValueError where more than 1% of the files cannot be read: then it is not the files."""
    if unreadable > 0.01 * total:
        raise ValueError(f"{where}: {unreadable} of {total} audio files cannot be read, over 1%; is the copy whole?")


def find_corpus(data, splits=LIBRISPEECH_960):
    """The Corpus of a folder's sub-folders `splits`, or of a fairseq manifest.

    data: a folder, or a `.tsv` whose first line is the root folder and every other one `path<tab>samples`.
        A folder is scanned once, the headers read in threads, and kept as such a manifest in torch.hub's cache: it
        is scanned again when a folder in it has changed. One process a machine scans while the others wait.
    splits: sub-folders of `data`; "." is the folder itself.
    Raises FileNotFoundError and ValueError with one line.
    """
    if str(data).endswith(".tsv"):
        if not os.path.isfile(data):
            raise FileNotFoundError(f"{data}: no such manifest; give --data a folder of audio or a .tsv")
        return Corpus(*read_manifest(data))
    folders = [os.path.join(data, split) for split in splits]
    if not os.path.isdir(data):
        raise FileNotFoundError(f"{data}: no such data folder; give --data, or download LibriSpeech as README says")
    for folder in folders:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such split; give --splits the sub-folders of {data} to use")

    root = os.path.realpath(data)
    name = hashlib.sha256("\n".join([root, *splits]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    cache = os.path.join(torch.hub.get_dir(), "ekd-manifests")
    os.makedirs(cache, exist_ok=True)
    manifest = os.path.join(cache, f"{os.path.basename(root)}-{name}.tsv")
    with locked(manifest + ".lock"):
        if not _is_current(manifest, root, splits):
            started = time.time()
            paths = sorted({path for split in splits for path in _audio_files(root, split)})
            if not paths:
                raise ValueError(f"{data}: no audio files in {', '.join(splits)}")
            write_manifest(manifest, root, paths, read_lengths(root, paths))
            os.utime(manifest, (started, started))  # anything that changed during the scan counts as newer
    return Corpus(*read_manifest(manifest))


def read_manifest(path):
    """(root, paths, samples) of a fairseq manifest. Raises ValueError naming the line that is not `path<tab>samples`."""
    paths, samples = [], []
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        root = file.readline().rstrip("\r\n")
        for number, line in enumerate(file, start=2):
            name, tab, count = line.rstrip("\r\n").rpartition("\t")
            if not tab or not count.isdigit():
                raise ValueError(f"{path}, line {number}: not 'path<tab>samples' but {line.strip()[:60]!r}")
            paths.append(name)
            samples.append(int(count))
    if not paths:
        raise ValueError(f"{path}: an empty manifest")
    return root, paths, samples


def write_manifest(path, root, paths, samples):
    """Writes a fairseq manifest; a file that cannot be read has 0 samples. samples: at 16 kHz."""
    with open(path + ".partial", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(root + "\n")
        file.writelines(f"{name}\t{count}\n" for name, count in zip(paths, samples))
    os.replace(path + ".partial", path)


def files_under(root, folder):
    """Paths relative to `root` of all files under its sub-folder; folders behind links too, each once."""
    seen = set()
    for place, folders, names in os.walk(os.path.join(root, folder), followlinks=True):
        folders[:] = [f for f in folders if not _seen(os.path.join(place, f), seen)]
        for name in names:
            yield os.path.normpath(os.path.join(os.path.relpath(place, root), name))


def _audio_files(root, split):
    for path in files_under(root, split):
        name = os.path.basename(path)
        audio = os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        if audio and "\n" not in path:  # a manifest has one path a line
            yield path


def _seen(folder, seen):
    real = os.path.realpath(folder)
    known = real in seen
    seen.add(real)
    return known


def _is_current(manifest, root, splits):
    """Whether no folder has changed since the manifest was written: a new or removed file changes its folder's time."""
    if not os.path.exists(manifest):
        return False
    written = os.path.getmtime(manifest)
    with open(manifest, encoding="utf-8", errors="surrogateescape") as file:
        file.readline()
        folders = {os.path.dirname(line.rpartition("\t")[0]) for line in file}
    folders |= {os.path.normpath(split) for split in splits}
    for folder in list(folders):
        while os.path.dirname(folder) and folder not in splits:
            folder = os.path.dirname(folder)
            folders.add(folder)
    try:
        return all(os.stat(os.path.join(root, folder)).st_mtime <= written for folder in folders)
    except OSError:
        return False


def read_lengths(root, paths):
    """Samples at 16 kHz of each file, from its header; 0 where it cannot be read."""

    def length(path):
        try:
            info = soundfile.info(os.path.join(root, path))
            return resampled_length(info.frames, info.samplerate)
        except (soundfile.SoundFileError, OSError, ValueError, TypeError):
            return 0

    # A line that counts up on a terminal; in a log, a new line now and then.
    pause, start, end = (0.5, "\r", "") if sys.stderr.isatty() else (20, "", "\n")
    lengths, shown = [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for samples in pool.map(length, paths):
            lengths.append(samples)
            if time.monotonic() - shown > pause:
                shown = time.monotonic()
                counted = f"{len(lengths):,} of {len(paths):,} files"
                print(f"{start}scanning {root}: {counted}", end=end, file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(f"\rscanned {root}: {len(paths):,} files   ", file=sys.stderr)
    return lengths


@contextlib.contextmanager
def locked(path):
    """One process at a time; the lock goes with its holder, however that ends."""
    import fcntl  # not on Windows, where the rest of this file works

    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def claim(folder):
    """Keeps other runs out of a folder until this process ends, however that is, or the returned file is closed.

    Raises ValueError where another process has claimed it.
    """
    import fcntl  # not on Windows, where the rest of this file works

    file = open(os.path.join(folder, "lock"), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held on by a loader's orphaned processes
    except (BlockingIOError, PermissionError):  # what POSIX allows for "held by another"
        file.close()
        raise ValueError(f"{folder}: another run is at work in it; wait for its end, or give another --out") from None
    except OSError:
        pass  # a file system without locks: other runs cannot be told
    return file


# ---------------------------------------------------------------- reading


def resampled_length(samples, rate):
    """Samples at 16 kHz of `samples` at `rate` Hz, as torchaudio's resample gives them."""
    return -(-samples * SAMPLE_RATE // rate)


def read_audio(path, start=0, samples=None, expected=None):
    """(samples,) float32 at 16 kHz, channels averaged, from sample `start` on (both counted at 16 kHz).

    expected: how long the file was when it was scanned, in samples at 16 kHz.
    At 16 kHz only what is asked for is read from disk; other rates are read whole and resampled.
    Raises soundfile.SoundFileError or OSError where the file cannot be read, ValueError where it ends too early, is
    not as long as expected, or holds numbers that are not finite.
    """
    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
        if expected is not None and resampled_length(file.frames, rate) != expected:
            raise ValueError(f"has changed: {resampled_length(file.frames, rate)} samples, {expected} before")
        if rate == SAMPLE_RATE:
            file.seek(min(start, file.frames))
            audio = file.read(-1 if samples is None else samples, dtype="float32", always_2d=True)
        elif math.gcd(rate, SAMPLE_RATE) < 25:  # the resampling filter grows to gigabytes
            raise ValueError(f"a sample rate of {rate} Hz")
        else:
            audio = file.read(dtype="float32", always_2d=True)
    audio = torch.from_numpy(audio.mean(axis=1))
    if rate != SAMPLE_RATE:
        audio = torchaudio.functional.resample(audio, rate, SAMPLE_RATE) if len(audio) else audio
        audio = audio[start : None if samples is None else start + samples]
    if samples is not None and len(audio) < samples:
        raise ValueError(f"ends after {start + len(audio)} of {start + samples} samples")
    if not torch.isfinite(audio).all():
        raise ValueError("holds samples that are not finite")
    return audio


# ---------------------------------------------------------------- batches


class Batches(torch.utils.data.Dataset):
    """One item a step: this process's share of the step's batch, every utterance cut to the same length.

    Nothing is padded: utterances of similar length come together and are cut to the shortest of them, rounded down
    to a multiple of 3,200 samples. Which utterances make up a step, in which order, and where each is cut depend on
    seed, epoch and utterance alone, never on the number of processes or workers; step n can be had without the
    steps before it, so that a resume reads nothing twice.

    batch_size: utterances a step over all processes; max_samples: longest cut.
    Raises ValueError where the batch does not divide over the processes or is larger than the corpus.
    """

    def __init__(self, corpus, batch_size, max_samples, seed=0, rank=0, world_size=1):
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size} does not divide over {world_size} processes")
        if batch_size > len(corpus):
            raise ValueError(f"--batch-size {batch_size} is more than the {len(corpus)} utterances there are")
        self.corpus, self.batch_size, self.max_samples, self.seed = corpus, batch_size, max_samples, seed
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)
        self.steps_an_epoch = len(corpus) // batch_size
        self.epoch = None

    def plan(self, epoch):
        """(utterances, cuts, positions) of an epoch.

        utterances: (steps, batch_size) indices into the corpus; cuts: (steps,) samples of the step's waveforms;
        positions: (utterances of the corpus,) where each is cut, 0 at its start, 1 as late as it fits.
        """
        rng = np.random.default_rng([self.seed, epoch])
        used = rng.permutation(len(self.corpus))[: self.steps_an_epoch * self.batch_size]
        lengths = np.minimum(self.corpus.samples[used], self.max_samples)
        # Sorted by length give or take 5%: little is cut off, and no two epochs have the same batches.
        order = np.argsort(lengths * rng.uniform(0.95, 1.05, len(used)), kind="stable")
        utterances = rng.permutation(used[order].reshape(self.steps_an_epoch, self.batch_size))
        shortest = np.minimum(self.corpus.samples[utterances].min(axis=1), self.max_samples)
        cuts = np.where(shortest >= GRID, shortest // GRID * GRID, shortest)
        return utterances, cuts, rng.random(len(self.corpus))

    def __getitem__(self, step):
        """{"waveforms": (share of the batch, samples), "paths": [str], "left_out": {path: reason}} of a step, from 0.

        An utterance that cannot be read is silent, and named in left_out.
        """
        epoch, row = divmod(step, self.steps_an_epoch)
        if self.epoch != epoch:
            self.epoch, self.planned = epoch, self.plan(epoch)
        utterances, cuts, positions = self.planned
        mine, cut = utterances[row, self.share], int(cuts[row])
        paths = [self.corpus.paths[i] for i in mine]
        waveforms, left_out = torch.zeros(len(mine), cut), {}
        for waveform, path, i in zip(waveforms, paths, mine):
            start = int(positions[i] * (self.corpus.samples[i] - cut + 1))
            try:
                waveform.copy_(
                    read_audio(os.path.join(self.corpus.root, path), start, cut, int(self.corpus.samples[i]))
                )
            except (soundfile.SoundFileError, OSError, ValueError) as error:
                left_out[path] = str(error) or type(error).__name__
        return {"waveforms": waveforms, "paths": paths, "left_out": left_out}


def load_batches(batches, first, last, workers=0, pin_memory=False):
    """Iterates over the items of steps first..last-1, read ahead by `workers` processes; pinned for a GPU if asked."""
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(worker):
    # Ctrl-C and SIGTERM reach every process of a job; the parent finishes its step first, and needs the batch.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------- a synthetic corpus

# ARPAbet phonemes: (formants in Hz, voicing 0..1, noise band in Hz or None, seconds)
PHONEMES = {
    "AA": ((730, 1090, 2440), 1.0, None, 0.16),
    "IY": ((270, 2290, 3010), 1.0, None, 0.15),
    "UW": ((300, 870, 2240), 1.0, None, 0.15),
    "EH": ((530, 1840, 2480), 1.0, None, 0.14),
    "OW": ((500, 900, 2400), 1.0, None, 0.16),
    "M": ((250, 1100, 2100), 0.5, None, 0.08),
    "N": ((250, 1500, 2400), 0.5, None, 0.08),
    "L": ((360, 1000, 2700), 0.7, None, 0.08),
    "S": ((300, 1600, 2600), 0.0, (4500, 7500), 0.11),
    "SH": ((300, 1700, 2400), 0.0, (2200, 5000), 0.11),
    "F": ((300, 1200, 2300), 0.0, (1200, 7000), 0.09),
    "Z": ((300, 1600, 2600), 0.4, (4500, 7500), 0.09),
}
WORDS = {
    "SEE": "S IY1", "SHE": "SH IY1", "FEE": "F IY1", "KNEE": "N IY1", "ME": "M IY1", "ZOO": "Z UW1", "SHOE": "SH UW1",
    "LOW": "L OW1", "NO": "N OW1", "SHOW": "SH OW1", "SO": "S OW1", "MOON": "M UW1 N", "NOON": "N UW1 N",
    "SOON": "S UW1 N", "FOOL": "F UW1 L", "LESS": "L EH1 S", "MESS": "M EH1 S", "SHELL": "SH EH1 L", "FELL": "F EH1 L",
    "SEAL": "S IY1 L", "MEAL": "M IY1 L", "FOAM": "F OW1 M", "LOAN": "L OW1 N", "NOSE": "N OW1 Z", "MA": "M AA1",
    "LA": "L AA1", "SHAH": "SH AA1",
}  # fmt: skip
DEMO_SPLITS = {"train-clean-100": (132, 6), "dev-clean": (16, 2), "test-clean": (16, 2)}  # utterances, speakers


def write_demo_corpus(folder, seed=0):
    """Writes about 5 minutes of formant-synthesised words in LibriSpeech's layout; the same bytes for the same seed.

    folder gets {train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/*.flac with .trans.txt, and lexicon.txt
    (WORD<tab>PHONEMES, ARPAbet with stress). No speaker is in two splits.
    """
    rng = np.random.default_rng(seed)
    speaker = 100
    for split, (utterances, speakers) in DEMO_SPLITS.items():
        for pitch in np.linspace(90, 230, speakers):
            speaker += 1
            throat = 0.85 + 0.3 * pitch / 230 + rng.uniform(-0.03, 0.03)  # higher voices have higher formants
            place = os.path.join(folder, split, str(speaker), "1")
            os.makedirs(place, exist_ok=True)
            lines = []
            for number in range(utterances // speakers):
                words = [str(word) for word in rng.choice(list(WORDS), rng.integers(3, 8))]
                name = f"{speaker}-1-{number:04d}"
                audio = _say(words, pitch * rng.uniform(0.93, 1.07), throat, rng)
                soundfile.write(os.path.join(place, name + ".flac"), audio, SAMPLE_RATE, subtype="PCM_16")
                lines.append(f"{name} {' '.join(words)}\n")
            with open(os.path.join(place, f"{speaker}-1.trans.txt"), "w", encoding="utf-8") as file:
                file.writelines(lines)
    with open(os.path.join(folder, "lexicon.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{word}\t{phonemes}\n" for word, phonemes in sorted(WORDS.items()))


def _say(words, pitch, throat, rng):
    """Formant synthesis: harmonics of the pitch weighted by three resonances, and bands of noise. (samples,) int16."""
    silence = ((500, 1500, 2500), 0.0, None)
    segments = [(*silence, 0.08)]
    for word in words:
        for phoneme in WORDS[word].split():
            *sound, seconds = PHONEMES[phoneme.rstrip("012")]
            segments.append((*sound, seconds * rng.uniform(0.8, 1.25)))
        segments.append((*silence, rng.uniform(0.02, 0.09)))

    control = 200  # the resonances move at 200 Hz
    counts = [max(1, round(seconds * control)) for *_, seconds in segments]
    formants = np.repeat(np.array([f for f, *_ in segments], float) * throat, counts, axis=0)
    voicing = np.repeat([v for _, v, *_ in segments], counts)
    smooth = np.hanning(9) / np.hanning(9).sum()  # 40 ms from one phoneme to the next
    formants = np.stack([np.convolve(np.pad(f, 4, mode="edge"), smooth, "valid") for f in formants.T], axis=1)
    voicing = np.convolve(np.pad(voicing, 4), smooth, "valid")

    step = SAMPLE_RATE // control
    at = np.arange(len(voicing) * step) / step
    frames = np.arange(len(voicing))
    glide = pitch * np.linspace(1.08, 0.92, len(at)) * (1 + 0.015 * np.sin(2 * np.pi * 4.5 * at / control))
    phase = 2 * np.pi * np.cumsum(glide) / SAMPLE_RATE
    audio, now, before, twice = np.zeros(len(at)), np.sin(phase), np.zeros(len(at)), 2 * np.cos(phase)
    for harmonic in range(1, int(4000 / pitch) + 1):
        distance = (harmonic * pitch - formants) / (0.5 * np.array([80, 110, 160]))
        loudness = voicing * (np.array([1, 0.6, 0.3]) / np.sqrt(1 + distance**2)).sum(axis=1) / harmonic**0.5
        audio += np.interp(at, frames, loudness) * now
        now, before = twice * now - before, now  # sin(k + 1)x = 2 cos x sin kx - sin(k - 1)x

    begin = 0
    for (_, _, band, _), count in zip(segments, counts):
        length = count * step
        if band:
            spectrum = np.fft.rfft(rng.standard_normal(length))
            pitch_of_bin = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
            spectrum[(pitch_of_bin < band[0]) | (pitch_of_bin > band[1])] = 0
            audio[begin : begin + length] += 0.8 * np.fft.irfft(spectrum, length) * np.hanning(length)
        begin += length
    audio = audio / np.abs(audio).max() * rng.uniform(0.3, 0.7) + 0.001 * rng.standard_normal(len(audio))
    return (audio * 32767).astype(np.int16)
