"""How fast a distillation step is, and how near the machine's limit: three full-size Base teachers of random weights.

    python bench.py --peer
    torchrun --standalone --nproc_per_node=2 bench.py
    python bench.py --loader --data data/LibriSpeech --splits train-clean-100

The step is train.py's, with a clock between its parts; its waveforms come from files, through data.py.
"""

import processes
from processes import DISTRIBUTED, RANK, WORLD_SIZE

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import tempfile
import time

import numpy as np
import soundfile
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import aggregate
import data
from encoder import EncoderConfig, SpeechEncoder
from losses import distillation_loss
from states import Ensemble, States, WithTargets
from student import Student, initialise, student_config
from train import ADAMW

TEACHERS = ("hubert", "hubert", "wavlm")
PARTS = ("data", "teachers", "student forward", "backward", "optimizer")


# ---------------------------------------------------------------- settings


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = processes.parser(__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--seconds", type=_seconds, default=argparse.SUPPRESS, help="lengths of the utterances of a process's batch (default: 8.0,7.6,7.1,6.5; on a GPU 24 of 12 to 15 s)")
    add("--heads", type=_layers, default="4,8,12", help="layers of Base to predict, counted from 1")
    add("--agg", choices=list(aggregate.AGGREGATIONS), default="avg", help="aggregation of the teachers' states")
    add("--steps", type=processes.count, default=5, help="steps that are timed, after two that are not")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto is bf16 where the device computes in it")
    add("--compile", action="store_true", help="torch.compile teachers and student")
    add("--cache", action="store_true", help="time the step with kept targets too, in turn with ours (train.py --cache)")
    add("--peer", action="store_true", help="time the step as transformers' models do it too, in float32 on the padded batch, in turn with ours (needs transformers)")
    add("--peer-precision", choices=["fp32", "bf16"], default="fp32", help="transformers in float32, or under autocast")
    add("--loader", action="store_true", help="time data.py alone instead, on --data")
    add("--data", default="data/LibriSpeech", help="for --loader: folder of audio, or a fairseq manifest (.tsv)")
    add("--splits", type=processes.names, default="train-clean-100", help="for --loader: sub-folders of --data")
    add("--batch-size", type=processes.count, default=24, help="for --loader: utterances a batch")
    add("--workers", type=processes.whole, default=1, help="processes that read audio")
    add("--profile", metavar="FILE", help="write a Chrome trace of one more step of ours there")
    add("--json", action="store_true", help="print the figures as a JSON object on the last line")
    # fmt: on
    return parser.parse_args(arguments)


def _seconds(text):
    seconds = [float(number) for number in text.split(",")]
    if not all(0.2 <= number <= 3600 for number in seconds):
        raise argparse.ArgumentTypeError(f"{text}: utterances of 0.2 to 3600 seconds")
    return seconds


def _layers(text):
    found = processes.layers(text)
    if max(found) > 12:
        raise argparse.ArgumentTypeError(f"{text}: layers of Base, 1 to 12")
    return found


# ---------------------------------------------------------------- what is timed


class Clock:
    """Seconds between marks, summed by name. On a GPU by events in its stream, so that nothing waits for it."""

    def __init__(self, device):
        self.device, self.marks = device, []

    def mark(self, name):
        """What ran since the mark before was `name`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def shares(self):
        """{part: its share of the time that all parts took}."""
        synchronize(self.device)
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, before), (name, now) in zip(self.marks, self.marks[1:]):
            if name in spent:
                spent[name] += before.elapsed_time(now) if self.device.type == "cuda" else now - before
        return {part: seconds / sum(spent.values()) for part, seconds in spent.items()}


class Ours:
    """train.py's step, in its own order."""

    def __init__(self, args, device, batches):
        torch.manual_seed(0)
        config = EncoderConfig()
        configs = [config if name == "hubert" else EncoderConfig(relative_buckets=320) for name in TEACHERS]
        self.teachers = [SpeechEncoder(config).requires_grad_(False).eval().to(device) for config in configs]
        names = [(f"{name}-{number}", config.dim) for number, name in enumerate(TEACHERS)]
        student = Student(student_config(config), aggregate.heads(args.agg, [args.heads] * len(names), names))
        initialise(student, self.teachers[0])
        self.student = student.to(device).train()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4, weight_decay=0.01, **ADAMW)
        self.model = student
        if DISTRIBUTED:
            devices = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(student, devices, gradient_as_bucket_view=True)
        self.targets_of, self.layers, self.device = aggregate.AGGREGATIONS[args.agg], args.heads, device
        self.workers = args.workers
        self.loader = data.load_batches(batches, 0, 10**9, args.workers, pin_memory=device.type == "cuda")
        self.precision = processes.precision(args.precision, device)
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.teachers = [teacher.to(self.dtype) for teacher in self.teachers]
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compile(self):
        processes.compile(*self.teachers, self.student)

    def keep_targets(self, batches, folder):
        """Keeps the targets of the whole corpus in files, and has its own loader for steps with them. Returns its items."""
        dims = [head[-1].out_features for head in self.student.heads]
        layers = [self.layers] * len(self.teachers)
        ensemble = Ensemble(self.teachers, layers, self.targets_of, dims, self.device)
        states = States(ensemble, batches.corpus)
        states.keep(folder, "the teachers", 1)
        batches = data.Batches(batches.corpus, batches.batch_size, batches.max_samples, grid=ensemble.hop)
        items = WithTargets(batches, states.kept, ensemble.field)
        self.kept_loader = data.load_batches(items, 0, 10**9, self.workers, pin_memory=self.device.type == "cuda")
        self.dims = dims
        return items

    def step(self, clock=None, kept=False):
        """One step, with kept targets or with the teachers; returns the seconds of audio in it."""
        mark = clock.mark if clock else lambda name: None
        mark("before")
        batch = next(self.kept_loader if kept else self.loader)
        waves = batch["waveforms"].to(self.device, non_blocking=True)
        mark("data")
        if kept:
            targets = batch["targets"].to(self.device, non_blocking=True).float().split(self.dims, dim=-1)
        else:
            with torch.no_grad():
                targets = self.targets_of([teacher(waves, layers=self.layers) for teacher in self.teachers])
        mark("teachers")
        with self.autocast():
            predictions = self.model(waves)
        loss, _, _ = distillation_loss(predictions, targets)
        mark("student forward")
        loss.backward()
        mark("backward")
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimizer.found_inf = processes.anywhere(~(torch.isfinite(loss) & torch.isfinite(norm))).float()
        self.optimizer.step()
        processes.agree(0)
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimizer")
        return waves.numel() / data.SAMPLE_RATE


