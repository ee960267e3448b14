"""Judging a frozen encoder by a small probe: what the evaluate_*.py share.

Protocol: SUPERB, arXiv:2105.01051, after s3prl's downstream tasks. The upstream never learns:

    waveforms -> upstream    states  (states, batch, frames, dim)
      -> Probe: softmax-weighted sum of the states, then a task's head -> outputs -> its loss

The upstream is frozen, so its states are computed once and kept where there is room for them.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import soundfile
import torch
import torchaudio
from torch import nn

import data
from student import load_student, save_atomically
from teachers import TEACHERS, load_safely, load_teacher, native_bf16

FORMAT = "ekd-probe-1"
AT_ONCE = 160 * 16000  # samples, with padding, that go through the upstream together: its convolutions need the memory
DEMO_STUDENT = "runs/demo-avg/student.pt"
FREE = {"out", "cache", "cache_memory", "workers", "log_every"}  # may change when a run is resumed


# ---------------------------------------------------------------- settings


def parser(description, splits=None):
    """The settings that all evaluations have. splits: the default of --splits, or None for a task without them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = stop
    add = parser.add_argument
    count = number(int, "1 or more", lambda n: n >= 1)
    whole = number(int, "0 or more", lambda n: n >= 0)
    positive = number(float, "above 0", lambda x: 0 < x < float("inf"))
    share = number(float, "from 0 to 1", lambda x: 0 <= x <= 1)
    # fmt: off
    add("--upstream", help="what is judged: a student.pt, a teacher's name or checkpoint, or fbank (SUPERB's baseline)")
    add("--data", default="data/LibriSpeech", help="folder of the corpus")
    if splits:
        add("--splits", type=names, default=splits, help="sub-folders of --data to train, choose the best step, and test on")
    add("--out", help="folder of the run (default: beside a student.pt, else runs/ and the upstream's name)", default=argparse.SUPPRESS)
    add("--steps", type=count, default=100_000, help="optimizer steps")
    add("--batch-size", type=count, default=32, help="utterances a step")
    add("--lr", type=positive, default=5e-4, help="learning rate, of Adam; SUPERB tunes it from 1e-2 to 1e-5")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="autocast of the upstream; auto is bf16 where the device computes in it")
    add("--cache", metavar="DIR", default=None, help="keep the upstream's states in files there, for this run and others")
    add("--cache-memory", type=share, default=0.5, help="without --cache: share of the free memory that states may take; if they need more, they are computed for every batch again")
    add("--workers", type=whole, default=argparse.SUPPRESS, help="processes that read audio or states (default: up to 4)")
    add("--seed", type=whole, default=0, help="of the probe's first weights and the data's order")
    add("--log-every", type=count, default=100, help="steps between lines of progress")
    add("--eval-every", type=count, default=1000, help="steps between scores on the second split, each one saved")
    add("--demo", action="store_true", help="synthetic speech and the demo's student: shows the machinery in two minutes")
    # fmt: on
    return parser


