"""The hidden states of a frozen network, computed once and kept: in memory where there is room, or in files.

    states = States(upstream, corpus)
    states.keep("cache/hubert", "train-clean-100", batch_size=32)
    for utterances, x, frames in states.batches(plan): ...         # x: (states, batch, frames, dim)

README's promises kept here: files are filled once, carried on after a kill, never those of other audio or weights, and
a disk without room is known before anything is computed.
"""

import processes
from processes import RANK, WORLD_SIZE

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
import zlib

import numpy as np
import soundfile
import torch

import data
from encoder import EncoderConfig, SpeechEncoder
from report import clock
from safe_files import locked_now, write_text, write_whole
from teachers import TEACHERS, digest, download, load_teacher

BLOCK = 32  # utterances whose states come into one file, and are lost where a kill comes before it is whole
TARGETS_AS = torch.bfloat16  # how the targets of a distillation are kept
SCALE_ROWS = 4  # a float32 is four int8
AT_ONCE = 160 * 16000  # samples, with padding, that go through a network together: its convolutions need the memory


class States:
    """A frozen network's hidden states of a corpus: computed for each batch until `keep` has kept them.

    upstream: has `frames`, `states`, `dim`, `device`, and gives (states, batch, frames, dim) for waveforms and lengths.
    dtype: in which they are kept; int8 has a scale for each dimension of an utterance's states (see `rounded`).
    """

    def __init__(self, upstream, corpus, dtype=torch.bfloat16):
        self.upstream, self.corpus, self.dtype = upstream, corpus, dtype
        self.frames = upstream.frames(torch.from_numpy(corpus.samples))
        self.sizes = (self.frames + (SCALE_ROWS if dtype is torch.int8 else 0)) * upstream.states * upstream.dim
        self.bytes = dtype.itemsize * int(self.sizes.sum())
        order = by_length(corpus.samples)
        self.blocks = [order[i : i + BLOCK] for i in range(0, len(order), BLOCK)]  # the longest first: room shows early
        self.kept = None

    def batches(self, plan, first=0, last=None, workers=0):
        """Yields (utterances, their states as Probe takes them, their frames) of steps first..last-1, the states on the device.

        plan[step]: the step's utterances, indices into the corpus. A file that cannot be read ends the program.
        """
        device, last = self.upstream.device, len(plan) if last is None else last
        workers = workers if self.kept is None or self.kept.folder else 0  # memory is nearer than another process
        items = _Items(self.corpus, plan, self.kept)
        for item in data.load_batches(items, first, last, workers, pin_memory=device.type == "cuda"):
            if "unreadable" in item:
                processes.stop(item["unreadable"])
            if "states" in item:
                states = item["states"].to(device, non_blocking=True)
            else:
                states = self.upstream(item["waveforms"].to(device, non_blocking=True), item["lengths"])
            yield item["utterances"].tolist(), states.float(), self.frames[item["utterances"]]

    def keep(self, folder, name, batch_size, asked=(), silent=False):
        """Runs the upstream over the corpus once and keeps its states: in files in `folder`, or in memory where it is None.

        Files that are there are used, so that what was interrupted is carried on; several processes, on any number of
        machines, share the work. asked: the signals that came (see processes.signals), looked at between batches.
        silent: an utterance that cannot be read is silence; otherwise it ends the program.
        Raises OSError where there is no room, and what the upstream raises.
        """
        kept = Kept(self, folder)
        spoken, started, shown = 0, time.monotonic(), time.monotonic()
        missing = kept.missing()
        left = sum(int(self.frames[self.blocks[number]].sum()) for number in missing)
        if missing and folder:
            os.makedirs(folder, exist_ok=True)
            needed = sum(kept.file_bytes[number] for number in missing)
            if shutil.disk_usage(folder).free < needed:
                raise OSError(f"{folder}: no room for {needed / 1e9:.3g} GB; give --cache another folder")
        while missing:
            mine = sorted(missing, key=lambda number: (number % WORLD_SIZE != RANK, number))
            for number in mine:  # its own share first, then what others have not begun
                with kept.alone(number) as free:
                    if not free or number not in kept.missing([number]):
                        continue
                    kept.write(number, self._compute(self.blocks[number], batch_size, asked, silent))
                spoken += int(self.frames[self.blocks[number]].sum())
                if time.monotonic() - shown > 20 or number == mine[-1]:
                    shown = time.monotonic()
                    seconds_left = (shown - started) / spoken * max(0, left / WORLD_SIZE - spoken)
                    done = len(self.blocks) - len(kept.missing())
                    if RANK == 0:
                        what = f"{done:,} of {len(self.blocks):,} blocks of {BLOCK} utterances"
                        print(f"states of {name}: {what}  {clock(seconds_left)} left", flush=True)
            missing = kept.missing()
            if missing:  # others are at work on them
                processes.heed(asked)
                time.sleep(0.5)
        self.kept = kept

    def _compute(self, utterances, batch_size, asked, silent):
        """The states of some utterances, one after another, as they are kept."""
        found, device = [], self.upstream.device
        for i in range(0, len(utterances), batch_size):
            processes.heed(asked)
            mine = utterances[i : i + batch_size]
            item = read_whole(self.corpus, mine, silent)
            if "unreadable" in item:
                processes.stop(item["unreadable"])
            states = self.upstream(item["waveforms"].to(device), item["lengths"])
            alone = (states[:, place, : self.frames[one]] for place, one in enumerate(mine))
            found += [
                (rounded(one) if self.dtype is torch.int8 else one).to("cpu", self.dtype).flatten() for one in alone
            ]
        return torch.cat(found)


