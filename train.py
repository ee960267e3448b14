"""Distil an ensemble of frozen speech teachers into one small student (arXiv:2302.12757).

    torchrun --standalone --nproc_per_node=4 train.py --agg avg --heads 4,8,12

The method is distil(); main() sets it up. The same command resumes a run.
"""

import argparse
import importlib.util
import inspect
import math
import os
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

import aggregate
import cache
import data
import program
from aggregate import Ensemble
from losses import distillation_loss
from manifest import LIBRISPEECH_960, find_corpus, fingerprint, warn_skipped
from program import RANK, WORLD_SIZE
from run import Run
from student import Student, initialise, student_config
from teachers import digest, load_teacher, short_names


def distil(args, ensemble, student, optimizer, batches, held_out, run, device):
    """Ensemble knowledge distillation: the student learns to predict the ensemble's targets.

    batches: per step, a batch of utterances of one length, as TrainBatches makes them.
    held_out: TrainBatches to validate on, or None.
    """
    parallel_student = data_parallel(student, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def forward(part):
        """(loss, L1 per head, cosine per head) of a part of a batch."""
        targets = find_targets(part, ensemble)
        with autocast:
            predictions = parallel_student(part.get("noisy", part["waveforms"]))
        return distillation_loss(predictions, targets, args.cosine_weight)

    for step, batch in enumerate(batches, start=run.start + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        program.seed(args.seed, step, RANK)  # for dropout; a resumed run needs no saved RNG state
        terms = []  # per part (2, heads), L1 and cosine
        for number, part in enumerate(split(batch, args.accumulate, device), start=1):
            is_last = number == args.accumulate
            # DDP reads this: it averages the gradients of all ranks in the last part alone.
            parallel_student.require_backward_grad_sync = is_last
            loss, l1, cosine = forward(part)
            (loss / args.accumulate).backward()
            terms.append(torch.stack([l1, cosine]))
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
        check_finite(norm, step, batch["paths"])
        optimizer.step()
        optimizer.zero_grad()
        held_out_terms = validate(step, args, forward, student, held_out, run.stop)
        run.after_step(step, batch, terms, norm, held_out_terms)


def main(arguments=None):
    program.init()
    with program.one_line_errors():
        args = parse(arguments)
    program.join()

    with program.one_line_errors():
        device = program.find_device()
        args.precision = program.precision(args.precision, device)
        ensemble = load_ensemble(args, device)
        identity = target_identity(args, ensemble)
        noise = find_noise(args)
        run = Run(args, fixed_settings(args, ensemble, noise) | identity)
    ranks = program.gather(must_be_equal(args, run, device))

    with program.one_line_errors():
        check_equal(args, ranks)
        student = make_student(args, ensemble)
        corpus = run.corpus()
        batches = data.TrainBatches(corpus, args.batch_size, args.seed, RANK, WORLD_SIZE, noise)
        held_out = find_held_out(args, corpus)
        check_fits(args, corpus, ensemble)
    stop = program.StopSignal()

    student.to(device).train()
    if args.precision == "bf16":
        # Cast once: autocast would cast the weights at every step.
        ensemble.teachers = [teacher.to(torch.bfloat16) for teacher in ensemble.teachers]
    if args.cache and run.start < args.steps:
        folder = os.path.join(args.cache, f"targets-{args.agg}-{cache.key(*identity.values())}")
        batches.cache = fill_cache(folder, ensemble, corpus, device, stop)
        if held_out:
            held_out.cache = fill_cache(folder, ensemble, held_out.corpus, device, stop)
        ensemble.teachers = []  # frees their memory
    if args.compile:
        compile_networks([*ensemble.teachers, student])
    adamw = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(student.parameters(), 0, **adamw)  # lr is set at every step
    if RANK == 0:
        millions = sum(p.numel() for p in student.parameters()) / 1e6
        program.say(f"audio: {corpus}")
        heads = ", ".join(student.head_names)
        program.say(f"teachers: {', '.join(ensemble.names)}; heads: {heads}")
        precision = f"{args.precision} on {device.type}"
        program.say(f"student: {millions:.2f} million parameters; {precision}")
    with program.one_line_errors():
        run.begin(student, optimizer, batches, stop)
    steps = range(run.start, args.steps)
    batches.plan(run.start // batches.steps_per_epoch)  # here, so that workers share its memory
    loader = data.load_batches(batches, steps, args.workers, device.type == "cuda", stop)
    distil(args, ensemble, student, optimizer, run.saving(loader), held_out, run, device)
    run.end()


# ------------------------------------------------------------------ parts of a step


def data_parallel(student, device):
    """The student; under torchrun a wrapper that averages the gradients of all processes."""
    if WORLD_SIZE == 1:
        return student
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(student, devices, gradient_as_bucket_view=True)


def split(batch, count, device):
    """Yields the tensors of a batch in `count` equal parts, on the device."""
    tensors = {name: x.chunk(count) for name, x in batch.items() if torch.is_tensor(x)}
    for number in range(count):
        yield {name: x[number].to(device, non_blocking=True) for name, x in tensors.items()}


def find_targets(part, ensemble):
    """One (batch, frames, dim) target per head: cached, or from the teachers."""
    if "values" in part:
        targets = cache.dequantize(part["values"], part["scale"], part["zero"])
        return ensemble.split(targets)
    return ensemble(part["waveforms"])


def learning_rate(step, args):
    """Linear warmup, then linear decay to 0 after the last step. Steps count from 1."""
    warmup = max(1, round(args.warmup * args.steps))
    return args.lr * min(step / warmup, (args.steps + 1 - step) / (args.steps + 1 - warmup))


def check_finite(norm, step, paths):
    """Raises RuntimeError naming the files of a step whose gradient is not finite.

    DDP has averaged the gradients, so their norm is finite on all processes or on none.
    """
    if not norm.isfinite():
        files = ", ".join(sum(program.gather(paths), []))
        raise RuntimeError(f"step {step}: gradient not finite, student not updated: {files}")


@torch.no_grad()
def validate(step, args, forward, student, held_out, stop):
    """(2, heads) L1 and cosine on at most 20 held-out batches.

    None at steps without validation, after a signal, so that the step is saved soon, and, with a
    warning, if a batch cannot be read.
    """
    is_due = step % args.valid_every == 0 or step == args.steps
    if held_out is None or not is_due:
        return None
    student.eval()  # no dropout
    device, terms, skipped = next(student.parameters()).device, [], {}
    unreadable = None
    count = min(20, held_out.steps_per_epoch)
    progress = program.Progress("held-out batches", count)
    for number in range(count):
        if stop.received():
            student.train()
            return None
        try:
            batch = held_out[number]
        except ValueError as error:  # other ranks may be able to read theirs
            unreadable = str(error)
            continue
        skipped |= batch["skipped"]["audio"]
        for part in split(batch, args.accumulate, device):
            terms.append(torch.stack(forward(part)[1:]))
        progress.show(number + 1)
    student.train()
    problems = [text for text in program.gather(unreadable) if text]
    if problems:
        warnings.warn(f"step {step} has no held-out loss: {problems[0]}")
        return None
    for skipped_by_rank in program.gather(skipped):
        warn_skipped(skipped_by_rank)  # each file once: Python prints equal warnings once
    return program.mean(torch.stack(terms).mean(0))


# ------------------------------------------------------------------ settings

# Settings that may differ when a run resumes: they change weights by rounding alone, or, as
# --accumulate, --compile and the number of processes, by other dropout masks.
MAY_CHANGE = {"out", "accumulate", "compile", "workers", "log_every", "save_every", "tensorboard"}
MAY_CHANGE |= {"valid", "valid_every"}
# Paths. Compared are the teachers' weights and names, the noise files' paths and lengths, the
# lines of a manifest; the length of an audio file when it is read.
MAY_CHANGE |= {"data", "teachers", "cache", "noise"}


def parse(arguments=None):
    """Settings from the command line. Raises ValueError."""
    parser = program.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--teachers", type=program.names, default="hubert,robust_hubert,wavlm_plus",
        help="names or paths of checkpoints; the first sets the student's architecture")
    add("--agg", choices=list(aggregate.AGGREGATIONS), default="avg",
        help="layerwise average or concatenation, or one head per teacher and layer")
    add("--weights", type=program.numbers,
        help="weights of the teachers in the average, such as 1,1,2")
    add("--heads", dest="layers", type=parse_layers, default="4,8,12", metavar="LAYERS",
        help="teachers' layers to predict, from 1; per teacher: 4,8,12/4,8,12/8,16,24")
    add("--student-layers", type=program.count, default=2,
        help="Transformer layers of the student")
    add("--student-dim", type=program.count,
        help="width of the student; the teacher's if not given")
    add("--init", choices=["first", "none"], default="first",
        help="initialise from the first teacher, or randomly")
    add("--dropout", type=program.fraction, default=0.1, help="dropout of the student")
    add("--data", default="data/LibriSpeech", help="folder of audio, or a manifest (.tsv)")
    add("--splits", type=program.names, default=",".join(LIBRISPEECH_960),
        help="sub-folders of --data; . is the whole folder")
    add("--out", help="folder of the run; runs/AGG if not given")
    add("--steps", type=program.whole, default=200_000, help="optimizer steps; 0: no training")
    add("--batch-size", type=program.count, default=24,
        help="utterances per step, over all processes")
    add("--accumulate", type=program.count, default=1, help="gradient accumulation steps")
    add("--lr", type=program.at_least_0, default=2e-4, help="peak learning rate of AdamW")
    add("--weight-decay", type=program.at_least_0, default=0.01, help="weight decay of AdamW")
    add("--warmup", type=program.fraction, default=0.07,
        help="fraction of the steps for linear warmup")
    add("--clip", type=program.at_least_0, default=5.0,
        help="maximum gradient norm; 0: no clipping")
    add("--noise", metavar="DIR", help="folder of noise files to mix into the student's input")
    add("--noise-probability", type=program.fraction, default=0.5,
        help="share of the waveforms with noise")
    add("--snr", type=program.numbers, default="0,20",
        help="signal-to-noise ratio in dB, or low,high")
    add("--cosine-weight", type=program.at_least_0, default=1.0,
        help="weight of the cosine loss beside L1")
    add("--max-seconds", type=program.at_least_0, default=15.625,
        help="longer files are split into equal pieces of at most this")
    add("--cache", metavar="DIR", help="folder of cached targets; the teachers run only once")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="mixed precision; auto is bf16 if the device computes in it")
    add("--compile", action="store_true", help="torch.compile teachers and student")
    add("--valid", metavar="SPLIT",
        help="sub-folder of --data for a held-out loss, of at most 20 batches")
    add("--valid-every", type=program.count, default=1000, help="steps between held-out losses")
    add("--workers", type=program.whole, default=min(4, program.cores()),
        help="data-loading workers per process")
    add("--seed", type=program.whole, default=0,
        help="seed of initial weights, data order and dropout")
    add("--log-every", type=program.count, default=100, help="steps between lines of metrics")
    add("--save-every", type=program.count, default=1000, help="steps between checkpoints")
    add("--tensorboard", action="store_true", help="log to TensorBoard")
    # fmt: on
    args = parser.parse_args(arguments)
    args.out = args.out or f"runs/{args.agg}"
    if args.batch_size % (WORLD_SIZE * args.accumulate):
        divisor = f"{WORLD_SIZE} processes x --accumulate {args.accumulate}"
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {divisor}")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard: pip install tensorboard")
    if args.weights and args.agg != "avg":
        raise ValueError("--weights needs --agg avg")
    return args


