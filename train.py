"""Distil an ensemble of frozen speech teachers into one small student (arXiv:2302.12757).

    torchrun --nproc_per_node=4 train.py --agg avg --heads 4,8,12
    python train.py --demo

One file, read from top to bottom: settings, set-up, the loop. Running the same command again resumes the run.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import aggregate
import data
from losses import distillation_loss
from student import Student, earlier, initialise, save_atomically, save_student, student_config
from teachers import EncoderConfig, SpeechEncoder, load_safely, load_teacher, native_bf16, reuse_memory, save_official

# torchrun tells every process who it is; a plain `python train.py` is rank 0 of 1.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DISTRIBUTED = "RANK" in os.environ

# Settings that may change when a run is resumed: they change no weight beyond rounding.
FREE = {"out", "accumulate", "compile", "workers", "log_every", "save_every", "keep", "tensorboard"}


# ---------------------------------------------------------------- settings


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = stop
    add = parser.add_argument
    count = _number(int, "1 or more", lambda n: n >= 1)
    whole = _number(int, "0 or more", lambda n: n >= 0)
    positive = _number(float, "above 0", lambda x: 0 < x < float("inf"))
    not_negative = _number(float, "0 or more", lambda x: 0 <= x < float("inf"))
    share = _number(float, "0 or more, and below 1", lambda x: 0 <= x < 1)
    # fmt: off
    add("--teachers", type=_names, default="hubert,robust_hubert,wavlm_plus", help="names or paths of checkpoints, with commas; the first shapes the student")
    add("--agg", choices=list(aggregate.AGGREGATIONS), default="avg", help="layerwise average, layerwise concatenation, or a head for each teacher and layer")
    add("--heads", type=_layers, default="4,8,12", help="teachers' layers to predict, counted from 1")
    add("--student-layers", type=count, default=2, help="Transformer layers of the student")
    add("--init", choices=["first", "none"], default="first", help="start from the first teacher's weights, or from random ones")
    add("--dropout", type=share, default=0.1, help="dropout of the student, 0 to 1")
    add("--data", default="data/LibriSpeech", help="folder of audio, or a fairseq manifest (.tsv)")
    add("--splits", type=_names, default=",".join(data.LIBRISPEECH_960), help="sub-folders of --data, with commas; . is all of it")
    add("--out", help="folder of the run (default: runs/ and the aggregation, such as runs/avg)", default=argparse.SUPPRESS)
    add("--steps", type=count, default=200_000, help="optimizer steps")
    add("--batch-size", type=count, default=24, help="utterances a step, over all processes together")
    add("--accumulate", type=count, default=1, help="parts that a process cuts its share of a step into, to save memory")
    add("--lr", type=positive, default=2e-4, help="highest learning rate, of AdamW")
    add("--warmup", type=share, default=0.07, help="share of the steps that the learning rate rises; then it falls to 0")
    add("--clip", type=positive, default=5.0, help="norm that gradients are clipped to")
    add("--cosine-weight", type=not_negative, default=1.0, help="weight of the cosine loss beside L1")
    add("--max-seconds", type=positive, default=15.625, help="longest crop of an utterance, in seconds (250,000 samples)")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto is bf16 where the device computes in it")
    add("--compile", action="store_true", help="torch.compile teachers and student")
    add("--workers", type=whole, default=argparse.SUPPRESS, help="processes that read audio, for each training process (default: up to 4)")
    add("--seed", type=whole, default=0, help="of the student's first weights, the data's order and dropout")
    add("--log-every", type=count, default=100, help="steps between lines of metrics")
    add("--save-every", type=count, default=1000, help="steps between saves")
    add("--keep", type=count, default=2, help="saves that stay; where the last one is damaged, a resume takes the one before")
    add("--tensorboard", action="store_true", help="write TensorBoard scalars too (needs the package tensorboard)")
    add("--demo", action="store_true", help="synthetic speech and three tiny random teachers: shows the machinery in two minutes")
    # fmt: on
    if parser.parse_known_args(arguments)[0].demo:
        teachers = ",".join(f"{DEMO}/teachers/{name}.pt" for name in DEMO_TEACHERS)
        parser.set_defaults(data=DEMO, splits="train-clean-100", teachers=teachers, steps=240, batch_size=8)
        parser.set_defaults(lr=2e-3, max_seconds=1.2, log_every=20, save_every=100)
    args = parser.parse_args(arguments)
    if not hasattr(args, "out"):
        args.out = f"runs/{'demo-' if args.demo else ''}{args.agg}"
    if not hasattr(args, "workers"):
        args.workers = min(4, max(1, _cores() // LOCAL_WORLD_SIZE))
    if args.max_seconds * data.SAMPLE_RATE < data.SHORTEST:
        stop(f"argument --max-seconds: {args.max_seconds} is less than one frame, 0.025")
    if args.batch_size % (WORLD_SIZE * args.accumulate):
        parts = f"{WORLD_SIZE} processes and --accumulate {args.accumulate}"
        stop(f"--batch-size {args.batch_size} does not divide over {parts}")
    return args


def _names(text):
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("empty")
    return names


def _layers(text):
    try:
        layers = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: layer numbers with commas, such as 4,8,12") from None
    if min(layers) < 1 or len(set(layers)) < len(layers):
        raise argparse.ArgumentTypeError(f"{text!r}: layers count from 1, each once")
    return layers


def _number(kind, wanted, accepts):
    def number(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


# ---------------------------------------------------------------- set-up

DEMO = "data/demo"
DEMO_TEACHERS = {"hubert": "fairseq", "robust_hubert": "s3prl", "wavlm": "microsoft"}  # and the form each is written in


def prepare_demo(folder):
    """The synthetic corpus and three tiny random teachers, written once, by one process a machine."""
    os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
    with data.locked(folder + ".lock"):
        if os.path.isdir(folder):
            return
        shutil.rmtree(folder + ".partial", ignore_errors=True)
        data.write_demo_corpus(folder + ".partial")
        os.makedirs(f"{folder}.partial/teachers")
        convolutions = ((32, 10, 5),) + ((32, 3, 2),) * 4 + ((32, 2, 2),) * 2
        for seed, (name, form) in enumerate(DEMO_TEACHERS.items()):
            torch.manual_seed(seed)
            buckets = 320 if form == "microsoft" else 0
            encoder = SpeechEncoder(EncoderConfig(convolutions, dim=64, ffn_dim=128, heads=4, relative_buckets=buckets))
            for parameter in encoder.layers.parameters():
                if parameter.dim() == 2:  # wide enough for layers to differ from each other
                    torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
            save_official(encoder, f"{folder}.partial/teachers/{name}.pt", form)
        os.rename(folder + ".partial", folder)


def teacher_names(teachers):
    """A short name for each teacher, for heads and metrics: the file's without its ending, numbered where it recurs."""
    stems = [os.path.splitext(os.path.basename(os.path.normpath(path)))[0] for path in teachers]
    counts = [stems[:i].count(stem) + 1 for i, stem in enumerate(stems)]
    return [f"{stem}-{count}" if count > 1 else stem for stem, count in zip(stems, counts)]