def rounded(states):
    """(states, frames, dim) to int8, in front of them SCALE_ROWS rows that are the bytes of a float32 scale a dimension."""
    scale = states.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    rows = scale.view(torch.int8).view(len(states), SCALE_ROWS, -1)
    return torch.cat([rows, (states / scale).round().to(torch.int8)], dim=1)


def unrounded(kept, first, frames):
    """Some frames of what `rounded` gave, in float32."""
    scale = kept[:, :SCALE_ROWS].clone().view(len(kept), 1, -1).view(torch.float32)
    return kept[:, SCALE_ROWS + first : SCALE_ROWS + first + frames] * scale


class Kept:
    """Where States are kept: blocks of utterances, each a file or a tensor, every utterance's (states, frames, dim) in turn.

    A file ends with a CRC-32 of each utterance's bytes, looked at where a process reads it first. Goes to the loader's
    processes, so it holds no network.
    """

    def __init__(self, states, folder):
        self.folder, self.dtype, self.memory = folder, states.dtype, {}
        self.count, self.dim = states.upstream.states, states.upstream.dim
        self.sizes = [states.sizes[block].tolist() for block in states.blocks]
        self.bytes = [self.dtype.itemsize * sum(sizes) for sizes in self.sizes]
        self.file_bytes = [size + 4 * len(sizes) for size, sizes in zip(self.bytes, self.sizes)]
        self.place = {int(one): (n, i) for n, block in enumerate(states.blocks) for i, one in enumerate(block)}
        self.split, self.checked = {}, set()  # number of a block: a tensor for each of its utterances; whole utterances

    def path(self, number):
        return os.path.join(self.folder, f"{number:05d}")

    def missing(self, numbers=None):
        """The blocks that are not there; a file that is not as long as it should be is not."""
        numbers = range(len(self.bytes)) if numbers is None else numbers
        if self.folder is None:
            return [number for number in numbers if number not in self.memory]
        sizes = {}
        with contextlib.suppress(FileNotFoundError):
            if len(numbers) > 1:
                sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
            else:
                sizes = {f"{number:05d}": os.path.getsize(self.path(number)) for number in numbers}
        return [number for number in numbers if sizes.get(f"{number:05d}") != self.file_bytes[number]]

    def alone(self, number):
        """Within it no other process computes the block; gives whether that is so."""
        return contextlib.nullcontext(True) if self.folder is None else locked_now(self.path(number) + ".lock")

    def write(self, number, states):
        if states.nbytes != self.bytes[number]:  # it would be missing for ever
            raise ValueError(f"block {number}: {states.nbytes:,} bytes of states, not {self.bytes[number]:,}")
        if self.folder is None:
            self.memory[number] = states
        else:
            sums = np.array([_checksum(one) for one in states.split(self.sizes[number])], "<u4")
            write_whole(self.path(number), lambda file: file.writelines([states.view(torch.uint8).numpy(), sums]))

    def of(self, utterance):
        """An utterance's states, (states, frames, dim). Raises ValueError where its file is damaged."""
        number, i = self.place[int(utterance)]
        if number not in self.split:
            block = self.memory.get(number)
            if block is None:  # every process maps the file for itself
                path, size = self.path(number), sum(self.sizes[number])
                try:
                    block = torch.from_file(path, shared=False, size=size, dtype=self.dtype)
                except RuntimeError as error:
                    raise ValueError(f"{path}: {error}; start again, and it is made again") from None
            self.split[number] = block.split(self.sizes[number])
        found = self.split[number][i]
        if self.folder and (number, i) not in self.checked:
            with open(self.path(number), "rb") as file:
                file.seek(self.bytes[number] + 4 * i)
                if file.read(4) != np.array(_checksum(found), "<u4").tobytes():
                    raise ValueError(f"{self.path(number)}: damaged; delete it, and it is made again")
            self.checked.add((number, i))
        return found.view(self.count, -1, self.dim)