def finish(args, task):
    """Checks the settings that all evaluations have, and fills in those that depend on others."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        stop("runs as one process; start it with python, not torchrun")
    if not args.upstream:
        stop("argument --upstream: missing; give a student.pt, a teacher's name or checkpoint, or fbank")
    if len(getattr(args, "splits", "123")) != 3:
        stop(
            f"argument --splits: {','.join(args.splits)}: three are needed, to train, to choose the best step, to test"
        )
    if not hasattr(args, "out"):
        folder, name = os.path.split(os.path.normpath(args.upstream))
        args.out = os.path.join(folder if name == "student.pt" else f"runs/{os.path.splitext(name)[0]}", task)
    if not hasattr(args, "workers"):
        args.workers = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return args


def names(text):
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("empty")
    return found


def number(kind, wanted, accepts):
    """An argparse type that names what it wants."""

    def convert(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def stop(message, code=2):
    """Ends the program with one line on stderr."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def refusing():
    """Around set-up: what bad input raises ends the program with one line and exit code 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        stop(error)


def prepare_demo():
    """The demo's corpus and student, made by train.py where they are not there yet."""
    if not (os.path.exists(DEMO_STUDENT) and os.path.isdir("data/demo")):
        print(f"demo: there is no {DEMO_STUDENT} yet; python train.py --demo makes it", flush=True)
        train = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
        done = subprocess.run([sys.executable, train, "--demo", "--out", os.path.dirname(DEMO_STUDENT)])
        if done.returncode:
            sys.exit(done.returncode)
    print(
        "demo: synthetic speech, a student of random teachers. It shows the machinery, not the quality of the method."
    )


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came; the argument is its number."""


@contextlib.contextmanager
def interruptions():
    """Gives check(), which raises Interrupted once SIGTERM or Ctrl-C has come; a second Ctrl-C is not waited for."""
    asked = []

    def on_signal(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    def check():
        if asked:
            raise Interrupted(asked[0])

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the frozen upstream


class FilterBanks(nn.Module):
    """SUPERB's baseline `fbank`: 80 log Mel filter banks with deltas and delta-deltas, a frame each 10 ms.

    Every dimension has zero mean and unit variance over the utterance.
    Source: s3prl's upstream/baseline/fbank.yaml and extracter.py.
    """

    def frames(self, samples):
        """Number of frames that `samples` (int or integer tensor) give: windows of 25 ms that lie wholly inside."""
        count = (samples - 400) // 160 + 1
        return count.clamp(min=0) if torch.is_tensor(samples) else max(count, 0)

    def forward(self, waveforms, lengths):
        """waveforms (batch, samples) at 16 kHz; lengths in samples. Returns [(batch, frames, 240)], 0 past an utterance's end."""
        states = waveforms.new_zeros(len(waveforms), self.frames(waveforms.shape[1]), 240)
        for row, waveform, length in zip(states, waveforms, lengths.tolist()):
            row[: self.frames(length)] = self.features(waveform[:length])
        return [states]

    def features(self, waveform):
        """(samples,) at 16 kHz to (frames, 240)."""
        x = torchaudio.compliance.kaldi.fbank(waveform[None], num_mel_bins=80, sample_frequency=16000)
        delta = torchaudio.functional.compute_deltas(x.t())
        x = torch.cat([x, delta.t(), torchaudio.functional.compute_deltas(delta).t()], dim=1)
        # A floor that s3prl lacks: there, a band that is silent throughout becomes loud rounding noise.
        return (x - x.mean(0)) / x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-5)


class Upstream:
    """A frozen encoder in eval mode.

    path: a student.pt, a teacher's name or checkpoint in any form that load_teacher knows, or "fbank".
    precision: "fp32", "bf16" for autocast, or "auto": bf16 where the device computes in it.
    states, dim: how many hidden states it has (0..N make N + 1), and their width. digest: changes with any weight.
    Raises FileNotFoundError, OSError and ValueError with one line.
    """

    def __init__(self, path, device="cpu", precision="auto"):
        self.device = torch.device(device)
        self.precision = precision if precision != "auto" else "bf16" if native_bf16(self.device) else "fp32"
        self.name = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
        self.encoder = _load_encoder(path, self.device)
        self.frames = self.encoder.frames
        self.states, self.dim, sizes = 1, 240, "fbank"
        if path != "fbank":
            config = self.encoder.config
            self.states, self.dim, sizes = config.layers + 1, config.dim, str(dataclasses.asdict(config))
        digest = hashlib.sha256(sizes.encode())
        for weight in self.encoder.state_dict().values():
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        self.digest = digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, waveforms, lengths):
        """Hidden states, (states, batch, frames, dim); an utterance's are those it has alone, and 0 past its end.

        waveforms: (batch, samples) at 16 kHz, on the device; lengths: samples of each, (batch,).
        In bfloat16, whether they are kept or not, so that a score does not depend on where there was room.
        """
        count, states = max(1, AT_ONCE // waveforms.shape[1]), []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for part in zip(waveforms.split(count), lengths.split(count)):
                states.append(torch.stack([state.bfloat16() for state in self.encoder(*part)]))
        return torch.cat(states, dim=1)


def _load_encoder(path, device):
    if path == "fbank":
        return FilterBanks()
    if path in TEACHERS or os.path.isdir(path):
        return load_teacher(path, device)
    if not os.path.exists(path):
        known = ", ".join(TEACHERS)
        raise FileNotFoundError(f"{path}: no such upstream; give a student.pt, a checkpoint, fbank, or a name: {known}")
    try:
        return load_student(path, device).encoder.requires_grad_(False)
    except ValueError:  # no student: a teacher's checkpoint
        return load_teacher(path, device)


class Probe(nn.Module):
    """All that learns: a weight for each hidden state, and a task's head.

    Source: the featurizer of SUPERB, arXiv:2105.01051, section 3.
    """

    def __init__(self, states, head):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(states))
        self.head = head

    def forward(self, states, frames):
        """states: (states, batch, frames, dim); frames: (batch,), how many each utterance has. Returns the head's outputs."""
        return self.head(torch.tensordot(self.weights.softmax(0), states, dims=1), frames)


