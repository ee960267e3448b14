"""Time per step of train.py and per part of a step, with three Base teachers of random weights.

    python bench.py --cache
    python bench.py --agg concat --precision bf16
    python bench.py --student                        # a student beside a teacher, in use

Other flags go to train.py; audio, teachers and batch size are set here.
The first two steps of a run are not timed.
"""

import contextlib
import tempfile
import time
from unittest import mock

import numpy as np
import soundfile
import torch

import data
import manifest
import program
import train
from encoder import EncoderConfig, SpeechEncoder

TEACHERS = {"hubert-1": 0, "hubert-2": 0, "wavlm": 320}  # their relative position buckets
PARTS = {  # functions that train.distil() calls at every step
    "targets": [(train.Ensemble, "__call__"), (train.cache, "dequantize")],
    "forward": [(train.Student, "__call__")],
    "backward": [(torch.Tensor, "backward")],
    "optimizer": [(torch.optim.AdamW, "step")],
}
WARMUP = 2  # steps that are not timed


def load_teacher(name, device):
    config = EncoderConfig(relative_buckets=TEACHERS[name])
    return SpeechEncoder(config).to(device).eval().requires_grad_(False)


def write_audio(folder, seconds):
    """Writes one FLAC file of noise per length in seconds. Returns the Corpus."""
    rng = np.random.default_rng(0)
    for number, length in enumerate(seconds):
        noise = 0.1 * rng.standard_normal(int(length * data.SAMPLE_RATE))
        soundfile.write(f"{folder}/{number:03}.flac", noise, data.SAMPLE_RATE)
    return manifest.find_corpus(folder, ["."])


def timed(function, part, times):
    """Wraps a function: each call also appends (part, start, end), in seconds, to `times`."""

    def now():
        if torch.cuda.is_initialized():  # so that its work counts for the right part
            torch.cuda.synchronize()
        return time.perf_counter()

    def call(*args, **keywords):
        start = now()
        result = function(*args, **keywords)
        times.append((part, start, now()))
        return result

    return call


def time_steps(flags):
    """Runs train.py. Returns per timed step the seconds of each part, and of everything else."""
    times = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(train, "load_teacher", load_teacher))
        for part, functions in PARTS.items():
            for owner, name in functions:
                function = timed(getattr(owner, name), part, times)
                patches.enter_context(mock.patch.object(owner, name, function))
        train.main(flags)
    # A step lasts from the end of one optimizer step to the end of the next.
    ends = [end for part, _, end in times if part == "optimizer"][WARMUP - 1 :]
    steps = []
    for before, after in zip(ends, ends[1:]):
        inside = [(part, end - start) for part, start, end in times if before < end <= after]
        seconds = [sum(s for p, s in inside if p == part) for part in PARTS]
        steps.append([*seconds, after - before - sum(seconds)])
    return steps


def time_student(seconds=10, rounds=7):
    """Prints the time of the default student and of a Base teacher for an utterance."""
    teacher = load_teacher("hubert-1", program.find_device())
    student = train.Student(train.student_config(teacher.config), []).to(teacher.norm.weight).eval()
    networks, times = {"teacher": teacher, "student": student.encoder}, []
    waveform = 0.1 * torch.randn(1, seconds * data.SAMPLE_RATE).to(teacher.norm.weight)
    for _ in range(rounds):  # in turn, since a machine's speed varies
        for name, network in networks.items():
            with torch.no_grad():
                timed(network, name, times)(waveform)
    for name, network in networks.items():
        median = np.median([end - start for part, start, end in times if part == name])
        millions = sum(weight.numel() for weight in network.parameters()) / 1e6
        speed = f"{median / seconds:.3g} s per second of audio, {seconds} s at a time"
        print(f"{name}: {millions:.1f} million parameters, {speed}")


def main(arguments=None):
    program.init()
    with program.one_line_errors():
        parser = program.Parser(__doc__.split("\n")[0])
        add = parser.add_argument
        seconds = {"type": program.at_least_0, "nargs": "+", "default": [8, 7.6, 7.1, 6.5]}
        add("--seconds", **seconds, help="per utterance")
        add("--steps", type=program.count, default=5, help="timed steps per round")
        add("--cache", action="store_true", help="also time steps with cached targets")
        add("--student", action="store_true", help="time a student and a teacher in use instead")
        args, others = parser.parse_known_args(arguments)
        if args.student and others:
            raise ValueError(f"{others[0]}: --student takes no flags of train.py")
    if args.student:
        return time_student()
    flags = ["--teachers", ",".join(TEACHERS), "--splits", ".", "--max-seconds", "inf"]
    flags += ["--batch-size", str(len(args.seconds)), "--steps", str(WARMUP + args.steps)]
    kinds = ["step", "step with cached targets"] if args.cache else ["step"]
    measured = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        with program.one_line_errors():
            corpus = write_audio(folder, args.seconds)
        for number in range(2):  # interleaved, since a machine's speed varies
            for kind in kinds:
                cache = [] if kind == "step" else ["--cache", f"{folder}/targets"]
                place = ["--data", folder, "--out", f"{folder}/{number}{kind}"]
                measured[kind] += time_steps([*others, *flags, *cache, *place])
    _, crops, _ = data.TrainBatches(corpus, len(corpus)).plan(0)
    audio = len(corpus) * crops[0] / data.SAMPLE_RATE
    print(f"\n{', '.join(TEACHERS)}; {audio:.1f} s of audio per step")
    for kind, steps in measured.items():
        total = np.median(np.sum(steps, axis=1))
        print(f"{kind}: {total:.3g} s, {audio / total:.3g} s of audio/s; median of {len(steps)}:")
        for part, median in zip([*PARTS, "rest"], np.median(steps, axis=0)):
            print(f"  {part:10}{median:.3g} s")


if __name__ == "__main__":
    program.run(main)