def check_teachers(teachers, paths, layers):
    """Raises ValueError where a teacher lacks a layer to predict or has frames of its own."""

    def kernels_and_strides(teacher):
        return [layer[1:] for layer in teacher.config.conv_layers]

    for teacher, path in zip(teachers, paths):
        if max(layers) > teacher.config.layers:
            raise ValueError(f"--heads {max(layers)}: {path} has {teacher.config.layers} layers")
        if kernels_and_strides(teacher) != kernels_and_strides(teachers[0]):
            raise ValueError(f"{path}: its frames are not those of {paths[0]}; teachers must share one frame rate")


def open_run(out, settings):
    """Raises ValueError where the folder holds another run, whose settings it names."""
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        for name in ("last.pt", "last.1.pt", "student.pt", "metrics.jsonl"):
            if os.path.exists(os.path.join(out, name)):
                raise ValueError(f"{out}: holds {name} but no config.json of a run; give --out another folder")
        return
    try:
        with open(path, encoding="utf-8") as file:
            then = json.load(file)["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the settings of a run; give --out another folder") from None
    differ = [
        f"--{key.replace('_', '-')} was {_text(then[key])}, is {_text(value)}"
        for key, value in settings.items()
        if key not in FREE and key in then and then[key] != value
    ]
    if differ:
        raise ValueError(f"{out}: holds a run with other settings: {'; '.join(differ)}; take its own, or another --out")


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else value