# ---------------------------------------------------------------- utterances with labels, and their states


class Split:
    """Labelled utterances of a corpus.

    name: for messages. corpus: a data.Corpus; places: which of its utterances, in order; ids: [str], labels: [tensor],
    for each of those. left_out: {ID: reason} of the utterances that cannot be used.
    """

    def __init__(self, name, corpus, places, ids, labels, left_out):
        self.name, self.corpus, self.places = name, corpus, np.asarray(places)
        self.ids, self.labels, self.left_out = ids, labels, left_out
        self.number = {int(place): number for number, place in enumerate(places)}
        self.samples = corpus.samples[self.places]

    def fingerprint(self):
        """Changes with any utterance's path, length or label."""
        text = self.corpus.part(self.places).fingerprint() + str([label.tolist() for label in self.labels])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_transcripts(folder, split):
    """LibriSpeech's transcripts: (data.Corpus of the utterances that have words, their IDs, words, {ID: reason} left out).

    Every line of a `.trans.txt` is `ID WORD WORD ...`, the audio beside it. Raises FileNotFoundError and ValueError,
    naming the line, for one without audio.
    """
    corpus = data.find_corpus(folder, [split])
    audio = {os.path.splitext(path)[0]: place for place, path in enumerate(corpus.paths)}
    unusable = {os.path.splitext(path)[0]: reason for path, reason in corpus.left_out.items()}
    places, ids, words, left_out, described = [], [], [], {}, set()
    for file in sorted(path for path in data.files_under(folder, split) if path.endswith(".trans.txt")):
        for number, line in read_lines(os.path.join(folder, file)):
            name, *spoken = line.split()
            stem = os.path.join(os.path.dirname(file), name)
            if (stem not in audio and stem not in unusable) or stem in described:
                what = "a second line of" if stem in described else "no audio beside it for"
                raise ValueError(f"{os.path.join(folder, file)}, line {number}: {what} {name}; mend it, or take it out")
            described.add(stem)
            if stem in unusable or not spoken:
                left_out[name] = unusable.get(stem, "no words")
            else:
                places.append(audio[stem])
                ids.append(name)
                words.append(spoken)
    left_out |= {os.path.basename(stem): "no transcript" for stem in (audio.keys() | unusable.keys()) - described}
    if not places:
        raise ValueError(f"{os.path.join(folder, split)}: no transcripts; each folder of audio needs its .trans.txt")
    return corpus.part(places), ids, words, left_out