def parse_layers(text):
    """[4, 8, 12] from "4,8,12"; from "4,8,12/8,16,24" one such list per teacher."""
    lists = [[int(layer) for layer in part.split(",")] for part in text.split("/")]
    for layers in lists:
        is_repeated = len(set(layers)) < len(layers)
        if min(layers) < 1 or is_repeated or len(layers) != len(lists[0]):
            message = f"{text}: layers count from 1, each once, equally many per teacher"
            raise argparse.ArgumentTypeError(message)
    return lists if len(lists) > 1 else lists[0]


# ------------------------------------------------------------------ set-up


def load_ensemble(args, device):
    paths = dict(zip(short_names(args.teachers), args.teachers))
    teachers = {name: load_teacher(path, device) for name, path in paths.items()}
    return Ensemble(teachers, args.layers, args.agg, args.weights)


def make_student(args, ensemble):
    first = ensemble.teachers[0]
    config = student_config(first.config, args.student_layers, args.dropout, args.student_dim)
    torch.manual_seed(args.seed)
    student = Student(config, ensemble.heads)
    if args.init == "first":
        initialise(student, first)
    return student


def target_identity(args, ensemble):
    """What determines the targets. It names the folder of the cache, and must not change."""
    example = [[round(x, 3) for x in target.flatten().tolist()] for target in ensemble.example]
    identity = {
        "--agg": args.agg,
        "--heads": ensemble.layers,
        "--weights": args.weights,
        "--precision": args.precision,
        "version of the targets": cache.VERSION,
        "source of the aggregation": inspect.getsource(ensemble.aggregation),
        "results of the aggregation": cache.key(example),  # its source may use other functions
    }
    for number, teacher in enumerate(ensemble.teachers, start=1):
        identity[f"weights of teacher {number}"] = digest(teacher)
    return identity


