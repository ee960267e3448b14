"""The hidden states of a frozen network, computed once and kept: in memory where there is room, or in files.

    states = States(upstream, corpus)
    states.keep("cache/hubert.states", "train-clean-100", batch_size=32, workers=4, asked=[])
    for utterances, x, frames in states.batches(plan): ...         # x: (states, batch, frames, dim)

README's promises kept here: files are filled once, carried on after a kill, never those of other audio or weights, and
a disk without room is known before anything is computed.
"""

import processes

import contextlib
import hashlib
import os
import time

import numpy as np
import soundfile
import torch

import data
from report import clock
from safe_files import locked, write_text


class States:
    """The upstream's hidden states of a corpus, batch by batch: computed for each batch until `keep` has kept them."""

    def __init__(self, upstream, corpus):
        self.upstream, self.corpus = upstream, corpus
        self.frames = upstream.frames(torch.from_numpy(corpus.samples))
        self.sizes = self.frames * upstream.states * upstream.dim
        self.bytes = 2 * int(self.sizes.sum())
        self.row = self.path = None  # where they are kept: every utterance's (states, frames, dim) one after another

    def batches(self, plan, first=0, last=None, workers=0):
        """Yields (utterances, their states as Probe takes them, their frames) of steps first..last-1, on the device.

        plan[step]: the step's utterances, indices into the corpus. A file that cannot be read ends the program.
        """
        device, last = self.upstream.device, len(plan) if last is None else last
        workers = workers if self.row is None else 0  # memory is nearer than another process
        items = _Items(self, plan)
        for item in data.load_batches(items, first, last, workers, pin_memory=device.type == "cuda"):
            if "unreadable" in item:
                processes.stop(item["unreadable"])
            if "states" in item:
                states = item["states"].to(device, non_blocking=True)
            else:
                states = self.upstream(item["waveforms"].to(device, non_blocking=True), item["lengths"].to(device))
            yield item["utterances"].tolist(), states.float(), self.frames[item["utterances"]].to(device)

    def keep(self, path, name, batch_size, workers, asked):
        """Runs the upstream over the corpus once and keeps its states: in memory, or in a file where a path is given.

        A file that is there is used; one that an interrupted run has begun is carried on. asked: the signals that came
        (see processes.signals), looked at between batches.
        Raises OSError where the disk has no room, ValueError where the file is not what it should be.
        """
        if path is None:
            row = torch.empty(self.bytes // 2, dtype=torch.bfloat16)
            for _ in self._fill(row, 0, name, batch_size, workers):
                processes.heed(asked)
            self.row = row
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with locked(path + ".lock"):
            if not os.path.exists(path):
                self._fill_file(path, name, batch_size, workers, asked)
        if os.path.getsize(path) != self.bytes:
            raise ValueError(f"{path}: not {self.bytes:,} bytes long; delete it, and it is made anew")
        self.path = path

    def _fill_file(self, path, name, batch_size, workers, asked):
        partial, count, done = path + ".partial", path + ".done", 0
        with contextlib.suppress(OSError, ValueError):
            with open(count, encoding="ascii") as file:
                done = int(file.read()) if os.path.getsize(partial) == self.bytes else 0

        with open(partial, "r+b" if done else "wb") as file:
            try:  # all of it now: a disk that turns out full under mapped memory kills the process
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, self.bytes)
                else:
                    file.truncate(self.bytes)
            except OSError as error:
                os.remove(partial)
                room = f"no room for {self.bytes / 1e9:.3g} GB ({error})"
                raise OSError(f"{path}: {room}; give --cache another folder") from None

            def save():
                os.fsync(file.fileno())
                write_text(count, str(done))

            saved = time.monotonic()
            row = torch.from_file(partial, shared=True, size=self.bytes // 2, dtype=torch.bfloat16)
            try:
                for count_now in self._fill(row, done, name, batch_size, workers):
                    done = count_now
                    if time.monotonic() - saved > 30:
                        save()
                        saved = time.monotonic()
                    processes.heed(asked)
            finally:
                save()
        os.replace(partial, path)
        os.remove(count)

    def _fill(self, row, done, name, batch_size, workers):
        """Writes the states of all utterances but the first `done`, the longest first; yields how many are done."""
        order, blocks = by_length(self.corpus.samples), row.split(self.sizes.tolist())
        plan = [order[i : i + batch_size] for i in range(done, len(order), batch_size)]
        left, spoken, started = int(self.frames[order[done:]].sum()), 0, time.monotonic()
        shown = started
        for utterances, states, frames in self.batches(plan, workers=workers):
            for place, (utterance, length) in enumerate(zip(utterances, frames.tolist())):
                blocks[utterance].view(len(states), length, -1).copy_(states[:, place, :length])
            done, spoken = done + len(utterances), spoken + int(frames.sum())
            now = time.monotonic()
            if done == len(order) or now - shown > 20:
                shown, time_left = now, clock((now - started) / spoken * (left - spoken))
                print(f"states of {name}: {done:,} of {len(order):,} utterances  {time_left} left", flush=True)
            yield done


class _Items(torch.utils.data.Dataset):
    """What the loader's processes bring for a step: the states where they are kept, else the audio."""

    def __init__(self, states, plan):
        # Not the upstream: this goes to other processes.
        self.plan, self.corpus, self.path, self.sizes = plan, states.corpus, states.path, states.sizes.tolist()
        self.count, self.dim = states.upstream.states, states.upstream.dim
        self.blocks = states.row.split(self.sizes) if states.row is not None else None

    def __getitem__(self, step):
        if self.path and self.blocks is None:  # every process maps the file for itself
            row = torch.from_file(self.path, shared=False, size=sum(self.sizes), dtype=torch.bfloat16)
            self.blocks = row.split(self.sizes)
        utterances = [int(utterance) for utterance in self.plan[step]]
        item = self.states(utterances) if self.blocks is not None else self.audio(utterances)
        return item | {"utterances": torch.tensor(utterances)}

    def states(self, utterances):
        """Kept states, (states, batch, frames, dim) in bfloat16."""
        blocks = [self.blocks[utterance].view(self.count, -1, self.dim) for utterance in utterances]
        longest = max(block.shape[1] for block in blocks)
        states = torch.zeros(self.count, len(blocks), longest, self.dim, dtype=torch.bfloat16)
        for place, block in enumerate(blocks):
            states[:, place, : block.shape[1]] = block
        return {"states": states}

    def audio(self, utterances):
        """Whole waveforms, (batch, samples), and their lengths."""
        lengths = torch.from_numpy(self.corpus.samples)[utterances]
        waveforms = torch.zeros(len(utterances), int(lengths.max()))
        for waveform, length, utterance in zip(waveforms, lengths.tolist(), utterances):
            path = os.path.join(self.corpus.root, self.corpus.paths[utterance])
            try:
                waveform[:length] = data.read_audio(path, 0, length)
            except (soundfile.SoundFileError, OSError, ValueError) as error:
                return {"unreadable": f"{path}: {error}; restore it, or take it and its transcript out"}
        return {"waveforms": waveforms, "lengths": lengths}


def by_length(samples):
    """Indices of the utterances, the longest first."""
    return np.argsort(-samples, kind="stable")


# ---------------------------------------------------------------- whether and where


def keep_states(args, upstream, states, splits, training, asked):
    """Keeps the States that the run needs more than once, or all with --cache, where there is room for them.

    states: {corpus: States}; training: whether steps are left; without, only the third split is needed.
    """
    needed = {}
    for split in splits[0 if training else 2 : 3 if args.cache else 2]:
        if states[split.corpus].row is None and states[split.corpus].path is None:
            needed.setdefault(split.corpus, split.name)
    if not needed:
        return
    total, allowed = sum(states[corpus].bytes for corpus in needed), args.cache_memory * free_memory()
    size = f"states: {upstream.states} of {upstream.dim} dims, {total / 1e9:.3g} GB"
    share = f"{args.cache_memory:.0%} of the free memory, {allowed / 1e9:.3g} GB"
    if args.cache:
        where = f"kept in {args.cache}"
    elif args.steps * args.batch_size < len(splits[0].ids):
        where, needed = "computed for every batch: no utterance is trained on twice", {}
    elif total > allowed:
        where, needed = f"over {share}: computed for every batch again; --cache DIR keeps them on disk", {}
    else:
        where = f"kept in memory, where they may take {share}"
    print(f"{size}, {where}", flush=True)
    for corpus, name in needed.items():
        path = None
        if args.cache:
            path = os.path.join(args.cache, upstream.name, f"{os.path.basename(name)}-{_fingerprint(corpus)}.states")
        states[corpus].keep(path, name, args.batch_size, args.workers, asked)


def _fingerprint(corpus):
    """Of the files themselves, their times and sizes too, so that states in a cache are never those of other audio."""
    digest = hashlib.sha256(corpus.fingerprint().encode())
    for path in corpus.paths:
        about = os.stat(os.path.join(corpus.root, path))
        digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def free_memory():
    """Bytes that the system says it can still give, within a container's limit."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is; nothing where the system does not say (Windows)
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            free = min(free, int(file.read()))
    return free