def read_lines(path):
    """(number from 1, line) of every line that is not empty. Raises FileNotFoundError and ValueError naming the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8") as file:
            return [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None


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
                stop(item["unreadable"])
            if "states" in item:
                states = item["states"].to(device, non_blocking=True)
            else:
                states = self.upstream(item["waveforms"].to(device, non_blocking=True), item["lengths"].to(device))
            yield item["utterances"].tolist(), states.float(), self.frames[item["utterances"]].to(device)

    def keep(self, path, name, batch_size, workers, check):
        """Runs the upstream over the corpus once and keeps its states: in memory, or in a file where a path is given.

        A file that is there is used; one that an interrupted run has begun is carried on. check: called between batches.
        Raises OSError where the disk has no room, ValueError where the file is not what it should be.
        """
        if path is None:
            row = torch.empty(self.bytes // 2, dtype=torch.bfloat16)
            for _ in self._fill(row, 0, name, batch_size, workers):
                check()
            self.row = row
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with data.locked(path + ".lock"):
            if not os.path.exists(path):
                self._fill_file(path, name, batch_size, workers, check)
        if os.path.getsize(path) != self.bytes:
            raise ValueError(f"{path}: not {self.bytes:,} bytes long; delete it, and it is made anew")
        self.path = path

    def _fill_file(self, path, name, batch_size, workers, check):
        partial, count, done = path + ".partial", path + ".done", 0
        with contextlib.suppress(OSError, ValueError):
            with open(count, encoding="ascii") as file:
                done = int(file.read()) if os.path.getsize(partial) == self.bytes else 0

        with open(partial, "r+b" if done else "wb") as file:
            try:  # all of it now: a disk that turns out full under mapped memory kills the process
                reserve = getattr(
                    os, "posix_fallocate", lambda number, _, size: os.truncate(number, size)
                )  # not on macOS
                reserve(file.fileno(), 0, self.bytes)
            except OSError as error:
                os.remove(partial)
                room = f"no room for {self.bytes / 1e9:.3g} GB ({error})"
                raise OSError(f"{path}: {room}; give --cache another folder") from None

            def save():
                os.fsync(file.fileno())
                save_atomically(count, lambda count_file: count_file.write(str(done).encode()))

            saved = time.monotonic()
            row = torch.from_file(partial, shared=True, size=self.bytes // 2, dtype=torch.bfloat16)
            try:
                for count_now in self._fill(row, done, name, batch_size, workers):
                    done = count_now
                    if time.monotonic() - saved > 30:
                        save()
                        saved = time.monotonic()
                    check()
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


class Shuffled:
    """A split's training batches, as places in its corpus: [step] gives utterances of similar length, each at most once an
    epoch, by seed and step alone."""

    def __init__(self, split, batch_size, seed):
        self.places = split.places
        self.of_epoch = data.Batches(split.corpus.part(split.places), batch_size, int(split.samples.max()), seed)
        self.epoch = None

    def __getitem__(self, step):
        epoch, row = divmod(step, self.of_epoch.steps_an_epoch)
        if epoch != self.epoch:
            self.epoch, (self.utterances, _, _) = epoch, self.of_epoch.plan(epoch)
        return self.places[self.utterances[row]]


def keep_states(args, upstream, states, splits, training, check):
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
            folder = f"{upstream.name}-{upstream.digest}-{upstream.precision}"
            path = os.path.join(args.cache, folder, f"{os.path.basename(name)}-{_fingerprint(corpus)}.states")
        states[corpus].keep(path, name, args.batch_size, args.workers, check)


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
    except (OSError, StopIteration):  # not Linux: all there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            free = min(free, int(file.read()))
    return free


# ---------------------------------------------------------------- the run


def load_run(args, fingerprints):
    """What last.pt in OUT holds, or None. Raises ValueError where it is another run's, or damaged."""
    path = os.path.join(args.out, "last.pt")
    if not os.path.exists(path):
        return None
    try:
        run = load_safely(path)
        settings, before, known = run["settings"], run["fingerprints"], run["format"] == FORMAT
    except Exception:  # a damaged file can raise nearly anything
        known = False
    if not known:
        raise ValueError(f"{path}: damaged, or not a probe's; give --out another folder, or move the file away")
    differ = [
        f"--{key.replace('_', '-')} was {_text(settings[key])}, is {_text(value)}"
        for key, value in vars(args).items()
        if key not in FREE and key in settings and settings[key] != value
    ]
    if differ:
        raise ValueError(
            f"{args.out}: holds a run with other settings: {'; '.join(differ)}; take its own, or another --out"
        )
    changed = [name for name, value in fingerprints.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"{args.out}: not the same any more: {', '.join(changed)}; restore it, or give another --out")
    return run


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else value


def save_run(args, fingerprints, probe, optimizer, progress):
    run = {"format": FORMAT, "settings": vars(args), "fingerprints": fingerprints, "progress": progress}
    run |= {"probe": probe.state_dict(), "optimizer": optimizer.state_dict()}
    with refusing():
        save_atomically(os.path.join(args.out, "last.pt"), lambda file: torch.save(run, file))


def predict(probe, split, states, decode, batch_size, workers=0, check=lambda: None):
    """A prediction for each utterance of a split, in its order; the same for any batch size."""
    order, predictions = split.places[by_length(split.samples)], [None] * len(split.ids)
    plan = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    probe.eval()
    with torch.no_grad():
        for utterances, x, frames in states.batches(plan, workers=workers):
            for place, prediction in zip(utterances, decode(probe(x, frames), frames)):
                predictions[split.number[place]] = prediction
            check()
    probe.train()
    return predictions