class Peer:
    """The same step as it is usually written: transformers' models, shorter utterances padded."""

    def __init__(self, args, device):
        from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel

        torch.manual_seed(0)
        models = {"hubert": lambda: HubertModel(HubertConfig()), "wavlm": lambda: WavLMModel(WavLMConfig())}
        self.teachers = [models[name]().requires_grad_(False).eval().to(device) for name in TEACHERS]
        encoder = HubertModel(HubertConfig(num_hidden_layers=2, layerdrop=0.0, apply_spec_augment=False))
        dims = [dim for _, dim in aggregate.heads(args.agg, [args.heads] * 3, [(name, 768) for name in TEACHERS])]
        heads = (
            torch.nn.Sequential(torch.nn.Linear(768, 768), torch.nn.GELU(), torch.nn.Linear(768, dim)) for dim in dims
        )
        self.student = torch.nn.ModuleDict({"encoder": encoder, "heads": torch.nn.ModuleList(heads)}).train().to(device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=2e-4)
        self.targets_of, self.layers = aggregate.AGGREGATIONS[args.agg], args.heads
        bf16 = args.peer_precision == "bf16"
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        lengths = [int(seconds * data.SAMPLE_RATE) for seconds in args.seconds]
        self.audio = sum(lengths) / data.SAMPLE_RATE
        self.mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
        self.waves = 0.1 * torch.randn(self.mask.shape, device=device) * self.mask
        frames = encoder._get_feat_extract_output_lengths(torch.tensor(lengths))
        self.valid = (torch.arange(int(frames.max())) < frames[:, None]).to(device)

    def step(self):
        """One step; returns the seconds of audio in it, padding apart."""
        with torch.no_grad(), self.autocast():
            states = []
            for teacher in self.teachers:
                found = teacher(self.waves, attention_mask=self.mask, output_hidden_states=True).hidden_states
                states.append([found[layer] for layer in self.layers])
            targets = self.targets_of(states)
        with self.autocast():
            last = self.student["encoder"](self.waves, attention_mask=self.mask).last_hidden_state
            predictions = [head(last) for head in self.student["heads"]]
        loss, _, _ = distillation_loss(predictions, targets, self.valid)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.audio


def write_utterances(folder, seconds):
    """A data.Corpus of noise in FLAC files of these lengths."""
    rng, lengths = np.random.default_rng(RANK), [int(length * data.SAMPLE_RATE) for length in seconds]
    for number, length in enumerate(lengths):
        soundfile.write(os.path.join(folder, f"{number}.flac"), 0.1 * rng.standard_normal(length), data.SAMPLE_RATE)
    return data.Corpus(folder, [f"{number}.flac" for number in range(len(lengths))], lengths)