def load_run(out, corpus, student):
    """The newest save that is whole, its weights put into the student, or None before the first save.

    Raises ValueError where there are saves but none is whole, or where the audio has changed.
    """
    damaged = []
    for path in [earlier(os.path.join(out, "last.pt"), age) for age in range(100)]:
        if not os.path.exists(path):
            continue
        try:
            run = load_safely(path)
            step, fingerprint, _, _ = run["step"], run["corpus"], run["optimizer"], run["left_out"]
            student.load_state_dict(run["student"])
        except Exception:  # a damaged file can raise nearly anything
            damaged.append(path)
            continue
        if fingerprint != corpus.fingerprint():
            raise ValueError(
                f"{out}: the audio is not what it was up to step {step}; restore it, or give another --out"
            )
        if damaged and RANK == 0:
            what = f"damaged or not a run's; going on from {path}, step {step}"
            print(f"warning: {', '.join(damaged)}: {what}", file=sys.stderr)
        return run
    if damaged:
        raise ValueError(f"{', '.join(damaged)}: damaged or not a run's; move it away to start again")
    return None


def prepare(args, device):
    """Everything that bad input can spoil, before a file of the run is written.

    Returns (corpus, batches, teachers, student, what last.pt holds or None). Raises OSError and ValueError.
    """
    open_run(args.out, vars(args))
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError:
            raise ValueError("--tensorboard needs a package that is not there: pip install tensorboard") from None
    if args.demo:
        prepare_demo(DEMO)
    corpus = data.find_corpus(args.data, args.splits)
    longest = int(args.max_seconds * data.SAMPLE_RATE)
    batches = data.Batches(corpus, args.batch_size, longest, args.seed, RANK, WORLD_SIZE)
    teachers = [load_teacher(path, device) for path in args.teachers]
    check_teachers(teachers, args.teachers, args.heads)
    widths = [(name, teacher.config.dim) for name, teacher in zip(teacher_names(args.teachers), teachers)]
    heads = aggregate.heads(args.agg, args.heads, widths)
    torch.manual_seed(args.seed)
    student = Student(student_config(teachers[0].config, args.student_layers, args.dropout), heads)
    if args.init == "first":
        initialise(student, teachers[0])
    run = load_run(args.out, corpus, student)
    return corpus, batches, teachers, student.to(device), run


