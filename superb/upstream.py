"""Labelled utterances to hidden states of a frozen upstream: cached, in memory, or per batch."""

import contextlib
import math
import os
from pathlib import Path

import torch
import torchaudio
from torch import nn

import data
import manifest
import program
from cache import Cache, audio_hash, key
from student import load_student
from teachers import digest, load_teacher

MAX_SECONDS = 160  # of the longest utterance; the upstream gets it in one piece


class Split(torch.utils.data.Dataset):
    """Labelled utterances of a Corpus, and their hidden states, once computed.

    ids, labels: per utterance; skipped: {path: reason} of the utterances that are not used.
    memory: Upstream.memory; cache: a Cache, or None; compute_states sets them.
    noise, noise_key: a data.Noise and a hash of it, or None; add_noise sets them.
    Raises ValueError if over 10% of the utterances are skipped, or one is too long.
    """

    def __init__(self, name, corpus, ids, labels, skipped):
        self.name, self.corpus, self.skipped = name, corpus, skipped
        self.ids, self.labels = ids, labels
        self.memory, self.cache, self.noise, self.noise_key = {}, None, None, None
        self.counts = {"utterances": len(ids), "skipped": len(skipped)}
        total = len(ids) + len(skipped)
        if len(skipped) > 0.1 * total:
            path, reason = next(iter(skipped.items()))
            problem = f"{len(skipped)} of {total} utterances cannot be used, over 10%"
            raise ValueError(f"{name}: {problem}: {path}: {reason}")
        longest = int(corpus.samples.argmax())
        seconds = corpus.samples[longest] / data.SAMPLE_RATE
        if seconds > MAX_SECONDS:
            problem = f"{math.ceil(seconds)} s, evaluations take up to {MAX_SECONDS} s; split it"
            raise ValueError(f"{self.path(longest)}: {problem}")

    def add_noise(self, folder, snr):
        """Mixes noise into all utterances from now on. Raises ValueError, OSError.

        The noise depends on the place i in the split, so noise_key covers the order of the paths.
        """
        self.noise = data.Noise(manifest.find_corpus(folder, ["."]), snr)
        manifest.warn_skipped(self.noise.corpus.skipped)
        files = [audio_hash(self.noise.corpus, i) for i in range(len(self.noise.corpus))]
        self.noise_key = key(files, self.noise.snr, list(self.corpus.paths()))

    def path(self, i):
        return os.path.join(self.corpus.root, self.corpus.path(i))

    def read(self, i):
        """The waveform of utterance i, (samples,). Raises ValueError naming the file."""
        try:
            waveform, skipped = self.corpus.read(i), {}
            if self.noise:
                waveform = self.noise.mix(waveform, (i,), skipped)
            for path, reason in skipped.items():
                raise ValueError(f"its noise {path}: {reason}")
            return waveform
        except data.UNREADABLE as error:
            raise ValueError(f"{self.path(i)}: {error}; restore it") from None

    def memory_key(self, i):
        return self.path(i), self.noise_key

    def load(self, i):
        """The states of utterance i, (states, frames, dim), if computed; else its waveform."""
        if self.memory_key(i) in self.memory:
            return self.memory[self.memory_key(i)]
        if self.cache:
            with contextlib.suppress(OSError, ValueError):  # missing or damaged: computed again
                return self.cache.load(i)
        return self.read(i)

    def __getitem__(self, indices):
        """One batch: per utterance its states or, if they are not computed, its waveform."""
        return [self.load(i) for i in indices]


class FilterBanks(nn.Module):
    """SUPERB's baseline: 80 log Mel filter banks, deltas and delta-deltas, normalized, every 10 ms.

    Source: s3prl's upstream/baseline/fbank.yaml and extracter.py.
    """

    def frames(self, samples):
        """Number of windows of 25 ms that lie within the utterance."""
        return max((samples - 400) // 160 + 1, 0)

    def forward(self, waveforms):
        """(1, samples) at 16 kHz to one state, [(1, frames, 240)]."""
        mel = torchaudio.compliance.kaldi.fbank(waveforms, num_mel_bins=80, sample_frequency=16000)
        delta = torchaudio.functional.compute_deltas(mel.t())
        x = torch.cat([mel, delta.t(), torchaudio.functional.compute_deltas(delta).t()], dim=1)
        # Not in s3prl: without a minimum, a silent band becomes loud rounding noise.
        deviation = x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-5)
        return [((x - x.mean(0)) / deviation)[None]]


class Upstream:
    """The frozen encoder --upstream: a student, a teacher in any official form, or "fbank".

    layers: numbers of its hidden states; dim: width of each; digest: hash of sizes and weights.
    memory: {(path, noise_key): (states, frames, dim)}, shared by all folds.
    """

    def __init__(self, args):
        self.device = program.find_device()
        self.precision = program.precision(args.precision, self.device)
        self.memory = {}
        path = args.upstream
        if path == "fbank":
            self.encoder, self.precision = FilterBanks(), "fp32"
            self.digest, self.dim, self.layers = key(path), 240, [0]
        else:
            self.encoder = load_encoder(path, self.device)
            if not all(weight.isfinite().all() for weight in self.encoder.state_dict().values()):
                raise ValueError(f"{path}: has weights that are NaN or infinite")
            self.digest, self.dim = digest(self.encoder), self.encoder.config.dim
            self.layers = list(range(self.encoder.config.layers + 1))

    @torch.no_grad()
    def __call__(self, waveform):
        """Hidden states of a waveform, (states, frames, dim).

        They are in bfloat16 at any precision, so that cached and computed states are equal.
        """
        waveforms = waveform[None].to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            states = self.encoder(waveforms)
        return torch.cat(states).bfloat16()


