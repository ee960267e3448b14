"""The audio of a run: finding files, and manifests, which list them. Lengths are at 16 kHz."""

import collections
import concurrent.futures
import hashlib
import os
import re
import warnings
from array import array

import numpy as np
import soundfile

import program
from data import MIN_SAMPLES, SAMPLE_RATE, UNREADABLE, open_audio, read_audio, resampled_length

LIBRISPEECH_960 = ("train-clean-100", "train-clean-360", "train-other-500")
EXTENSIONS = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"}
EXTENSIONS |= {".aif", ".oga", ".opus", ".snd", ".sph"}
UNSUPPORTED = {".m4a", ".aac", ".wma", ".mp4", ".webm", ".amr", ".3gp", ".ape", ".mka", ".wv"}
ROW = re.compile("([^\t]*)\t(?:([0-9]{1,15})\t)?([0-9]{1,15})")


class Corpus:
    """Utterances: audio files, or pieces of long files.

    root: folder that paths are relative to.
    rows: per utterance (path, samples) if it is a whole file, which must have this length, or
        (path, first sample, samples) if it is a piece of a file.
    skipped: {path: reason} of the files that were found but cannot be used.
    starts, samples: (utterances,) int64, first sample in the file, and length.
    whole: (utterances,) 1 for a whole file, 0 for a piece.
    """

    def __init__(self, root, rows, skipped=()):
        self.root, self.skipped = root, dict(skipped)
        # One array: reading Python strings in a forked worker copies their memory.
        self.text, numbers = bytearray(), array("q")
        for path, *start, length in rows:
            numbers.extend([len(self.text), start[0] if start else 0, length, not start])
            self.text += path.encode("utf-8", "surrogateescape") + b"\0"
        columns = np.frombuffer(numbers, np.int64).reshape(-1, 4).T.copy()
        self.offsets, self.starts, self.samples, self.whole = columns

    def __len__(self):
        return len(self.offsets)

    def __str__(self):
        return f"{self.file_count():,} files in {len(self):,} utterances, {self.hours():.2f} hours"

    def path(self, i):
        """The path of the file of utterance i."""
        start = self.offsets.item(i)
        return self.text[start : self.text.index(0, start)].decode("utf-8", "surrogateescape")

    def paths(self):
        """The paths of all utterances, one at a time."""
        return map(self.path, range(len(self)))

    def file_count(self):
        """The number of files."""
        hashes = np.fromiter(map(hash, self.paths()), np.int64, len(self))  # smaller than a set
        return len(np.unique(hashes))

    def hours(self):
        return self.samples.sum() / SAMPLE_RATE / 3600

    def part(self, indices):
        """The Corpus of some of the utterances; an index may be repeated."""
        part = Corpus(self.root, [])
        part.text = self.text
        for name in ("offsets", "starts", "samples", "whole"):
            setattr(part, name, getattr(self, name)[indices])
        return part

    def read(self, i, start=0, samples=None):
        """Samples of utterance i, (samples,) float32. Raises as read_audio does."""
        if samples is None:
            samples = int(self.samples[i]) - start
        file_samples = int(self.samples[i]) if self.whole[i] else None
        path = os.path.join(self.root, self.path(i))
        return read_audio(path, int(self.starts[i]) + start, samples, file_samples)


# ------------------------------------------------------------------ finding files