def fixed_settings(args, ensemble, noise):
    """The other settings that must not change when a run resumes."""
    compared = [name for name in vars(args) if name not in MAY_CHANGE | {"layers"}]
    settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in compared}
    settings["--teachers"] = ensemble.names
    # Cached targets are computed from whole utterances, others from crops.
    settings["--cache"] = bool(args.cache)
    if args.data.endswith(".tsv"):
        settings["lines of the manifest"] = fingerprint(args.data)
    if noise:
        files = cache.key(list(noise.corpus.paths()), noise.corpus.samples.tolist())
        settings["files of noise"] = files
    return settings


def must_be_equal(args, run, device):
    """{what must be equal on all ranks; the remedy if it is not: value}."""
    flags = [args.accumulate, args.log_every, args.valid, args.valid_every]
    settings = cache.key(run.settings, flags)
    return {
        "checkpoints; use a shared folder": run.start,
        "precision or device; use one kind of device": [args.precision, device.type],
        "settings or teachers; start all with the same command and files": settings,
    }


def check_equal(args, ranks):
    """Raises ValueError if a value of must_be_equal() differs between ranks."""
    for what in ranks[0]:
        if any(rank[what] != ranks[0][what] for rank in ranks):
            raise ValueError(f"{args.out}: the processes differ in {what}")


