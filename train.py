"""Distil an ensemble of frozen speech teachers into one small student (arXiv:2302.12757).

    torchrun --standalone --nproc_per_node=4 train.py --agg avg --heads 4,8,12
    python train.py --demo

One file, read from top to bottom: settings, set-up, the loop. The same command resumes a run.
"""

import runs
from runs import RANK, WORLD_SIZE

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import subprocess
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import aggregate
import data
from cache import Cache, dequantize, key, quantize
from losses import distillation_loss
from student import Student, initialise, save_student, student_config
from teachers import check_frames, digest, layers_per_teacher, load_teacher, short_names

# Settings that may differ when a run resumes: they change no weight beyond rounding, except
# --accumulate, --compile and the number of processes, which change the dropout masks.
MAY_CHANGE = {"out", "accumulate", "compile", "workers", "log_every", "save_every", "tensorboard"}
MAY_CHANGE |= {"data", "teachers", "cache", "noise"}  # paths: audio and weights are compared
CHECKPOINT = ("step", "settings", "teachers", "student", "optimizer")


def parse(arguments=None):
    """Settings from the command line. Raises ValueError."""
    parser = runs.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--teachers", type=runs.names, default="hubert,robust_hubert,wavlm_plus",
        help="names or paths of checkpoints; the first sets the student's architecture")
    add("--agg", choices=list(aggregate.AGGREGATIONS), default="avg",
        help="layerwise average or concatenation, or one head per teacher and layer")
    add("--heads", type=parse_layers, default="4,8,12",
        help="teachers' layers to predict, from 1; per teacher: 4,8,12/4,8,12/8,16,24")
    add("--student-layers", type=runs.count, default=2, help="Transformer layers of the student")
    add("--student-dim", type=runs.count, help="width of the student; the teacher's if not given")
    add("--init", choices=["first", "none"], default="first",
        help="initialise from the first teacher, or randomly")
    add("--dropout", type=float, default=0.1, help="dropout of the student")
    add("--data", default="data/LibriSpeech", help="folder of audio, or a manifest (.tsv)")
    add("--splits", type=runs.names, default=",".join(data.LIBRISPEECH_960),
        help="sub-folders of --data; . is the whole folder")
    add("--out", help="folder of the run; runs/AGG if not given")
    add("--steps", type=runs.whole, default=200_000, help="optimizer steps; 0: no training")
    add("--batch-size", type=runs.count, default=24, help="utterances per step, over all processes")
    add("--accumulate", type=runs.count, default=1, help="gradient accumulation steps")
    add("--lr", type=float, default=2e-4, help="peak learning rate of AdamW")
    add("--weight-decay", type=float, default=0.01, help="weight decay of AdamW")
    add("--warmup", type=float, default=0.07, help="fraction of the steps for linear warmup")
    add("--clip", type=float, default=5.0, help="maximum gradient norm")
    add("--noise", metavar="DIR", help="folder of noise files to mix into the student's input")
    add("--noise-probability", type=float, default=0.5, help="share of the waveforms with noise")
    add("--snr", type=runs.numbers, default="0,20", help="signal-to-noise ratio in dB, or low,high")
    add("--cosine-weight", type=float, default=1.0, help="weight of the cosine loss beside L1")
    add("--max-seconds", type=float, default=15.625,
        help="longer files are split into equal pieces of at most this")
    add("--cache", metavar="DIR", help="folder of cached targets; the teachers run only once")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="mixed precision; auto is bf16 if the device computes in it")
    add("--compile", action="store_true", help="torch.compile teachers and student")
    add("--workers", type=runs.whole, default=min(4, runs.cores()),
        help="data-loading workers per process")
    add("--seed", type=runs.whole, default=0, help="of initial weights, data order and dropout")
    add("--log-every", type=runs.count, default=100, help="steps between lines of metrics")
    add("--save-every", type=runs.count, default=1000, help="steps between checkpoints")
    add("--tensorboard", action="store_true", help="log to TensorBoard")
    add("--demo", action="store_true", help="tiny teachers and synthetic speech, 75 seconds")
    # fmt: on
    if parser.parse_known_args(arguments)[0].demo:
        from demo import speech

        parser.set_defaults(data=speech.DATA, splits="train-clean-100", teachers=speech.TEACHERS)
        parser.set_defaults(heads="2,3,4", init="none", steps=300, batch_size=16, lr=2e-3)
        parser.set_defaults(max_seconds=1.6, log_every=20, save_every=100)
    args = parser.parse_args(arguments)
    args.out = args.out or f"runs/{'demo-' if args.demo else ''}{args.agg}"
    if args.batch_size % (WORLD_SIZE * args.accumulate):
        divisor = f"{WORLD_SIZE} processes x --accumulate {args.accumulate}"
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {divisor}")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard: pip install tensorboard")
    if not 0 <= args.warmup <= 1:
        raise ValueError(f"--warmup {args.warmup} is not between 0 and 1")
    return args