def count_flops(ours):
    """Floating-point operations of one step of this process, a multiplication and an addition being two."""
    # torch counts a grouped convolution's gradient as if it had one group, and a CPU's fused attention not at all,
    # where the plain one is matrix products.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, sdpa_kernel(SDPBackend.MATH):
        ours.step()
    return counter.get_total_flops()


def _convolution_backward(gradient, x, weight, *settings, out_shape):
    wanted = settings[-1]  # gradients of the input, the weight, the bias
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(wanted[:2])


def matrix_product(device, dtype):
    """Floating-point operations a second of a large matrix product, the best of five: what this machine can do at most."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):  # the first one warms up
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step, device):
    """(seconds, what it returned) of one step."""
    synchronize(device)
    started = time.perf_counter()
    result = step()
    synchronize(device)
    return time.perf_counter() - started, result


# ---------------------------------------------------------------- the measurements


def time_steps(args, device):
    """{figure: value} of training steps, ours and, if asked for, the peer's in turn with it."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_utterances(folder, args.seconds)
        batches = data.Batches(corpus, len(corpus), int(max(args.seconds) * data.SAMPLE_RATE))
        ours = Ours(args, device, batches)
        flops = sum(processes.gather(count_flops(ours)))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if args.compile:
            ours.compile()
        for _ in range(2):
            ours.step()
        memory = max(processes.gather(processes.peak_memory(device)))
        peer = Peer(args, device) if args.peer else None
        for _ in range(2 if peer else 0):
            peer.step()

        if args.cache:
            items = ours.keep_targets(batches, os.path.join(folder, "targets"))
            target_bytes = read_targets(items, args.workers)
            for _ in range(2):
                ours.step(kept=True)
        clock, limits, steps, kept_steps, peer_steps = Clock(device), [], [], [], []
        for _ in range(args.steps):
            limits.append(sum(processes.gather(matrix_product(device, ours.dtype))))
            steps.append(timed(lambda: ours.step(clock), device))
            if args.cache:
                kept_steps.append(timed(lambda: ours.step(kept=True), device))
            if peer:
                peer_steps.append(timed(peer.step, device))
        if args.profile:
            write_profile(ours, args.profile)

    seconds, audio = statistics.median(spent for spent, _ in steps), sum(processes.gather(steps[0][1]))
    figures = {"audio_per_second": audio / seconds, "seconds_per_step": seconds, "audio_per_step": audio}
    figures |= {"shares": clock.shares(), "peak_memory_bytes": memory}
    limit = statistics.median(limits)
    figures |= {"flops_per_step": flops, "flops_per_second": flops / seconds, "limit_flops_per_second": limit}
    figures |= {"share_of_limit": flops / seconds / limit, "precision": ours.precision}
    if args.cache:
        kept_seconds = statistics.median(spent for spent, _ in kept_steps)
        figures |= {"kept_seconds_per_step": kept_seconds, "kept_ratio": seconds / kept_seconds}
        figures["target_bytes_per_second"] = target_bytes
    if peer:
        peer_seconds = statistics.median(spent for spent, _ in peer_steps)
        figures["peer_audio_per_second"] = peer_steps[0][1] / peer_seconds
        figures["ratio_to_peer"] = figures["audio_per_second"] / figures["peer_audio_per_second"]
    return figures


def read_targets(items, workers, count=100):
    """Bytes of targets a second and worker that the loader brings of kept files, from the page cache, audio beside them."""
    loader = data.load_batches(items, 0, count, workers)
    next(loader)  # the processes are up
    started = time.perf_counter()
    read = sum(item["targets"].nbytes for item in loader)
    return read / (time.perf_counter() - started) / max(1, workers)


def write_profile(ours, path):
    """A Chrome trace of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ours.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        ours.step()
    if RANK == 0:
        profiler.export_chrome_trace(path)


def time_loader(args):
    """{figure: value} of data.py alone: the start, planning an epoch, reading and cutting."""
    memory, started = resident_memory(), time.perf_counter()
    corpus = data.find_corpus(args.data, args.splits)
    batches = data.Batches(corpus, args.batch_size, 250_000)
    begun = time.perf_counter()
    figures = {"utterances": len(corpus), "hours": corpus.hours(), "start_seconds": begun - started}
    batches.plan(0)
    figures |= {"plan_seconds": time.perf_counter() - begun, "start_memory_bytes": resident_memory() - memory}

    last, begun = 0, time.perf_counter()  # a first pass fills the page cache, for ten seconds at most
    for _ in data.load_batches(batches, 0, batches.steps_an_epoch, args.workers):
        last += 1
        if time.perf_counter() - begun > 10:
            break
    if last == batches.steps_an_epoch:
        last *= 5  # the corpus is small: five epochs
    audio, utterances, left_out, since = 0.0, 0, 0, None
    for batch in data.load_batches(batches, 0, last, args.workers):
        if since is None:  # the processes are up
            since = time.perf_counter()
            continue
        audio += batch["waveforms"].numel() / data.SAMPLE_RATE
        utterances, left_out = utterances + len(batch["paths"]), left_out + len(batch["left_out"])
    spent = max(1, args.workers) * (time.perf_counter() - since)
    data.check_left_out(left_out, utterances, args.data)
    figures |= {"utterances_per_second": utterances / spent, "audio_per_second": audio / spent}
    return figures | {"workers": args.workers}


def resident_memory():
    """Bytes of memory that this process holds; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


