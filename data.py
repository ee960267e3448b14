"""Audio to batches of waveforms: utterances first, their batches, reading, and last how a folder or manifest is found.

Batches come from a Corpus, however that was made. Works with safe_files.py beside it, torch, torchaudio, numpy and
soundfile.
"""

import concurrent.futures
import contextlib
import hashlib
import math
import os
import re
import signal
import sys
import time

import numpy as np
import soundfile
import torch
import torchaudio

from safe_files import locked, write_text

SAMPLE_RATE = 16000
SHORTEST = 400  # samples: the receptive field of one frame
GRID = 3200  # samples: batches are cut to a multiple of this, so that only a few shapes occur
LIBRISPEECH_960 = ("train-clean-100", "train-clean-360", "train-other-500")
EXTENSIONS = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"} | {".aif", ".oga", ".opus"}


# ---------------------------------------------------------------- utterances


class Corpus:
    """Utterances and their lengths: what a manifest says.

    root: folder that the paths are relative to; paths: list of str; samples: (utterances,) int64 at 16 kHz.
    where: what messages name, the root if nothing else.
    left_out: {path: reason} of the files that cannot be used.
    """

    def __init__(self, root, paths, samples, where=None):
        self.root, samples = root, np.asarray(samples, np.int64)
        usable = samples >= SHORTEST
        self.paths = [path for path, good in zip(paths, usable) if good]
        self.samples = samples[usable]
        self.left_out = {
            paths[i]: "cannot be read" if samples[i] <= 0 else f"{samples[i]} samples, fewer than {SHORTEST}"
            for i in np.flatnonzero(~usable)
        }
        self.unreadable = int((samples <= 0).sum())
        check_left_out(self.unreadable, len(paths), where or root)
        if not self.paths:
            raise ValueError(f"{where or root}: no audio to train on")

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
        raise ValueError(f"{where}: {unreadable} of {total} audio files cannot be read, over 1%; mend or remove them")


# ---------------------------------------------------------------- batches