def find_corpus(data, splits=LIBRISPEECH_960, max_seconds=1e9):
    """The Corpus of a folder's sub-folders `splits`, or of a manifest (.tsv).

    Files longer than max_seconds become equal pieces of at most that; files shorter than a frame
    are skipped. "." as split is the whole folder. Raises FileNotFoundError and ValueError.
    """
    corpus = read_manifest(data) if str(data).endswith(".tsv") else scan(data, splits)
    longest = int(min(max_seconds, 1e9) * SAMPLE_RATE)
    if longest < 2 * MIN_SAMPLES:
        raise ValueError(f"pieces of {max_seconds} s are too short; at least 0.05")
    too_short = corpus.samples < MIN_SAMPLES
    for i in np.flatnonzero(too_short):
        corpus.skipped[corpus.path(i)] = f"{corpus.samples[i]} samples, shorter than a frame"
    counts = np.where(too_short, 0, -(-corpus.samples // longest))  # of pieces per utterance
    indices = np.repeat(np.arange(len(corpus)), counts)
    pieces = corpus.part(indices)
    if not pieces:
        raise ValueError(f"{data}: no audio of at least 25 ms")
    firsts = np.cumsum(counts) - counts  # row of the first piece, per utterance
    numbers = np.arange(len(indices)) - firsts[indices]  # of pieces, from 0 per utterance
    counts = counts[indices]
    first = numbers * pieces.samples // counts
    pieces.starts += first
    pieces.samples = (numbers + 1) * pieces.samples // counts - first
    pieces.whole &= counts == 1
    pieces.skipped = corpus.skipped
    return pieces


def scan(folder, splits):
    """The Corpus of the audio files under sub-folders of a folder, lengths from their headers."""
    root, paths = os.path.realpath(folder), list_audio(folder, splits)
    if not paths:
        raise ValueError(f"{folder}: no audio files in {', '.join(splits)}")
    lengths, unreadable = read_lengths(root, sorted(paths))
    check_skipped(unreadable, len(paths))
    return Corpus(root, lengths.items(), unreadable)


def list_audio(folder, splits):
    """The set of the paths of audio files under sub-folders of a folder, by their names alone."""
    root = os.path.realpath(folder)
    paths, unsupported = set(), collections.Counter()  # of endings
    progress = program.Progress(f"audio files in {folder}", total=None)
    for split in splits:
        if not os.path.isdir(os.path.join(root, split)):
            raise FileNotFoundError(f"{os.path.join(folder, split)}: no such folder")
        for path in files_under(root, split):
            ending = os.path.splitext(path)[1].lower()
            if ending in EXTENSIONS:
                paths.add(path)
            elif ending in UNSUPPORTED:
                unsupported[ending] += 1
            progress.show(len(paths))
    if unsupported:
        counts = ", ".join(f"{count} {ending}" for ending, count in unsupported.items())
        warnings.warn(f"{folder}: not read, convert to FLAC: {counts}")
    return paths


def files_under(root, folder):
    """Paths relative to `root` of all files under its sub-folder; links are followed.

    Names that begin with a dot are ignored, such as macOS's ._x.flac, and lost+found. Raises
    OSError for another folder that cannot be listed.
    """

    def refuse(error):
        raise error

    visited = set()
    top = os.path.join(root, folder)
    for place, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and name != "lost+found"]
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        relative = os.path.relpath(place, root)
        for name in names:
            if not name.startswith("."):
                yield name if relative == "." else os.path.join(relative, name)


def read_lengths(root, paths):
    """({path: samples} of the readable files, {path: reason} of the others), from headers."""

    def read_length(path):
        try:
            if re.search(r"[\t\r\n]", path):
                raise ValueError("a tab or line break in its name")
            with open_audio(os.path.join(root, path)) as file:
                # ffmpeg and others write a length of 0 or 2^63 - 1 to a pipe.
                if not 0 < file.frames < 10_000 * os.path.getsize(file.name):
                    raise ValueError(f"a length of {file.frames} in its header; encode it again")
                return resampled_length(file.frames, file.samplerate)
        except UNREADABLE as error:
            return str(error)

    lengths, unreadable = {}, {}
    progress = program.Progress("headers of audio files", len(paths))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # network disks have latency
        for start in range(0, len(paths), 1000):
            some = paths[start : start + 1000]
            for path, length in zip(some, pool.map(read_length, some)):
                if isinstance(length, str):
                    unreadable[path] = length
                else:
                    lengths[path] = length
            progress.show(start + len(some))
    return lengths, unreadable


# ------------------------------------------------------------------ manifests


def read_manifest(path, moved_root=None):
    """The Corpus of a fairseq manifest: a root folder, then lines of `path<tab>samples`.

    With three columns the middle one is the first sample of a piece of a file. A relative root is
    relative to the manifest; moved_root replaces the root if it is a folder.
    Raises FileNotFoundError and ValueError.
    """
    root = read_root(path)
    if moved_root and os.path.isdir(moved_root):
        root = os.path.realpath(moved_root)
    corpus = Corpus(root, read_rows(path))
    if not corpus:
        raise ValueError(f"{path}: an empty manifest")
    # Up to 100 files are checked: fairseq's wav2vec_manifest.py counts at the rate of the file.
    checked = range(0, len(corpus), len(corpus) // 100 + 1)
    lengths, _ = read_lengths(root, [corpus.path(i) for i in checked])
    if not lengths:
        raise ValueError(f"{path}: {corpus.path(0)} and others cannot be read in {root}")
    whole = [i for i in checked if corpus.whole[i] and corpus.path(i) in lengths]
    if whole and all(lengths[corpus.path(i)] != corpus.samples[i] for i in whole):
        name = corpus.path(whole[0])
        cause = f"{name} has {lengths[name]} samples at 16 kHz, not {corpus.samples[whole[0]]}"
        raise ValueError(f"{path}: {cause}; scan the folder instead")
    return corpus


def read_rows(path):
    """Yields the rows of a manifest, for Corpus."""
    progress, position = program.Progress(f"bytes of {path}", os.path.getsize(path)), 0
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            position += len(line)
            progress.show(position)
            row = ROW.fullmatch(line.rstrip("\r\n"))
            if row and number > 1:
                name, start, samples = row.groups()
                yield (name, int(start), int(samples)) if start else (name, int(samples))
            elif number > 1 and line.strip():
                problem = f"not 'path<tab>samples': {line.strip()[:60]!r}"
                raise ValueError(f"{path}, line {number}: {problem}")


def read_root(path):
    """The root folder of a manifest, which is in its first line."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        root = file.readline().rstrip("\r\n").split("\t")[0]
    return os.path.join(os.path.dirname(os.path.realpath(path)), root)


def fingerprint(path):
    """A hash of a manifest's lines below the root, without blank ones, in 16 hex digits."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        next(file, None)
        for line in filter(None, map(bytes.strip, file)):
            content.update(line + b"\n")
    return content.hexdigest()[:16]


def write_manifest(path, corpus):
    """Writes a Corpus for read_manifest, with three columns for pieces of files, else two."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{corpus.root}\n")
        columns = (corpus.paths(), corpus.starts, corpus.samples, corpus.whole)
        for name, start, samples, whole in zip(*columns):
            first = "" if whole else f"{start}\t"
            file.write(f"{name}\t{first}{samples}\n")


def read_lines(path):
    """[(line number from 1, line)] of the lines of a text that are not blank."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [(number, line) for number, line in enumerate(file, start=1) if line.strip()]


# ------------------------------------------------------------------ skipped files


def warn_skipped(skipped):
    """A warning per file, up to twenty. skipped: {path: reason}."""
    for path in sorted(skipped)[:20]:
        warnings.warn(f"skipped {path}: {skipped[path]}")
    if len(skipped) > 20:
        warnings.warn(f"skipped {len(skipped) - 20} more files")


def check_skipped(skipped, total, kind="audio"):
    """Raises ValueError if over 1% of `total` files are skipped."""
    if len(skipped) > 0.01 * total:
        path = min(skipped)
        count = f"{len(skipped)} of {total} {kind} files cannot be used, over 1%"
        raise ValueError(f"{count}: {path}: {skipped[path]}")