def evaluate(args, metric, upstream, states, splits, make_head, loss, decode, count, higher_is_better=False):
    """Trains a probe on the first split, takes its best step on the second, and scores that step on the third.

    states: {corpus: States} of all splits.
    make_head(dim): an nn.Module, (batch, frames, dim) and frames (batch,) to outputs.
    loss(outputs, frames, labels): one number. decode(outputs, frames): a prediction for each utterance.
    count(labels, predictions): two (utterances,) arrays, whose sums' quotient is the score named `metric`.
    Returns (the result so far, a dict, and the predictions on the third split), or, where the run was finished before,
    (its whole result, None). Started again after an interruption, it goes on where it was.
    """
    fingerprints = {"upstream": upstream.digest} | {split.name: split.fingerprint() for split in splits}
    report = os.path.join(args.out, "result.json")
    with refusing():
        run = load_run(args, fingerprints)
        if run and run["progress"]["scored"] == args.steps and os.path.exists(report):
            print(f"{args.out}: finished, {args.steps:,} steps; give --out another folder for another run")
            with open(report, encoding="utf-8") as file:
                return json.load(file), None
        plan = Shuffled(splits[0], args.batch_size, args.seed)
        os.makedirs(args.out, exist_ok=True)
        claim = data.claim(args.out)  # noqa: F841, let go when this function ends

    torch.manual_seed(args.seed)
    probe = Probe(upstream.states, make_head(upstream.dim)).to(upstream.device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=args.lr)
    # scored: the step last scored on the second split; curve: [step, score] of each so far.
    progress = {"step": 0, "scored": 0, "curve": [], "best": None}
    progress["seconds"] = {"states": 0.0, "training": 0.0, "scoring": 0.0}
    if run:
        probe.load_state_dict(run["probe"])
        optimizer.load_state_dict(run["optimizer"])
        progress = run["progress"]
        print(f"{args.out}: resuming after step {progress['step']:,} of {args.steps:,}", flush=True)

    def scores(split, check):
        with _timed(progress["seconds"], "scoring"):
            predictions = predict(probe, split, states[split.corpus], decode, args.batch_size, args.workers, check)
            return predictions, *count(split.labels, predictions)

    save = functools.partial(save_run, args, fingerprints, probe, optimizer, progress)
    with interruptions() as check:
        try:
            with refusing(), _timed(progress["seconds"], "states"):
                keep_states(args, upstream, states, splits, progress["scored"] < args.steps, check)
            loader = states[splits[0].corpus].batches(plan, progress["step"], args.steps, args.workers)
            losses, since = [], time.monotonic()
            while progress["scored"] < args.steps:
                step = progress["step"]
                if step > progress["scored"] and (step % args.eval_every == 0 or step == args.steps):
                    save()
                    _, part, total = scores(splits[1], check)
                    note = note_score(progress, step, float(part.sum() / total.sum()), probe, higher_is_better)
                    print(f"step {step}: {metric} {progress['curve'][-1][1]:.2%} on {splits[1].name}{note}", flush=True)
                    save()
                    losses, since = [], time.monotonic()
                    continue

                check()
                with _timed(progress["seconds"], "training"):
                    # A head's dropout depends on seed and step alone, so that a resume needs no generator's state.
                    seed = np.random.SeedSequence((args.seed, step)).generate_state(1, np.uint64)[0]
                    torch.manual_seed(int(seed))
                    utterances, x, frames = next(loader)
                    labels = [splits[0].labels[splits[0].number[place]] for place in utterances]
                    value = loss(probe(x, frames), frames, labels)
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    norm = nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
                    if not torch.isfinite(value + norm):
                        ids = ", ".join(splits[0].ids[splits[0].number[place]] for place in utterances)
                        stop(f"step {step + 1}: the loss is not finite; utterances of the batch: {ids}")
                    optimizer.step()
                losses.append(value.item())
                progress["step"] = step = step + 1
                if step % args.log_every == 0 or step == args.steps:
                    each = (time.monotonic() - since) / len(losses)
                    left = f"{1 / each:.3g} steps/s  {clock(each * (args.steps - step))} left"
                    place = f"step {step:>{len(str(args.steps))}}/{args.steps}"
                    print(f"{place}  loss {sum(losses) / len(losses):.4f}  {left}", flush=True)
                    losses, since = [], time.monotonic()

            probe.load_state_dict(progress["best"]["probe"])
            predictions, part, total = scores(splits[2], check)
        except Interrupted as interrupted:
            # The best probe is loaded only after the last save.
            if progress["scored"] < progress["step"]:
                save()
            where = f"interrupted after step {progress['step']} of {args.steps}"
            stop(f"{where}; the same command resumes", 128 + interrupted.args[0])

    result = {"metric": metric, metric.lower(): float(part.sum() / total.sum()), "interval": bootstrap((part, total))}
    result |= {"best_step": progress["best"]["step"], "curve": progress["curve"]}
    result |= {"layer_weights": probe.weights.detach().softmax(0).tolist(), "counts": {}}
    for split in splits:
        seconds = round(float(split.samples.sum()) / data.SAMPLE_RATE, 2)
        counts = {"utterances": len(split.ids), "seconds": seconds, "left_out": len(split.left_out)}
        result["counts"][split.name] = counts
    result["upstream"] = {"path": args.upstream, "states": upstream.states, "dim": upstream.dim}
    result["upstream"] |= {"digest": upstream.digest, "precision": upstream.precision, "device": upstream.device.type}
    result["seconds"] = {what: round(spent, 2) for what, spent in progress["seconds"].items()}
    result["settings"] = vars(args)
    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    result["versions"] |= {"torchaudio": torchaudio.__version__, "soundfile": soundfile.__version__}
    return result, predictions