def parse_layers(text):
    """[4, 8, 12] from "4,8,12"; from "4,8,12/8,16,24" one such list per teacher."""
    lists = [[int(layer) for layer in part.split(",")] for part in text.split("/")]
    for found in lists:
        is_repeated = len(set(found)) < len(found)
        if min(found) < 1 or is_repeated or len(found) != len(lists[0]):
            message = f"{text}: layers count from 1, each once, equally many per teacher"
            raise argparse.ArgumentTypeError(message)
    return lists if len(lists) > 1 else lists[0]


def learning_rate(step, args):
    """Linear warmup, then linear decay to 0 after the last step. Steps count from 1."""
    warmup = max(1, round(args.warmup * args.steps))
    return args.lr * min(step / warmup, (args.steps + 1 - step) / (args.steps + 1 - warmup))


@torch.no_grad()
def compute_targets(teachers, teacher_layers, agg, waveforms):
    """(batch, samples) to (batch, frames, sum of dims): the targets of all heads, in float32."""
    pairs = zip(teachers, teacher_layers)
    states = [teacher(waveforms, layers=layers) for teacher, layers in pairs]
    targets = aggregate.AGGREGATIONS[agg](states)
    return torch.cat([target.float() for target in targets], dim=-1)


def main(arguments=None):
    runs.init()

    # ------------------------------------------------------------------ settings and audio
    with runs.one_line_errors():
        args = parse(arguments)
        device = runs.find_device(cpu_ok=args.demo)
        args.precision = runs.precision(args.precision, device)
        compared = [name for name in vars(args) if name not in MAY_CHANGE]
        settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in compared}
        # Compared because cached targets are computed from whole utterances, others from crops.
        settings["--cache"] = bool(args.cache)
        if args.data.endswith(".tsv"):
            settings["lines of --data"] = key(data.read_lines(args.data)[1:])
        noise = data.Noise(args.noise, args.snr, args.noise_probability) if args.noise else None
        noise_files = noise and key(noise.corpus.paths, noise.corpus.samples.tolist())
        settings["files of --noise"] = noise_files
        if RANK == 0:
            runs.lock(args.out)
        checkpoint = runs.load_latest(args.out, CHECKPOINT)
        manifest = os.path.join(args.out, "manifest.tsv")
        start = checkpoint["step"] if checkpoint else 0
        if checkpoint:
            runs.check_same(args.out, checkpoint["settings"], settings)
        elif RANK == 0:
            if args.demo:
                from demo import speech

                speech.prepare()
            corpus = data.find_corpus(args.data, args.splits, args.max_seconds)
            data.warn_skipped(corpus.skipped)
            data.write_manifest(manifest, corpus)
    starts = runs.gather(start)  # a barrier too: the manifest is complete

    # ------------------------------------------------------------------ teachers and student
    with runs.one_line_errors():
        if len(set(starts)) > 1:
            raise ValueError(f"{args.out}: different checkpoints per process; use a shared folder")
        root = data.read_manifest(args.data).root if args.data.endswith(".tsv") else args.data
        corpus = data.read_manifest(manifest, root)
        names = short_names(args.teachers)
        teachers = [load_teacher(path, device) for path in args.teachers]
        check_frames(teachers, names)
        teacher_layers = layers_per_teacher(args.heads, teachers, names)
        widths = [(name, teacher.config.dim) for name, teacher in zip(names, teachers)]
        heads = aggregate.heads(args.agg, teacher_layers, widths)
        dims = [dim for _, dim in heads]
        digests = dict(zip(names, map(digest, teachers)))
        torch.manual_seed(args.seed)
        sizes = (args.student_layers, args.dropout, args.student_dim)
        student = Student(student_config(teachers[0].config, *sizes), heads)
        if args.init == "first":
            initialise(student, teachers[0])
        if checkpoint:
            before = {"--teachers": list(checkpoint["teachers"])} | checkpoint["teachers"]
            runs.check_same(args.out, before, {"--teachers": names} | digests)
            student.load_state_dict(checkpoint["student"])
        share = args.batch_size // WORLD_SIZE  # utterances per process
        sample_bytes = 4 + 4 * bool(args.noise) + bool(args.cache) * sum(dims) / data.FRAME_SAMPLES
        batch_bytes = sample_bytes * int(corpus.samples.max()) * share
        data.check_shared_memory(batch_bytes * runs.LOCAL_WORLD_SIZE, args.workers)
        batches = data.TrainBatches(corpus, args.batch_size, args.seed, RANK, WORLD_SIZE, noise)
        if RANK == 0:
            write_config(args, heads)
    stop = runs.StopSignal()

    # ------------------------------------------------------------------ targets
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    if args.precision == "bf16":  # frozen, so cast once instead of at every step
        teachers = [teacher.to(torch.bfloat16) for teacher in teachers]

    def compute_cached(i):
        try:
            waveform = corpus.read(i)[None].to(device)
        except data.UNREADABLE:
            return None  # skipped with a warning in training
        return quantize(compute_targets(teachers, teacher_layers, args.agg, waveform)[0])

    if args.cache and start < args.steps:
        source = inspect.getsource(aggregate)  # edited code has a folder of its own
        name = key(list(digests.values()), teacher_layers, args.agg, args.precision, source)
        cache = Cache(os.path.join(args.cache, f"targets-{args.agg}-{name}"), corpus)
        sizes = [sum(dims) * (student.encoder.frames(n) + 4) for n in corpus.samples.tolist()]
        cache.fill(compute_cached, sizes, "targets", stop)
        batches.cache = cache
        teachers = []  # frees their memory

    # ------------------------------------------------------------------ optimizer and DDP
    student.to(device).train()
    adamw = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(student.parameters(), 0, **adamw)  # lr is set at every step
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    model = student
    if WORLD_SIZE > 1:
        devices = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(student, devices, gradient_as_bucket_view=True)
    if args.compile:  # one graph per network for all lengths
        torch._dynamo.config.cache_size_limit = 8 * (len(teachers) + 1)  # networks share code
        torch._dynamo.config.specialize_int = True  # layer numbers are constants
        for network in [*teachers, student]:
            network.compile(dynamic=True)
    if RANK == 0:
        log = Log(args, student.head_names, start)
        millions = sum(p.numel() for p in student.parameters()) / 1e6
        print(f"audio: {corpus}")
        print(f"teachers: {', '.join(names)}; heads: {', '.join(student.head_names)}")
        print(f"student: {millions:.2f} million parameters; {args.precision} on {device.type}")
        print(f"{args.out}: step {start} of {args.steps}", flush=True)

    # ------------------------------------------------------------------ training
    micro = share // args.accumulate  # utterances per forward pass
    skipped, terms, samples = {}, [], 0
    steps = range(start, args.steps)
    loader = data.load_batches(batches, steps, args.workers, device.type == "cuda", stop)
    for step, batch in enumerate(loader, start=start + 1):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        runs.seed(args.seed, step, RANK)  # dropout depends on these only: no RNG state to resume
        tensors = [(name, x) for name, x in batch.items() if torch.is_tensor(x)]
        for first in range(0, share, micro):
            here = slice(first, first + micro)
            part = {name: x[here].to(device, non_blocking=True) for name, x in tensors}
            waveforms = part["waveforms"]
            if args.cache:
                targets = dequantize(part["values"], part["scale"])
            else:
                targets = compute_targets(teachers, teacher_layers, args.agg, waveforms)
            if args.noise:  # for the student alone, so that cached targets stay valid
                waveforms = part["noisy"]
            model.require_backward_grad_sync = first + micro == share  # sync on the last only
            with bf16:
                predictions = model(waveforms)
            targets = targets.split(dims, dim=-1)
            loss, l1, cosine = distillation_loss(predictions, targets, None, args.cosine_weight)
            (loss / args.accumulate).backward()
            terms.append(torch.stack([l1, cosine]))
            samples += waveforms.numel() * WORLD_SIZE
        # DDP has averaged the gradients, so their norm is finite on all processes or on none.
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        if not norm.isfinite():
            files = ", ".join(sum(runs.gather(batch["paths"]), []))
            raise RuntimeError(f"step {step}: gradient not finite, student not updated: {files}")
        optimizer.step()
        optimizer.zero_grad()

        data.warn_skipped({p: why for p, why in batch["skipped"].items() if p not in skipped})
        skipped |= batch["skipped"]
        stopping = stop.received()  # on any process: all stop after the same step
        last = step == args.steps or stopping > 0
        if last or step % args.log_every == 0 or step == start + 1:
            for found in runs.gather(skipped):
                skipped |= found
            data.check_skipped(skipped, len(corpus.files))  # over 1% is an error on all ranks
            means = torch.stack(runs.gather(torch.stack(terms).mean(0).cpu())).mean(0)
            if RANK == 0:
                log.write(step, means, lr, float(norm), samples / data.SAMPLE_RATE)
            terms, samples = [], 0
        if RANK == 0 and (last or step % args.save_every == 0):
            save(args, step, student, optimizer, settings, digests)
        if stopping:
            raise SystemExit(128 + stopping)  # the same command resumes

    if RANK == 0:
        is_initial = not checkpoint and args.steps == 0
        if is_initial or not os.path.exists(os.path.join(args.out, "student.pt")):
            save(args, start, student, optimizer, settings, digests)
        print(f"{args.out}/student.pt: the student", flush=True)
        if args.demo:
            upstream = "" if args.out == "runs/demo-avg" else f" --upstream {args.out}/student.pt"
            print(f"python evaluate_pr.py --demo{upstream}: its phone error rate")