# ---------------------------------------------------------------- the report


def show_steps(args, figures, device):
    """The table of a training step, from rank 0."""
    f, threads = figures, "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    names = {"hubert": "HuBERT", "wavlm": "WavLM"}
    print(f"three Base teachers ({', '.join(names[name] for name in TEACHERS)}; random weights), a student of 2 layers")
    heads = ",".join(map(str, args.heads))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    compiled = ", compiled" if args.compile else ""
    print(f"--agg {args.agg}, heads {heads}, {f['precision']}{compiled}, {WORLD_SIZE} x {where}{threads}")
    count, audio = WORLD_SIZE * len(args.seconds), f["audio_per_step"]
    print(f"batch: {count} utterances, {sum(args.seconds) * WORLD_SIZE:.1f} s of speech, cut to {audio:.1f} s\n")
    rows = [("speech a second", f"{f['audio_per_second']:.3g} s"), ("a step", f"{f['seconds_per_step']:.3g} s")]
    rows += [(f"  {part}", f"{share:.1%}") for part, share in f["shares"].items()]
    rows += [("200,000 such steps", f"{f['seconds_per_step'] * 200_000 / 3600:,.0f} hours")]
    rows += [("peak memory", f"{f['peak_memory_bytes'] / 1e9:.1f} GB a process")]
    rows += [("a step's FLOPs", f"{f['flops_per_step']:.3g}"), ("FLOPs a second", f"{f['flops_per_second']:.3g}")]
    rows += [("the limit", f"{f['limit_flops_per_second']:.3g}, a matrix product in {f['precision']}")]
    rows += [("share of the limit", f"{f['share_of_limit']:.1%}")]
    if args.cache:
        rows += [("a step, targets kept", f"{f['kept_seconds_per_step']:.3g} s, {f['kept_ratio']:.2f} times as fast")]
        rows += [
            (
                "reading targets",
                f"{f['target_bytes_per_second'] / 1e6:,.0f} MB a second and worker, from the page cache",
            )
        ]
    if args.peer:
        rows += [(f"transformers, {args.peer_precision}", f"{f['peer_audio_per_second']:.3g} s of speech a second")]
        rows += [("ours to that", f"{f['ratio_to_peer']:.2f} times")]
    for name, value in rows:
        print(f"  {name:22}{value}")


def show_loader(args, figures):
    """The table of the loader."""
    f = figures
    rows = [("start", f"{f['start_seconds']:.2f} s, {f['start_memory_bytes'] / 1e6:.0f} MB")]
    rows += [("planning an epoch", f"{f['plan_seconds']:.2f} s")]
    rows += [("reading and cutting", f"{f['utterances_per_second']:,.0f} utterances a second and worker")]
    rows += [("", f"{f['audio_per_second']:,.0f} s of audio a second and worker")]
    print(f"{args.data}: {f['utterances']:,} utterances, {f['hours']:.2f} hours; {args.workers} workers\n")
    for name, value in rows:
        print(f"  {name:20}{value}")


def main(arguments=None):
    processes.begin()
    args = parse(arguments)
    if args.peer:
        if DISTRIBUTED:
            processes.stop("--peer compares one process; start it with python, not torchrun")
        try:
            import transformers  # noqa: F401
        except ImportError:
            processes.stop("--peer needs a package that is not there: pip install transformers")
    if args.profile:
        with processes.together("--profile"):
            if not os.path.isdir(os.path.dirname(args.profile) or "."):
                raise FileNotFoundError(f"{args.profile}: no such folder; make it first")
            open(args.profile, "ab").close()  # torch.profiler says nothing where it cannot write
    device = processes.device()
    if not hasattr(args, "seconds"):  # on a GPU train.py's batch
        args.seconds = np.linspace(15, 12, 24).tolist() if device.type == "cuda" else [8.0, 7.6, 7.1, 6.5]
    if args.loader:
        with processes.together():
            figures = time_loader(args)
    else:
        figures = time_steps(args, device)
    if RANK == 0:
        show_loader(args, figures) if args.loader else show_steps(args, figures, device)
        if args.json:
            print(json.dumps(figures), flush=True)
    processes.end()


if __name__ == "__main__":
    processes.run(main)