def note_score(progress, step, score, probe, higher_is_better=False):
    """Takes a score on the second split down, with the probe where it is the best so far; returns a remark on it."""
    progress["scored"] = step
    progress["curve"].append([step, score])
    best = progress["best"]
    if best and (score <= best["score"] if higher_is_better else score >= best["score"]):
        return ""
    weights = {name: weight.detach().cpu().clone() for name, weight in probe.state_dict().items()}
    progress["best"] = {"step": step, "score": score, "probe": weights}
    return ", the best so far"


@contextlib.contextmanager
def _timed(seconds, what):
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[what] += time.monotonic() - started


# ---------------------------------------------------------------- one label an utterance


class MeanHead(nn.Module):
    """A projection to 256, the mean over an utterance's frames, and a linear layer to the classes.

    longest: frames of the random crop that training sees of longer utterances, or None.
    Source: SUPERB's speaker identification and emotion recognition, s3prl's UtteranceLevel with MeanPooling.
    """

    def __init__(self, dim, classes, longest=None):
        super().__init__()
        self.projection = nn.Linear(dim, 256)
        self.classes = nn.Linear(256, classes)
        self.longest = longest

    def forward(self, x, frames):
        """x: (batch, frames, dim); frames: (batch,). Returns logits, (batch, classes)."""
        start = torch.zeros_like(frames)
        if self.training and self.longest:
            room = (frames - self.longest).clamp(min=0)
            start = (torch.rand(len(frames)).to(frames.device) * (room + 1)).long()
            frames = frames.clamp(max=self.longest)
        time = torch.arange(x.shape[1], device=x.device)
        inside = (time >= start[:, None]) & (time < (start + frames)[:, None])
        mean = (self.projection(x) * inside[:, :, None]).sum(1) / frames[:, None]
        return self.classes(mean)


def class_loss(logits, frames, labels):
    """Cross-entropy of (batch, classes) logits for [() int64 tensor] labels."""
    return nn.functional.cross_entropy(logits, torch.stack(labels).to(logits.device))


def class_of(logits, frames):
    """The most probable class of each utterance."""
    return logits.argmax(-1).tolist()


def right(labels, predictions):
    """(1 where the class is right, 1), each (utterances,): their sums make the accuracy."""
    same = np.array([int(label) == prediction for label, prediction in zip(labels, predictions)], float)
    return same, np.ones(len(same))


def read_table(path, columns):
    """Rows of a .csv, each a dict with its "line", that has all `columns`. Raises FileNotFoundError and ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; give --manifest a .csv with columns {','.join(columns)}")
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file)
            rows = [row | {"line": reader.line_num} for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a .csv in UTF-8 ({error})") from None
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(f"{path}, line 1: no column {', '.join(missing)}; it needs {','.join(columns)}")
    for row in rows:
        if not all(row[column] for column in columns):
            raise ValueError(f"{path}, line {row['line']}: a field is empty; it needs {','.join(columns)}")
    if not rows:
        raise ValueError(f"{path}: no lines below the header")
    return rows


def labelled_corpus(root, paths, where):
    """A data.Corpus of files that a list names, and the place of each path in it.

    where: of each path, the line that names it. Raises ValueError with that line where there is no such file.
    """
    for path, line in zip(paths, where):
        if not os.path.isfile(os.path.join(root, path)):
            raise ValueError(f"{line}: no file {os.path.join(root, path)}")
    twice = [path for path, count in collections.Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"{where[paths.index(twice[0])]}: {twice[0]} is named twice")
    corpus = data.Corpus(root, paths, data.read_lengths(root, paths))
    return corpus, {path: place for place, path in enumerate(corpus.paths)}


# ---------------------------------------------------------------- CTC


def ctc_loss(log_probabilities, frames, labels):
    """Mean over the utterances of CTC's loss for each label, blank 0; an utterance with too few frames weighs nothing.

    log_probabilities: (batch, frames, symbols + 1); frames: (batch,); labels: [(length,) int64 tensor], symbols from 1.
    """
    lengths = torch.tensor([len(label) for label in labels])
    targets = torch.cat(labels).to(log_probabilities.device)
    return nn.functional.ctc_loss(log_probabilities.transpose(0, 1), targets, frames.cpu(), lengths, zero_infinity=True)


def ctc_frames(label):
    """How many frames CTC needs for a label: one a symbol, and a blank between equal neighbours."""
    return len(label) + int((label[1:] == label[:-1]).sum())


def ctc_greedy(log_probabilities, frames):
    """Each utterance's most probable path, repeats merged and blanks taken out: [[symbol, ...]]."""
    best = log_probabilities.argmax(-1).cpu()
    paths = [path[:length].unique_consecutive().tolist() for path, length in zip(best, frames.tolist())]
    return [[symbol for symbol in path if symbol != 0] for path in paths]