def _checksum(tensor):
    return zlib.crc32(tensor.view(torch.uint8).numpy())


def read_whole(corpus, utterances, silent=False):
    """Whole waveforms, {"waveforms": (batch, samples), "lengths": (batch,)}, or {"unreadable": a line that says which}."""
    lengths = torch.from_numpy(corpus.samples[utterances])
    waveforms = torch.zeros(len(utterances), int(lengths.max()))

    def read(place):
        path = os.path.join(corpus.root, corpus.paths[utterances[place]])
        try:
            waveforms[place, : lengths[place]] = data.read_audio(path, 0, int(lengths[place]))
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            return None if silent else f"{path}: {error}; restore it, or take it and its transcript out"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        problem = next((problem for problem in pool.map(read, range(len(utterances))) if problem), None)
    return {"unreadable": problem} if problem else {"waveforms": waveforms, "lengths": lengths}


class _Items(torch.utils.data.Dataset):
    """What the loader's processes bring for a step: the states where they are kept, else the audio."""

    def __init__(self, corpus, plan, kept):
        self.corpus, self.plan, self.kept = corpus, plan, kept

    def __getitem__(self, step):
        utterances = np.asarray(self.plan[step])
        if self.kept is None:
            item = read_whole(self.corpus, utterances)
        else:  # (states, batch, frames, dim)
            try:
                found = [self.kept.of(utterance) for utterance in utterances]
            except (OSError, ValueError) as error:
                return {"unreadable": str(error)}
            longest = max(states.shape[1] for states in found)
            item = {"states": torch.zeros(self.kept.count, len(found), longest, self.kept.dim, dtype=self.kept.dtype)}
            for place, states in enumerate(found):
                item["states"][:, place, : states.shape[1]] = states
        return item | {"utterances": torch.from_numpy(utterances)}


def by_length(samples):
    """Indices of the utterances, the longest first."""
    return np.argsort(-samples, kind="stable")


# ---------------------------------------------------------------- targets of a distillation


class Ensemble:
    """Teachers and their aggregation as States takes an upstream: one state, all heads' targets side by side.

    teachers: SpeechEncoders; layers: those of each; targets_of: a function of aggregate.py; dims: of each head's target.
    """

    def __init__(self, teachers, layers, targets_of, dims, device):
        self.teachers, self.layers, self.targets_of = teachers, layers, targets_of
        self.states, self.dim, self.device, self.frames = 1, sum(dims), device, teachers[0].frames
        self.field, self.hop = 1, 1  # samples that a frame sees, and from one to the next
        for _, kernel, stride in reversed(teachers[0].config.conv_layers):
            self.field, self.hop = (self.field - 1) * stride + kernel, self.hop * stride

    @torch.no_grad()
    def __call__(self, waveforms, lengths):
        states = [teacher(waveforms, lengths, mine) for teacher, mine in zip(self.teachers, self.layers)]
        return torch.cat([target.float() for target in self.targets_of(states)], dim=-1)[None]