def start_files(args, student, done):
    """config.json of a new run; metrics.jsonl of a resumed one without the lines of steps that are taken again.

    Returns what keeps other runs out of the folder. Raises ValueError where one is in it.
    """
    os.makedirs(args.out, exist_ok=True)
    claim = data.claim(args.out)
    path = os.path.join(args.out, "config.json")
    if not os.path.exists(path):
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
        config = {"settings": vars(args), "heads": student.head_names, "processes": WORLD_SIZE, "versions": versions}
        save_atomically(path, lambda file: file.write(json.dumps(config, indent=2).encode()))
    path = os.path.join(args.out, "metrics.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if _step_of(line) <= done]
        save_atomically(path, lambda file: file.write("".join(kept).encode()))
    return claim


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line cut short when the run was killed
        return float("inf")


# ---------------------------------------------------------------- saving, logging, stopping together


def save_run(args, step, student, optimizer, corpus, left_out):
    """student.pt, the student alone, and then last.pt, everything a resume needs: a kill between loses neither."""
    save_atomically(os.path.join(args.out, "student.pt"), lambda file: save_student(student, file, step=step))
    run = {"step": step, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
    run |= {"corpus": corpus.fingerprint(), "left_out": left_out}
    save_atomically(os.path.join(args.out, "last.pt"), lambda file: torch.save(run, file), args.keep)


def log(args, metrics, seconds_left, board):
    """One line for a person, one in metrics.jsonl, and TensorBoard's scalars."""
    m, width = metrics, len(str(args.steps))
    print(
        f"step {m['step']:>{width}}/{args.steps}  loss {m['loss']:.4f}  L1 {m['l1']:.4f}  cosine {m['cosine']:.4f}"
        f"  lr {m['lr']:.2e}  {m['audio_per_second']:.3g} s of audio/s  {_time(seconds_left)} left",
        flush=True,
    )
    with open(os.path.join(args.out, "metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    if board:
        for name in metrics.keys() - {"step"}:
            board.add_scalar(name, metrics[name], metrics["step"])


def warn(left_out):
    """One line on stderr for each file that is left out, up to twenty; from rank 0 only."""
    if RANK == 0:
        for path, reason in list(left_out.items())[:20]:
            print(f"warning: left out {path}: {reason}", file=sys.stderr)
        if len(left_out) > 20:
            print(f"warning: left out {len(left_out) - 20} more files", file=sys.stderr)


def _time(seconds):
    days, seconds = divmod(round(seconds), 86400)
    return f"{f'{days} d ' if days else ''}{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def gather(value):
    """The values of all processes, in the order of their ranks."""
    if not DISTRIBUTED:
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def together(action, *arguments, only_rank_0=False):
    """action(*arguments) on every process; where it raises on any, all stop with that line."""
    result = problem = None
    try:
        if RANK == 0 or not only_rank_0:
            result = action(*arguments)
    except (OSError, ValueError) as error:
        problem = str(error)
    problem = next((p for p in gather(problem) if p), None)
    if problem:
        stop(problem)
    return result


def stop_not_finite(args, step, saved, loss, paths):
    """Ends the run on every process, naming the files of those whose own loss is not finite, else all of the batch."""
    finite = bool(torch.isfinite(loss))
    shares = gather((finite, paths))
    files = [path for share_finite, share in shares if not share_finite for path in share]
    what = "loss" if files else "gradient"
    files = files or [path for _, share in shares for path in share]
    kept = f"{args.out} is as saved after step {saved}" if saved else "nothing was saved yet"
    stop(f"step {step}: the {what} is not finite; files of the batch: {', '.join(files)}; {kept}")


def stop(message, code=2):
    """Ends the program with one line on stderr, from rank 0 only."""
    if RANK == 0:
        print(f"train.py: {message}", file=sys.stderr, flush=True)
    leave()
    sys.exit(code)


def watched(loader):
    """The loader's batches. Raises RuntimeError, as torch does, where one of its processes died, however that shows."""
    try:
        yield from loader
    except (OSError, EOFError) as error:  # memory that it shared went with it
        raise RuntimeError(f"DataLoader worker: {error or type(error).__name__}") from error


def join(backend):
    """The start of the process group."""
    env, store = os.environ, None
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun's store still holds the addresses of the processes before (pytorch issue 135712):
        # a part of it for each start. With several agents the count differs between them.
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)


def leave():
    """The end of the process group; every process comes here together."""
    if dist.is_initialized():
        # After the other collectives a barrier: gloo's threads may still hold their tensors, and a thread that lets
        # go of one while the interpreter ends aborts the process.
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------- the numbers of the recipe


def learning_rate(step, args):
    """Of step 1..steps: a linear rise over the first share, then a linear fall that reaches 0 after the last."""
    warmup = max(1, round(args.warmup * args.steps))
    return args.lr * min(step / warmup, (args.steps + 1 - step) / (args.steps + 1 - warmup))


def peak_memory(device):
    """Gigabytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------- the run


def main(arguments=None):
    args = parse(arguments)
    on_gpu = torch.cuda.is_available()
    if on_gpu and LOCAL_WORLD_SIZE > torch.cuda.device_count():
        if not args.demo:
            stop(f"{LOCAL_WORLD_SIZE} processes but {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        on_gpu = False  # the demo runs anywhere
    device = torch.device("cuda", LOCAL_RANK) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        reuse_memory()
        if LOCAL_WORLD_SIZE > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(max(1, _cores() // LOCAL_WORLD_SIZE))  # 1 is torchrun's default, on any machine
    if DISTRIBUTED:
        join("cpu:gloo,cuda:nccl" if on_gpu else "gloo")

    corpus, batches, teachers, student, run = together(prepare, args, device)
    done = run["step"] if run else 0
    if len(set(gather((corpus.fingerprint(), done)))) > 1:
        stop(
            f"the processes see different audio in {args.data}, or different saves in {args.out}; all must see the same"
        )
    precision = args.precision if args.precision != "auto" else "bf16" if native_bf16(device) else "fp32"
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-6)
    left_out = dict(corpus.left_out)
    if run:
        optimizer.load_state_dict(run["optimizer"])
        left_out.update(run["left_out"])
        del run
    if args.compile:
        for module in (*teachers, student):
            module.compile()
    model = student
    if DISTRIBUTED:
        model = DistributedDataParallel(student, [LOCAL_RANK] if on_gpu else None, gradient_as_bucket_view=True)
    targets_of = aggregate.AGGREGATIONS[args.agg]

    claim = together(start_files, args, student, done, only_rank_0=True)  # noqa: F841, let go when the run ends
    warn(corpus.left_out)
    board = None
    if RANK == 0:
        if args.tensorboard:
            board = torch.utils.tensorboard.SummaryWriter(args.out, purge_step=done + 1)
        weights = sum(parameter.numel() for parameter in student.parameters()) / 1e6
        on = f"{precision} on {WORLD_SIZE} x {device.type}"
        print(
            f"audio: {len(corpus):,} utterances, {corpus.hours():.2f} hours, {batches.steps_an_epoch:,} steps an epoch"
        )
        print(f"teachers: {', '.join(teacher_names(args.teachers))}; heads: {', '.join(student.head_names)}")
        print(f"student: {args.student_layers} layers, {weights:.2f} million weights with its heads; {on}")
        if args.demo:
            print("demo: synthetic speech, random teachers. It shows the machinery, not the quality of the method.")
        if done == args.steps:
            print(f"{args.out}: finished, {done} of {args.steps} steps; give --out another folder for another run")
        else:
            print(f"{args.out}: {f'resuming after step {done}' if done else f'{args.steps:,} steps to go'}", flush=True)

    asked = []  # signals that came: the step in hand is finished first, but a second Ctrl-C is not waited for

    def on_signal(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    student.train()
    saved, unreadable = done, {}
    # Since the last line of metrics: the heads' L1 and cosine summed over parts of steps, steps, samples, and when it was.
    terms, steps, samples, since = torch.zeros(2, len(student.heads), device=device), 0, 0, time.monotonic()
    loader = data.load_batches(batches, done, args.steps, args.workers, pin_memory=on_gpu)
    for step, batch in enumerate(watched(loader), start=done + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        # Dropout depends on seed, step and rank alone, so that a resume needs no state of a random generator.
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, RANK)).generate_state(1, np.uint64)[0]))
        readable = torch.tensor([path not in batch["left_out"] for path in batch["paths"]])
        waveforms = batch["waveforms"].to(device, non_blocking=True)

        step_loss = torch.zeros((), device=device)
        parts = zip(waveforms.chunk(args.accumulate), readable.chunk(args.accumulate))
        for part, (waves, good) in enumerate(parts, start=1):
            with torch.no_grad(), autocast():
                targets = targets_of([teacher(waves, layers=args.heads) for teacher in teachers])
            # Processes add up their gradients once a step, while its last part goes backward.
            with contextlib.nullcontext() if part == args.accumulate or not DISTRIBUTED else model.no_sync():
                with autocast():
                    predictions = model(waves)
                valid = None if good.all() else good[:, None].expand(predictions[0].shape[:2]).to(device)
                loss, l1, cosine = distillation_loss(predictions, targets, valid, args.cosine_weight)
                # An utterance left out weighs nothing, and the others what they weigh in a full batch.
                loss = loss * (float(good.float().mean()) / args.accumulate)
                loss.backward()
            step_loss += loss.detach()
            terms += torch.stack([l1, cosine])
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        unreadable.update(batch["left_out"])
        steps += 1
        samples += args.batch_size * waveforms.shape[1]

        # All processes go the same way: to the update, or out before it spoils a weight.
        finite = bool(torch.isfinite(step_loss) & torch.isfinite(norm))
        state = torch.tensor([not finite, max(asked, default=0)], dtype=torch.int64)
        if DISTRIBUTED:
            dist.all_reduce(state, dist.ReduceOp.MAX)
        if state[0]:
            stop_not_finite(args, step, saved, step_loss, batch["paths"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        interrupted = int(state[1])
        last = step == args.steps or interrupted

        if step == done + 1 or step % args.log_every == 0 or last:
            found, unreadable = functools.reduce(dict.__or__, gather(unreadable)), {}
            warn({path: reason for path, reason in found.items() if path not in left_out})
            left_out.update(found)
            lost = corpus.unreadable + len(left_out) - len(corpus.left_out)
            together(data.check_left_out, lost, len(corpus) + len(corpus.left_out), args.data)
            means = terms.cpu() / (steps * args.accumulate * WORLD_SIZE)
            if DISTRIBUTED:
                dist.all_reduce(means)
            l1, cosine = means.mean(dim=1).tolist()
            seconds, since = time.monotonic() - since, time.monotonic()
            metrics = {"step": step, "loss": l1 + args.cosine_weight * cosine, "l1": l1, "cosine": cosine}
            metrics |= {"lr": learning_rate(step, args), "audio_per_second": samples / data.SAMPLE_RATE / seconds}
            metrics |= {"gradient_norm": float(norm), "left_out": len(left_out)}
            for name, (head_l1, head_cosine) in zip(student.head_names, means.t().tolist()):
                metrics |= {f"l1/{name}": head_l1, f"cosine/{name}": head_cosine}
            together(log, args, metrics, (args.steps - step) * seconds / steps, board, only_rank_0=True)
            terms.zero_()
            steps = samples = 0

        if step % args.save_every == 0 or last:
            together(save_run, args, step, student, optimizer, corpus, left_out, only_rank_0=True)
            saved = step
        if interrupted:
            what = f"interrupted; step {step} of {args.steps} is saved in {args.out}, the same command resumes"
            stop(what, 128 + interrupted)

    for number, handler in before.items():
        signal.signal(number, handler)
    if RANK == 0 and done < args.steps:
        print(f"{args.out}/student.pt: the student; peak memory of a process {peak_memory(device):.1f} GB", flush=True)
    leave()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print(
            f"train.py: a process that reads audio died ({error}); the same command resumes",
            file=sys.stderr,
            flush=True,
        )
        # Not by stop: the other processes may be anywhere. They fail when this one is gone, and torchrun ends them.
        os._exit(1)