def load_encoder(path, device):
    """The encoder of a student or of a teacher, in eval mode."""
    if os.path.isfile(path) or path.endswith("student.pt"):  # load_student names a missing one
        with contextlib.suppress(ValueError):  # not a student
            return load_student(path, device).encoder
    return load_teacher(path, device)


def compute_states(args, upstream, splits, stop):
    """Computes states into --cache, or into memory if half of the free memory is enough.

    Else load_states computes them per batch.
    args: cache, batch_size and workers are used.
    """
    frame_bytes = 2 * len(upstream.layers) * upstream.dim  # bfloat16
    sizes = {}  # {split: [bytes]}
    for split in splits:
        split.memory = upstream.memory
        lengths = split.corpus.samples.tolist()
        sizes[split] = [frame_bytes * upstream.encoder.frames(length) for length in lengths]
        if args.cache:
            data.check_shared_memory(args.batch_size * max(sizes[split]), args.workers)
    if not args.cache:
        fill_memory(upstream, sizes, stop)
        return
    for split in splits:
        name = key(upstream.digest, upstream.precision, upstream.layers, split.noise_key)
        split.cache = Cache(os.path.join(args.cache, f"states-{name}"), split.corpus)
        label = f"states of {split.name}"
        split.cache.fill(lambda i, s=split: upstream(s.read(i)).cpu(), sizes[split], label, stop)


def fill_memory(upstream, sizes, stop):
    """Computes states into upstream.memory, unless they need over half of the free memory.

    sizes: {split: [bytes per utterance]}. Exits on a signal.
    """
    missing = {}  # {(split, utterance): bytes}
    for split, split_sizes in sizes.items():
        for i, size in enumerate(split_sizes):
            if split.memory_key(i) not in upstream.memory:
                missing[split, i] = size
    if not missing:
        return
    needed = sum(missing.values())
    text = f"states: {needed / 1e9:.3g} GB of {len(missing):,} utterances"
    if needed > free_memory() / 2:
        program.say(f"{text}, computed at every step; --cache DIR stores them")
        return
    program.say(f"{text}, in memory, lost if stopped; --cache DIR stores them")
    progress = program.Progress("states", len(missing))
    for number, (split, i) in enumerate(missing, start=1):
        if stop.number:
            remedy = "with --cache DIR, the same command would have resumed"
            program.say(f"stopped: the {number - 1:,} states in memory are lost; {remedy}")
            raise SystemExit(128 + stop.number)
        upstream.memory[split.memory_key(i)] = upstream(split.read(i)).cpu()
        progress.show(number)


CGROUPS = {  # controllers, as in /proc/self/cgroup: folder, files of limit and use, prefix
    "": ("", "memory.max", "memory.current", ""),  # cgroup 2
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # cgroup 1
}


def free_memory(root="/"):
    """Bytes of memory that are available within the limits of containers and jobs.

    Limits are those of this process's cgroup and of all that contain it. Cached files count as
    free. root: folder of proc/ and sys/. Returns 0 if there is no proc/.
    """
    root = Path(root)
    if not (root / "proc/meminfo").exists():
        return 0
    free = 1024 * read_numbers(root / "proc/meminfo")["MemAvailable"]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in CGROUPS:
            continue
        folder, limit, used, prefix = CGROUPS[controllers]
        path = root / "sys/fs/cgroup" / folder / path.strip("/")
        for place in (path, *path.parents):
            with contextlib.suppress(OSError, KeyError, ValueError):  # absent, or "max"
                stat = read_numbers(place / "memory.stat")
                cached = stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"]
                bytes_used = int((place / used).read_text()) - cached
                free = min(free, int((place / limit).read_text()) - bytes_used)
    return max(free, 0)


def read_numbers(path):
    """{name: number} of a file of lines such as "name: 42 kB"."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return {name.rstrip(":"): int(number) for name, number, *_ in rows}


def load_states(upstream, split, plan, workers, stop):
    """Yields (states, frames) per batch: (states, batch, frames, dim), zero-padded.

    frames: of each utterance, (batch,). plan: per batch, the indices of its utterances.
    """
    if split.memory_key(0) in upstream.memory:
        workers = 0  # each would copy the memory
    for items in data.load_batches(split, plan, workers, upstream.device.type == "cuda", stop):
        items = [upstream(x) if x.dim() == 1 else x for x in items]  # 1: a waveform
        items = [x.to(upstream.device, non_blocking=True) for x in items]
        frames = [x.shape[1] for x in items]
        items = [nn.functional.pad(x, (0, 0, 0, max(frames) - x.shape[1])) for x in items]
        yield torch.stack(items, dim=1).float(), torch.tensor(frames)