def edits(references, hypotheses):
    """(edit distances, lengths of the references), each (utterances,): their sums make PER, WER or CER."""
    distance = torchaudio.functional.edit_distance
    pairs = zip(references, hypotheses)
    return np.array([distance(list(r), list(h)) for r, h in pairs], float), np.array(
        [len(r) for r in references], float
    )


def alignment(reference, hypothesis):
    """(substitutions, deletions, insertions) of the shortest edit; where several are, of the one with most symbols right."""
    # row[j]: (errors, substitutions, deletions, insertions) from the reference so far to hypothesis[:j].
    row = [(j, 0, 0, j) for j in range(len(hypothesis) + 1)]
    for i, symbol in enumerate(reference, start=1):
        diagonal, row[0] = row[0], (i, 0, i, 0)
        for j, other in enumerate(hypothesis, start=1):
            e, s, d, n = diagonal
            substituted = (e, s, d, n) if symbol == other else (e + 1, s + 1, d, n)
            e, s, d, n = row[j]
            deleted = (e + 1, s, d + 1, n)
            e, s, d, n = row[j - 1]
            inserted = (e + 1, s, d, n + 1)
            diagonal, row[j] = row[j], min(substituted, deleted, inserted)
    return row[-1][1:]


def kinds_of_errors(references, hypotheses):
    """{"substitutions", "deletions", "insertions"} over a set, and "reference_symbols", what they are out of."""
    counted = [alignment(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses)]
    kinds = dict(zip(("substitutions", "deletions", "insertions"), (sum(column) for column in zip(*counted))))
    return kinds | {"reference_symbols": sum(len(reference) for reference in references)}


def too_short(upstream, splits):
    """{name: how many utterances have fewer frames than CTC needs for their label}."""
    counts = {}
    for split in splits:
        frames = upstream.frames(torch.from_numpy(split.samples)).tolist()
        counts[split.name] = sum(ctc_frames(label) > length for label, length in zip(split.labels, frames))
    return counts


# ---------------------------------------------------------------- the report


def bootstrap(*sets, resamples=10_000, seed=0):
    """95% interval, [low, high], of sum(parts) / sum(totals) where the utterances are drawn anew with replacement.

    sets: (parts, totals), each (utterances,); of several, such as folds, it is the interval of the mean of their scores.
    Source: Bisani and Ney 2004, Bootstrap estimates for confidence intervals in ASR performance evaluation.
    """
    rng, scores = np.random.default_rng(seed), np.zeros(resamples)
    for parts, totals in sets:
        for resample in range(resamples):
            drawn = rng.integers(0, len(parts), len(parts))
            scores[resample] += parts[drawn].sum() / totals[drawn].sum() / len(sets)
    return [float(edge) for edge in np.percentile(scores, [2.5, 97.5])]


def describe(split, unknown=(), too_short=0):
    """One line on a split: its size, and what of it is not used."""
    parts = [f"{split.name}: {len(split.ids):,} utterances, {split.samples.sum() / data.SAMPLE_RATE / 3600:.2f} hours"]
    if too_short:
        parts.append(f"{too_short} with fewer frames than their transcript needs")
    if split.left_out:
        parts.append(f"{len(split.left_out)} left out")
        parts += sorted({reason for reason in split.left_out.values() if not reason.startswith("not in the lexicon")})[
            :3
        ]
    if unknown:
        parts.append(f"not in the lexicon: {' '.join(sorted(unknown)[:20])}{' ...' if len(unknown) > 20 else ''}")
    return "; ".join(parts)


