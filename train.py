"""Distil an ensemble of frozen speech teachers into one small student (arXiv:2302.12757).

    torchrun --nproc_per_node=4 train.py --agg avg --heads 4,8,12
    python train.py --demo

One file, read from top to bottom: settings, set-up, the loop. Running the same command again resumes the run.
"""

import processes
from processes import DISTRIBUTED, RANK, WORLD_SIZE

import argparse
import contextlib
import functools
import json
import os
import sys

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import aggregate
import data
import demo
from losses import distillation_loss
from report import Metrics, find_tensorboard, introduce
from safe_files import check_settings, claimed, newest_save, read_settings, write_text, write_whole
from states import Ensemble, digest_of, keep_targets, known_teachers
from student import Student, initialise, save_student, student_config
from teachers import check_frames, layers_of, load_teacher, short_names

# Settings that may change when a run is resumed: they change no weight beyond rounding, but for --accumulate, --compile
# and the number of processes, which draw other dropout. Audio and teachers are known by what they are, not by their paths.
FREE = {"out", "accumulate", "compile", "workers", "log_every", "save_every", "keep", "tensorboard", "data", "teachers"}
ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6, "fused": True}  # fused: it can be told on the device to change nothing


# ---------------------------------------------------------------- settings


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = processes.parser(__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--teachers", type=processes.names, default="hubert,robust_hubert,wavlm_plus", help="names or paths of checkpoints, with commas; the first shapes the student")
    add("--agg", choices=list(aggregate.AGGREGATIONS), default="avg", help="layerwise average, layerwise concatenation, or a head for each teacher and layer")
    add("--heads", type=processes.layers_of_each, default="4,8,12", help="teachers' layers to predict, counted from 1; 4,8,12/8,16,24 for each teacher its own")
    add("--student-layers", type=processes.count, default=2, help="Transformer layers of the student")
    add("--init", choices=["first", "none"], default="first", help="start from the first teacher's weights, or from random ones")
    add("--dropout", type=processes.below_one, default=0.1, help="dropout of the student, 0 to 1")
    add("--data", default="data/LibriSpeech", help="folder of audio, or a fairseq manifest (.tsv)")
    add("--splits", type=processes.names, default=",".join(data.LIBRISPEECH_960), help="sub-folders of --data, with commas; . is all of it")
    add("--out", help="folder of the run (default: runs/ and the aggregation, such as runs/avg)", default=argparse.SUPPRESS)
    add("--steps", type=processes.count, default=200_000, help="optimizer steps")
    add("--batch-size", type=processes.count, default=24, help="utterances a step, over all processes together")
    add("--accumulate", type=processes.count, default=1, help="parts that a process cuts its share of a step into, to save memory")
    add("--lr", type=processes.positive, default=2e-4, help="highest learning rate, of AdamW")
    add("--weight-decay", type=processes.not_negative, default=0.01, help="of AdamW; s3prl's is 0.01 in effect, whatever its file says")
    add("--warmup", type=processes.below_one, default=0.07, help="share of the steps that the learning rate rises; then it falls to 0")
    add("--clip", type=processes.positive, default=5.0, help="norm that gradients are clipped to")
    add("--cosine-weight", type=processes.not_negative, default=1.0, help="weight of the cosine loss beside L1")
    add("--max-seconds", type=processes.positive, default=15.625, help="longest crop of an utterance, in seconds (250,000 samples)")
    add("--cache", metavar="DIR", help="keep the teachers' targets in files there, or in `memory`, and run the teachers once; crops then begin at multiples of 320 samples")
    add("--cache-bits", type=int, choices=[16, 8], default=16, help="bits of a kept number; 8 take half the room, with a scale for each dimension and utterance")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto is bf16 where the device computes in it")
    add("--compile", action="store_true", help="torch.compile teachers and student")
    add("--workers", type=processes.whole, default=argparse.SUPPRESS, help="processes that read audio, for each training process (default: up to 4)")
    add("--seed", type=processes.seed, default=0, help="of the student's first weights, the data's order and dropout")
    add("--log-every", type=processes.count, default=100, help="steps between lines of metrics")
    add("--save-every", type=processes.count, default=1000, help="steps between saves")
    add("--keep", type=processes.count, default=2, help="saves that stay; where the last one is damaged, a resume takes the one before")
    add("--tensorboard", action="store_true", help="write TensorBoard scalars too (needs the package tensorboard)")
    add("--demo", action="store_true", help="synthetic speech and three tiny teachers trained on it: the whole method in two minutes")
    # fmt: on
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(data=demo.DATA, splits="train-clean-100", teachers=demo.teachers(), heads=[2, 3, 4])
        parser.set_defaults(steps=300, batch_size=16, lr=2e-3, max_seconds=1.6, log_every=20, save_every=100)
    args = parser.parse_args(arguments)
    if not hasattr(args, "out"):
        args.out = f"runs/{'demo-' if args.demo else ''}{args.agg}"
    if not hasattr(args, "workers"):
        args.workers = min(4, max(1, processes.cores() // processes.LOCAL_WORLD_SIZE))
    args.workers = processes.readers(args.workers)
    if args.max_seconds * data.SAMPLE_RATE < data.SHORTEST:
        processes.stop(f"argument --max-seconds: {args.max_seconds} is less than one frame, 0.025")
    if args.batch_size % (WORLD_SIZE * args.accumulate):
        parts = f"{WORLD_SIZE} processes and --accumulate {args.accumulate}"
        processes.stop(f"--batch-size {args.batch_size} does not divide over {parts}")
    return args


def learning_rate(step, args):
    """Of step 1..steps: a linear rise over the first share, then a linear fall that reaches 0 after the last."""
    warmup = max(1, round(args.warmup * args.steps))
    return args.lr * min(step / warmup, (args.steps + 1 - step) / (args.steps + 1 - warmup))


# ---------------------------------------------------------------- the run


def main(arguments=None):
    processes.begin()
    args = parse(arguments)
    device = processes.device(anywhere=args.demo)
    args.precision = processes.precision(args.precision, device)  # kept so: a resume on another device is told

    # Set-up. Bad input ends all processes with one line, before a file of the run is written.
    with processes.together():
        check_settings(args.out, read_settings(args.out), vars(args), FREE)
        if args.tensorboard:
            find_tensorboard()
        if args.demo:
            demo.prepare()
    with processes.together("--data, --splits"):
        corpus = data.find_corpus(args.data, args.splits)
    with processes.together(f"--batch-size {args.batch_size}"):
        longest = int(args.max_seconds * data.SAMPLE_RATE)
        batches = data.Batches(corpus, args.batch_size, longest, args.seed, RANK, WORLD_SIZE)
    with processes.together("--teachers"):
        names = short_names(args.teachers)
        teachers = known_teachers(args.cache, args.teachers, device)  # what is kept needs no teacher loaded
        teachers = teachers or [load_teacher(path, device) for path in args.teachers]
        check_frames(teachers, names)
    with processes.together("--heads"):
        layers = layers_of(args.heads, teachers, names)
    with processes.together(f"--agg {args.agg}"):
        heads = aggregate.heads(args.agg, layers, [(name, t.config.dim) for name, t in zip(names, teachers)])
    torch.manual_seed(args.seed)
    student = Student(student_config(teachers[0].config, args.student_layers, args.dropout), heads)
    if args.init == "first":
        with processes.together(f"--student-layers {args.student_layers} asks for --init none"):
            initialise(student, teachers[0])
    with processes.together():
        digests = dict(zip(names, map(digest_of, teachers)))
        run = load_run(args, corpus, student, digests)  # the newest save, its weights put into the student
    done = run["step"] if run else 0
    if len(set(processes.gather((corpus.fingerprint(), done)))) > 1:
        what = f"the processes see different audio in {args.data}, or different saves in {args.out}"
        processes.stop(f"{what}; all must see the same")

    student.to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=args.weight_decay, **ADAMW)
    left_out = dict(corpus.left_out)
    if run:
        optimizer.load_state_dict(run["optimizer"])
        optimizer.param_groups[0]["fused"] = True  # saves did not always say so
        left_out |= run["left_out"]
        del run
    if args.precision == "bf16":  # teachers never learn: their weights are rounded once, not at every step
        teachers = [teacher.to(torch.bfloat16) for teacher in teachers]
    if args.compile:
        processes.compile(*([] if args.cache else teachers), student)
    model = student
    if DISTRIBUTED:
        devices = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(student, devices, gradient_as_bucket_view=True)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16")
    targets_of, dims = aggregate.AGGREGATIONS[args.agg], [dim for _, dim in heads]

    with contextlib.ExitStack() as until_the_end:
        with processes.together():
            if RANK == 0:
                os.makedirs(args.out, exist_ok=True)
                until_the_end.enter_context(claimed(args.out))
                write_config(args, heads, done)
                if done and not os.path.exists(os.path.join(args.out, "student.pt")):
                    write_student(args, done, student, names)
            metrics = Metrics(args, student.head_names, done, corpus, left_out, device)
        until_the_end.callback(metrics.close)
        asked = until_the_end.enter_context(processes.signals())
        introduce(args, corpus, batches, names, student, f"{args.precision} on {WORLD_SIZE} x {device.type}", done)

        if args.cache and done < args.steps:
            made_of = [list(digests.values()), layers, args.agg, args.precision]
            batches = keep_targets(args, batches, Ensemble(teachers, layers, targets_of, dims, device), made_of, asked)
            teachers = None  # their memory is given back

        saved = done
        loader = data.load_batches(batches, done, args.steps, args.workers, pin_memory=device.type == "cuda")
        for step, batch in enumerate(loader, start=done + 1):
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
            processes.reseed(args.seed, step, RANK)  # dropout by these alone: a resume needs no generator's state
            waveforms = batch["waveforms"].to(device, non_blocking=True)
            step_loss, size = torch.zeros((), device=device), len(waveforms) // args.accumulate

            for begin in range(0, len(waveforms), size):
                part = slice(begin, begin + size)
                waves, readable = waveforms[part], batch["readable"][part]
                if args.cache:  # the teachers ran before
                    targets = batch["targets"][part].to(device, non_blocking=True).float().split(dims, dim=-1)
                else:
                    with torch.no_grad():
                        targets = targets_of([teacher(waves, layers=mine) for teacher, mine in zip(teachers, layers)])
                model.require_backward_grad_sync = begin + size == len(waveforms)  # DDP adds gradients up once a step
                with autocast():
                    predictions = model(waves)
                # An utterance that cannot be read weighs nothing, and the others what they weigh in a full batch.
                valid = None if readable.all() else readable[:, None].expand(predictions[0].shape[:2]).to(device)
                loss, l1, cosine = distillation_loss(predictions, targets, valid, args.cosine_weight)
                loss = loss * (float(readable.float().mean()) / args.accumulate)
                loss.backward()
                step_loss += loss.detach()
                metrics.add(l1, cosine)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
            metrics.count(batch)

            # From a loss or gradient on that is not finite on some process, no weight changes. The device knows; the host
            # asks it only where a line or a save is due, so that it never waits for a step.
            optimizer.found_inf = metrics.not_finite(step, step_loss, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            (interrupted,) = processes.agree(max(asked, default=0))  # all stop after the same step
            last = step == args.steps or interrupted
            line, save = step == done + 1 or step % args.log_every == 0 or last, step % args.save_every == 0 or last
            if line or save:
                metrics.stop_where_not_finite(saved, batches)
            if line:
                metrics.report(step, lr, norm)
            if save:
                save_run(args, step, student, optimizer, corpus, metrics.left_out, digests)
                saved = step
            if interrupted:
                what = f"interrupted; step {step} of {args.steps} is saved in {args.out}, the same command resumes"
                processes.stop(what, 128 + interrupted)

    if RANK == 0 and done < args.steps:
        memory = f"peak memory of a process {processes.peak_memory(device) / 1e9:.1f} GB"
        print(f"{args.out}/student.pt: the student; {memory}", flush=True)
        if args.demo:
            print("python evaluate_pr.py --demo: what it has learned, beside its teacher and untrained", flush=True)
    processes.end()


# ---------------------------------------------------------------- the folder of the run


def load_run(args, corpus, student, digests):
    """The newest whole save, its weights put into the student, or None.

    Raises ValueError where audio or teachers, digests by name, are not those it began with.
    """
    needed = ("step", "corpus", "optimizer", "left_out")
    run, warning = newest_save(
        args.out, lambda save: [student.load_state_dict(save["student"]), *map(save.get, needed)]
    )
    if run and run["corpus"] != corpus.fingerprint():
        what = f"the audio is not what it was up to step {run['step']}"
        raise ValueError(f"{args.out}: {what}; restore it, or give another --out")
    before = run.get("teachers", digests) if run else digests  # saves did not always hold them
    if list(before) != list(digests):
        what = f"--teachers were {', '.join(before)}, are {', '.join(digests)}"
        raise ValueError(f"{args.out}: {what}; take its own, or another --out")
    changed = [name for name in digests if before[name] != digests[name]]
    if changed:
        what = f"the weights of {', '.join(changed)} are not those that the run began with"
        raise ValueError(f"{args.out}: {what}; restore them, or give another --out")
    if warning:
        processes.warn(f"{warning}, step {run['step']}")
    return run


def save_run(args, step, student, optimizer, corpus, left_out, digests):
    """student.pt, the student alone, and then last.pt, everything a resume needs: a kill between loses neither."""
    run = {"step": step, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
    run |= {"corpus": corpus.fingerprint(), "teachers": digests, "left_out": left_out}
    with processes.together():
        if RANK == 0:
            write_student(args, step, student, list(digests))
            write_whole(os.path.join(args.out, "last.pt"), lambda file: torch.save(run, file), args.keep)


def write_student(args, step, student, teachers):
    about = {"step": step, "teachers": teachers, "agg": args.agg, "layers": args.heads}
    write_whole(os.path.join(args.out, "student.pt"), lambda file: save_student(student, file, **about))


def write_config(args, heads, done):
    """config.json of a run that has no save yet: its settings, heads and versions."""
    path = os.path.join(args.out, "config.json")
    if not done or not os.path.exists(path):
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
        config = {"settings": vars(args), "heads": [name for name, _ in heads], "processes": WORLD_SIZE}
        write_text(path, json.dumps(config | {"versions": versions}, indent=2))


if __name__ == "__main__":
    processes.run(main, less_memory="a larger --accumulate")