def find_noise(args):
    """The Noise of the folder --noise, or None."""
    if not args.noise:
        return None
    corpus = find_corpus(args.noise, ["."])
    warn_skipped(corpus.skipped)
    return data.Noise(corpus, args.snr, args.noise_probability)


def find_held_out(args, corpus):
    """The TrainBatches of --valid, the same crops whenever they are used; None without it."""
    if not args.valid:
        return None
    audio = find_corpus(corpus.root, [args.valid], args.max_seconds)
    warn_skipped(audio.skipped)
    of_audio = {os.path.join(audio.root, path) for path in audio.paths()}
    for path in corpus.paths():  # those of a manifest may be absolute
        if os.path.join(corpus.root, path) in of_audio:
            raise ValueError(f"--valid {args.valid}: {path} is in the training audio too")
    if len(audio) < args.batch_size:
        raise ValueError(f"--valid {args.valid}: only {len(audio)} utterances, under --batch-size")
    return data.TrainBatches(audio, args.batch_size, 0, RANK, WORLD_SIZE)


def check_fits(args, corpus, ensemble):
    """Raises ValueError if targets cannot be cached, or workers' batches do not fit in memory."""
    around_the_first_frames = (399, 400, 719, 720)  # samples
    frames = [ensemble.teachers[0].frames(samples) for samples in around_the_first_frames]
    if args.cache and frames != [0, 1, 1, 2]:
        raise ValueError("--cache needs teachers with a frame of 400 samples every 320 samples")
    share = args.batch_size // WORLD_SIZE  # utterances per process
    width = sum(dim for _, dim in ensemble.heads)
    sample_bytes = 4 + 4 * bool(args.noise) + bool(args.cache) * width / data.FRAME_SAMPLES
    batch_bytes = sample_bytes * int(corpus.samples.max()) * share
    data.check_shared_memory(batch_bytes * program.LOCAL_WORLD_SIZE, args.workers)


def fill_cache(folder, ensemble, corpus, device, stop):
    """The Cache of the targets of whole utterances; those that are missing are computed."""

    def compute(i):
        try:
            waveform = corpus.read(i)[None].to(device)
        except data.UNREADABLE:
            return None  # skipped with a warning in training
        targets = torch.cat(ensemble(waveform), dim=-1)[0]
        if not targets.isfinite().all():
            raise RuntimeError(f"{corpus.path(i)}: the teachers' states are not finite")
        return cache.quantize(targets)

    width, frames = sum(dim for _, dim in ensemble.heads), ensemble.teachers[0].frames
    # Bytes per dim: 1 per frame, 4 for the scale, 4 for the zero point.
    sizes = [width * (frames(samples) + 8) for samples in corpus.samples.tolist()]
    cached = cache.Cache(folder, corpus)
    cached.fill(compute, sizes, "targets", stop)
    return cached


def compile_networks(networks):
    """torch.compile, with one graph per network for all lengths."""
    torch._dynamo.config.cache_size_limit = 8 * len(networks)  # networks share code
    torch._dynamo.config.specialize_int = True  # layer numbers are constants
    for network in networks:
        network.compile(dynamic=True)


if __name__ == "__main__":
    program.run(main)
