"""Finding audio files, and the manifests that list them. All lengths are samples at 16 kHz."""

import collections
import concurrent.futures
import hashlib
import math
import os
import re
import warnings

import numpy as np
import soundfile

from data import MIN_SAMPLES, SAMPLE_RATE, UNREADABLE, Corpus, resampled_length

LIBRISPEECH_960 = ("train-clean-100", "train-clean-360", "train-other-500")
EXTENSIONS = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"}
EXTENSIONS |= {".aif", ".oga", ".opus", ".snd", ".sph"}
UNSUPPORTED = {".m4a", ".aac", ".wma", ".mp4", ".webm", ".amr", ".3gp", ".ape", ".mka", ".wv"}


def find_corpus(data, splits=LIBRISPEECH_960, max_seconds=None):
    """The Corpus of a folder's sub-folders `splits`, or of a manifest (.tsv).

    Files longer than max_seconds become equal pieces of at most that; files shorter than a frame
    are skipped. "." as split is the whole folder. Raises FileNotFoundError and ValueError.
    """
    corpus = read_manifest(data) if str(data).endswith(".tsv") else scan(data, splits)
    longest = int(corpus.samples.max())
    if max_seconds is not None:
        longest = int(min(max_seconds, 1e9) * SAMPLE_RATE)
        if longest < 2 * MIN_SAMPLES:
            raise ValueError(f"pieces of {max_seconds} s are too short; at least 0.05")
    rows = []
    for path, start, length in zip(corpus.paths, corpus.starts, corpus.samples):
        if length < MIN_SAMPLES:
            corpus.skipped[path] = f"{length} samples, shorter than a frame"
            continue
        pieces = math.ceil(length / longest)
        if pieces > 1:
            corpus.pieces.add(path)
        edges = start + np.arange(pieces + 1) * length // pieces
        rows += [(path, first, end - first) for first, end in zip(edges, edges[1:])]
    if not rows:
        raise ValueError(f"{data}: no audio to train on")
    return Corpus(corpus.root, *zip(*rows), corpus.skipped, corpus.pieces)


def scan(folder, splits):
    """The Corpus of the audio files under sub-folders of a folder, lengths from their headers."""
    root, found, unsupported = os.path.realpath(folder), set(), collections.Counter()
    for split in splits:
        if not os.path.isdir(os.path.join(root, split)):
            place = os.path.join(folder, split)
            raise FileNotFoundError(f"{place}: no such folder")
        for path in files_under(root, split):
            ending = os.path.splitext(path)[1].lower()
            if ending in EXTENSIONS:
                found.add(path)
            elif ending in UNSUPPORTED:
                unsupported[ending] += 1
    if unsupported:
        counts = ", ".join(f"{count} {ending}" for ending, count in unsupported.items())
        warnings.warn(f"{folder}: not read, convert to FLAC: {counts}")
    if not found:
        raise ValueError(f"{folder}: no audio files in {', '.join(splits)}")
    lengths, unreadable = read_lengths(root, sorted(found))
    check_skipped(unreadable, len(found))
    return Corpus(root, lengths, [0] * len(lengths), list(lengths.values()), unreadable)


def files_under(root, folder):
    """Paths relative to `root` of all files under its sub-folder; links are followed.

    Names that begin with a dot are ignored, such as macOS's ._x.flac.
    """
    visited = set()
    for place, folders, names in os.walk(os.path.join(root, folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        for name in names:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), root)


def read_lengths(root, paths):
    """({path: samples} of the readable files, {path: reason} of the others), from headers."""

    def length(path):
        file = os.fsencode(os.path.join(root, path))  # bytes, since a path may not be UTF-8
        try:
            if re.search(r"[\t\r\n]", path):
                return "a tab or line break in its name"
            info = soundfile.info(file)
            # ffmpeg and others write a length of 0 or 2^63 - 1 to a pipe.
            if not 0 < info.frames < 10_000 * os.path.getsize(file):
                raise ValueError(f"a length of {info.frames} in its header; encode it again")
            return resampled_length(info.frames, info.samplerate)
        except UNREADABLE as error:
            return f"cannot be read: {error}"

    if len(paths) > 10_000:
        print(f"reading the headers of {len(paths):,} files in {root}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # network disks have latency
        found = dict(zip(paths, pool.map(length, paths)))
    unreadable = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    return {path: n for path, n in found.items() if path not in unreadable}, unreadable


def read_manifest(path, moved_root=None):
    """The Corpus of a fairseq manifest: a root folder, then lines of `path<tab>samples`.

    With three columns the middle one is the first sample of a piece of a file. A relative root is
    relative to the manifest; moved_root replaces the root if it is a folder.
    Raises FileNotFoundError and ValueError.
    """
    rows, pieces, root = [], set(), read_root(path)
    for number, line in read_lines(path):
        line = line.rstrip("\r\n")
        row = re.fullmatch("([^\t]*)\t(?:([0-9]{1,15})\t)?([0-9]{1,15})", line)
        if number == 1:
            continue
        if row:
            name, start, samples = row.groups()
            rows.append((name, int(start or 0), int(samples)))
            if start:
                pieces.add(name)
        else:
            problem = f"not 'path<tab>samples': {line.strip()[:60]!r}"
            raise ValueError(f"{path}, line {number}: {problem}")
    if not rows:
        raise ValueError(f"{path}: an empty manifest")
    if moved_root and os.path.isdir(moved_root):
        root = os.path.realpath(moved_root)
    corpus = Corpus(root, *zip(*rows), pieces=pieces)
    # Up to 100 files are checked: fairseq's wav2vec_manifest.py counts at the rate of the file.
    checked = range(0, len(corpus), len(corpus) // 100 + 1)
    found, _ = read_lengths(root, [corpus.paths[i] for i in checked])
    if not found:
        raise ValueError(f"{path}: {corpus.paths[0]} and others cannot be read in {root}")
    whole = [i for i in checked if corpus.paths[i] in found and corpus.paths[i] not in pieces]
    if whole and all(found[corpus.paths[i]] != corpus.samples[i] for i in whole):
        first = corpus.paths[whole[0]]
        cause = f"{first} has {found[first]} samples at 16 kHz, not {corpus.samples[whole[0]]}"
        raise ValueError(f"{path}: {cause}; scan the folder instead")
    return corpus


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
        for name, start, samples in zip(corpus.paths, corpus.starts, corpus.samples):
            first = f"{start}\t" if name in corpus.pieces else ""
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