class Log:
    """Metrics, means over all ranks: printed, in OUT/metrics.jsonl, and for TensorBoard."""

    def __init__(self, args, heads, start):
        self.args, self.heads, self.board = args, heads, None
        self.step, self.time = start, time.monotonic()
        self.path = os.path.join(args.out, "metrics.jsonl")
        if os.path.exists(self.path):  # drop what was written after the checkpoint
            with open(self.path, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("}\n")]
            lines = [line for line in lines if json.loads(line)["step"] <= start]
            runs.save(self.path, "".join(lines))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out, purge_step=start + 1)

    def write(self, step, means, lr, norm, audio):
        """means: (2, heads), L1 and cosine; audio: seconds; both since the last line."""
        l1, cosine = means.mean(dim=1).tolist()
        loss = l1 + self.args.cosine_weight * cosine
        seconds = time.monotonic() - self.time
        left = seconds / (step - self.step) * (self.args.steps - step) / 60
        self.step, self.time = step, time.monotonic()
        terms = f"loss {loss:.4f}  L1 {l1:.4f}  cosine {cosine:.4f}  lr {lr:.2e}"
        speed = f"{audio / seconds:.3g} s of audio/s  {left:.0f} min left"
        with contextlib.suppress(OSError):  # tee may have ended: Ctrl-C ends it too
            print(f"step {step}/{self.args.steps}  {terms}  {speed}", flush=True)
        row = {"step": step, "loss": loss, "l1": l1, "cosine": cosine, "lr": lr, "norm": norm}
        row["seconds"] = seconds
        for head, (head_l1, head_cosine) in zip(self.heads, means.t().tolist()):
            row |= {f"l1/{head}": head_l1, f"cosine/{head}": head_cosine}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def save(args, step, student, optimizer, settings, digests):
    """Writes student.pt, the student alone, then last.pt, all that resuming needs."""
    about = {"teachers": list(digests), "agg": args.agg, "layers": args.heads, "step": step}
    about["data"] = os.path.basename(os.path.realpath(args.data))
    save_student(student, os.path.join(args.out, "student.pt"), **about)
    checkpoint = {"step": step, "settings": settings, "teachers": digests}
    checkpoint |= {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
    runs.save(os.path.join(args.out, "last.pt"), checkpoint, keep_previous=True)


def write_config(args, heads):
    """Writes OUT/config.json: settings, heads, version, and the commit of a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    config = {"settings": vars(args), "heads": [name for name, _ in heads], "processes": WORLD_SIZE}
    config |= {"torch": torch.__version__, "commit": commit or "not recorded"}
    runs.save(os.path.join(args.out, "config.json"), json.dumps(config, indent=2))


if __name__ == "__main__":
    runs.run(main)