class Known:
    """A teacher of which a cache knows sizes and digest, in a SpeechEncoder's place: it is loaded only where it is used."""

    def __init__(self, path, device, config, digest):
        self.path, self.device, self.config, self.digest, self.dtype = path, device, config, digest, torch.float32

    @functools.cached_property
    def network(self):
        return load_teacher(self.path, self.device)

    def __call__(self, *waveforms_lengths_layers):
        return self.network.to(self.dtype)(*waveforms_lengths_layers)

    def state_dict(self):
        return self.network.state_dict()

    def frames(self, samples):
        return SpeechEncoder.frames(self, samples)

    def to(self, dtype):
        self.dtype = dtype
        return self


def known_teachers(cache, paths, device):
    """A Known for each path where DIR/teachers.json knows all of these files as they are, else []."""
    index = _read_index(cache)
    try:
        known = [index[_about_file(path)] for path in paths if index]
        return [Known(path, device, EncoderConfig(**one["config"]), one["digest"]) for path, one in zip(paths, known)]
    except (KeyError, TypeError, OSError):
        return []


def digest_of(teacher):
    """teachers.digest, which is computed only where it is not known."""
    return teacher.digest if isinstance(teacher, Known) else digest(teacher)


def _remember(cache, paths, teachers, digests):
    """Writes the teachers into DIR/teachers.json, for known_teachers."""
    index = _read_index(cache)
    entries = [{"config": dataclasses.asdict(one.config), "digest": mine} for one, mine in zip(teachers, digests)]
    entries = json.loads(json.dumps(dict(zip(map(_about_file, paths), entries))))
    if index | entries != index:
        with contextlib.suppress(OSError):  # read-only: then they are loaded the next time too
            write_text(os.path.join(cache, "teachers.json"), json.dumps(index | entries, indent=1))


def _read_index(cache):
    """{what _about_file says: {"config": sizes, "digest": ...}}; empty where there is none."""
    try:
        with open(os.path.join(cache, "teachers.json"), encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, TypeError, ValueError):  # no cache, no file, or a damaged one
        return {}