def show(args, result, dev, test, rows):
    """Prints the result as a person reads it. dev, test: names of the splits; rows: (name, value, remark) of the task."""
    metric, (low, high), counts = result["metric"], result["interval"], result["counts"][test]
    step, best = next(pair for pair in result["curve"] if pair[0] == result["best_step"])
    of = f"{counts['utterances']:,} utterances, {counts['left_out']} left out"
    print(f"\n{result['task'].capitalize()} of {args.upstream} on {test} ({of})")
    rows = [(metric, f"{result[metric.lower()]:.2%}", f"95% interval {low:.2%} to {high:.2%}"), *rows]
    for name, value, remark in [*rows, ("best step", f"{step:,}", f"{metric} {best:.2%} on {dev}")]:
        print(f"  {name:13}  {value:>8}  {remark}")
    print("  learned weights of the hidden states:")
    print("\n".join(bars(result["layer_weights"])))
    print(f"{args.out}: result.json, test.hyp, test.ref", flush=True)


def write_report(args, result, **texts):
    """OUT/result.json, and a file for each of texts: {ID: symbols}, one utterance a line."""
    with refusing():
        for name, lines in texts.items():
            text = "".join(" ".join([name, *map(str, symbols)]) + "\n" for name, symbols in lines.items())
            save_atomically(os.path.join(args.out, f"test.{name}"), lambda file, text=text: file.write(text.encode()))
        text = json.dumps(result, indent=2)
        save_atomically(os.path.join(args.out, "result.json"), lambda file: file.write(text.encode()))


def error_rows(result, symbols):
    """Rows for `show` of the kinds of errors; symbols: what is counted, such as "phones"."""
    total = result["reference_symbols"]
    kinds = ("substitutions", "deletions", "insertions")
    return [(k, f"{result[k] / total:.2%}", f"{result[k]:,}") for k in kinds] + [("out of", f"{total:,}", symbols)]


def bars(weights, width=40):
    """The learned layer weights as lines of text, the longest bar for the largest."""
    longest = max(weights)
    return [
        f"  state {i:>2}  {weight:.3f}  {'#' * round(width * weight / longest)}" for i, weight in enumerate(weights)
    ]


def clock(seconds):
    """Seconds as 1 d 2:03:04."""
    days, seconds = divmod(round(seconds), 86400)
    return f"{f'{days} d ' if days else ''}{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


# ---------------------------------------------------------------- a table of results

TASKS = {
    "phoneme recognition": "PR",
    "speaker identification": "SID",
    "emotion recognition": "ER",
    "speech recognition": "ASR",
}


def table(folders):
    """Lines of a table of the result.json in the folders: upstreams by tasks, laid out as in the paper. Raises as open does."""
    scores = {}
    for folder in folders:
        path = os.path.join(folder, "result.json")
        try:
            with open(path, encoding="utf-8") as file:
                result = json.load(file)
            metric, (low, high) = result["metric"], result["interval"]
            cell = f"{result[metric.lower()]:.2%} ({low:.2%} to {high:.2%})"
            upstream, task = result["upstream"]["path"], (TASKS[result["task"]], metric)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{path}: no such result; give folders that an evaluate_*.py wrote") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not the result of an evaluate_*.py") from None
        if task in scores.setdefault(upstream, {}):
            raise ValueError(f"{path}: a second {task[0]} of {upstream}; give one")
        scores[upstream][task] = cell
    order = list(TASKS.values())
    tasks = sorted({task for row in scores.values() for task in row}, key=lambda task: order.index(task[0]))
    arrows = {"accuracy": "up"}
    head = ["upstream", *(f"{task} ({metric}, {arrows.get(metric, 'down')})" for task, metric in tasks)]
    rows = [head] + [[upstream, *(row.get(task, "-") for task in tasks)] for upstream, row in scores.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def main(arguments=None):
    parser = argparse.ArgumentParser(description="A table of results: upstreams by tasks, with 95% intervals.")
    parser.error = stop
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders with a result.json, such as runs/*/pr")
    with refusing():
        print("\n".join(table(parser.parse_args(arguments).folders)))


if __name__ == "__main__":
    main()
