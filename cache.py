"""Tensors of frozen networks, computed once: targets of training, hidden states of probes."""

import runs
from runs import RANK, WORLD_SIZE

import contextlib
import hashlib
import json
import os
import shutil
import time

import torch
from torch import nn

import data


def key(*parts):
    """16 hex digits, a hash of the parts (JSON types): to name or compare them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Cache:
    """One .pt file per utterance of a Corpus; `folder` has a hash of networks and settings."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus

    def path(self, i):
        """The file of utterance i: audio path, first sample, length, and a hash of the audio file.

        The hash is over the size of the file and 16 KiB from its middle. Raises OSError.
        """
        corpus = self.corpus
        with open(os.path.join(corpus.root, corpus.paths[i]), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(size // 2)
            content = hashlib.sha256(file.read(16384) + str(size).encode()).hexdigest()[:8]
        name = corpus.paths[i].lstrip("/").replace("..", "__")  # stays inside the folder
        name = f"{name}.{corpus.starts[i]}-{corpus.samples[i]}.{content}.pt"
        return os.path.join(self.folder, name)

    def is_missing(self, i):
        try:
            return not os.path.exists(self.path(i))
        except OSError:  # compute() reports it
            return True

    def fill(self, compute, sizes, name, stop):
        """Computes what is missing, in the main process; ranks share the work by index.

        compute(i): the tensors of utterance i, or None; sizes: bytes per utterance.
        The total size is printed first; too little free disk space is an error before anything
        is computed. Exits on a signal; the same command resumes.
        """
        with runs.one_line_errors():
            os.makedirs(self.folder, exist_ok=True)
            missing = [i for i in range(RANK, len(self.corpus), WORLD_SIZE) if self.is_missing(i)]
        needed = sum(runs.gather(sum(sizes[i] for i in missing))) / 1e9
        started = printed = time.monotonic()
        with runs.one_line_errors():
            free = shutil.disk_usage(self.folder).free / 1e9
            message = f"{self.folder}: {sum(sizes) / 1e9:.3g} GB of {name}, {needed:.3g} to compute"
            if needed > free:
                raise OSError(f"{message}, {free:.3g} GB free; choose another --cache")
            if RANK == 0:
                print(message, flush=True)
        for number, i in enumerate(missing, start=1):
            if stop.number:
                break
            try:
                tensors = compute(i)
                if tensors is not None:
                    path = self.path(i)
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    runs.save(path, tensors)
            except (OSError, ValueError) as error:
                runs.print_error(error)  # at once: the other ranks may compute for hours
                raise SystemExit(2) from None
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
    return {"values": (x / scale).round().to(torch.int8).cpu(), "scale": scale.cpu()}


def dequantize(values, scale):
    """(..., frames, dim) float32 of int8 values and their (..., dim) scales."""
    return values * scale[..., None, :]


class CachedTargets(data.TrainBatches):
    """TrainBatches with targets from a Cache, quantized: "values" and "scale", for dequantize.

    Convolutions without padding keep frames and samples aligned: the crop that starts at sample
    320 n has the frames from n on. The targets are computed from the whole utterance.
    """

    crop_start_multiple = 320  # samples per frame

    def __init__(self, cache, *args):
        """args: arguments of TrainBatches, after the corpus."""
        super().__init__(cache.corpus, *args)
        self.cache = cache

    def example(self, epoch, i, position, samples):
        first = self.crop_start(i, position, samples) // self.crop_start_multiple
        frames = (samples - data.MIN_SAMPLES) // self.crop_start_multiple + 1
        targets = runs.load(self.cache.path(i))
        targets["values"] = targets["values"][first:][:frames]
        return super().example(epoch, i, position, samples) | targets


# ------------------------------------------------------------------ hidden states for probes


class States(torch.utils.data.Dataset):
    """Hidden states of the utterances of a probe.Split, read in batches by a loader's workers.

    memory: {(path, key of its noise): (states, frames, dim)}; cache: a Cache, or None.
    """

    def __init__(self, split, memory, cache=None):
        self.split, self.memory, self.cache = split, memory, cache

    def memory_key(self, i):
        return self.split.path(i), self.split.noise_key

    def load(self, i):
        """The states of utterance i, (states, frames, dim), if computed; else its waveform."""
        if self.memory_key(i) in self.memory:
            return self.memory[self.memory_key(i)]
        if self.cache:
            with contextlib.suppress(OSError, ValueError):  # missing or damaged: computed again
                return runs.load(self.cache.path(i))
        return self.split.read(i)

    def __getitem__(self, indices):
        return [self.load(i) for i in indices]


def compute_states(args, upstream, splits, stop):
    """{split: its States}: computed into --cache, or into memory if half of what is free is enough.

    upstream: a probe.Upstream.
    """
    frame_bytes = 2 * len(upstream.layers) * upstream.dim
    datasets, missing = {}, {}  # missing: {(dataset, utterance): bytes}
    for split in splits:
        dataset = datasets[split] = States(split, upstream.memory)
        sizes = [frame_bytes * upstream.encoder.frames(n) for n in split.corpus.samples.tolist()]
        if args.cache:
            name = key(upstream.digest, upstream.precision, upstream.layers, split.noise_key)
            dataset.cache = Cache(os.path.join(args.cache, f"states-{name}"), split.corpus)

            def compute(i, split=split):
                return upstream(split.read(i)).cpu()

            dataset.cache.fill(compute, sizes, f"states of {split.name}", stop)
            data.check_shared_memory(args.batch_size * max(sizes), args.workers)
        else:
            for i, size in enumerate(sizes):
                if dataset.memory_key(i) not in upstream.memory:
                    missing[dataset, i] = size
    if missing:
        needed = sum(missing.values())
        fits = needed < free_memory() / 2
        place = "in memory" if fits else "computed at every step; --cache DIR would store them"
        print(f"states: {needed / 1e9:.3g} GB, {place}", flush=True)
        if fits:
            for dataset, i in missing:
                if stop.number:
                    raise SystemExit(128 + stop.number)
                waveform = dataset.split.read(i)
                upstream.memory[dataset.memory_key(i)] = upstream(waveform).cpu()
    return datasets


def free_memory():
    """Bytes of memory that are available, within a container's limit; 0 if that is unknown."""
    free = 0
    with contextlib.suppress(OSError, ValueError):  # not Linux, or the limit is "max"
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        free = int(sizes["MemAvailable"].split()[0]) * 1024
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            free = min(free, int(file.read()))
    return free


def load_states(upstream, dataset, plan, workers, stop):
    """Yields (states, frames) per batch: (states, batch, frames, dim), zero-padded, and (batch,).

    dataset: States; plan: per batch, the indices of its utterances.
    """
    in_memory = dataset.memory_key(0) in upstream.memory
    workers = 0 if in_memory else workers  # workers would copy the memory
    for items in data.load_batches(dataset, plan, workers, upstream.device.type == "cuda", stop):
        items = [upstream(x) if x.dim() == 1 else x for x in items]
        items = [x.to(upstream.device, non_blocking=True) for x in items]
        frames = [x.shape[1] for x in items]
        items = [nn.functional.pad(x, (0, 0, 0, max(frames) - x.shape[1])) for x in items]
        yield torch.stack(items, dim=1).float(), torch.tensor(frames)