def _about_file(path):
    """A line on a checkpoint that changes with its place, size or time, and with those of what is read beside it."""
    path = os.path.realpath(download(TEACHERS[path]) if path in TEACHERS else path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    beside = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
    files = [file for file in [path, *(os.path.join(folder, name) for name in beside)] if os.path.exists(file)]
    return " ".join(f"{file} {os.stat(file).st_size} {os.stat(file).st_mtime_ns}" for file in files)


class WithTargets(torch.utils.data.Dataset):
    """data.Batches whose items hold "targets" too, (share, frames, dim of all heads): kept, and cut where the audio is.

    Convolutions without padding make frames and samples line up: a crop that begins at a multiple of their stride has the
    frames of that place. Its targets have seen the whole utterance, where they would have seen the crop alone.
    """

    def __init__(self, batches, kept, field):
        self.batches, self.kept, self.field = batches, kept, field

    def __getitem__(self, step):
        utterances, starts, cut = self.batches.crops(step)
        frames, item = (cut - self.field) // self.batches.grid + 1, self.batches[step]
        eight = self.kept.dtype is torch.int8
        targets = torch.zeros(
            len(utterances), frames, self.kept.dim, dtype=torch.bfloat16 if eight else self.kept.dtype
        )
        for place, (utterance, start) in enumerate(zip(utterances, starts)):
            first = start // self.batches.grid
            try:
                kept = self.kept.of(utterance)
                targets[place] = unrounded(kept, first, frames)[0] if eight else kept[0, first : first + frames]
            except (OSError, ValueError) as error:  # as audio that cannot be read
                item["readable"][place] = False
                item["left_out"][item["paths"][place]] = f"its targets: {error}"
        return item | {"targets": targets}


def keep_targets(args, batches, ensemble, made_of, asked):
    """data.Batches with the ensemble's targets, kept in --cache or in memory; their size is said before any is computed.

    made_of: what the targets depend on beside the audio. Ends the program where there is no room, or on a signal.
    """
    dtype = torch.int8 if args.cache_bits == 8 else TARGETS_AS
    states, where, folder = States(ensemble, batches.corpus, dtype), "in memory", None
    made_of = made_of + [8] if args.cache_bits == 8 else made_of
    with processes.together("--cache"):
        if args.cache != "memory":
            name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
            where = folder = os.path.join(args.cache, f"targets-{args.agg}-{name}-{_fingerprint(batches.corpus)}")
        elif WORLD_SIZE > 1:
            raise ValueError("memory is for one process; give a folder that all processes see")
        elif states.bytes > 0.8 * free_memory():
            raise ValueError(f"{states.bytes / 1e9:.3g} GB do not fit into the memory that is free; give a folder")
    if RANK == 0:
        print(f"targets: {states.bytes / 1e9:.3g} GB, {ensemble.dim} numbers a frame, kept {where}", flush=True)
    batches.grid = ensemble.hop
    try:
        with processes.together("--cache"):
            states.keep(
                folder, "the teachers", max(1, AT_ONCE // int(batches.corpus.samples.max())), asked, silent=True
            )
    except processes.Interrupted as interrupted:
        what = "interrupted while targets are computed; those that are kept stay, the same command resumes"
        processes.stop(what, 128 + interrupted.args[0])
    if RANK == 0 and folder:
        _remember(args.cache, args.teachers, ensemble.teachers, made_of[0])
    return WithTargets(batches, states.kept, ensemble.field)


# ---------------------------------------------------------------- whether and where


def keep_states(args, upstream, states, splits, training, asked):
    """Keeps the States that the run needs more than once, or all with --cache, where there is room for them.

    states: {corpus: States}; training: whether steps are left; without, only the third split is needed.
    """
    needed, line = worth_keeping(args, upstream, states, splits, training)
    if line:
        print(line, flush=True)
    for corpus, name in needed.items():
        path = None
        if args.cache:
            path = os.path.join(args.cache, upstream.name, f"{os.path.basename(name)}-{_fingerprint(corpus)}.states")
        states[corpus].keep(path, name, args.batch_size, asked)


def worth_keeping(args, upstream, states, splits, training=True):
    """({corpus: name} of those whose States are kept, see keep_states, and a line that says how much and why or "")."""
    needed = {}
    for split in splits[0 if training else 2 : 3 if args.cache else 2]:
        if states[split.corpus].kept is None:
            needed.setdefault(split.corpus, split.name)
    if not needed:
        return {}, ""
    total, allowed = sum(states[corpus].bytes for corpus in needed), args.cache_memory * free_memory()
    size = f"states: {upstream.states} of {upstream.dim} dims, {total / 1e9:.3g} GB"
    share = f"{args.cache_memory:.0%} of the free memory, {allowed / 1e9:.3g} GB"
    if args.cache:
        return needed, f"{size}, kept in {args.cache}"
    if args.steps * args.batch_size < len(splits[0].ids):
        return {}, f"{size}, computed for every batch: no utterance is trained on twice"
    if total > allowed:
        return {}, f"{size}, over {share}: computed for every batch again; --cache DIR keeps them on disk"
    return needed, f"{size}, kept in memory, where they may take {share}"


def _fingerprint(corpus):
    """Of the files themselves, their times and sizes too, so that states in a cache are never those of other audio."""
    digest = hashlib.sha256(corpus.fingerprint().encode())
    for path in corpus.paths:
        with contextlib.suppress(OSError):  # gone since the scan
            about = os.stat(os.path.join(corpus.root, path))
            digest.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
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