class Batches(torch.utils.data.Dataset):
    """One item a step: this process's share of the step's batch, every utterance cut to the same length.

    Nothing is padded: utterances of similar length come together and are cut to the shortest of them, rounded down
    to a multiple of 3,200 samples. Which utterances make up a step, in which order, and where each is cut depend on
    seed, epoch and utterance alone, never on the number of processes or workers; step n can be had without the
    steps before it, so that a resume reads nothing twice.

    batch_size: utterances a step over all processes; max_samples: longest cut; grid: cuts begin at its multiples.
    Raises ValueError where the batch does not divide over the processes or is larger than the corpus.
    """

    def __init__(self, corpus, batch_size, max_samples, seed=0, rank=0, world_size=1, grid=1):
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} does not divide over {world_size} processes")
        if batch_size > len(corpus):
            raise ValueError(f"a batch of {batch_size} is more than the {len(corpus)} utterances there are")
        self.corpus, self.batch_size, self.max_samples, self.seed = corpus, batch_size, max_samples, seed
        self.grid = grid
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

    def crops(self, step):
        """(utterances, their first samples, samples of each) of this process's share of a step's batch."""
        epoch, row = divmod(step, self.steps_an_epoch)
        if self.epoch != epoch:
            self.epoch, self.planned = epoch, self.plan(epoch)
        utterances, cuts, positions = self.planned
        mine, cut = utterances[row, self.share], int(cuts[row])
        starts = (positions[mine] * (self.corpus.samples[mine] - cut + 1)).astype(int)
        return mine, (starts // self.grid * self.grid).tolist(), cut

    def __getitem__(self, step):
        """This process's share of a step's batch, steps counted from 0, as a dict.

        "waveforms": (share, samples); "paths": [str]; "readable": (share,) bool. An utterance that cannot be read is
        silent, and named in "left_out": {path: reason}.
        """
        mine, starts, cut = self.crops(step)
        paths = [self.corpus.paths[i] for i in mine]
        waveforms, left_out = torch.zeros(len(mine), cut), {}
        for waveform, path, i, start in zip(waveforms, paths, mine, starts):
            try:
                expected = int(self.corpus.samples[i])
                waveform.copy_(read_audio(os.path.join(self.corpus.root, path), start, cut, expected))
            except (soundfile.SoundFileError, OSError, ValueError) as error:
                left_out[path] = str(error) or type(error).__name__
        readable = torch.tensor([path not in left_out for path in paths])
        return {"waveforms": waveforms, "paths": paths, "readable": readable, "left_out": left_out}


def load_batches(batches, first, last, workers=0, pin_memory=False):
    """Iterates over the items of steps first..last-1, read ahead by `workers` processes; pinned for a GPU if asked.

    Raises RuntimeError, as torch does, where one of these processes dies, however that shows.
    """
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    return _watched(iter(loader))  # iter draws a random number: now, not at a moment that a seed is meant for


def _watched(loader):
    try:
        yield from loader
    except (OSError, EOFError) as error:  # memory that it shared went with it
        raise RuntimeError(f"DataLoader worker: {error or type(error).__name__}") from error


def _leave_signals_to_the_parent(worker):
    # Ctrl-C and SIGTERM reach every process of a job; the parent finishes its step first, and needs the batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------- reading


def resampled_length(samples, rate):
    """Samples at 16 kHz of `samples` at `rate` Hz, as torchaudio's resample gives them."""
    return -(-samples * SAMPLE_RATE // rate)


def _name(path):
    """As soundfile takes it: a name that is not UTF-8 too."""
    return os.fspath(path) if os.name == "nt" else os.fsencode(path)


def read_audio(path, start=0, samples=None, expected=None):
    """(samples,) float32 at 16 kHz, channels averaged, from sample `start` on (both counted at 16 kHz).

    expected: how long the file was when it was scanned, in samples at 16 kHz.
    At 16 kHz only what is asked for is read from disk; other rates are read whole and resampled.
    Raises soundfile.SoundFileError or OSError where the file cannot be read, ValueError where it ends too early, is
    not as long as expected, or holds numbers that are not finite.
    """
    with soundfile.SoundFile(_name(path)) as file:
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


# ---------------------------------------------------------------- finding utterances


def find_corpus(data, splits=LIBRISPEECH_960):
    """The Corpus of a folder's sub-folders `splits`, or of a fairseq manifest.

    data: a folder, or a `.tsv` whose first line is the root folder, from the manifest's own where it is relative, and
        every other one `path<tab>samples`. A folder's headers are read in threads, and the lengths kept as such a
        manifest in torch.hub's cache: only files that are new, have changed, or could not be read are looked at again.
        One process a machine scans while the others wait.
    splits: sub-folders of `data`; "." is the folder itself.
    Raises FileNotFoundError and ValueError with one line.
    """
    if str(data).endswith(".tsv"):
        if not os.path.isfile(data):
            raise FileNotFoundError(f"{data}: no such manifest; give a folder of audio or a .tsv")
        return Corpus(*read_manifest(data), where=data)
    folders = [os.path.join(data, split) for split in splits]
    if not os.path.isdir(data):
        raise FileNotFoundError(f"{data}: no such folder of audio; README says how LibriSpeech is downloaded")
    for folder in folders:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such split; the splits are sub-folders of {data}")

    root = os.path.realpath(data)
    name = hashlib.sha256("\n".join([root, *splits]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    cache = os.path.join(torch.hub.get_dir(), "ekd-manifests")
    os.makedirs(cache, exist_ok=True)
    manifest = os.path.join(cache, f"{os.path.basename(root)}-{name}.tsv")
    with locked(manifest + ".lock"):
        started, known = time.time(), _known_lengths(manifest, root)
        found = {path for split in splits for path in _audio_files(root, split)}
        unlisted = {path for path in found if "\n" in path or "\r" in path}  # a manifest has one path a line
        paths = sorted(found - unlisted)
        if not paths:
            raise ValueError(f"{data}: no audio files in {', '.join(splits)}")
        new = [path for path in paths if path not in known]
        known |= zip(new, read_lengths(root, new))
        corpus = Corpus(root, paths, [known[path] for path in paths], where=data)  # a scan that is refused is not kept
        if new:
            write_manifest(manifest, root, paths, [known[path] for path in paths])
            # What changed during the scan, by a clock that lags a little, counts as newer.
            os.utime(manifest, (started - 0.05, started - 0.05))
    corpus.left_out |= dict.fromkeys(sorted(unlisted), "a line break in its name")
    return corpus


def _known_lengths(manifest, root):
    """{path: samples} of the files in a kept manifest that could be read and have not changed since."""
    try:
        written, (_, paths, samples) = os.path.getmtime(manifest), read_manifest(manifest)
    except (OSError, ValueError):
        return {}

    def unchanged(part):
        found = {}
        for path, length in part:
            with contextlib.suppress(OSError):
                about = os.stat(os.path.join(root, path))
                if length > 0 and max(about.st_mtime, about.st_ctime) < written:
                    found[path] = length
        return found

    known, listed = {}, list(zip(paths, samples))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a network disk answers many questions at once
        for found in pool.map(unchanged, [listed[i : i + 1000] for i in range(0, len(listed), 1000)]):
            known |= found
    return known


def read_manifest(path):
    """(root, paths, samples) of a fairseq manifest. Raises ValueError naming the line that is not `path<tab>samples`."""
    paths, samples = [], []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        root = os.path.join(os.path.dirname(path), file.readline().rstrip("\r\n"))
        for number, line in enumerate(file, start=2):
            name, tab, count = line.rstrip("\r\n").rpartition("\t")
            if not tab or not re.fullmatch("[0-9]{1,15}", count):
                raise ValueError(f"{path}, line {number}: not 'path<tab>samples' but {line.strip()[:60]!r}")
            paths.append(name)
            samples.append(int(count))
    if not paths:
        raise ValueError(f"{path}: an empty manifest")
    return root, paths, samples


def write_manifest(path, root, paths, samples):
    """Writes a fairseq manifest; a file that cannot be read has 0 samples. samples: at 16 kHz."""
    lines = (f"{name}\t{count}\n" for name, count in zip(paths, samples))
    write_text(path, "".join([f"{root}\n", *lines]))


def read_lines(path):
    """(number from 1, line) of every line that is not empty. Raises FileNotFoundError and ValueError naming the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None


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
        if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
            yield path


def _seen(folder, seen):
    real = os.path.realpath(folder)
    known = real in seen
    seen.add(real)
    return known


def read_lengths(root, paths):
    """Samples at 16 kHz of each file, from its header; 0 where it cannot be read."""

    def length(path):
        try:
            info = soundfile.info(_name(os.path.join(root, path)))
            return resampled_length(info.frames, info.samplerate)
        except (soundfile.SoundFileError, OSError, ValueError, TypeError):
            return 0

    lengths, shown = [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for samples in pool.map(length, paths):
            lengths.append(samples)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"scanning {root}: {len(lengths):,} of {len(paths):,} files", file=sys.stderr, flush=True)
    return lengths
